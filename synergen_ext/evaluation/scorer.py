"""Reads a painted picture: which of the 16 objects it holds, in which colour, where.

Template matching on ink (1 - pixel value, so that white paper is zero) in three steps:

1. find: every object in every colour against every place 4 pixels apart, at a quarter of the resolution;
2. place: the best few names again at full resolution, to the pixel;
3. judge: the match has to be good as a whole and in every part. A shape that is merely *like* an object is no
   object: half a cat, a cat's head on a dog's body or a round smear are turned away.

Matches are compared by ``1 - 2<a, b> / (|a|^2 + |b|^2)``: 0 for equal ink, 1 for ink that shares nothing, whatever
the amount. The colour of each 8 x 8 cell is free while the name is judged (an object painted half red, half blue
is still that object); three quarters of the ink have to agree with a colour for it to be the object's colour.

The limits were chosen on scenes blurred (sigma 0.3-1.2), tinted (15 % a channel), noisy and JPEG-compressed, against
the wrong shapes of ``evaluation.validation``, which measures both again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scenes.render import CANVAS, COLORS, OBJECTS, SPRITE, sprite

Array = NDArray[np.float32]

_COLOR_NAMES = tuple(COLORS)
_PAD = 4  # white added around the picture: an object may hang over the edge by so much
_STEP = 4  # pixels between the places of the first search, and its loss of resolution
_CELL = 8  # pixels a side of a cell, one image token
_CELLS = SPRITE // _CELL
_PLACES = (CANVAS + 2 * _PAD - SPRITE) // _STEP + 1
_SLACK = 3  # pixels the second step may move a find
_NAMES = 4  # names the second step compares
_TRIES = 8  # finds looked at in one picture; a scene holds at most 4 objects
_APART = 16  # pixels; a find that was turned away silences the places closer than this

#: Distance at the first step below which a place is looked at.
_FOUND = 0.5
#: Largest distance of a whole object, cells coloured freely.
_WHOLE = 0.10
#: Largest distance of one half (top, bottom, left, right) of an object.
_HALF = 0.25
#: Least correlation of fine detail (outlines, faces) in every 24 x 24 pixels of an object.
_DETAIL = 0.70
#: A cell disagrees with a colour if another one brings its distance down by more than this.
_DISAGREE = 0.02
#: Least share of an object's ink in cells that agree with a colour, for that to be its colour.
_AGREE = 0.75


@dataclass(frozen=True)
class Detection:
    """One object read from a picture.

    Attributes:
        name: one of ``scenes.OBJECTS``.
        color: one of ``scenes.COLORS``, or None where no single colour fits.
        box: ``(x0, y0, x1, y1)`` of its ink in pixels, right and bottom edge excluded.
        score: 1 - distance, at least 0.9.
        corner: top-left corner ``(x, y)`` of the 40 x 40 drawing, as ``scenes.Item`` gives it.
    """

    name: str
    color: str | None
    box: tuple[int, int, int, int]
    score: float
    corner: tuple[int, int]

    def as_dict(self) -> dict[str, Any]:
        """The row of a detections file (see ``evaluation.geneval``)."""
        return {"class": self.name, "box": list(self.box), "score": round(self.score, 4), "color": self.color}


@dataclass(frozen=True)
class _Bank:
    """The 16 x 8 drawings as the three steps need them."""

    ink: Array  # [16, 8, 40, 40, 3]
    small: Array  # [300, 128]: a quarter of the resolution
    small_norm: Array  # [128]
    cells: Array  # [16, 25, 8, 192]: ink by cell
    cell_norm: Array  # [16, 25, 8]
    blank: Array  # [16, 44, 44, 1]: 0 on the object and 2 pixels around it, 1 elsewhere
    boxes: tuple[tuple[int, int, int, int], ...]


@functools.cache
def _bank() -> _Bank:
    ink = np.zeros((len(OBJECTS), len(_COLOR_NAMES), SPRITE, SPRITE, 3), np.float32)
    blank = np.ones((len(OBJECTS), SPRITE + 4, SPRITE + 4, 1), np.float32)
    boxes = []
    for i, name in enumerate(OBJECTS):
        for j, color in enumerate(_COLOR_NAMES):
            patch = sprite(name, color)
            ink[i, j] = patch[..., 3:] - patch[..., :3]
        alpha = sprite(name, _COLOR_NAMES[0])[..., 3]
        ys, xs = np.nonzero(alpha > 0.1)
        for y, x in zip(ys, xs, strict=True):
            blank[i, y : y + 5, x : x + 5] = 0
        boxes.append((int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1))
    small = _shrink(ink.reshape(-1, SPRITE, SPRITE, 3)).reshape(len(OBJECTS) * len(_COLOR_NAMES), -1)
    cells = np.ascontiguousarray(_by_cell(ink).swapaxes(1, 2))
    return _Bank(
        ink,
        np.ascontiguousarray(small.T),
        (small * small).sum(1),
        cells,
        (cells * cells).sum(-1),
        blank,
        tuple(boxes),
    )


def _shrink(x: Array) -> Array:
    n, h, w, c = x.shape
    return x.reshape(n, h // _STEP, _STEP, w // _STEP, _STEP, c).mean((2, 4))


@functools.cache
def _bands() -> tuple[Array, Array]:
    """Matrices whose two-sided products are a light and a strong blur; their difference keeps outlines and faces."""
    light: Array = np.zeros((SPRITE, SPRITE), np.float32)
    box: Array = np.zeros((SPRITE, SPRITE), np.float32)
    for i in range(SPRITE):
        for j in range(max(i - 4, 0), min(i + 5, SPRITE)):
            box[i, j] = 1 / 9
            light[i, j] = {0: 0.5, 1: 0.25}.get(abs(i - j), 0.0)
    return light, (box @ box @ light).astype(np.float32)


def _detail(ink: Array) -> Array:
    """Fine detail of ``[40, 40, 3]`` ink, as ``[3, 40, 40]``."""
    light, strong = _bands()
    planes = ink.transpose(2, 0, 1)
    fine: NDArray[Any] = light @ planes @ light.T - strong @ planes @ strong.T
    return fine


def _by_cell(x: Array) -> Array:
    """``[..., 40, 40, 3]`` -> ``[..., 25, 192]``: the values of each 8 x 8 cell side by side."""
    lead = x.shape[:-3]
    x = x.reshape(*lead, _CELLS, _CELL, _CELLS, _CELL, 3)
    return np.ascontiguousarray(np.swapaxes(x, -4, -3)).reshape(*lead, _CELLS * _CELLS, -1)


def _find(padded: Array) -> Array:
    """Step 1. ``[B, 104, 104, 3]`` ink -> least distance over colours, ``[B, places, places, 16]``."""
    bank, side = _bank(), SPRITE // _STEP
    windows = np.lib.stride_tricks.sliding_window_view(_shrink(padded), (side, side), axis=(1, 2))
    x = np.ascontiguousarray(windows.transpose(0, 1, 2, 4, 5, 3)).reshape(len(padded) * _PLACES**2, -1)
    distance = 1 - 2 * (x @ bank.small) / (np.einsum("ij,ij->i", x, x)[:, None] + bank.small_norm + 1e-6)
    return distance.reshape(len(padded), _PLACES, _PLACES, len(OBJECTS), -1).min(-1)


@dataclass(frozen=True)
class _Match:
    """Step 2's result: the likeliest name, and how the picture compares with its drawing."""

    name: int
    color: int
    x: int  # of the window in the padded picture
    y: int
    whole: float
    half: float
    detail: float
    agree: float  # share of the ink that agrees with the colour

    @property
    def good(self) -> bool:
        return self.whole <= _WHOLE and self.half <= _HALF and self.detail >= _DETAIL


