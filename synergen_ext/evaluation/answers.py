"""What is asked about a held-out scene, and when an answer counts as right."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..scenes import CAPTION_INSTRUCTION, COLORS, OBJECTS, RELATIONS, Scene, caption
from ..scenes.compose import opposite
from ..scenes.language import (
    NAME_QUESTION,
    NUMBERS,
    color_question,
    count_question,
    naming_answer,
    plural,
    position_answer,
    position_question,
    seen_groups,
    seen_relation,
)


def exam_questions(
    scene: Scene,
) -> Iterable[tuple[str, tuple[tuple[str, Callable[[str], bool]], ...]]]:
    """Questions about one scene and what makes their answers right, by figure."""

    def exactly(wanted: str) -> Callable[[str], bool]:
        return lambda answer: plain(answer) == plain(wanted)

    groups = seen_groups(scene)
    shown = {g.name: g.count for g in groups}
    yield (
        NAME_QUESTION,
        (
            ("naming", lambda answer: named(answer) == set(shown)),
            ("naming_counts", lambda answer: said(answer)[0] == said(naming_answer(scene))[0]),
        ),
    )
    yield (
        CAPTION_INSTRUCTION,
        (
            ("caption", lambda answer: set(shown) <= named(answer)),
            ("caption_exact", lambda answer: said(answer) == said(caption(scene))),
        ),
    )
    for g in groups:
        yield color_question(g.name, g.count), (("color", exactly(str(g.color))),)
        yield count_question(g.name), (("counting", exactly(NUMBERS[g.count])),)
    # The absent object follows from the scene alone: the first name after the first shown one.
    order = OBJECTS[OBJECTS.index(groups[0].name) :] + OBJECTS
    absent = next(name for name in order if name not in shown)
    yield count_question(absent), (("counting", exactly(NUMBERS[0])),)
    relation = seen_relation(scene)
    if relation:
        a, b = groups[:2]
        yield position_question(a, b), (("position", exactly(position_answer(relation, b))),)
        back = position_answer(opposite(relation), a)
        yield position_question(b, a), (("position", exactly(back)),)


def plain(text: str) -> str:
    """Lower case, single spaces, no punctuation: what two answers are compared by."""
    kept = "".join(c if c.isalnum() else " " for c in text.lower())
    return " ".join(kept.split())


def named(text: str) -> set[str]:
    """The objects that a sentence names, singular or plural."""
    return {name for name, _, _ in said(text)[0]}


def said(text: str) -> tuple[frozenset[tuple[str, int | None, str | None]], tuple[str, str] | None]:
    """What a sentence says, whatever its order.

    Returns:
        ``(name, count, color)`` of each group it names, and its relation as (``left of`` or ``above``, first name).
    """
    singular = {form: name for name in OBJECTS for form in (name, plural(name))}
    groups: dict[str, tuple[str, int | None, str | None]] = {}
    count: int | None = None
    color: str | None = None
    for word in plain(text).split():
        if word in ("a", "an", "one"):
            count, color = 1, None
        elif word in NUMBERS:
            count, color = NUMBERS.index(word), None
        elif word in COLORS:
            color = word
        elif word in singular:
            groups.setdefault(singular[word], (singular[word], count, color))
            count = color = None
    names = list(groups)
    relation = next((r for r in RELATIONS if f" {r} " in f" {plain(text)} "), None)
    if relation is None or len(names) != 2:
        return frozenset(groups.values()), None
    if relation in ("right of", "below"):
        relation, names = opposite(relation), names[::-1]
    return frozenset(groups.values()), (relation, names[0])
