"""The ops of the model as differentiable torch functions.

Each goes to the compiled kernel (``synergen::<op>``), or to its slow twin in `reference` when that
backend is chosen:

    >>> from synergen_ext import ops
    >>> with ops.backend("reference"):
    ...     y = ops.rms_norm(x, weight)
"""

import sys
from types import ModuleType

from . import reference
from ._backend import backend, current_backend, set_backend
from .expert_ffn import expert_ffn
from .fold_tokens import fold_ids, fold_tokens, unfold_ids
from .rms_norm import rms_norm
from .rope import rope
from .sample_tokens import sample_tokens

__all__ = [
    "active",
    "backend",
    "current_backend",
    "expert_ffn",
    "fold_ids",
    "fold_tokens",
    "reference",
    "rms_norm",
    "rope",
    "sample_tokens",
    "set_backend",
    "unfold_ids",
]


def active() -> ModuleType:
    """The module whose ops the model calls: this one, or `eager` (PyTorch's own kernels) when that
    backend is chosen."""
    if current_backend() == "eager":
        from . import eager

        return eager
    return sys.modules[__name__]
