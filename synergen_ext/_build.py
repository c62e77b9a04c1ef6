"""Loads the compiled module and says what was built."""

import importlib
import re
from types import ModuleType
from typing import Any

TORCH_FLOOR = (2, 13)
REBUILD = "python setup.py build_ext --inplace"


def load() -> ModuleType:
    """The compiled module ``synergen_ext._C``; torch is imported first, because it links to torch's
    libraries.

    Raises:
        ImportError: torch is missing or older than 2.13, or ``_C`` was not built. One line, with
            the remedy.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            "synergen_ext needs torch >= 2.13, and there is none here; run `pip install 'torch>=2.13'`"
        ) from None
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < TORCH_FLOOR:
        raise ImportError(
            f"synergen_ext needs torch >= 2.13, got {torch.__version__}; run `pip install -U 'torch>=2.13'`"
        )
    try:
        return importlib.import_module("synergen_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "synergen_ext._C":
            raise
        raise ImportError(
            "synergen_ext._C is not built for this Python; run `pip install .` in the source"
            f" folder, or `{REBUILD}` to build it in place"
        ) from None
    except ImportError as error:
        raise ImportError(
            f"synergen_ext._C does not load ({error}); rebuild it with `pip install --force-reinstall --no-deps .`"
        ) from error


def kernel_of(op: str) -> str:
    """The kernel that an op calls: unfold_ids is fold_ids run backwards, expert_ffn_train keeps more."""
    return {"unfold_ids": "fold_ids", "expert_ffn_train": "expert_ffn"}.get(op, op)


def build_info() -> dict[str, Any]:
    """What the compiled module was built from and for.

    Returns:
        version, compiler, torch_built (the torch whose headers were used), torch_target (the oldest
        torch that can load the binary), cpu_isas (list), cuda (bool), nvcc (version or ""),
        cuda_archs (list, "ptx90" is PTX).
    """
    info = dict(load().build_info())
    info["cuda_archs"] = info["cuda_archs"].split()
    return info
