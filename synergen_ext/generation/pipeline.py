"""The front end: words to pictures and pictures to words, with a checkpoint folder behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..model import SynerGenVL
from ..processing.image_tokenizer import ImageTokenizer, to_pixels, to_uint8
from ..processing.sequences import SequenceBuilder
from ..processing.text import TextTokenizer
from .oracle import Sampling, generate_image_ids, generate_text

MAX_PROMPT_TOKENS = 256
MAX_SEED = 2**63 - 1


def shipped_checkpoint() -> Path:
    """Folder of the checkpoint inside the package."""
    return Path(__file__).resolve().parent.parent / "checkpoints" / "demo"


class Pipeline:
    """A model with its tokenizers.

    >>> pipeline = Pipeline.from_pretrained()
    >>> picture = pipeline.paint("two red apples left of a blue car", seeds=7)[0]
    >>> pipeline.ask(picture, "How many apples are there?")
    'two'
    """

    def __init__(self, model: SynerGenVL, image_tokenizer: ImageTokenizer, text: TextTokenizer) -> None:
        if image_tokenizer.codebook_size != model.config.codebook_size:
            raise ValueError(
                f"image tokenizer has {image_tokenizer.codebook_size} codes, the model {model.config.codebook_size}"
            )
        self.model, self.image_tokenizer, self.text = model.eval(), image_tokenizer.eval(), text
        self.config = model.config
        self.builder = SequenceBuilder(model.config, text)

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Pipeline:
        """Load a checkpoint folder; None loads the one in the package.

        Args:
            dtype: of the model's weights in memory. float32 reproduces the measured scores.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file does not fit.
        """
        folder = shipped_checkpoint() if folder is None else Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"checkpoint: no folder {folder}")
        return cls(
            SynerGenVL.from_pretrained(folder, dtype),
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
    ) -> list[Image.Image]:  # fmt: skip
        """Paint one picture a prompt.

        Args:
            prompts: descriptions, without the instruction around them.
            seeds: one for all, or one a prompt. Same prompt, seed and settings: same picture, whatever the batch.
            guidance: scale s of ``l_u + s (l_c - l_u)``; 1 is off; default: the checkpoint's own.
            temperature, top_k, top_p: sampling of image tokens; default: the checkpoint's own.
            batch: pictures painted together.
            on_progress: called with (patches done, patches in all).

        Raises:
            ValueError: an empty or over-long prompt, or a setting out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"paint: seeds must be one or {len(prompts)}, got {len(seeds)}")
        for seed in seeds:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"paint: seed must be in [0, 2^63 - 1], got {seed}")
        if batch < 1:
            raise ValueError(f"paint: batch must be at least 1, got {batch}")
        c = self.config
        s = _number("guidance", c.guidance if guidance is None else guidance, 0, 50)
        sampling = Sampling(
            _number("temperature", c.image_temperature if temperature is None else temperature, 0, 10),
            int(_number("top_k", c.image_top_k if top_k is None else top_k, 0, c.codebook_size)),
            _number("top_p", c.image_top_p if top_p is None else top_p, 1e-6, 1),
        )
        rows = [self.builder.paint_prompt(self._checked(p, "prompt")) for p in prompts]
        unconditional = self.builder.paint_prompt(None)
        total, done = len(rows) * c.image_tokens, 0
        pictures: list[Image.Image] = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]

            def progress(patch: int, _: int, before: int = done, width: int = len(part)) -> None:
                if on_progress:
                    on_progress(before + patch * width, total)

            ids = generate_image_ids(
                self.model, part, unconditional, seeds[start : start + batch], s, sampling, on_patch=progress
            )
            done += len(part) * c.image_tokens
            pictures += [Image.fromarray(p) for p in to_uint8(self.image_tokenizer.decode(ids)).numpy()]
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
        images: list[Image.Image] = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
        asked = [questions] * len(images) if isinstance(questions, str) else list(questions)
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
            out = generate_text(self.model, rows[start:stop], ids, max_new_tokens, (self.text.im_end, self.text.eos))
            answers += [self.text.decode(o).strip() for o in out]
        return answers[0] if single and isinstance(questions, str) else answers

    def image_ids(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Image token ids ``[N, h, w]`` of pictures, each fitted into the model's size on white."""
        return self.image_tokenizer.encode(to_pixels(np.stack([np.asarray(self._fit(p)) for p in pictures])))

    def _fit(self, picture: Image.Image) -> Image.Image:
        if min(picture.size) < 1:
            raise ValueError(f"ask: a picture must have pixels, got {picture.size[0]} x {picture.size[1]}")
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            ground = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(ground, picture.convert("RGBA"))
        picture = picture.convert("RGB")
        if picture.size == self.picture_size:
            return picture
        return ImageOps.pad(picture, self.picture_size, Image.Resampling.BICUBIC, color="white")

    def _checked(self, text: str, what: str) -> str:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what} must not be empty")
        # Every token is at least one byte, so most over-long texts are refused before they are tokenised.
        length = len(text) if len(text) > 16 * MAX_PROMPT_TOKENS else len(self.text.encode(text))
        if length > MAX_PROMPT_TOKENS:
            raise ValueError(f"{what} must be at most {MAX_PROMPT_TOKENS} tokens, got {length}")
        return " ".join(text.split())


def _number(name: str, value: float, low: float, high: float) -> float:
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    return float(value)