def _match(name: int, window: Array, x: int, y: int) -> _Match:
    """Step 3's figures for the best name at its best place."""
    by_color, amount = _differences(name, window)
    free = by_color.argmin(1)  # [25]: each cell's own colour
    cells = np.arange(len(free))
    difference, amount = by_color[cells, free], amount[cells, free]
    total = float(amount.sum()) + 1e-6
    agrees = by_color - difference[:, None] <= _DISAGREE * amount[:, None]
    agree = (agrees * amount[:, None]).sum(0) / total  # [8]
    # Between neighbouring colours all cells may agree with both: then the smaller distance decides.
    color = int((agree - by_color.sum(0) / total).argmax())
    grid = np.stack([difference, amount]).reshape(2, _CELLS, _CELLS)
    halves = [
        grid[(slice(None), *part)].sum((1, 2)) for part in (np.s_[:2, :], np.s_[3:, :], np.s_[:, :2], np.s_[:, 3:])
    ]
    shown = free.reshape(_CELLS, _CELLS).repeat(_CELL, 0).repeat(_CELL, 1)[None, ..., None]
    drawn = np.take_along_axis(_bank().ink[name], shown, 0)[0]
    return _Match(
        name,
        color,
        x,
        y,
        whole=float(difference.sum()) / total,
        half=max(float(d / (a + 0.02 * total)) for d, a in halves),
        detail=_worst_detail(window, drawn),
        agree=float(agree[color]),
    )


def _differences(name: int, window: Array) -> tuple[Array, Array]:
    """Squared difference and amount of ink by cell and colour, ``[25, 8]`` each."""
    bank, x = _bank(), _by_cell(window)  # [25, 192]
    amount = (x * x).sum(1)[:, None] + bank.cell_norm[name]
    return np.maximum(amount - 2 * (bank.cells[name] @ x[..., None])[..., 0], 0), amount


def _freely(name: int, window: Array) -> float:
    """Distance of a name, its cells coloured freely."""
    difference, amount = _differences(name, window)
    free = difference.argmin(1)[:, None]
    return float(difference.min(1).sum() / (np.take_along_axis(amount, free, 1).sum() + 1e-6))


