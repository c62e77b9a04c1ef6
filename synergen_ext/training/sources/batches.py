"""Batches from mixtures: order decided here, reading and decoding in threads, bad samples skipped in the open."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...processing.sequences import Example, SequenceBuilder
from ..data import ALL, Batch, collate, collate_packed
from ..world import World
from .mixture import Draw, Mixture
from .order import uniform
from .sample import BadSample, Sample
from .tokens import check_share

BAD_FILE = "bad_samples.jsonl"


@dataclass(frozen=True)
class Rules:
    """How samples become sequences, and how many may be bad; see ``SourcesRecipe``."""

    template: str
    max_tokens: int
    max_bad: float
    bad_after: int
    workers: int
    unconditional: float
    pack: int


class SourceBatches:
    """Draws a stage's batches from its mixtures, step after step.

    A bad sample is counted under its cause, listed in ``bad_samples.jsonl``, and the next draws of the mixture take
    the free places. Every process sees which draws were bad, so all of them stand at the same place, and one process
    gets the samples that several would share.

    Args:
        mixtures: by task, ``understand`` and ``generate``.
        encode: uint8 ``[H, W, 3]`` to ids ``[h, w]``; None where every picture is ids already.
        folder: where bad samples are listed, with the name of the ``stage``.
    """

    def __init__(
        self, builder: SequenceBuilder, mixtures: dict[str, Mixture], rules: Rules,
        encode: Callable[[NDArray[Any]], NDArray[Any]] | None, folder: Path, world: World, stage: str,
    ) -> None:  # fmt: skip
        self.builder, self.mixtures, self.rules, self.encode = builder, mixtures, rules, encode
        self.bad_file, self.world, self.stage = folder / BAD_FILE, world, stage
        self._threads: ThreadPoolExecutor | None = None
        self._trimmed = False

    # ---- what a stage asks for --------------------------------------------------------------------------------

    def paint(self, step: int, size: int, share: slice = ALL) -> Batch:
        """Generation: the next ``size`` captions and pictures; ``share`` chooses this process's part of them."""
        return self._batch("generate", size, share)

    def describe(self, step: int, size: int, questions_each: int = 3, share: slice = ALL) -> Batch:
        """Understanding: the next ``size`` conversations, whole ones whatever ``questions_each``."""
        return self._batch("understand", size, share)

    def text(self, step: int, size: int, questions_each: int = 3, share: slice = ALL) -> Batch:
        """Words only come from ``understand``; a recipe with sources is refused before this is called."""
        raise ValueError("sources: text must be 0, words only are rows of understand")

    def state_dict(self) -> dict[str, Any]:
        """Where every mixture and source stands, as JSON values."""
        return {task: mixture.state_dict() for task, mixture in self.mixtures.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the state is of other sources.
        """
        if sorted(state) != sorted(self.mixtures):
            raise ValueError(f"sources: the state to resume must be of {sorted(self.mixtures)}, got {sorted(state)}")
        for task, mixture in self.mixtures.items():
            mixture.load_state_dict(state[task])

    def summary(self) -> str:
        """What was drawn of every source, and what was bad, in a line each."""
        lines = []
        for task, mixture in self.mixtures.items():
            for part in mixture.parts:
                causes = "".join(f", {cause} {n}" for cause, n in part.bad.most_common())
                bad = f"{part.bad.total()} bad{causes}"
                lines.append(f"{task} {part.name}: {part.draws:,} draws, {part.epoch:.2f} passes, {bad}")
        return "\n".join(lines)

    # ---- drawing ----------------------------------------------------------------------------------------------

    def _batch(self, task: str, size: int, share: slice) -> Batch:
        if not self._trimmed:
            self._trim()
        mixture, mine = self.mixtures[task], set(range(size)[share])
        done: dict[int, tuple[Example, list[NDArray[Any]]]] = {}
        ids: dict[int, str] = {}
        places = list(range(size))
        while places:  # until every place has a good sample; `check_share` ends it where there are too few
            draws = {place: mixture.draw() for place in places}
            own = [place for place in places if place in mine]
            bad: list[tuple[int, str, str]] = []
            for place, loaded in zip(own, self._load([draws[p] for p in own]), strict=True):
                try:
                    done[place] = self._example(task, draws[place], loaded)
                    part = draws[place].part
                    ids[place] = f"{part.name} {part.source.where(draws[place].index)}"
                except BadSample as e:
                    bad.append((place, e.cause, e.detail))
            bad = sorted(self.world.gather(bad))
            self._count(task, draws, bad)
            places = [place for place, _, _ in bad]
        kept = [done[place] for place in sorted(done)]
        batch = self._collate([e for e, _ in kept], [pictures for _, pictures in kept], task == "generate")
        batch.ids = [ids[place] for place in sorted(ids)]
        return batch

    def _load(self, draws: list[Draw]) -> list[Sample | BadSample]:
        if self.rules.workers == 0 or len(draws) < 2:
            return [_read(d) for d in draws]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.rules.workers, "samples")
        return list(self._threads.map(_read, draws))

    def _example(self, task: str, draw: Draw, sample: Sample | BadSample) -> tuple[Example, list[NDArray[Any]]]:
        if isinstance(sample, BadSample):
            raise sample
        rules = self.rules
        try:
            if isinstance(sample.text, str):
                dropped = uniform(draw.salt, 1) < rules.unconditional
                example = self.builder.paint(None if dropped else sample.text)
            else:
                example = self.builder.conversation(sample.text, rules.template)
        except ValueError as e:  # half a surrogate pair
            raise BadSample("wrong row", str(e)) from e
        most = min(rules.max_tokens, rules.pack or rules.max_tokens)
        if len(example.ids) > most:
            raise BadSample("over-long", f"a sample must have at most {most} tokens, got {len(example.ids)}")
        return example, [p if p.dtype != np.uint8 else self._encode(p) for p in sample.pictures]

    def _encode(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """One picture at a time, so that its ids do not depend on what stands beside it."""
        if self.encode is None:
            raise ValueError("sources: a picture in pixels needs the image tokenizer, which this recipe does not have")
        return self.encode(pixels)

    def _collate(self, examples: list[Example], pictures: list[list[NDArray[Any]]], paint: bool) -> Batch:
        counts = [len(p) for p in pictures]
        ids = np.stack([i for p in pictures for i in p]) if any(counts) else None
        if self.rules.pack:
            return collate_packed(examples, ids, paint, self.rules.pack, counts)
        return collate(examples, ids, paint)

    # ---- bad samples ------------------------------------------------------------------------------------------

    def _count(self, task: str, draws: dict[int, Draw], bad: list[tuple[int, str, str]]) -> None:
        for place, cause, _ in bad:
            draws[place].part.bad[cause] += 1
        if bad and self.world.rank == 0:
            with open(self.bad_file, "a") as f:
                for place, cause, detail in bad:
                    draw = draws[place]
                    row = {
                        "stage": self.stage, "task": task, "draw": draw.number, "source": draw.part.name,
                        "where": draw.part.source.where(draw.index), "cause": cause, "detail": detail,
                    }  # fmt: skip
                    f.write(json.dumps(row) + "\n")
        for part in self.mixtures[task].parts:
            name = f"sources: {part.name!r}"
            check_share(name, str(self.bad_file), part.bad, part.draws, self.rules.max_bad, self.rules.bad_after)

    def _trim(self) -> None:
        """Take what this stage listed after the present position off the list: it is drawn again."""
        self._trimmed = True
        if self.world.rank or not self.bad_file.is_file():
            return
        whole = self.bad_file.with_suffix(".tmp")
        with open(self.bad_file) as old, open(whole, "w") as new:
            for line in old:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # half a line
                if row["stage"] != self.stage or row["draw"] < self.mixtures[row["task"]].draws:
                    new.write(line)
        os.replace(whole, self.bad_file)


def _read(draw: Draw) -> Sample | BadSample:
    try:
        return draw.part.source.read(draw.index, draw.salt)
    except BadSample as e:
        return e
