"""Which implementation the public functions call: the compiled kernels, the slow reference, or
PyTorch's own kernels (`eager`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from .._build import kernel_of, load
from . import eager, reference

_C = load()  # registers torch.ops.synergen

BACKENDS = ("native", "reference", "eager")
_current = "native"


def set_backend(name: str) -> None:
    """Choose the implementation for the whole process: "native", "reference" or "eager"."""
    global _current
    if name not in BACKENDS:
        raise ValueError(f"set_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    _current = name


def current_backend() -> str:
    """The implementation that the public functions call now: "native", "reference" or "eager"."""
    return _current


def substitute() -> ModuleType | None:
    """The module whose functions stand in for the kernels; None where the kernels are called."""
    return {"native": None, "reference": reference, "eager": eager}[_current]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation for a block of code, then go back to the one before."""
    before = _current
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def reference_on_cuda(op: str, function: Callable[..., Any]) -> None:
    """Run `function` for CUDA tensors where this build has no CUDA kernel of the op; `synergen doctor` lists such
    ops."""
    if kernel_of(op) in _C.cuda_kernels():
        return

    def run(*args: Any) -> Any:
        with torch.autocast("cuda", enabled=False):  # a kernel keeps its precision, and so does what stands in for it
            return function(*args)

    torch.library.impl(f"synergen::{op}", "CUDA")(run)


def no_second_derivative(op: str) -> None:
    """Refuse to differentiate a backward op, in one line, where torch would give wrong zeros or a
    warning."""

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(
            f"{op}: second derivatives are not implemented; compute them under synergen_ext.ops.backend('reference')"
        )

    torch.library.register_autograd(f"synergen::{op}_backward", refuse)
