"""The front end: words to pictures and pictures to words, with a checkpoint folder behind it."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..model import SynerGenVL
from ..processing.image_tokenizer import ImageTokenizer, to_pixels, to_uint8
from ..processing.pictures import fit_on_white, upright_rgb
from ..processing.sequences import SequenceBuilder
from ..processing.text import TextTokenizer
from . import oracle
from .engine import Engine
from .oracle import Sampling
from .packing import Formats

MAX_PROMPT_TOKENS = 256
MAX_SEED = 2**63 - 1


def shipped_checkpoint() -> Path:
    """Folder of the checkpoint inside the package."""
    return Path(__file__).resolve().parent.parent / "checkpoints" / "demo"


class Pipeline:
    """A model with its tokenizers: a `SynerGenVL`, which `oracle` runs step by step, or an `Engine`.

    >>> pipeline = Pipeline.from_pretrained()
    >>> picture = pipeline.paint("two red apples left of a blue car", seeds=7)[0]
    >>> pipeline.ask(picture, "How many apples are there?")
    'two'
    """

    def __init__(self, model: SynerGenVL | Engine, image_tokenizer: ImageTokenizer, text: TextTokenizer) -> None:
        if image_tokenizer.codebook_size != model.config.codebook_size:
            raise ValueError(
                f"image tokenizer has {image_tokenizer.codebook_size} codes, the model {model.config.codebook_size}"
            )
        self.model = model if isinstance(model, Engine) else model.eval()
        self.image_tokenizer, self.text = image_tokenizer.eval(), text
        self.config = model.config
        self.builder = SequenceBuilder(model.config, text)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path | None = None, dtype: torch.dtype = torch.float32,
        weights: Formats | str | None = None, packed: str | Path | None = None,
    ) -> Pipeline:  # fmt: skip
        """Load a checkpoint folder; None loads the one in the package.

        Args:
            dtype: of the model's weights in memory. float32 reproduces the measured scores.
            weights: load an `Engine`, which keeps matrices so: "float32", "bfloat16", "int8" or "int4", or by
                `Formats`. Without it, a `SynerGenVL` in ``dtype``.
            packed: the engine's file of packed weights, as in `Engine.from_pretrained`.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file does not fit.
        """
        folder = shipped_checkpoint() if folder is None else Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"checkpoint: no folder {folder}")
        if weights is None and packed is not None:
            raise ValueError("checkpoint: packed is a file of the engine, so weights must be given too")
        model: SynerGenVL | Engine = (
            SynerGenVL.from_pretrained(folder, dtype)
            if weights is None
            else Engine.from_pretrained(folder, weights, packed)
        )
        return cls(
            model,
            ImageTokenizer.from_pretrained(folder),
            TextTokenizer.load(folder),
        )

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of a picture in pixels."""
        h, w = self.config.image_grid
        return w * self.image_tokenizer.stride, h * self.image_tokenizer.stride

    def paint(
        self, prompts: str | Sequence[str], seeds: int | Sequence[int] = 0, guidance: float | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None, batch: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
        on_preview: Callable[[int, list[Image.Image]], object] | None = None, preview_every: int = 16,
    ) -> list[Image.Image]:  # fmt: skip
        """Paint one picture a prompt.

        Args:
            prompts: descriptions, without the instruction around them.
            seeds: one for all, or one a prompt. Same prompt, seed and settings: same image tokens, whatever the batch
                (float32 sums of another batch may round a pixel by 1/255).
            guidance: scale s of ``l_u + s (l_c - l_u)``; 1 is off; default: the checkpoint's own.
            temperature, top_k, top_p: sampling of image tokens; default: the checkpoint's own.
            batch: pictures painted together.
            on_progress: called with (patches done, patches in all).
            on_preview: called with (number of the first, pictures so far), white where nothing is painted yet, after
                every ``preview_every`` patches of the pictures that are painted together. With an `Engine` alone.

        Raises:
            ValueError: an empty or over-long prompt, or a setting out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        given = list(seeds) if isinstance(seeds, Iterable) else [seeds] * len(prompts)
        if len(given) != len(prompts):
            raise ValueError(f"paint: seeds must be one or {len(prompts)}, got {len(given)}")
        seeds = [_whole("seed", seed, 0, MAX_SEED, "in [0, 2^63 - 1]") for seed in given]
        batch = _whole("batch", batch, 1, MAX_SEED, "at least 1")
        preview_every = _whole("preview_every", preview_every, 1, MAX_SEED, "at least 1")
        if on_preview and not isinstance(self.model, Engine):
            raise ValueError("paint: previews need an engine: Pipeline.from_pretrained(weights=...)")
        c = self.config
        s = _number("guidance", c.guidance if guidance is None else guidance, 0, 50)
        sampling = Sampling(
            _number("temperature", c.image_temperature if temperature is None else temperature, 0, 10),
            _whole(
                "top_k", c.image_top_k if top_k is None else top_k, 0, c.codebook_size, f"in [0, {c.codebook_size}]"
            ),
            _number("top_p", c.image_top_p if top_p is None else top_p, 1e-6, 1),
        )
        rows = [self.builder.paint_prompt(self._checked(p, "prompt")) for p in prompts]
        unconditional = self.builder.paint_prompt(None)
        total = len(rows) * c.image_tokens
        pictures: list[Image.Image] = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]

            def progress(
                patch: int, _: int, ids: torch.Tensor | None = None, first: int = start, width: int = len(part)
            ) -> None:
                if on_progress:
                    on_progress(first * c.image_tokens + patch * width, total)
                if on_preview and ids is not None and patch % preview_every == 0 and patch < c.image_tokens:
                    on_preview(first, self._pictures(ids))

            ids = self._painted(part, unconditional, seeds[start : start + batch], s, sampling, progress)
            pictures += self._pictures(ids)
        return pictures

    def ask(
        self, pictures: Image.Image | Sequence[Image.Image], questions: str | Sequence[str],
        history: Sequence[tuple[str, str]] = (), max_new_tokens: int = 48, batch: int = 64,
    ) -> str | list[str]:  # fmt: skip
        """Answer a question about each picture (the likeliest words). One picture and one question give one string.

        Args:
            pictures: of any size; fitted into the model's size on white.
            questions: one for all pictures, or one a picture.
            history: earlier (question, answer) pairs about the same picture.

        Raises:
            ValueError: an empty or over-long question, or counts that do not match.
        """
        single = isinstance(pictures, Image.Image)
        max_new_tokens = _whole("max_new_tokens", max_new_tokens, 1, self.config.max_positions, "at least 1")
        batch = _whole("batch", batch, 1, MAX_SEED, "at least 1")
        images = [pictures] if isinstance(pictures, (Image.Image, str, Path)) else list(pictures)
        asked = list(questions) if isinstance(questions, (list, tuple)) else [questions] * len(images)
        if single and not isinstance(questions, str):
            images = images * len(asked)
        if len(asked) != len(images):
            raise ValueError(f"ask: questions must be one or {len(images)}, got {len(asked)}")
        for question, answer in history:
            self._checked(question, "question")
            self._checked(answer, "answer")
        rows = [self.builder.ask_prompt(self._checked(q, "question"), history=history) for q in asked]
        longest = max(map(len, rows), default=0) + max_new_tokens
        if longest > self.config.max_positions:
            raise ValueError(f"ask: the conversation must fit {self.config.max_positions} tokens, got {longest}")
        answers: list[str] = []
        for start in range(0, len(rows), batch):
            stop = start + batch
            ids = self.image_ids(images[start:stop])
            out = self._words(rows[start:stop], ids, max_new_tokens, (self.text.im_end, self.text.eos))
            answers += [self.text.decode(o).strip() for o in out]
        return answers[0] if single and isinstance(questions, str) else answers

    def _painted(
        self, prompts: list[list[int]], unconditional: list[int], seeds: list[int], guidance: float,
        sampling: Sampling, on_patch: Callable[..., None],
    ) -> torch.Tensor:  # fmt: skip
        if isinstance(self.model, Engine):
            return self.model.generate_image_ids(prompts, unconditional, seeds, guidance, sampling, on_patch=on_patch)
        return oracle.generate_image_ids(
            self.model, prompts, unconditional, seeds, guidance, sampling, on_patch=on_patch
        )

    def _words(
        self, prompts: list[list[int]], image_ids: torch.Tensor, max_new_tokens: int, stop_ids: tuple[int, ...]
    ) -> list[list[int]]:
        if isinstance(self.model, Engine):
            return self.model.generate_text(prompts, image_ids, max_new_tokens, stop_ids)
        return oracle.generate_text(self.model, prompts, image_ids, max_new_tokens, stop_ids)

    def _pictures(self, ids: torch.Tensor) -> list[Image.Image]:
        """Of ids ``[N, h, w]``; white where they are -1."""
        pixels = to_uint8(self.image_tokenizer.decode(ids.clamp_min(0)))
        stride = self.image_tokenizer.stride
        blank = (ids < 0).repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        return [Image.fromarray(p) for p in pixels.masked_fill(blank[..., None], 255).numpy()]

    def image_ids(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Image token ids ``[N, h, w]`` of pictures, each fitted into the model's size on white."""
        return self.image_tokenizer.encode(to_pixels(np.stack([np.asarray(self.fit(p)) for p in pictures])))

    def fit(self, picture: Image.Image) -> Image.Image:
        """A picture of any size and mode as the model sees it: RGB, fitted into ``picture_size`` on white.

        Raises:
            ValueError: not a PIL image, or one without pixels.
        """
        if not isinstance(picture, Image.Image):
            raise ValueError(f"ask: pictures must be PIL images, got {picture!r:.60}")
        if min(picture.size) < 1:
            raise ValueError(f"ask: a picture must have pixels, got {picture.size[0]} x {picture.size[1]}")
        return fit_on_white(upright_rgb(picture), *self.picture_size)

    def _checked(self, text: Any, what: str) -> str:
        """One prompt, question or answer with its white space folded."""
        if not isinstance(text, str):
            raise ValueError(f"{what} must be text, got {text!r}")
        text = " ".join(text.split())
        if not text:
            raise ValueError(f"{what} must not be empty")
        # A token of English is about four letters, so most over-long texts are refused before they are tokenised.
        length = len(text) if len(text) > 16 * MAX_PROMPT_TOKENS else len(self.text.encode(text))
        if length > MAX_PROMPT_TOKENS:
            raise ValueError(f"{what} must be at most {MAX_PROMPT_TOKENS} tokens, got {length}")
        return text


def _number(name: str, value: float, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high:  # so NaN is refused too
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    return float(value)


def _whole(name: str, value: int, low: int, high: int, shown: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {shown}, got {value}")
    return int(value)
