"""The scorer reads true scenes, and refuses what is no object."""

import itertools

import numpy as np
import pytest
from PIL import Image

from synergen_ext.evaluation.scorer import Detection, read_picture, read_pictures
from synergen_ext.evaluation.validation import (
    NO_OBJECTS,
    WEAR,
    compare,
    read_exactly,
    validate,
)
from synergen_ext.scenes import CANVAS, COLORS, OBJECTS, SPRITE, draw, sprite
from synergen_ext.scenes.compose import exam_scene


@pytest.fixture(scope="module")
def figures() -> dict:
    return validate(n=240)


def seen(picture: np.ndarray) -> list[tuple]:
    return sorted((d.name, d.color, *d.corner) for d in read_picture(picture))


# ---- fit to judge ---------------------------------------------------------------------------


def test_true_scenes_read_right(figures: dict) -> None:
    assert set(figures["true"]) == {"object", "count", "color", "position", "all"}
    assert all(share >= 0.99 for share in figures["true"].values()), figures["true"]


@pytest.mark.parametrize("kind", WEAR)
def test_worn_scenes_read_right(figures: dict, kind: str) -> None:
    assert figures[kind]["all"] >= 0.95, figures[kind]


@pytest.mark.parametrize("kind", NO_OBJECTS)
def test_wrong_shapes_are_refused(figures: dict, kind: str) -> None:
    assert figures["rejected"][kind] >= 0.95, figures["rejected"]


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_in_every_color(name: str) -> None:
    colors = list(COLORS)
    pictures = np.stack([draw([(name, c, 8 * (i % 8), 8 * (7 - i % 8))]) for i, c in enumerate(colors)])
    for i, (color, found) in enumerate(zip(colors, read_pictures(pictures), strict=True)):
        assert [(d.name, d.color, d.corner) for d in found] == [(name, color, (8 * (i % 8), 8 * (7 - i % 8)))]
        assert found[0].score > 0.99


def test_boxes_are_tight() -> None:
    for name, (x, y) in itertools.product(OBJECTS, [(0, 0), (56, 48)]):
        picture = draw([(name, "blue", x, y)])
        inked = np.argwhere((picture < 230).any(-1))
        (y0, x0), (y1, x1) = inked.min(0), inked.max(0) + 1
        (found,) = read_picture(picture)
        assert np.abs(np.subtract(found.box, (x0, y0, x1, y1))).max() <= 1, name


def test_off_the_grid() -> None:
    rng = np.random.default_rng(0)
    for _ in range(24):
        name, color = rng.choice(OBJECTS), rng.choice(list(COLORS))
        x, y = (int(v) for v in rng.integers(0, CANVAS - SPRITE + 1, 2))
        assert seen(draw([(name, color, x, y)])) == [(name, color, x, y)]


def test_touching_objects_are_told_apart() -> None:
    items = [("book", "red", 0, 0), ("book", "red", 40, 0), ("car", "red", 0, 40), ("house", "red", 40, 40)]
    assert seen(draw(items)) == sorted(items)


def test_an_empty_picture_holds_nothing() -> None:
    for value in (255, 250, 0, 128):
        assert read_picture(np.full((CANVAS, CANVAS, 3), value, np.uint8)) == []
    noise = np.random.default_rng(0).integers(0, 256, (CANVAS, CANVAS, 3), dtype=np.uint8)
    assert read_picture(noise) == []


# ---- negative controls: each must be caught -------------------------------------------------


