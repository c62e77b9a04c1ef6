"""Is the scorer fit to judge? True scenes must be read without a fault, wrong shapes must not pass for objects."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ..scenes.compose import Item, Scene, exam_scene
from ..scenes.render import CANVAS, COLORS, OBJECTS, SPRITE, sprite
from .scorer import Detection, read_pictures

if TYPE_CHECKING:
    from ..processing.image_tokenizer import ImageTokenizer

Picture = NDArray[np.uint8]
Rng = np.random.Generator

#: Largest distance in pixels, along each axis, at which an object counts as read in its place.
PLACE_TOLERANCE = 3
_COLOR_NAMES = tuple(COLORS)
_CELL = 8
_CELLS = SPRITE // _CELL


# ---- true scenes ----------------------------------------------------------------------------


def compare(items: Sequence[Item], read: Sequence[Detection]) -> dict[str, bool]:
    """Which parts of a reading are right: ``object`` (names), ``count``, ``color``, ``position``, ``all``."""
    names = sorted(i.name for i in items)
    found = sorted(d.name for d in read)
    colors = sorted((i.name, i.color) for i in items)
    found_colors = sorted((d.name, d.color or "") for d in read)
    left = list(read)
    for item in items:
        near = [
            d
            for d in left
            if d.name == item.name
            and abs(d.corner[0] - item.x) <= PLACE_TOLERANCE
            and abs(d.corner[1] - item.y) <= PLACE_TOLERANCE
        ]
        if near:
            left.remove(near[0])
    right = {
        "object": set(names) == set(found),
        "count": names == found,
        "color": colors == found_colors,
        "position": not left and len(read) == len(items),
    }
    return {**right, "all": all(right.values())}


def read_exactly(scenes: Sequence[Scene], pictures: NDArray[np.uint8]) -> list[bool]:
    """Whether each picture reads as its scene: names, colours, counts and places."""
    return [compare(s.items, r)["all"] for s, r in zip(scenes, read_pictures(pictures), strict=True)]


def blurred(picture: Picture, rng: Rng) -> Picture:
    radius = float(rng.uniform(0.3, 1.2))
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def noisy(picture: Picture, rng: Rng) -> Picture:
    return np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


def tinted(picture: Picture, rng: Rng) -> Picture:
    """Ink of each channel off by up to 15 %."""
    ink = (255 - picture.astype(np.float32)) * (1 + rng.uniform(-0.15, 0.15, 3))
    return np.clip(255 - ink, 0, 255).astype(np.uint8)


def compressed(picture: Picture, rng: Rng) -> Picture:
    """JPEG of quality 50-80."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=int(rng.integers(50, 81)))
    return np.asarray(Image.open(buffer))


def worn(picture: Picture, rng: Rng) -> Picture:
    """All four at once."""
    return compressed(noisy(blurred(tinted(picture, rng), rng), rng), rng)


WEAR: dict[str, Callable[[Picture, Rng], Picture]] = {
    "blurred": blurred,
    "noisy": noisy,
    "tinted": tinted,
    "compressed": compressed,
    "worn": worn,
}


# ---- shapes that are no objects -------------------------------------------------------------


def _patch(rng: Rng, name: int | None = None, color: int | None = None) -> NDArray[np.float32]:
    n = int(rng.integers(len(OBJECTS))) if name is None else name
    c = int(rng.integers(len(_COLOR_NAMES))) if color is None else color
    rgba = sprite(OBJECTS[n], _COLOR_NAMES[c])
    return rgba[..., :3] + 1 - rgba[..., 3:]


