"""The processes that train together: every one holds the model and works on its share of each step's rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """``size`` processes, of which this is number ``rank``. One process needs no group."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> World:
        """The world that ``torchrun`` describes in the environment; one process alone without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            # Others wait while the first process trains the image tokenizer.
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        return cls(dist.get_rank(), size)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def first(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process, then in the others, which find its files."""
        if self.size == 1:
            return work()
        if self.rank:
            dist.barrier()
            return work()
        result = work()
        dist.barrier()
        return result

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over all processes."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return [float(v) for v in total]

    def gather(self, values: list[T]) -> list[T]:
        """The values of all processes, the first process's first."""
        if self.size == 1:
            return values
        parts: list[list[T]] = [[]] * self.size
        dist.all_gather_object(parts, values)
        return [v for part in parts for v in part]

    @torch.no_grad()
    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes (bit-identical in all of them)."""
        if self.size == 1:
            return
        gradients: list[Tensor] = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([g.numel() for g in gradients])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)
