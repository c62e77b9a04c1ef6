"""SynerGen-VL: one autoregressive model that understands and paints pictures.

Importing the package does no work: submodules are loaded when first used, and with them torch and the kernels.
"""

import importlib
from typing import Any

from ._version import __version__

_SUBMODULES = (
    "doctor",
    "evaluation",
    "generation",
    "integrations",
    "kernels",
    "model",
    "ops",
    "processing",
    "testing",
    "training",
)
_FUNCTIONS = {"build_info": "_build"}

__all__ = ["__version__", "build_info", *_SUBMODULES]  # noqa: F822 (resolved by __getattr__)


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
