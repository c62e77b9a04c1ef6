"""Weighted draws from several sources: which sample is the n-th is a function of the seed and n."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from .order import mix, shuffled, uniform
from .sample import Source


@dataclass
class Part:
    """One source of a mixture and how far it has been read."""

    name: str
    source: Source
    weight: float
    count: int  # rows used: ``repeat_time`` below 1 takes a prefix
    draws: int = 0
    bad: Counter[str] = field(default_factory=Counter)

    @property
    def epoch(self) -> float:
        """Passes over the rows so far."""
        return self.draws / self.count


@dataclass(frozen=True)
class Draw:
    """Sample ``index`` of ``part``; ``number`` counts the draws of the mixture."""

    number: int
    part: Part
    index: int
    salt: int


class Mixture:
    """Draws sources by weight, and every source's rows in a new order on each pass.

    Raises:
        ValueError: no source, or a weight that is not above 0.
    """

    def __init__(self, parts: list[Part], seed: int) -> None:
        if not parts:
            raise ValueError("mixture: parts must hold at least one source, got none")
        for part in parts:
            if not 0 < part.weight < math.inf:
                raise ValueError(f"mixture: weight of {part.name!r} must be above 0, got {part.weight}")
        self.parts, self.seed, self.draws = parts, seed, 0
        self._until = list(accumulate(p.weight for p in parts))

    def draw(self) -> Draw:
        at = uniform(self.seed, 0, self.draws) * self._until[-1]
        which = next((i for i, until in enumerate(self._until) if at < until), len(self.parts) - 1)
        part = self.parts[which]
        epoch, position = divmod(part.draws, part.count)
        index = shuffled(position, part.count, mix(self.seed, 1, which, epoch))
        drawn = Draw(self.draws, part, index, mix(self.seed, 2, self.draws))
        self.draws += 1
        part.draws += 1
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """JSON values that `load_state_dict` takes."""
        parts = {p.name: {"draws": p.draws, "count": p.count, "bad": dict(p.bad)} for p in self.parts}
        return {"draws": self.draws, "sources": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: other sources, or a source with another number of rows: the order would be another.
        """
        names, kept = [p.name for p in self.parts], list(state["sources"])
        if sorted(names) != sorted(kept):
            raise ValueError(f"sources: the state to resume must be of {names}, got {kept}")
        for part in self.parts:
            held = state["sources"][part.name]
            if held["count"] != part.count:
                raise ValueError(f"sources: {part.name!r} must have {held['count']} rows to resume, got {part.count}")
            part.draws, part.bad = int(held["draws"]), Counter(held["bad"])
        self.draws = int(state["draws"])
