"""The processes that train together: every one holds the model and works on its share of each step's rows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

#: How long a process waits for others that are silent before it takes them for lost.
PATIENCE = timedelta(minutes=30)


class LostProcess(RuntimeError):
    """Another process ended or fell silent in the middle of a step."""


@dataclass(frozen=True)
class World:
    """``size`` processes, of which this is number ``rank``. One process needs no group."""

    rank: int = 0
    size: int = 1
    #: Groups of their own: for waiting while one process works, and for checkpoints written beside the steps.
    patient: Any = field(default=None, compare=False, repr=False)
    saving: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def join(cls) -> World:
        """The world that ``torchrun`` describes in the environment; one process alone without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        # Others wait while the first process trains the image tokenizer, or paints samples.
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        return cls(dist.get_rank(), size, patient, dist.new_group(backend="gloo", timeout=PATIENCE))

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def first(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process, then in the others, which find its files."""
        if self.size == 1:
            return work()
        if self.rank:
            self.wait()
            return work()
        result = work()
        self.wait()
        return result

    def wait(self) -> None:
        """Until all processes are here, for as long as a day."""
        if self.size > 1:
            dist.barrier(self.patient)

    def agree(self, error: str) -> str:
        """The first process's trouble that there is, in all processes; "" where there is none."""
        return next((e for e in self.gather([error]) if e), "")

    def least(self, values: Iterable[int]) -> list[int]:
        """Minima over all processes."""
        low = torch.tensor(list(values), dtype=torch.int64)
        if self.size > 1:
            dist.all_reduce(low, dist.ReduceOp.MIN)
        return [int(v) for v in low]

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
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        dist.all_reduce(there, dist.ReduceOp.MAX)  # what no process used stays without a gradient, as in one alone
        parameters = [p for p, any_has in zip(parameters, there.tolist(), strict=True) if any_has]
        gradients: list[Tensor] = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([g.numel() for g in gradients])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)


@contextmanager
def losing(world: World, advice: str) -> Iterator[None]:
    """Turn what a collective says when another process is gone into one line.

    Raises:
        LostProcess: from the error that the communication library raised.
    """
    try:
        yield
    except RuntimeError as e:
        said = " ".join(str(e).split())
        if world.size == 1 or not re.search(r"gloo|nccl|connection (closed|reset)|timed? ?out", said, re.IGNORECASE):
            raise
        where = f"process {world.rank} of {world.size}"
        raise LostProcess(f"{where}: another process was lost ({said[-120:]}); {advice}") from e
