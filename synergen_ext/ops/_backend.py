"""Which implementation the public functions call: the compiled kernels or the plain PyTorch reference."""

from collections.abc import Iterator
from contextlib import contextmanager

from .._build import load

load()  # registers torch.ops.synergen

BACKENDS = ("native", "reference")
_current = "native"


def set_backend(name: str) -> None:
    """Choose the implementation for the whole process: "native" or "reference"."""
    global _current
    if name not in BACKENDS:
        raise ValueError(f"set_backend: name must be 'native' or 'reference', got {name!r}")
    _current = name


def current_backend() -> str:
    return _current


def use_native() -> bool:
    return _current == "native"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation for a block of code, then go back to the one before."""
    before = _current
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)
