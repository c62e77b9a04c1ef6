"""Bad steps: losses or gradients that are not finite or exploded, found before they reach the weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .data import Batch
from .recipe import GuardRecipe
from .world import World

BAD_STEPS_FILE = "bad_steps.jsonl"
#: Weight of the past in the means that `explode` compares with: half of it is of the last 34 steps.
_KEEP = 0.98


class BadStep(FloatingPointError):
    """A step that must not reach the weights; they are as before it."""


class Guard:
    """Judges each step by what all processes agree on; where `explode` asks for it, by the means of the good ones."""

    def __init__(self, recipe: GuardRecipe, out: Path, world: World) -> None:
        self.recipe, self.out, self.world = recipe, out, world
        self.steps = self.skipped = 0
        self.means: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "skipped": self.skipped, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.skipped, self.means = int(state["steps"]), int(state["skipped"]), dict(state["means"])

    def judge(self, losses: dict[str, float], norm: float) -> None:
        """
        Raises:
            BadStep: a loss or the gradient norm is bad, by name.
        """
        figures = {**losses, "gradient_norm": norm}
        why = _not_finite(losses, norm)
        if not why and self.recipe.explode and self.steps >= self.recipe.after:
            for name, value in figures.items():
                most = self.recipe.explode * self.means.get(name, math.inf)
                if value > most > 0:
                    why = f"{name} exploded: {value:.6g}, at most {most:.6g} ({self.recipe.explode:g} times its mean)"
                    break
        if self.world.sum([bool(why)])[0]:
            raise BadStep(self.world.agree(why))
        for name, value in figures.items() if self.recipe.explode else ():
            self.means[name] = _KEEP * self.means.get(name, value) + (1 - _KEEP) * value
        self.steps, self.skipped = self.steps + 1, 0

    def bad(self, stage: str, step: int, why: BadStep, tasks: list[tuple[str, Batch]]) -> None:
        """List the step with the samples of all processes; returns if the run may go on without it.

        Raises:
            BadStep: the policy is to stop, or too many were skipped in a row.
        """
        samples = {name: self.world.gather(batch.ids) for name, batch in tasks}
        path = self.out / BAD_STEPS_FILE
        if self.world.rank == 0:
            with open(path, "a") as f:
                f.write(json.dumps({"stage": stage, "step": step, "why": str(why), "samples": samples}) + "\n")
        self.skipped += 1
        said = f"stage {stage!r}: step {step}: {why}; its samples are listed in {path}"
        if self.recipe.policy == "stop":
            raise BadStep(said) from why
        if self.skipped > self.recipe.max_skips:
            raise BadStep(f"{said}; guard.max_skips allows {self.recipe.max_skips} in a row") from why
        if self.world.rank == 0:
            print(f"{said}; skipped")


def _not_finite(losses: dict[str, float], norm: float) -> str:
    return "" if all(map(math.isfinite, (norm, *losses.values()))) else f"losses {losses}, gradient norm {norm}"


def finite(losses: dict[str, float], norm: float) -> None:
    """What is asked of a step that no guard watches.

    Raises:
        BadStep: a loss or the gradient norm is not finite.
    """
    if why := _not_finite(losses, norm):
        raise BadStep(why)
