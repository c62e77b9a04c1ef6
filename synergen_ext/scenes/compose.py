"""What a scene holds: requests (GenEval's six tags), layouts, and the pairs kept out of training.

Everything is a pure function of ``(seed, index)``, so a stream of scenes needs no storage and resumes anywhere.

Objects sit on a grid of 8 x 16 pixels: one image token is 8 x 8 pixels and a folded window of the demo model is
two token rows high, so an object's tokens do not depend on where it stands; and in training scenes, unless the
words say where, objects stand in the order they are named, row by row. Both are simplifications of the demo's data
(without them it is learned far slower), not properties of the model.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .language import PREFIXES, SUFFIXES, phrase
from .render import CANVAS, COLORS, OBJECTS, SPRITE, draw

#: GenEval's six tags, in its order.
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 4

_STEP_X = 8
_ROWS = (0, 16, 32, 48)
_TOP, _BOTTOM = 0, 48
_LAST = CANVAS - SPRITE  # largest top-left corner, 56
_COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Group:
    """``count`` objects of one name; ``color`` None leaves the colour to the painter."""

    name: str
    count: int = 1
    color: str | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for. ``relation`` says where ``groups[0]`` stands, seen from ``groups[1]``."""

    tag: str
    groups: tuple[Group, ...]
    relation: str | None
    prompt: str

    def metadata(self) -> dict[str, Any]:
        """The row of GenEval's ``evaluation_metadata.jsonl`` for this request."""
        include: list[dict[str, Any]] = []
        for i, g in enumerate(self.groups):
            row: dict[str, Any] = {"class": g.name, "count": g.count}
            if g.color:
                row["color"] = g.color
            # GenEval writes the relation on the later object, pointing at an earlier one, and
            # phrases it from the later object's side.
            if i == 1 and self.relation:
                row["position"] = [opposite(self.relation), 0]
            include.append(row)
        data: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.tag == "counting":
            data["exclude"] = [{"class": g.name, "count": g.count + 1} for g in self.groups]
        data["prompt"] = self.prompt
        return data


@dataclass(frozen=True)
class Item:
    """One drawn object; ``(x, y)`` is its top-left corner in pixels."""

    name: str
    color: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    request: Request
    items: tuple[Item, ...]

    def image(self) -> NDArray[np.uint8]:
        """uint8 ``[96, 96, 3]``."""
        return draw([(i.name, i.color, i.x, i.y) for i in self.items])


def opposite(relation: str) -> str:
    return {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]


