"""Figures of a training step that are not losses."""

from __future__ import annotations

import resource
import sys

import torch
from torch import nn

from .data import Batch
from .parallel import whole
from .recipe import PARTS
from .stages import part_of


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Length of the gradient of each part that has one, as ``gradient_norm_PART``; together the whole's, squared."""
    held: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
    for name, p in model.named_parameters():
        if p.grad is not None:
            held[part_of(name)].append(p.grad)
    return {f"gradient_norm_{part}": float(whole(torch.nn.utils.get_total_norm(g))) for part, g in held.items() if g}


def peak_memory() -> float:
    """Most bytes that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def pace(tasks: list[tuple[str, Batch]], processes: int, seconds: float, waited: float) -> dict[str, float]:
    """How fast a step went: ``seconds`` in all, of them ``waited`` for its data."""
    pictures = sum(0 if b.image_ids is None else len(b.image_ids) for _, b in tasks)
    return {
        "tokens_per_second": processes * sum(b.tokens for _, b in tasks) / seconds,
        "samples_per_second": processes * sum(b.samples for _, b in tasks) / seconds,
        "images_per_second": processes * pictures / seconds,
        "data_wait_seconds": waited,
        "memory_bytes": peak_memory(),
    }
