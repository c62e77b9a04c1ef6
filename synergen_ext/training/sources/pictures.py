"""Picture bytes to pixels of the model's size."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ...processing.pictures import fit_on_white, read_picture
from .order import mix
from .sample import BadSample


def fit(data: bytes, name: str, size: tuple[int, int], crop: bool, augment: int | None = None) -> NDArray[Any]:
    """A picture file as uint8 ``[height, width, 3]``.

    Args:
        size: pixels, ``(height, width)``.
        crop: cut the middle out (what is to be painted); otherwise the whole picture is laid on white (what is to be
            understood), as `Pipeline.fit` lays what is asked about.
        augment: a number that chooses a JPEG quality of 75 to 100 through which the picture goes, as InternVL's
            ``data_augment`` does; None: left as it is.

    Raises:
        BadSample: no picture, broken, or too large.
    """
    try:
        picture = read_picture(data, name)
    except ValueError as e:
        raise BadSample("broken picture", str(e)) from e
    if augment is not None:
        stored = io.BytesIO()
        picture.save(stored, "JPEG", quality=75 + mix(augment) % 26)
        picture = Image.open(stored, formats=("JPEG",)).convert("RGB")
    height, width = size
    if crop:
        return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))
    return np.asarray(fit_on_white(picture, width, height))
