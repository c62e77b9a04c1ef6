"""Sequence packing: several samples in one row, attention blocked by document, positions restarted."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.modeling import IGNORE
from ..processing.sequences import Example


def plan_rows(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Which samples share a row: best fit, longest first, so that the same lengths give the same rows.

    Args:
        lengths: tokens of each sample.
        row: positions of a row.

    Returns:
        Indices of samples, row by row; inside a row, and from row to row by their first, in rising order.

    Raises:
        ValueError: a sample is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (positions left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row:
            raise ValueError(f"pack: sample {i} must have at most {row} tokens, got {lengths[i]}")
        at = bisect_left(free, (lengths[i], -1))  # the row with the least room that is enough
        if at == len(free):
            rows.append([])
            free.append((row, len(rows) - 1))
        left, chosen = free.pop(at)
        rows[chosen].append(i)
        insort(free, (left - lengths[i], chosen))
    return sorted(sorted(r) for r in rows)


def pack(examples: Sequence[Example], rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples laid one after another, row by row as `plan_rows` says.

    Returns:
        input_ids: int64 ``[B, length]``; 0 after a row's last sample.
        labels: int64 ``[B, length]``; -100 there, and where a sample begins: nothing before it is its past.
        documents: int64 ``[B, length]``: 1, 2, ... for the samples of a row, 0 after the last.
    """
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE)
    documents = torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        at = 0
        for number, i in enumerate(row, start=1):
            example, end = examples[i], at + len(examples[i].ids)
            input_ids[b, at:end] = torch.tensor(example.ids, dtype=torch.long)
            labels[b, at:end] = torch.tensor(example.labels, dtype=torch.long)
            labels[b, at : at + 1] = IGNORE
            documents[b, at:end] = number
            at = end
    return input_ids, labels, documents
