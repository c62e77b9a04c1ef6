"""Gradient accumulation: a step's rows in parts, whose gradients add up to those of the whole."""

from __future__ import annotations

import torch

from ..model import SynerGenConfig
from .data import Batch
from .world import World


def split(batch: Batch, parts: int, config: SynerGenConfig) -> list[Batch]:
    """A batch's rows in ``parts`` pieces in order, each with its own pictures.

    Raises:
        ValueError: there are fewer rows than parts.
    """
    rows = len(batch.input_ids)
    if not 1 <= parts <= rows:
        raise ValueError(f"split: parts must be in [1, {rows}], got {parts}")
    if parts == 1:
        return [batch]
    pieces = [list(torch.tensor_split(t, parts)) for t in (batch.input_ids, batch.labels)]
    documents = [None] * parts if batch.documents is None else list(torch.tensor_split(batch.documents, parts))
    out, first = [], 0
    for ids, labels, document in zip(*pieces, documents, strict=True):
        pictures = paint = None
        if batch.image_ids is not None and batch.paint is not None:
            each = config.folded_length(*batch.image_ids.shape[1:])
            last = first + int((ids == config.image_id).sum()) // each
            pictures, paint = batch.image_ids[first:last], batch.paint[first:last]
            first = last
        out.append(Batch(ids, labels, pictures, paint, batch.tokens, batch.samples, document))
    return out


def accumulate(
    tasks: list[tuple[str, Batch]], parts: int, config: SynerGenConfig, world: World
) -> list[tuple[str, Batch]]:
    """Every task's batch in ``parts`` pieces, or in fewer where some process packed its samples into fewer rows.

    All processes get the same number, for they go through the layers together.
    """
    if parts == 1:
        return tasks
    counts = world.least(min(parts, len(batch.input_ids)) for _, batch in tasks)
    return [(name, b) for (name, batch), n in zip(tasks, counts, strict=True) for b in split(batch, n, config)]
