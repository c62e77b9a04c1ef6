"""Scenes: deterministic, in bounds, true to their request, and blind to what the exam asks."""

import itertools

import numpy as np
import pytest

from synergen_ext.scenes import (
    CANVAS,
    CAPTION_INSTRUCTION,
    COLORS,
    OBJECTS,
    RELATIONS,
    SPRITE,
    TAGS,
    Group,
    Item,
    caption,
    draw,
    exam_requests,
    phrase,
    place,
    questions,
    sprite,
    training_scene,
)
from synergen_ext.scenes.compose import (
    exam_scene,
    held_out_colors,
    held_out_pairs,
    held_out_relations,
    is_held_out,
    opposite,
    relation_between,
)
from synergen_ext.scenes.language import (
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
    vocabulary,
)

TRAINING = [training_scene(0, i) for i in range(2500)]
EXAM = [exam_scene(i) for i in range(600)]


# ---- drawing --------------------------------------------------------------------------------


def test_every_drawing_is_there_and_stays_inside_its_square() -> None:
    for name, color in itertools.product(OBJECTS, COLORS):
        patch = sprite(name, color)
        assert patch.shape == (SPRITE, SPRITE, 4) and patch.dtype == np.float32
        assert patch.min() >= 0 and patch.max() <= 1
        assert (patch[..., :3] <= patch[..., 3:] + 1e-6).all(), "premultiplied"
        assert 400 < (patch[..., 3] > 0.5).sum() < 1200
        # Two clear pixels around: objects in neighbouring squares never touch.
        border = np.ones((SPRITE, SPRITE), bool)
        border[2:-2, 2:-2] = False
        assert patch[..., 3][border].max() < 0.5


@pytest.mark.parametrize("color", COLORS)
def test_a_drawing_has_its_color(color: str) -> None:
    for name in OBJECTS:
        patch = sprite(name, color)
        body = np.median(patch[..., :3][patch[..., 3] > 0.99], axis=0) * 255
        nearest = min(COLORS, key=lambda c: np.abs(body - COLORS[c]).sum())
        assert nearest == color, f"{name}: {body}"


def test_draw_pastes_at_the_corner_and_leaves_the_rest_white() -> None:
    picture = draw([("book", "red", 16, 48)])
    assert picture.shape == (CANVAS, CANVAS, 3) and picture.dtype == np.uint8
    inked = np.argwhere((picture < 250).any(-1))
    assert inked.min(0).tolist() >= [48, 16] and inked.max(0).tolist() < [48 + SPRITE, 16 + SPRITE]
    alone = sprite("book", "red")
    expected = ((alone[..., :3] + 1 - alone[..., 3:]) * 255 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(picture[48:88, 16:56], expected)


def test_bad_drawings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="name must be one of .* got 'dragon'"):
        sprite("dragon", "red")
    with pytest.raises(ValueError, match="color must be one of .* got 'mauve'"):
        sprite("cat", "mauve")
    with pytest.raises(ValueError, match=r"cat must lie inside the canvas.*\(57, 0\)"):
        draw([("cat", "red", 57, 0)])


# ---- what training sees ---------------------------------------------------------------------


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    again = [training_scene(0, i) for i in reversed(range(50))][::-1]
    assert again == TRAINING[:50]
    assert [training_scene(1, i) for i in range(50)] != TRAINING[:50]
    assert exam_scene(17) == EXAM[17]


def test_held_out_pairs_are_spread_evenly() -> None:
    colors, pairs, relations = held_out_colors(), held_out_pairs(), held_out_relations()
    assert len(colors) == len(pairs) == len(relations) == 16
    for name in OBJECTS:
        assert sum(name == n for n, _ in colors) == 1
        assert sum(name in p for p in pairs) == 2
        assert sum(name == n for _, n in relations) == 1
    assert all(sum(c == color for _, c in colors) == 2 for color in COLORS)
    assert all(sum(r == relation for r, _ in relations) == 4 for relation in RELATIONS)
    assert all(len(p) == 2 for p in pairs)


