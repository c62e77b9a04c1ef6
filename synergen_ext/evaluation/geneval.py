"""GenEval's rules (Ghosh et al. 2023): is a picture what its metadata row asks for, and how often per tag.

A picture is right if every entry of ``include`` is met and no entry of ``exclude`` is:

- *count*: at least ``count`` detections of the class; the surest ``count`` of them are judged further;
- *color*: all of those have the colour;
- *position* ``[relation, k]``: all of those stand so to all that were taken for include entry ``k``. The offset
  between two box centres is shortened by a tenth of both boxes' sizes along each axis, divided by the whole
  offset's length, and has to exceed 0.5 in the relation's direction;
- *exclude*: fewer than ``count`` detections of the class.

A tag's score is the share of its pictures that are right; the overall score is the plain mean of the tags.

Detections come from ``evaluation.scorer`` or from any other detector; ``evaluation.folders`` scores whole folders.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..scenes.compose import TAGS

Row = Mapping[str, Any]
Box = Sequence[float]


@dataclass(frozen=True)
class Rules:
    """Which detections count. The defaults are GenEval's, for detectors with a confidence.

    Attributes:
        threshold: detections at or below this score are dropped.
        counting_threshold: the same for prompts of the tag ``counting``.
        max_objects: the surest so many of each class are kept.
        offset: share of both boxes' sizes taken off an offset before a relation is read.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    offset: float = 0.1


#: The scene scorer has turned bad matches away itself.
SCENE_RULES = Rules(threshold=0.0, counting_threshold=0.0)


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reasons: tuple[str, ...] = ()


def relations(a: Box, b: Box, offset: float = 0.1) -> set[str]:
    """Where box ``a`` stands, seen from box ``b``: none, one or two of left of, right of, above, below.

    Args:
        a, b: ``(x0, y0, x1, y1)``, y downwards.
        offset: see ``Rules``.
    """
    distance, short = [], []
    for axis in (0, 1):
        d = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        sizes = abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis])
        distance.append(d)
        short.append(math.copysign(max(abs(d) - offset * sizes, 0.0), d))
    if max(map(abs, short)) < 1e-3:
        return set()
    dx, dy = (s / math.hypot(*distance) for s in short)
    found = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, component in found.items() if component > 0.5}


def judge(row: Row, detections: Iterable[Row], rules: Rules = Rules()) -> Verdict:
    """Whether one picture's detections meet one metadata row.

    Args:
        row: ``{"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?: [{"class", "count"}]}``.
        detections: ``{"class", "box": [x0, y0, x1, y1], "score"?, "color"?}`` each; a missing score counts as 1.

    Raises:
        ValueError: a field of either is missing or has another type or range.
    """
    check_row(row)
    limit = rules.counting_threshold if row["tag"] == "counting" else rules.threshold
    objects: dict[str, list[Row]] = {}
    for d in sorted(map(_checked_detection, detections), key=lambda d: -d["score"]):
        kept = objects.setdefault(d["class"], [])
        if d["score"] > limit and len(kept) < rules.max_objects:
            kept.append(d)
    reasons: list[str] = []
    groups: list[list[Row] | None] = []
    for wanted in row["include"]:
        taken = objects.get(wanted["class"], [])[: wanted["count"]]
        problem = _problem(wanted, taken, groups, rules)
        groups.append(None if problem else taken)
        if problem:
            reasons.append(problem)
    for unwanted in row.get("exclude") or []:
        seen = len(objects.get(unwanted["class"], []))
        if seen >= unwanted["count"]:
            reasons.append(f"{unwanted['class']}: wanted fewer than {unwanted['count']}, got {seen}")
    return Verdict(not reasons, tuple(reasons))


def _problem(wanted: Row, taken: list[Row], groups: list[list[Row] | None], rules: Rules) -> str | None:
    """Why ``taken`` does not meet an include entry, or None."""
    name, count = wanted["class"], wanted["count"]
    if len(taken) < count:
        return f"{name}: wanted {count}, got {len(taken)}"
    color = wanted.get("color")
    colors = [d.get("color") for d in taken]
    if color is not None and colors.count(color) < count:
        return f"{name}: wanted {count} {color}, got {', '.join(str(c) for c in colors)}"
    if wanted.get("position"):
        relation, target = wanted["position"]
        others = groups[target]
        if others is None:
            return f"{name}: nothing to be {relation}"
        for a in taken:
            for b in others:
                found = relations(a["box"], b["box"], rules.offset)
                if relation not in found:
                    got = " and ".join(sorted(found)) or "neither side"
                    return f"{name}: wanted {relation} the {b['class']}, got {got}"
    return None


# ---- scores ---------------------------------------------------------------------------------


