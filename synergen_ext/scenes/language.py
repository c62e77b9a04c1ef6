"""Words about scenes: prompts, captions, and questions with their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .render import COLORS, OBJECTS

if TYPE_CHECKING:
    from .compose import Group, Scene

#: The paper's instruction for understanding pretraining.
CAPTION_INSTRUCTION = "Provide a one-sentence caption for the image"
NAME_QUESTION = "What is in the picture?"
NUMBERS = ("zero", "one", "two", "three", "four")
PREFIXES = ("a photo of", "", "a picture of", "an image of", "a drawing of", "a painting of", "a view of", "here is")
SUFFIXES = ("on white", "please")
_PLURALS = {"fish": "fish", "butterfly": "butterflies"}


def plural(name: str) -> str:
    return _PLURALS.get(name, name + "s")


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def count_phrase(name: str, count: int, color: str | None = None) -> str:
    """``a red cat``, ``two dogs``."""
    noun = name if count == 1 else plural(name)
    words = f"{color} {noun}" if color else noun
    return f"{article(words)} {words}" if count == 1 else f"{NUMBERS[count]} {words}"


def phrase(groups: tuple[Group, ...], relation: str | None) -> str:
    """``a red cat left of two dogs``, ``a cat, a dog and a car``."""
    parts = [count_phrase(g.name, g.count, g.color) for g in groups]
    if relation:
        return f"{parts[0]} {relation} {parts[1]}"
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def seen_groups(scene: Scene) -> tuple[Group, ...]:
    """The scene's groups with the colours they were given, in the request's order."""
    from .compose import Group

    shown = {i.name: i.color for i in scene.items}
    return tuple(Group(g.name, g.count, shown[g.name]) for g in scene.request.groups)


def seen_relation(scene: Scene) -> str | None:
    """The relation of group 0 to group 1, if the request names one or two lone objects show one."""
    from .compose import relation_between

    if scene.request.relation or len(scene.request.groups) != 2 or len(scene.items) != 2:
        return scene.request.relation
    return relation_between(scene.items[0], scene.items[1])


def caption(scene: Scene) -> str:
    """Every object with its count and colour, and the relation where there is one."""
    return phrase(seen_groups(scene), seen_relation(scene))


def naming_answer(scene: Scene) -> str:
    from .compose import Group

    return phrase(tuple(Group(g.name, g.count) for g in scene.request.groups), None)


def color_question(name: str, count: int) -> str:
    return f"What color is the {name}?" if count == 1 else f"What color are the {plural(name)}?"


def count_question(name: str) -> str:
    return f"How many {plural(name)} are there?"


def position_question(a: Group, b: Group) -> str:
    first, second = (g.name if g.count == 1 else plural(g.name) for g in (a, b))
    verb = "is" if a.count == 1 else "are"
    return f"Where {verb} the {first} relative to the {second}?"


def position_answer(relation: str, b: Group) -> str:
    return f"{relation} the {b.name if b.count == 1 else plural(b.name)}"


def questions(scene: Scene, rng: np.random.Generator, training: bool = True) -> list[tuple[str, str]]:
    """Question-answer pairs about one scene, in random order: caption, names, colours, counts, presence, place."""
    from .compose import held_out_relations, opposite

    groups = seen_groups(scene)
    absent = [n for n in OBJECTS if all(n != g.name for g in groups)]
    pairs = [(CAPTION_INSTRUCTION, caption(scene)), (NAME_QUESTION, naming_answer(scene))]
    for g in groups:
        pairs.append((color_question(g.name, g.count), str(g.color)))
        pairs.append((count_question(g.name), NUMBERS[g.count]))
    other = absent[int(rng.integers(len(absent)))]
    if rng.random() < 0.25:
        pairs.append((count_question(other), NUMBERS[0]))
    present = groups[int(rng.integers(len(groups)))].name
    for name, answer in ((present, "yes"), (other, "no")):
        if rng.random() < 0.4:
            pairs.append((f"Is there {article(name)} {name}?", answer))
    relation = seen_relation(scene)
    if relation:
        for r, a, b in ((relation, groups[0], groups[1]), (opposite(relation), groups[1], groups[0])):
            if not (training and (r, a.name) in held_out_relations()):
                pairs.append((position_question(a, b), position_answer(r, b)))
    return [pairs[i] for i in rng.permutation(len(pairs))]


def vocabulary() -> list[str]:
    """Every word these sentences can hold (the demo's text tokenizer is trained on sentences made of them)."""
    return sorted({*OBJECTS, *map(plural, OBJECTS), *COLORS, *NUMBERS})