def _worst_detail(a: Array, b: Array) -> float:
    """Least correlation of fine detail over all 3 x 3 cells; parts with little detail on either side weigh less."""
    fine = np.stack([_detail(a), _detail(b)])  # [2, 3, 40, 40]
    products = np.stack([fine[0] * fine[1], fine[0] ** 2, fine[1] ** 2]).sum(1)  # [3, 40, 40]
    cells = products.reshape(3, _CELLS, _CELL, _CELLS, _CELL).sum((2, 4))
    parts = np.lib.stride_tricks.sliding_window_view(cells, (3, 3), axis=(1, 2)).sum((-1, -2))
    dot, aa, bb = parts
    floor = 0.02 / 9
    return float((dot / np.sqrt((aa + floor * aa.sum()) * (bb + floor * bb.sum()) + 1e-12)).min())


def _place(work: Array, distances: Array, iy: int, ix: int) -> _Match:
    """Steps 2 and 3 around one find: the likeliest names, each at its best pixel; the best name of those."""
    bank = _bank()
    names = np.argsort(distances[max(iy - 1, 0) : iy + 2, max(ix - 1, 0) : ix + 2].min((0, 1)))[:_NAMES]
    last = CANVAS + 2 * _PAD - SPRITE
    y0, y1 = max(iy * _STEP - _SLACK, 0), min(iy * _STEP + _SLACK, last)
    x0, x1 = max(ix * _STEP - _SLACK, 0), min(ix * _STEP + _SLACK, last)
    region = work[y0 : y1 + SPRITE, x0 : x1 + SPRITE]
    windows = np.lib.stride_tricks.sliding_window_view(region, (SPRITE, SPRITE), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    x = windows.reshape(windows.shape[0] * windows.shape[1], -1)
    drawn = bank.ink[names].reshape(len(names) * len(_COLOR_NAMES), -1)
    norm = bank.cell_norm[names].sum(1).reshape(-1)
    distance = 1 - 2 * (x @ drawn.T) / (np.einsum("ij,ij->i", x, x)[:, None] + norm + 1e-6)
    places = distance.reshape(len(x), len(names), -1).min(-1).argmin(0)
    found = []
    for name, place in zip(names, places, strict=True):
        dy, dx = divmod(int(place), windows.shape[1])
        found.append((_freely(int(name), windows[dy, dx]), int(name), dy, dx))
    _, best, dy, dx = min(found)
    return _match(best, windows[dy, dx], x0 + dx, y0 + dy)


def _read(padded: Array, distances: Array) -> list[Detection]:
    bank, found = _bank(), []
    silent = np.zeros((_PLACES, _PLACES), bool)
    for _ in range(_TRIES):
        distances[silent] = np.inf
        iy, ix, name = np.unravel_index(int(distances.argmin()), distances.shape)
        if distances[iy, ix, name] > _FOUND:
            break
        match = _place(padded, distances, int(iy), int(ix))
        silent[iy, ix] = True
        near = [slice(max(-(-(c - _APART) // _STEP), 0), (c + _APART) // _STEP + 1) for c in (match.y, match.x)]
        silent[near[0], near[1]] = True
        if match.good:
            corner = (match.x - _PAD, match.y - _PAD)
            x0, y0, x1, y1 = bank.boxes[match.name]
            found.append(
                Detection(
                    OBJECTS[match.name],
                    _COLOR_NAMES[match.color] if match.agree >= _AGREE else None,
                    (corner[0] + x0, corner[1] + y0, corner[0] + x1, corner[1] + y1),
                    1 - match.whole,
                    corner,
                )
            )
            # Its ink is explained: take it away, so that no leftover of it can look like something else.
            work = np.pad(padded, ((2, 2), (2, 2), (0, 0)))
            work[match.y : match.y + SPRITE + 4, match.x : match.x + SPRITE + 4] *= bank.blank[match.name]
            padded = np.ascontiguousarray(work[2:-2, 2:-2])
            distances = _find(padded[None])[0]
    return sorted(found, key=lambda d: -d.score)


def read_pictures(pictures: Sequence[Any] | NDArray[np.uint8], batch: int = 32) -> list[list[Detection]]:
    """The objects in each picture, the surest first. About 5 ms a picture on one core.

    Args:
        pictures: uint8 ``[N, 96, 96, 3]``, or a list of such arrays or PIL images.
        batch: pictures searched at once.

    Raises:
        ValueError: not uint8, or another size than 96 x 96.
    """
    out: list[list[Detection]] = []
    for start in range(0, len(pictures), batch):
        part = np.stack([_checked(p) for p in pictures[start : start + batch]])
        ink: Array = 1 - part.astype(np.float32) / np.float32(255)
        padded = np.pad(ink, ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0)))
        distances = _find(padded)
        out += [_read(p, d) for p, d in zip(padded, distances, strict=True)]
    return out


def read_picture(picture: Any) -> list[Detection]:
    """``read_pictures`` for one picture."""
    return read_pictures([picture])[0]


def _checked(picture: Any) -> NDArray[np.uint8]:
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.shape != (CANVAS, CANVAS, 3):
        raise ValueError(
            f"read_pictures: a picture must be uint8 [{CANVAS}, {CANVAS}, 3], got {array.dtype} {list(array.shape)}"
        )
    return array