def score(
    rows: Sequence[Row],
    detections: Sequence[Sequence[Sequence[Row]]],
    rules: Rules = Rules(),
) -> dict[str, Any]:
    """GenEval's figures for ``detections[prompt][picture]`` under ``rows[prompt]``.

    Returns:
        ``summarise``'s figures and ``results``, one row a picture: prompt index, picture index, tag, prompt,
        correct, reason.
    """
    if len(rows) != len(detections):
        raise ValueError(f"score: detections must have {len(rows)} prompts, got {len(detections)}")
    results = []
    for i, (row, pictures) in enumerate(zip(rows, detections, strict=True)):
        for k, found in enumerate(pictures):
            verdict = judge(row, found, rules)
            results.append(
                {
                    "index": i,
                    "picture": k,
                    "tag": row["tag"],
                    "prompt": row["prompt"],
                    "correct": verdict.correct,
                    "reason": "; ".join(verdict.reasons),
                }
            )
    return {**summarise(results), "results": results}


def summarise(results: Sequence[Row]) -> dict[str, Any]:
    """Scores from rows with ``tag``, ``correct`` and ``index`` (or, as in GenEval's own results, ``prompt``).

    Returns:
        ``tags`` (share of right pictures in each), ``overall`` (plain mean of the tags), ``any_correct`` (share of
        prompts with a right picture among theirs), ``pictures`` and ``prompts`` (how many), and ``interval``:
        95 % intervals of the tags and the overall score, each prompt counted as one draw, since pictures of one
        prompt succeed and fail together.
    """
    if not results:
        raise ValueError("summarise: no results")
    tags: dict[str, list[bool]] = {}
    prompts: dict[Any, tuple[str, list[bool]]] = {}
    for r in results:
        tags.setdefault(r["tag"], []).append(bool(r["correct"]))
        key = (r["tag"], r.get("index", r.get("prompt")))
        prompts.setdefault(key, (r["tag"], []))[1].append(bool(r["correct"]))
    order = [t for t in TAGS if t in tags] + [t for t in tags if t not in TAGS]
    scores = {t: float(np.mean(tags[t])) for t in order}
    overall = float(np.mean(list(scores.values())))
    asked = {t: sum(tag == t for tag, _ in prompts.values()) for t in order}
    interval = {t: wilson(scores[t], asked[t]) for t in order}
    interval["overall"] = wilson(overall, len(prompts))
    return {
        "tags": scores,
        "overall": overall,
        "any_correct": float(np.mean([any(right) for _, right in prompts.values()])),
        "pictures": len(results),
        "prompts": len(prompts),
        "interval": interval,
    }


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share measured on ``n`` draws."""
    if n < 1:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


# ---- checks ---------------------------------------------------------------------------------


def check_row(row: Any, where: str = "metadata") -> None:
    """Refuse a metadata row that is not GenEval's.

    Raises:
        ValueError: names the field.
    """

    def entries(field: str) -> list[Row]:
        value = row.get(field) or []
        if not isinstance(value, list) or not all(isinstance(e, dict) for e in value):
            raise ValueError(f"{where}: {field} must be a list of objects, got {value!r}")
        for e in value:
            count = e.get("count")
            if not isinstance(e.get("class"), str):
                raise ValueError(f"{where}: {field} needs a class name, got {e.get('class')!r}")
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{where}: {field} count must be an integer >= 1, got {count!r}")
        return value

    if not isinstance(row, dict) or not isinstance(row.get("tag"), str):
        raise ValueError(f"{where}: must be an object with a tag, got {row!r:.80}")
    if not isinstance(row.get("prompt"), str):
        raise ValueError(f"{where}: prompt must be a string, got {row.get('prompt')!r}")
    include = entries("include")
    if not include:
        raise ValueError(f"{where}: include must not be empty")
    entries("exclude")
    for i, e in enumerate(include):
        position = e.get("position")
        if position is None:
            continue
        if (
            not isinstance(position, (list, tuple))
            or len(position) != 2
            or position[0] not in ("left of", "right of", "above", "below")
            or position[1] not in range(i)
        ):
            raise ValueError(
                f"{where}: position must be [relation, index of an earlier include entry], got {position!r}"
            )


def _checked_detection(d: Any) -> dict[str, Any]:
    if not isinstance(d, Mapping) or not isinstance(d.get("class"), str):
        raise ValueError(f"detections: each must be an object with a class, got {d!r:.80}")
    box = d.get("box")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(_finite, box)):
        raise ValueError(f"detections: box must be [x0, y0, x1, y1], got {box!r:.80}")
    confidence = d.get("score", 1.0)
    if not _finite(confidence):
        raise ValueError(f"detections: score must be a number, got {confidence!r:.80}")
    return {**d, "score": confidence}


def _finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