def test_controls_are_caught() -> None:
    caught = {"color": 0, "missing": 0, "moved": 0, "half": 0, "extra": 0, "other": 0}
    scenes = [exam_scene(i) for i in range(0, 600, 15)]
    for scene in scenes:
        items = [(i.name, i.color, i.x, i.y) for i in scene.items]
        name, color, x, y = items[0]
        wrong = list(COLORS)[(list(COLORS).index(color) + 3) % 8]
        other = OBJECTS[(OBJECTS.index(name) + 1) % 16]
        half = draw(items)
        half[y : y + 20, x : x + SPRITE] = 255
        free = next(
            ((px, py) for px in range(0, 57, 8) for py in range(0, 57, 8)
             if all(max(abs(px - i.x), abs(py - i.y)) >= SPRITE for i in scene.items)), None
        )  # fmt: skip
        altered = {
            "color": draw([(name, wrong, x, y), *items[1:]]),
            "missing": draw(items[1:]),
            "half": half,
            "other": draw([(other, color, x, y), *items[1:]]),
        }
        if free:
            altered["extra"] = draw([*items, ("star", "green", *free)])
            altered["moved"] = draw([(name, color, *free), *items[1:]])
        for kind, picture in altered.items():
            caught[kind] += not compare(scene.items, read_picture(picture))["all"]
            if kind in ("color", "moved"):  # ... and as what it is
                got = compare(scene.items, read_picture(picture))
                assert got["object"] and got["count"]
                assert got["color"] == (kind == "moved")
    movable = caught["moved"]
    assert caught["color"] == caught["missing"] == caught["half"] == caught["other"] == len(scenes)
    assert movable == caught["extra"] and movable >= 10


def test_an_object_in_two_colors_is_an_object_without_a_color() -> None:
    for name in ("cat", "house", "fish", "book"):
        picture = draw([(name, "red", 16, 16)])
        blue = draw([(name, "blue", 16, 16)])
        picture[40:] = blue[40:]
        (found,) = read_picture(picture)
        assert found.name == name and found.color is None


def test_a_pale_object_keeps_its_name() -> None:
    ink = 255 - draw([("duck", "green", 24, 24)]).astype(np.float32)
    (found,) = read_picture((255 - 0.8 * ink).astype(np.uint8))
    assert (found.name, found.color) == ("duck", "green")


# ---- comparison and interface ---------------------------------------------------------------


def test_compare_names_the_part_that_is_wrong() -> None:
    scene = exam_scene(110)  # two objects
    truth = [Detection(i.name, i.color, (0, 0, 1, 1), 1.0, (i.x, i.y)) for i in scene.items]
    assert len(truth) == 2 and compare(scene.items, truth)["all"]
    a, b = truth
    recolored = Detection(a.name, None, a.box, 1.0, a.corner)
    assert compare(scene.items, [recolored, b]) == {
        "object": True, "count": True, "color": False, "position": True, "all": False,
    }  # fmt: skip
    moved = Detection(a.name, a.color, a.box, 1.0, (a.corner[0] + 4, a.corner[1]))
    assert compare(scene.items, [moved, b])["position"] is False
    assert compare(scene.items, [a])["count"] is False
    assert compare(scene.items, [a, b, b])["count"] is False
    assert compare(scene.items, [])["object"] is False


def test_one_picture_many_pictures_and_pil_agree() -> None:
    pictures = np.stack([exam_scene(i).image() for i in range(200, 210)])
    many = read_pictures(pictures, batch=3)
    assert many == [read_picture(p) for p in pictures]
    assert many == read_pictures([Image.fromarray(p) for p in pictures])
    assert read_exactly([exam_scene(i) for i in range(200, 210)], pictures) == [True] * 10
    assert read_pictures(np.zeros((0, CANVAS, CANVAS, 3), np.uint8)) == []
    surest = many[0]
    assert [d.score for d in surest] == sorted((d.score for d in surest), reverse=True)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((96, 96), np.uint8),
        np.zeros((96, 96, 3), np.float32),
    ],
)
def test_other_pictures_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[96, 96, 3\], got"):
        read_picture(picture)


def test_the_drawing_of_reference_is_not_changed() -> None:
    before = sprite("cat", "red").copy()
    read_picture(draw([("cat", "red", 0, 0)]))
    np.testing.assert_array_equal(before, sprite("cat", "red"))