def _on_canvas(patch: NDArray[Any], rng: Rng) -> Picture:
    picture = np.ones((CANVAS, CANVAS, 3))
    x, y = _CELL * rng.integers(0, (CANVAS - SPRITE) // _CELL + 1, 2)
    picture[y : y + SPRITE, x : x + SPRITE] = patch
    return (picture * 255 + 0.5).astype(np.uint8)


def half_object(rng: Rng) -> Picture:
    patch, keep = _patch(rng), SPRITE // 2
    axis, side = (int(v) for v in rng.integers(0, 2, 2))
    patch = patch.swapaxes(0, axis)
    patch[keep * side : keep * (side + 1)] = 1
    patch = patch.swapaxes(0, axis)
    return _on_canvas(patch, rng)


def mixture(rng: Rng) -> Picture:
    """Two objects of one colour, cut and joined."""
    a, b = (int(i) for i in rng.permutation(len(OBJECTS))[:2])
    color, cut = int(rng.integers(len(_COLOR_NAMES))), _CELL * int(rng.integers(2, 4))
    patch, other = _patch(rng, a, color), _patch(rng, b, color)
    part = np.s_[cut:] if rng.random() < 0.5 else np.s_[:, cut:]
    patch[part] = other[part]
    return _on_canvas(patch, rng)


def scrambled(rng: Rng) -> Picture:
    """An object's 8 x 8 cells in another order."""
    cells = _patch(rng).reshape(_CELLS, _CELL, _CELLS, _CELL, 3).swapaxes(1, 2)
    cells = rng.permutation(cells.reshape(-1, _CELL, _CELL, 3)).reshape(cells.shape)
    return _on_canvas(cells.swapaxes(1, 2).reshape(SPRITE, SPRITE, 3), rng)


def patchwork(rng: Rng) -> Picture:
    """Each 8 x 8 cell from another object, all of one colour, each at its own place."""
    color, patch = int(rng.integers(len(_COLOR_NAMES))), np.ones((SPRITE, SPRITE, 3))
    for y in range(0, SPRITE, _CELL):
        for x in range(0, SPRITE, _CELL):
            cell = np.s_[y : y + _CELL, x : x + _CELL]
            patch[cell] = _patch(rng, None, color)[cell]
    return _on_canvas(patch, rng)


def smear(rng: Rng) -> Picture:
    """Brush strokes in one of the colours."""
    image = Image.new("RGB", (CANVAS, CANVAS), "white")
    pen = ImageDraw.Draw(image)
    color = np.array(COLORS[_COLOR_NAMES[int(rng.integers(len(_COLOR_NAMES)))]])
    x, y = (int(v) for v in rng.integers(10, CANVAS - 10, 2))
    for _ in range(int(rng.integers(3, 9))):
        to_x, to_y = (int(np.clip(v + rng.integers(-20, 21), 4, CANVAS - 4)) for v in (x, y))
        width = int(rng.integers(4, 18))
        ink = tuple(int(v) for v in np.clip(color * rng.uniform(0.6, 1.1), 0, 255))
        pen.line((x, y, to_x, to_y), fill=ink, width=width)
        r = width / 2
        pen.ellipse((to_x - r, to_y - r, to_x + r, to_y + r), fill=ink)
        x, y = to_x, to_y
    return np.asarray(image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2)))))


def blob(rng: Rng) -> Picture:
    """A plain ellipse or rectangle of an object's size."""
    image = Image.new("RGB", (CANVAS, CANVAS), "white")
    pen = ImageDraw.Draw(image)
    x, y = (int(v) for v in _CELL * rng.integers(0, 8, 2) + SPRITE // 2)
    w, h = (int(v) for v in rng.integers(12, 19, 2))
    shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
    shape((x - w, y - h, x + w, y + h), fill=COLORS[_COLOR_NAMES[int(rng.integers(len(COLORS)))]])
    return np.asarray(image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.5)))))


NO_OBJECTS: dict[str, Callable[[Rng], Picture]] = {
    "half_object": half_object,
    "mixture": mixture,
    "scrambled": scrambled,
    "patchwork": patchwork,
    "smear": smear,
    "blob": blob,
}


# ---- the whole ------------------------------------------------------------------------------


def validate(
    n: int = 2000,
    seed: int = 2024,
    image_tokenizer: ImageTokenizer | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Measure the scorer on held-out scenes and on shapes that are no objects.

    Args:
        n: true scenes; a quarter as many for every kind of wear and of wrong shape.
        seed: of the held-out scenes (``scenes.compose.exam_scene``).
        image_tokenizer: also read its reconstructions.

    Returns:
        ``true``: shares of scenes read right (object, count, color, position, all); one such row for each kind of
        ``WEAR`` and for ``reconstructed``; ``rejected``: for each kind of ``NO_OBJECTS`` the share of pictures in
        which no object is seen.
    """
    few = max(n // 4, 1)
    rng = np.random.default_rng([seed, 7])
    scenes = [exam_scene(i % 600, seed + i // 600) for i in range(n)]
    true = np.stack([s.image() for s in scenes])
    sets = {"true": true}
    for kind, wear in WEAR.items():
        sets[kind] = np.stack([wear(p, rng) for p in true[:few]])
    if image_tokenizer is not None:
        sets["reconstructed"] = reconstruct(image_tokenizer, true[:few])
    total, done = sum(map(len, sets.values())) + few * len(NO_OBJECTS), 0
    figures: dict[str, dict[str, float]] = {}
    for kind, pictures in sets.items():
        rows = [compare(s.items, r) for s, r in zip(scenes, read_pictures(pictures), strict=False)]
        figures[kind] = {part: float(np.mean([r[part] for r in rows])) for part in rows[0]}
        done += len(pictures)
        if on_progress:
            on_progress(done, total)
    figures["rejected"] = {}
    for kind, shape in NO_OBJECTS.items():
        read = read_pictures([shape(rng) for _ in range(few)])
        figures["rejected"][kind] = float(np.mean([not r for r in read]))
        done += few
        if on_progress:
            on_progress(done, total)
    return figures


def reconstruct(image_tokenizer: ImageTokenizer, pictures: Picture, batch: int = 32) -> Picture:
    """Pictures after encoding and decoding, uint8 ``[N, 96, 96, 3]``."""
    from ..processing.image_tokenizer import to_pixels, to_uint8

    out = []
    for start in range(0, len(pictures), batch):
        ids = image_tokenizer.encode(to_pixels(pictures[start : start + batch]))
        out.append(to_uint8(image_tokenizer.decode(ids)).cpu().numpy())
    return np.concatenate(out)
