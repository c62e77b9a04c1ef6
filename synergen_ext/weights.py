"""Reading weight files that may come from anywhere: safetensors only, checked by name before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def read_weights(path: Path, wanted: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, exactly those that a model wants.

    Shapes are compared in the file's header, so a wrong file costs no memory.

    Args:
        path: the file.
        wanted: a model's state dict; its tensors may be on the meta device.
        what: what the weights belong to, for messages.

    Raises:
        ValueError: not a safetensors file, or a weight is missing, surplus, of another shape, or numbers where integers
            are wanted (or the reverse); the first one by name.
    """
    check_names(path, wanted, what)
    state = load_file(str(path))
    for name, value in state.items():
        if value.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"{what}: {name} must be {wanted[name].dtype}, got {value.dtype} in {path}")
    return state


def check_names(path: Path, wanted: Mapping[str, Tensor], what: str) -> None:
    """Refuse a safetensors file whose header has other names or shapes than ``wanted``, as `read_weights` does."""
    try:
        with safe_open(str(path), "pt") as f:
            found = {k: list(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise ValueError(f"{what}: {path} is not a safetensors file: {e}") from e
    shapes = {k: list(v.shape) for k, v in wanted.items()}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            ours, theirs = (s.get(name, "nothing") for s in (shapes, found))
            raise ValueError(f"{what}: {name} must be {ours}, got {theirs} in {path}")