def test_training_never_sees_what_is_held_out() -> None:
    exam_prompts = {r.prompt for r in exam_requests()}
    seen_colors, seen_pairs, seen_relations = set(), set(), set()
    for s in TRAINING:
        assert not is_held_out(s.items, s.request.relation)
        assert not is_held_out(s.request.groups, s.request.relation)
        assert s.request.prompt not in exam_prompts
        seen_colors |= {(i.name, i.color) for i in s.items}
        names = {i.name for i in s.items}
        seen_pairs |= {frozenset(p) for p in itertools.combinations(sorted(names), 2)}
        if s.request.relation:
            seen_relations.add((s.request.relation, s.request.groups[0].name))
    # ... but everything else, so that the exam asks for new pairs of known things.
    assert len(seen_colors) == 128 - 16
    assert len(seen_pairs) == 120 - 16
    assert len(seen_relations) == 64 - 16


def test_questions_in_training_do_not_teach_held_out_relations() -> None:
    for i, scene in enumerate(TRAINING):
        for question, answer in questions(scene, np.random.default_rng(i)):
            if question.startswith("Where"):
                relation = next(r for r in RELATIONS if answer.startswith(r))
                subject = next(
                    g.name for g in scene.request.groups
                    if f" the {g.name if g.count == 1 else plural(g.name)} relative" in question
                )  # fmt: skip
                assert (relation, subject) not in held_out_relations()


# ---- the exam -------------------------------------------------------------------------------


def test_the_exam_has_100_distinct_requests_a_tag_in_order() -> None:
    requests = exam_requests()
    assert [r.tag for r in requests] == [t for t in TAGS for _ in range(100)]
    assert len({(r.tag, r.prompt) for r in requests}) == 600
    for r in requests:
        if r.tag in ("two_object", "colors", "position", "color_attr"):
            assert is_held_out(r.groups, r.relation)
    assert exam_requests(10) == tuple(r for t in range(6) for r in requests[t * 100 : t * 100 + 10])
    for bad in (0, 101):
        with pytest.raises(ValueError, match=f"per_tag must be in .* got {bad}"):
            exam_requests(bad)


def test_requests_have_the_shape_of_their_tag() -> None:
    for r in exam_requests():
        counts = [g.count for g in r.groups]
        colors = [g.color for g in r.groups]
        shape = (counts, [c is not None for c in colors], r.relation is not None)
        if r.tag == "counting":
            assert len(counts) == 1 and 2 <= counts[0] <= 4 and colors == [None] and not r.relation
        else:
            assert (
                shape
                == {
                    "single_object": ([1], [False], False),
                    "colors": ([1], [True], False),
                    "two_object": ([1, 1], [False, False], False),
                    "position": ([1, 1], [False, False], True),
                    "color_attr": ([1, 1], [True, True], False),
                }[r.tag]
            )
        assert len(set(colors)) == len(colors) or colors == [None, None]
        assert phrase(r.groups, r.relation) in r.prompt


def test_metadata_is_genevals_row() -> None:
    by_tag = {r.tag: r for r in exam_requests()}
    r = by_tag["position"]
    data = r.metadata()
    assert data["tag"] == "position" and data["prompt"] == r.prompt
    assert [e["class"] for e in data["include"]] == [g.name for g in r.groups]
    assert data["include"][1]["position"] == [opposite(str(r.relation)), 0]
    r = by_tag["counting"]
    name, count = r.groups[0].name, r.groups[0].count
    assert r.metadata()["include"] == [{"class": name, "count": count}]
    assert r.metadata()["exclude"] == [{"class": name, "count": count + 1}]
    r = by_tag["color_attr"]
    assert [e["color"] for e in r.metadata()["include"]] == [g.color for g in r.groups]


# ---- layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("scenes", [TRAINING, EXAM], ids=["training", "exam"])
def test_scenes_fulfil_their_request(scenes: list) -> None:
    for s in scenes:
        wanted = [(g.name, g.color) for g in s.request.groups for _ in range(g.count)]
        assert [i.name for i in s.items] == [n for n, _ in wanted]
        assert all(c is None or c == i.color for (_, c), i in zip(wanted, s.items, strict=True))
        assert 1 <= len(s.items) <= 4
        for i in s.items:
            assert 0 <= i.x <= CANVAS - SPRITE and 0 <= i.y <= CANVAS - SPRITE
            assert i.x % 8 == 0 and i.y % 16 == 0
        for a, b in itertools.combinations(s.items, 2):
            assert abs(a.x - b.x) >= SPRITE or abs(a.y - b.y) >= SPRITE, "overlap"
        groups = {g.name for g in s.request.groups}
        assert all(len({i.color for i in s.items if i.name == n}) == 1 for n in groups)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("counts", [[1, 1], [1, 2], [2, 1], [2, 2]])
