"""Batches of scenes: a cache of image token ids in one file, and sequences drawn from it by (seed, step)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model.modeling import IGNORE
from ..processing.image_tokenizer import ImageTokenizer, to_pixels
from ..processing.sequences import Example, SequenceBuilder
from ..processing.text import TextTokenizer
from ..scenes import CAPTION_INSTRUCTION, Scene, caption, questions, training_scene
from .checkpoints import replacing
from .packing import pack, plan_rows


@dataclass
class Batch:
    """Sequences and their pictures, one a row and padded on the right, or several where there are ``documents``;
    ``paint`` marks the pictures that carry the image loss."""

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T]
    image_ids: Tensor | None  # int64 [N, h, w]
    paint: Tensor | None  # bool [N]
    tokens: int  # positions that hold a token, padding left out
    samples: int
    documents: Tensor | None = None  # int64 [B, T], see SynerGenVL.forward
    ids: list[str] = field(default_factory=list)  # of the samples, for people: which they are


def train_text_tokenizer(seed: int, vocab_size: int, scenes: int = 4000) -> TextTokenizer:
    """BPE over the sentences of ``scenes`` scenes and the chat template."""

    def sentences() -> list[str]:
        out = ["user\n", "assistant\n", "Here is a random image ", ":"] * scenes
        for i in range(scenes):
            scene = training_scene(seed, i)
            out += [f"Generate an image of: {scene.request.prompt}", f"A picture shows {caption(scene)}."]
            out += [s for pair in questions(scene, np.random.default_rng([seed, 4, i])) for s in pair]
        return out

    return TextTokenizer.train(sentences(), vocab_size)


@torch.no_grad()
def tokenize_scenes(
    tokenizer: ImageTokenizer, scenes: list[Scene], on_batch: Callable[[int], None] | None = None
) -> NDArray[np.uint16]:
    """Image token ids of scenes, uint16 ``[N, h, w]``."""
    # In windows, many scenes at once share most of them (1,250 scenes/s on one core at 1024, 150 whole ones at 64).
    batch = 64 if tokenizer.window is None else 1024
    out = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        ids = tokenizer.encode(to_pixels(np.stack([s.image() for s in part])))
        out.append(ids.numpy().astype(np.uint16))
        if on_batch:
            on_batch(len(part))
    return np.concatenate(out)


class SceneCache:
    """Image token ids of the first ``count`` scenes of stream ``seed``, in one ``.npy`` file.

    A half-written cache is continued, not trusted: the number of finished scenes stands beside it.
    """

    def __init__(self, folder: Path, tokenizer: ImageTokenizer, seed: int, count: int) -> None:
        self.folder, self.tokenizer, self.seed, self.count = folder, tokenizer, seed, count
        weights = hashlib.sha256()
        for name, p in tokenizer.state_dict().items():
            if not name.startswith(("vq.decoder.", "vq.post_quant_conv.")):  # ids do not depend on these
                weights.update(p.contiguous().numpy().tobytes())
        self.path = folder / f"scenes-{seed}-{weights.hexdigest()[:12]}.npy"
        self.done_path = self.path.with_suffix(".json")

    def build(self, on_batch: Callable[[int], None] | None = None, chunk: int = 1024) -> NDArray[np.uint16]:
        """Tokenise what is missing; returns the ids, memory-mapped, uint16 ``[count, h, w]``."""
        side = self.tokenizer.encode(to_pixels(training_scene(self.seed, 0).image()[None])).shape[1:]
        # Written only behind a cache that is there in full length: a kill leaves the one without the other.
        done = json.loads(self.done_path.read_text())["done"] if self.done_path.is_file() else 0
        shape = (self.count, *side)
        self.folder.mkdir(parents=True, exist_ok=True)
        if done and self.path.is_file():
            ids = np.load(self.path, mmap_mode="r+")
            if len(ids) < self.count:  # a longer training: copy over, go on
                longer = np.zeros(shape, np.uint16)
                longer[: len(ids)] = ids
                whole = self.path.with_suffix(".tmp.npy")
                np.save(whole, longer)
                os.replace(whole, self.path)
                ids = np.load(self.path, mmap_mode="r+")
        else:
            ids = np.lib.format.open_memmap(self.path, mode="w+", dtype=np.uint16, shape=shape)
            done = 0
        for start in range(done, self.count, chunk):
            stop = min(start + chunk, self.count)
            part = [training_scene(self.seed, i) for i in range(start, stop)]
            ids[start:stop] = tokenize_scenes(self.tokenizer, part)
            ids.flush()
            with replacing(self.done_path) as temporary:
                temporary.write_text(json.dumps({"done": stop}))
            if on_batch:
                on_batch(stop - start)
        return ids[: self.count]


ALL = slice(None)


class Batches(Protocol):
    """What a stage draws from: `SceneBatches`, or `sources.batches.SourceBatches`."""

    def paint(self, step: int, size: int, share: slice = ALL) -> Batch: ...

    def describe(self, step: int, size: int, questions_each: int = 3, share: slice = ALL) -> Batch: ...

    def text(self, step: int, size: int, questions_each: int = 3, share: slice = ALL) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SceneBatches:
    """Draws batches from a scene cache. Step ``s`` is a function of ``(seed, s)``: resuming needs no state."""

    def __init__(
        self, builder: SequenceBuilder, ids: NDArray[np.uint16], scene_seed: int, seed: int, unconditional: float = 0.1,
        pack: int = 0,
    ) -> None:  # fmt: skip
        self.builder, self.ids, self.scene_seed, self.seed, self.unconditional, self.pack = (
            builder,
            ids,
            scene_seed,
            seed,
            unconditional,
            pack,
        )

    def state_dict(self) -> dict[str, Any]:
        return {}  # the step says it all

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _rng(self, step: int, task: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 5, task, step])

    def _pick(self, step: int, size: int, task: int) -> NDArray[np.int64]:
        """Scenes of one step: whole passes over the cache, each in its own order."""
        n = len(self.ids)
        where = np.arange(step * size, (step + 1) * size)
        orders = {
            int(e): np.random.default_rng([self.seed, 6, task, int(e)]).permutation(n) for e in np.unique(where // n)
        }
        return np.array([orders[int(w // n)][w % n] for w in where])

    def paint(self, step: int, size: int, share: slice = ALL) -> Batch:
        """Generation: caption to picture, the caption replaced with probability ``unconditional``.

        ``share`` chooses rows of the ``size`` of the step, here and in the other tasks: one process's part.
        """
        rng, picked = self._rng(step, 0), self._pick(step, size, 0)
        examples = []
        for i in picked:
            scene = training_scene(self.scene_seed, int(i))
            examples.append(self.builder.paint(None if rng.random() < self.unconditional else scene.request.prompt))
        return self._named(picked[share], self._collate(examples[share], self.ids[picked[share]], paint=True))

    def describe(self, step: int, size: int, questions_each: int = 3, share: slice = ALL) -> Batch:
        """Understanding: picture and questions to answers."""
        rng, picked = self._rng(step, 1), self._pick(step, size, 1)
        examples = []
        for i in picked:
            pairs = questions(training_scene(self.scene_seed, int(i)), rng)
            examples.append(self.builder.ask(pairs[:questions_each]))
        return self._named(picked[share], self._collate(examples[share], self.ids[picked[share]], paint=False))

    def text(self, step: int, size: int, questions_each: int = 3, share: slice = ALL) -> Batch:
        """Text only: a caption in words, then questions about it; loss on every word."""
        rng = self._rng(step, 2)
        examples, picked = [], rng.integers(0, 1 << 30, size)
        for i in picked:
            scene = training_scene(self.scene_seed, int(i))
            pairs = [p for p in questions(scene, rng) if p[0] != CAPTION_INSTRUCTION][:questions_each]
            first = (f"A picture shows {caption(scene)}. {pairs[0][0]}", pairs[0][1])
            examples.append(self.builder.ask([first, *pairs[1:]], pictures=0, learn_questions=True))
        return self._named(picked[share], self._collate(examples[share], None, paint=False))

    def _named(self, picked: NDArray[np.int64], batch: Batch) -> Batch:
        batch.ids = [f"scene {self.scene_seed}:{i}" for i in picked]
        return batch

    def _collate(self, examples: list[Example], image_ids: NDArray[np.uint16] | None, paint: bool) -> Batch:
        if self.pack:
            return collate_packed(examples, image_ids, paint, self.pack)
        return collate(examples, image_ids, paint)


def collate(examples: list[Example], image_ids: NDArray[Any] | None, paint: bool, multiple: int = 8) -> Batch:
    """Pad on the right to a multiple of ``multiple`` tokens (id 0, no loss)."""
    longest = max(len(e.ids) for e in examples)
    length = -(-longest // multiple) * multiple
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORE)
    for row, e in enumerate(examples):
        input_ids[row, : len(e.ids)] = torch.tensor(e.ids)
        labels[row, : len(e.labels)] = torch.tensor(e.labels)
    return _batch(examples, input_ids, labels, image_ids, paint)


def collate_packed(
    examples: list[Example],
    image_ids: NDArray[Any] | None,
    paint: bool,
    row: int,
    pictures: Sequence[int] | None = None,
) -> Batch:
    """Rows of ``row`` positions with as many whole examples as fit; ``pictures`` of each, default: one."""
    rows = plan_rows([len(e.ids) for e in examples], row)
    input_ids, labels, documents = pack(examples, rows, row)
    if image_ids is not None:
        ends = np.cumsum([1] * len(examples) if pictures is None else pictures)
        starts = [0, *ends[:-1]]
        image_ids = image_ids[[p for r in rows for i in r for p in range(starts[i], ends[i])]]  # in reading order
    return _batch(examples, input_ids, labels, image_ids, paint, documents)


def _batch(
    examples: list[Example], input_ids: Tensor, labels: Tensor, image_ids: NDArray[Any] | None, paint: bool,
    documents: Tensor | None = None,
) -> Batch:  # fmt: skip
    pictures = None if image_ids is None else torch.from_numpy(np.ascontiguousarray(image_ids).astype(np.int64))
    painted = None if pictures is None else torch.full((len(pictures),), paint)
    tokens = sum(len(e.ids) for e in examples)
    return Batch(input_ids, labels, pictures, painted, tokens, len(examples), documents)
