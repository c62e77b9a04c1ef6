"""Draws scenes: small vector drawings, tinted to a named colour, pasted on a white canvas.

The art is 16 drawings of Microsoft's Fluent Emoji (MIT, see ``art/LICENSE``). Tinting keeps what makes a
drawing recognisable: its luminance picks a point on a ramp dark -> colour -> white, so eyes stay dark and
highlights stay light in every colour.
"""

from __future__ import annotations

import functools
import io
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CANVAS = 96  # pixels a side
SPRITE = 40  # pixels a side of one object

#: Object names, in the order that fixes the held-out pairs of ``compose``.
OBJECTS = (
    "cat", "dog", "rabbit", "bear", "fish", "duck", "butterfly", "apple",
    "flower", "tree", "star", "car", "house", "umbrella", "teapot", "book",
)  # fmt: skip

#: sRGB of each colour word. Chosen far apart: the closest two (orange, yellow) differ by 87 in G.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 125, 20),
    "yellow": (246, 212, 26),
    "green": (36, 150, 62),
    "blue": (38, 84, 214),
    "purple": (128, 52, 180),
    "pink": (246, 130, 190),
    "brown": (122, 76, 40),
}


@functools.cache
def _raster(name: str, size: int) -> NDArray[np.float32]:
    """RGBA in [0, 1] of one untinted drawing, ``[size, size, 4]``."""
    try:
        import resvg_py
    except ImportError as e:  # pragma: no cover - depends on the environment
        raise ImportError("drawing scenes needs the package resvg-py: pip install 'synergen_ext[scenes]'") from e
    svg = resources.files(__package__).joinpath("art", f"{name}.svg").read_text()
    svg = svg.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    return (rgba / 255).astype(np.float32)


@functools.cache
def sprite(name: str, color: str, size: int = SPRITE) -> NDArray[np.float32]:
    """One tinted object on transparent ground: premultiplied RGBA in [0, 1], ``[size, size, 4]``."""
    if name not in OBJECTS:
        raise ValueError(f"sprite: name must be one of {', '.join(OBJECTS)}, got {name!r}")
    if color not in COLORS:
        raise ValueError(f"sprite: color must be one of {', '.join(COLORS)}, got {color!r}")
    rgba = _raster(name, size)
    alpha = rgba[..., 3:]
    luminance = (rgba[..., :3] * np.array([0.299, 0.587, 0.114], np.float32)).sum(-1, keepdims=True)
    median = np.median(luminance[rgba[..., 3] > 0.9])
    tint = np.array(COLORS[color], np.float32) / 255
    dark = tint * (0.12 + 0.88 * np.clip(luminance / median, 0, 1))
    light = tint + (1 - tint) * np.clip((luminance - median) / (1 - median + 1e-6), 0, 1)
    rgb = np.where(luminance < median, dark, light)
    return np.concatenate([rgb * alpha, alpha], -1).astype(np.float32)


def draw(objects: list[tuple[str, str, int, int]], canvas: int = CANVAS, size: int = SPRITE) -> NDArray[np.uint8]:
    """Paste ``(name, color, x, y)`` (top-left corner, pixels) on white: uint8 ``[canvas, canvas, 3]``."""
    image = np.ones((canvas, canvas, 3), np.float32)
    for name, color, x, y in objects:
        if not (0 <= x <= canvas - size and 0 <= y <= canvas - size):
            raise ValueError(
                f"draw: {name} must lie inside the canvas: x and y in [0, {canvas - size}], got ({x}, {y})"
            )
        patch = sprite(name, color, size)
        region = image[y : y + size, x : x + size]
        region *= 1 - patch[..., 3:]
        region += patch[..., :3]
    return (image * 255 + 0.5).astype(np.uint8)
