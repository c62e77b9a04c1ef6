"""SynerGen-VL: one autoregressive model that understands and paints pictures.

Importing the package does no work: a submodule is loaded when it is first used, and torch and the
kernels with it.
"""

import importlib
import pkgutil
from typing import Any

from ._version import __version__

__all__ = ["Engine", "__version__", "build_info"]


def _submodules() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}


def build_info() -> dict[str, Any]:
    """What the compiled module was built from and for; see `synergen_ext._build.build_info`."""
    from ._build import build_info

    return build_info()


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from .generation.engine import Engine

        return Engine
    if name in _submodules():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_submodules()})
