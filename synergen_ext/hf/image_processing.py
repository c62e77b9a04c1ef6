"""Pictures to pixels as the model sees them, under transformers' image processor interface."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from ..processing.image_tokenizer import to_pixels
from ..processing.pictures import fit_on_white, load_picture, read_picture, upright_rgb

#: Most bytes that are read from a URL, and for how many seconds it may be silent.
MAX_DOWNLOAD = 64 * 2**20
_TIMEOUT = 20


class SynerGenVLImageProcessor(BaseImageProcessor):
    """Fits pictures into one size on white, with values in [-1, 1], as `Pipeline.fit` does.

    Args:
        size: ``{"height": pixels, "width": pixels}``.

    Raises:
        ValueError: another size.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: dict[str, int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        size = {"height": 512, "width": 512} if size is None else dict(size)
        if set(size) != {"height", "width"} or any(type(v) is not int or v < 1 for v in size.values()):
            raise ValueError(f"image processor: size must be {{'height': pixels, 'width': pixels}}, got {size!r}")
        self.size = size

    def preprocess(  # type: ignore[override]  # transformers' own is generic over its backends
        self, images: Any, return_tensors: str | None = None, allow_urls: bool = False
    ) -> BatchFeature:
        """``pixel_values`` float32 ``[N, 3, H, W]`` in [-1, 1].

        Args:
            images: one or a list (of lists) of: PIL picture, path, uint8 array or tensor ``[H, W]``, ``[H, W, C]`` or
                ``[C, H, W]`` with 1, 3 or 4 channels.
            return_tensors: as everywhere in transformers; default: numpy.
            allow_urls: fetch strings that begin with http:// or https://, of at most `MAX_DOWNLOAD` bytes.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a picture, or a URL without ``allow_urls``.
        """
        width, height = self.size["width"], self.size["height"]
        pages = [np.asarray(fit_on_white(open_picture(p, allow_urls), width, height)) for p in flat(images)]
        stacked = np.stack(pages) if pages else np.empty((0, height, width, 3), np.uint8)
        return BatchFeature({"pixel_values": to_pixels(stacked).numpy()}, tensor_type=return_tensors)


def flat(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from flat(image)
    else:
        yield images


def open_picture(source: Any, allow_urls: bool = False) -> Image.Image:
    """Any of what `SynerGenVLImageProcessor.preprocess` takes, as RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, or a URL without ``allow_urls``.
    """
    if isinstance(source, Image.Image):
        if min(source.size) < 1:
            raise ValueError(f"picture must have pixels, got {source.size[0]} x {source.size[1]}")
        return upright_rgb(source)
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError(f"picture {source} is a URL, which is fetched with allow_urls=True only")
        return _download(source)
    if isinstance(source, (str, Path)):
        return load_picture(source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(np.asarray(source))
    raise ValueError(f"picture must be a PIL image, a path or a uint8 array, got {type(source).__name__}")


def _from_array(array: np.ndarray) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"picture must be a uint8 array [H, W], [H, W, C] or [C, H, W] with C 1, 3 or 4, got {array.dtype} {shape}"
        )
    return upright_rgb(
        Image.fromarray(np.ascontiguousarray(array[..., 0] if channels == 1 and array.ndim == 3 else array))
    )


def _download(url: str) -> Image.Image:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:  # follows redirects to http(s) and ftp only
        data = answer.read(MAX_DOWNLOAD + 1)
    if len(data) > MAX_DOWNLOAD:
        raise ValueError(f"picture {url} must have at most {MAX_DOWNLOAD} bytes, got more")
    return read_picture(data, url)