def test_related_groups_stand_apart_on_the_right_sides(relation: str, counts: list) -> None:
    rng = np.random.default_rng(0)
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    for _ in range(50):
        first, second = place(rng, counts, relation)
        assert [len(first), len(second)] == counts
        for a, b in itertools.product(first, second):
            assert sign * (a[axis] - b[axis]) >= SPRITE
        if counts == [1, 1]:
            items = [Item("cat", "red", *first[0]), Item("dog", "blue", *second[0])]
            assert relation_between(*items) == relation
            assert relation_between(*items[::-1]) == opposite(relation)


def test_diagonal_neighbours_have_no_relation() -> None:
    assert relation_between(Item("cat", "red", 0, 0), Item("dog", "red", 48, 48)) is None
    assert relation_between(Item("cat", "red", 0, 16), Item("dog", "red", 48, 0)) == "left of"


# ---- words ----------------------------------------------------------------------------------


def test_phrases() -> None:
    assert phrase((Group("apple", 1, "orange"),), None) == "an orange apple"
    assert phrase((Group("fish", 2), Group("butterfly", 3, "red")), None) == "two fish and three red butterflies"
    assert phrase((Group("cat"), Group("dog"), Group("umbrella")), None) == "a cat, a dog and an umbrella"
    assert phrase((Group("cat", 1, "red"), Group("dog", 2)), "above") == "a red cat above two dogs"


def test_captions_say_what_is_shown() -> None:
    for scene in EXAM[::7]:
        groups = seen_groups(scene)
        text = caption(scene)
        for g in groups:
            assert g.color in text
            assert (g.name if g.count == 1 else plural(g.name)) in text
        relation = seen_relation(scene)
        assert (relation is None) or f" {relation} " in text
        assert not any(c in naming_answer(scene).split() for c in COLORS)


def test_questions_are_answered_by_the_scene() -> None:
    """Every answer is checked against the items, not against the code that wrote it."""
    kinds = set()
    for i, scene in enumerate(EXAM[::5]):
        pairs = questions(scene, np.random.default_rng(i), training=False)
        assert len({q for q, _ in pairs}) == len(pairs)
        shown = {g.name: g for g in seen_groups(scene)}
        expected = {CAPTION_INSTRUCTION: caption(scene), NAME_QUESTION: naming_answer(scene)}
        for name in OBJECTS:
            items = [it for it in scene.items if it.name == name]
            expected[count_question(name)] = NUMBERS[len(items)]
            expected[f"Is there a{'n' * (name[0] in 'aeiou')} {name}?"] = "yes" if items else "no"
            if items:
                expected[color_question(name, len(items))] = items[0].color
        for a, b in itertools.permutations(shown.values(), 2):
            expected[position_question(a, b)] = ""
        for question, answer in pairs:
            kinds.add(question.split()[0])
            if question.startswith("Where"):
                a, b = next(
                    (a, b) for a, b in itertools.permutations(shown.values(), 2)
                    if position_question(a, b) == question
                )  # fmt: skip
                first = next(it for it in scene.items if it.name == a.name)
                second = next(it for it in scene.items if it.name == b.name)
                relation = next(r for r in RELATIONS if answer.startswith(r))
                dx, dy = first.x - second.x, first.y - second.y
                distance = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
                assert distance >= SPRITE and answer == position_answer(relation, b)
            else:
                assert expected[question] == answer
    assert kinds == {"Provide", "What", "How", "Is", "Where"}


def test_the_vocabulary_covers_names_colors_and_numbers() -> None:
    words = set(vocabulary())
    assert {"fish", "butterflies", "pink", "zero", "four"} <= words
    assert len(words) == 16 + 15 + 8 + 5  # "fish" is its own plural
