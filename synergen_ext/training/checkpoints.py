"""Resumable training state: one safetensors file, replaced in one step, so a half-written one is never seen."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class NotSaved(OSError):
    """A checkpoint could not be written: the disk is full, or worse. The one before it is whole."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to beside ``path``, which takes its place once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)  # gives a full disk its room back
        raise


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write ``tensors`` and ``meta`` (JSON values) to ``path``; the old file stays until the new one is whole.

    Raises:
        NotSaved: it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            save_file(
                {k: v.detach().contiguous().clone() for k, v in tensors.items()},
                str(temporary), {"meta": json.dumps(meta)},
            )  # fmt: skip
    except (OSError, SafetensorError) as e:
        kept = "the one before it is kept" if path.is_file() else "there is none before it"
        raise NotSaved(f"checkpoint: {path} could not be written ({e}); {kept}") from e


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_state`` wrote.

    Raises:
        ValueError: not such a file.
    """
    try:
        with safe_open(str(path), "pt") as f:
            meta = json.loads(f.metadata()["meta"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"training state: {path} cannot be read: {e}") from e
    return tensors, meta


def load_meta(path: Path) -> dict[str, Any]:
    """The ``meta`` of what ``save_state`` wrote, without its tensors.

    Raises:
        ValueError: not such a file.
    """
    try:
        with safe_open(str(path), "pt") as f:
            meta: dict[str, Any] = json.loads(f.metadata()["meta"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"training state: {path} cannot be read: {e}") from e
    return meta


def flatten_optimizers(optimizers: list[torch.optim.Optimizer], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Optimizer moments as ``optimizer.<moment>.<parameter>`` tensors; ``named`` are the trained parameters."""
    return {
        f"optimizer.{moment}.{name}": torch.as_tensor(value)
        for optimizer in optimizers
        for name, p in named.items()
        if p in optimizer.state
        for moment, value in optimizer.state[p].items()
    }


def restore_optimizers(
    optimizers: list[torch.optim.Optimizer], named: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Give every parameter of ``named`` the moments stored under its name, in whatever order groups hold them.

    Parameters that never had a gradient have none.

    Raises:
        ValueError: the state has moments of a parameter that is not trained.
    """
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in without_prefix("optimizer", tensors).items():
        moment, name = key.split(".", 1)
        moments.setdefault(name, {})[moment] = value
    if surplus := sorted(moments.keys() - named.keys()):
        raise ValueError(f"training state: it has optimizer moments of {surplus[0]}, which this stage does not train")
    names = {id(p): name for name, p in named.items()}
    for optimizer in optimizers:
        held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        state = {i: moments[name] for i, name in enumerate(held) if name in moments}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{k}": v for k, v in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "."
    return {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