def relation_between(a: Item, b: Item) -> str | None:
    """Where ``a`` stands, seen from ``b``; None where the eye would call it diagonal."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= SPRITE and abs(dy) <= 16:
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= SPRITE and abs(dx) <= 16:
        return "above" if dy < 0 else "below"
    return None


# ---- what training never sees -------------------------------------------------------------------------------


@functools.cache
def held_out_colors() -> frozenset[tuple[str, str]]:
    """16 of the 128 (object, colour) pairs: one a name, two a colour."""
    return frozenset((n, _COLOR_NAMES[(3 * i + 1) % 8]) for i, n in enumerate(OBJECTS))


@functools.cache
def held_out_pairs() -> frozenset[frozenset[str]]:
    """16 of the 120 (object, object) pairs: every name stands in two."""
    return frozenset(frozenset((n, OBJECTS[(i + 5) % 16])) for i, n in enumerate(OBJECTS))


@functools.cache
def held_out_relations() -> frozenset[tuple[str, str]]:
    """16 of the 64 (relation, subject) pairs: one a name, four a relation."""
    return frozenset((RELATIONS[(i + i // 4) % 4], n) for i, n in enumerate(OBJECTS))


def is_held_out(items: tuple[Item, ...] | tuple[Group, ...], relation: str | None) -> bool:
    """Whether a scene or request contains any pair that training must not see."""
    names = list(dict.fromkeys(i.name for i in items))
    return (
        any((i.name, i.color) in held_out_colors() for i in items)
        or any(frozenset(p) in held_out_pairs() for p in itertools.combinations(names, 2))
        or (relation is not None and (relation, items[0].name) in held_out_relations())
    )


# ---- requests -----------------------------------------------------------------------------------------------


def _choice(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _names(rng: np.random.Generator, n: int) -> list[str]:
    return [OBJECTS[i] for i in rng.permutation(len(OBJECTS))[:n]]


def _draw_groups(rng: np.random.Generator, tag: str) -> tuple[tuple[Group, ...], str | None]:
    """Contents for one tag; ``scene`` is the free mixture that only training uses."""
    if tag == "single_object":
        return (Group(_names(rng, 1)[0]),), None
    if tag == "colors":
        return (Group(_names(rng, 1)[0], 1, _choice(rng, _COLOR_NAMES)),), None
    if tag == "counting":
        return (Group(_names(rng, 1)[0], int(rng.integers(2, 5))),), None
    a, b = _names(rng, 2)
    if tag == "two_object":
        return (Group(a), Group(b)), None
    if tag == "position":
        return (Group(a), Group(b)), _choice(rng, RELATIONS)
    if tag == "color_attr":
        c, d = (_COLOR_NAMES[i] for i in rng.permutation(8)[:2])
        return (Group(a, 1, c), Group(b, 1, d)), None
    # scene: 1-3 groups, up to 4 objects, colours named or not, a relation or not
    kinds = int(rng.choice([1, 2, 2, 2, 3]))
    names = _names(rng, kinds)
    left = MAX_OBJECTS - kinds
    groups = []
    for name in names:
        extra = int(rng.integers(0, min(left, 3) + 1))
        left -= extra
        color = _choice(rng, _COLOR_NAMES) if rng.random() < 0.75 else None
        groups.append(Group(name, 1 + extra, color))
    relation = None
    if kinds == 2 and max(g.count for g in groups) <= 2 and rng.random() < 0.6:
        relation = _choice(rng, RELATIONS)
    return tuple(groups), relation


def _prompt(rng: np.random.Generator, groups: tuple[Group, ...], relation: str | None) -> str:
    # Half the prompts have GenEval's own form; the rest vary it so that no single form is needed.
    prefix = "a photo of" if rng.random() < 0.5 else _choice(rng, PREFIXES)
    suffix = "" if rng.random() < 0.7 else _choice(rng, SUFFIXES)
    return " ".join(s for s in (prefix, phrase(groups, relation), suffix) if s)


@functools.cache
def exam_requests(per_tag: int = 100, seed: int = 2024) -> tuple[Request, ...]:
    """The exam: ``per_tag`` distinct requests for each of the six tags, in GenEval's order.

    Colour, pair, position and attribute requests each contain a held-out pair (and are held out by it); single
    and counting requests are held out by their wording, which training never draws.

    Args:
        per_tag: requests a tag, at most 100.
        seed: which exam. Training refuses the prompts of the default exam only.
    """
    if not 1 <= per_tag <= 100:
        raise ValueError(f"exam_requests: per_tag must be in [1, 100], got {per_tag}")
    if per_tag < 100:
        full = exam_requests(100, seed)
        return tuple(r for t in range(6) for r in full[t * 100 : t * 100 + per_tag])
    rng = np.random.default_rng([seed, 0])
    requests: list[Request] = []
    for tag in TAGS:
        seen: set[str] = set()
        while len(seen) < per_tag:
            groups, relation = _draw_groups(rng, tag)
            by_wording = tag in ("single_object", "counting")
            if not by_wording and not is_held_out(groups, relation):
                continue
            prompt = _prompt(rng, groups, relation)
            if by_wording and _is_plain(prompt):
                continue  # plain wordings stay in training, or a name would never be seen alone
            if prompt not in seen:
                seen.add(prompt)
                requests.append(Request(tag, groups, relation, prompt))
    return tuple(requests)


def _is_plain(prompt: str) -> bool:
    return prompt.startswith("a photo of") and not prompt.endswith(tuple(SUFFIXES))


@functools.cache
def _exam_prompts() -> frozenset[str]:
    return frozenset(r.prompt for r in exam_requests())


# ---- layouts ------------------------------------------------------------------------------------------------


def _any_x(rng: np.random.Generator) -> int:
    return _STEP_X * int(rng.integers(_LAST // _STEP_X + 1))


def _split_x(rng: np.random.Generator) -> tuple[int, int]:
    """Two columns that do not overlap."""
    left = _STEP_X * int(rng.integers((_LAST - SPRITE) // _STEP_X + 1))
    lo = (left + SPRITE) // _STEP_X
    return left, _STEP_X * int(rng.integers(lo, _LAST // _STEP_X + 1))


def _row(rng: np.random.Generator, n: int, y: int) -> list[tuple[int, int]]:
    return [(_any_x(rng), y)] if n == 1 else [(x, y) for x in _split_x(rng)]


def _column(rng: np.random.Generator, n: int, x: int) -> list[tuple[int, int]]:
    return [(x, _choice(rng, _ROWS))] if n == 1 else [(x, _TOP), (x, _BOTTOM)]


def _related(rng: np.random.Generator, counts: list[int], relation: str) -> list[list[tuple[int, int]]]:
    first, second = counts
    while True:
        if relation in ("left of", "right of"):
            xs = _split_x(rng)
            a, b = _column(rng, first, xs[relation == "right of"]), _column(rng, second, xs[relation == "left of"])
        else:
            ys = (_TOP, _BOTTOM)
            a, b = _row(rng, first, ys[relation == "below"]), _row(rng, second, ys[relation == "above"])
        # One object against one must not look diagonal.
        if first == second == 1:
            (ax, ay), (bx, by) = a[0], b[0]
            if min(abs(ax - bx), abs(ay - by)) > 16:
                continue
        return [a, b]


def place(
    rng: np.random.Generator, counts: list[int], relation: str | None, reading_order: bool = False
) -> list[list[tuple[int, int]]]:
    """Top-left corners for each group's objects; nothing overlaps.

    Args:
        counts: objects in each group, at most 4 in all (2 a group where ``relation`` is given).
        relation: where group 0 stands, seen from group 1, or None for anywhere.
        reading_order: without a relation, groups stand as one reads them: rows from the top, each from the left.
    """
    if relation is not None:
        return _related(rng, counts, relation)
    total = sum(counts)
    if total == 1:
        spots = [(_any_x(rng), _choice(rng, _ROWS))]
    elif total == 2 and rng.random() < 0.6:
        spots = [(x, _choice(rng, _ROWS)) for x in _split_x(rng)]
    else:
        top = total // 2 if rng.random() < 0.5 else total - total // 2
        spots = _row(rng, top, _TOP) + _row(rng, total - top, _BOTTOM)
    if reading_order:
        spots.sort(key=lambda spot: (spot[1], spot[0]), reverse=True)  # taken from the end
    else:
        spots = [spots[i] for i in rng.permutation(total)]
    return [[spots.pop() for _ in range(n)] for n in counts]


def realise(rng: np.random.Generator, request: Request, training: bool) -> Scene:
    """Draw one scene that fulfils a request, with unnamed colours chosen freely.

    Args:
        training: avoid held-out (object, colour) pairs where the request leaves the colour open, and stand
            unrelated groups in the order the request names them. Half the two-coloured pictures of a model
            trained without that order carried their colours the wrong way round (docs/LOG.md).
    """
    corners = place(rng, [g.count for g in request.groups], request.relation, reading_order=training)
    items = []
    for g, spots in zip(request.groups, corners, strict=True):
        color = g.color
        while color is None or (training and (g.name, color) in held_out_colors()):
            color = _choice(rng, _COLOR_NAMES)
        items += [Item(g.name, color, x, y) for x, y in spots]
    return Scene(request, tuple(items))


#: How often training draws each tag; the harder ones more.
_MIX = {
    "single_object": 0.06, "colors": 0.20, "two_object": 0.12, "counting": 0.12,
    "position": 0.14, "color_attr": 0.26, "scene": 0.10,
}  # fmt: skip


def training_scene(seed: int, index: int) -> Scene:
    """Scene ``index`` of the endless training stream ``seed``: no held-out pair, no exam prompt."""
    rng = np.random.default_rng([seed, 1, index])
    tag = str(rng.choice(list(_MIX), p=list(_MIX.values())))
    while True:
        groups, relation = _draw_groups(rng, tag)
        if is_held_out(groups, relation):
            continue
        prompt = _prompt(rng, groups, relation)
        if prompt not in _exam_prompts():
            return realise(rng, Request(tag, groups, relation, prompt), training=True)


def tokenizer_scene(seed: int, index: int) -> Scene:
    """Scene ``index`` of stream ``seed`` for the image tokenizer: every (object, colour) pair, equally often.

    As in the paper, the image tokenizer is trained apart and knows how things look; what the held-out pairs test is
    the model that speaks its ids.
    """
    rng = np.random.default_rng([seed, 8, index])
    pairs = [int(i) for i in rng.permutation(len(OBJECTS) * len(COLORS))[: int(rng.integers(1, MAX_OBJECTS + 1))]]
    groups = tuple(Group(OBJECTS[i // len(COLORS)], 1, _COLOR_NAMES[i % len(COLORS)]) for i in pairs)
    return realise(rng, Request("scene", groups, None, phrase(groups, None)), training=False)


def exam_scene(index: int, seed: int = 2024) -> Scene:
    """The true picture for exam request ``index``: what the understanding exam shows and asks about."""
    return realise(np.random.default_rng([seed, 2, index]), exam_requests(100, seed)[index], training=False)
