"""What ``synergen tokenize`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...processing.image_tokenizer import ImageTokenizer, to_pixels
from .build import Wanted, open_parts
from .recipe import FORMATS, SourceRecipe
from .tokens import write_tokens


def tokenize_source(
    path: str, form: str, root: str, task: str | None, image_tokenizer: str | Path, grid: tuple[int, int],
    out: str | Path, max_bad: float = 0.01, on_progress: Callable[[int, int], None] | None = None,
) -> Counter[str]:  # fmt: skip
    """Tokenise a data set's pictures to ``grid`` tokens each, into the new folder ``out``.

    Args:
        path, form, root: as a recipe's source has them; ``captions``, ``conversations`` or ``tar``.
        task: ``understand`` or ``generate``; None: the only one of the format.
        on_progress: called with samples done and samples in all.

    Returns:
        Samples left out, by cause.

    Raises:
        FileNotFoundError, ValueError: something is missing or wrong, or too many samples are bad.
    """
    forms = ("captions", "conversations", "tar")
    if form not in forms:
        raise ValueError(f"tokenize: format must be one of {', '.join(forms)}, got {form!r}")
    task = task or (FORMATS[form][0] if len(FORMATS[form]) == 1 else None)
    if task not in FORMATS[form]:
        raise ValueError(f"tokenize: task of {form} must be one of {', '.join(FORMATS[form])}, got {task!r}")
    tokenizer = ImageTokenizer.from_pretrained(image_tokenizer).eval()
    size = (grid[0] * tokenizer.stride, grid[1] * tokenizer.stride)
    wanted = Wanted(grid, tokenizer.codebook_size, size)
    [part] = open_parts(SourceRecipe("tokenize", form, path, root), task, wanted)
    encode = encoder(tokenizer)
    return write_tokens(part.source, task, encode, tokenizer.codebook_size, out, max_bad, on_sample=on_progress)


def encoder(tokenizer: ImageTokenizer) -> Callable[[NDArray[np.uint8]], NDArray[Any]]:
    """uint8 ``[H, W, 3]`` to int64 ids ``[h, w]``: one picture at a time, so that its ids depend on itself alone."""

    def encode(pixels: NDArray[np.uint8]) -> NDArray[Any]:
        ids: NDArray[Any] = tokenizer.encode(to_pixels(pixels[None].copy()))[0].numpy()
        return ids

    return encode
