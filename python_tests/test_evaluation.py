"""GenEval's rules, its folders, and the exams, with painters and answerers whose score is known."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from synergen_ext.evaluation import answers, exam
from synergen_ext.evaluation.folders import read_folder, score_folder, write_folder
from synergen_ext.evaluation.geneval import (
    SCENE_RULES,
    Rules,
    judge,
    relations,
    score,
    summarise,
    wilson,
)
from synergen_ext.evaluation.scorer import read_picture
from synergen_ext.scenes import (
    COLORS,
    OBJECTS,
    RELATIONS,
    SPRITE,
    TAGS,
    caption,
    draw,
    exam_requests,
    training_scene,
)
from synergen_ext.scenes.compose import exam_scene, opposite
from synergen_ext.scenes.language import seen_groups


def box(x: float, y: float, size: float = 10) -> list[float]:
    return [x, y, x + size, y + size]


def thing(name: str, x: float = 0, y: float = 0, **more: object) -> dict:
    return {"class": name, "box": box(x, y), **more}


def row(*include: dict, tag: str = "two_object", **more: object) -> dict:
    return {"tag": tag, "include": list(include), "prompt": "a prompt", **more}


def detections(items: list) -> list[dict]:
    """What a perfect detector sees."""
    return [{"class": i.name, "color": i.color, "box": [i.x, i.y, i.x + SPRITE, i.y + SPRITE]} for i in items]


# ---- the position rule ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-20, 0, {"left of"}),
        (20, 0, {"right of"}),
        (0, -20, {"above"}),
        (0, 20, {"below"}),
        (20, 20, {"right of", "below"}),  # (20 - 2) / 28.3 = 0.64 on both axes
        (0, 0, set()),
        (2, 0, set()),  # 2 is a tenth of both sizes
        (2.1, 0, set()),  # 0.1 / 2.1 = 0.05
        (3.9, 0, set()),  # 1.9 / 3.9 = 0.49
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 = 0.51
        (20, 12.4, {"right of"}),  # 10.4 / 23.5 = 0.44 downwards
        (20, 15, {"right of", "below"}),  # 13 / 25 = 0.52 downwards
    ],
)
def test_relations_of_boxes_of_size_10(dx: float, dy: float, expected: set) -> None:
    assert relations(box(50 + dx, 50 + dy), box(50, 50)) == expected
    assert relations(box(50, 50), box(50 + dx, 50 + dy)) == {opposite(r) for r in expected}


def test_larger_boxes_take_more_off() -> None:
    assert relations([0, 0, 40, 10], [30, 0, 70, 10]) == {"left of"}  # (30 - 8) / 30
    assert relations([0, 0, 40, 10], [30, 0, 230, 10]) == {"left of"}
    assert relations([0, 0, 40, 10], [12, 0, 52, 10]) == set()  # (12 - 8) / 12 = 0.33
    assert relations([0, 0, 40, 10], [12, 0, 52, 10], offset=0.0) == {"left of"}


# ---- one picture ----------------------------------------------------------------------------


def test_include_counts_colors_and_positions() -> None:
    wanted = row({"class": "cat", "count": 1}, {"class": "dog", "count": 2, "color": "red"})
    dogs = [thing("dog", 30, color="red"), thing("dog", 60, color="red")]
    assert judge(wanted, [thing("cat"), *dogs]).correct
    assert judge(wanted, [thing("cat"), *dogs]).reasons == ()
    assert not judge(wanted, dogs).correct
    assert judge(wanted, [thing("cat"), dogs[0]]).reasons == ("dog: wanted 2, got 1",)
    verdict = judge(wanted, [thing("cat"), dogs[0], thing("dog", 60, color="blue")])
    assert not verdict.correct and verdict.reasons == ("dog: wanted 2 red, got red, blue",)
    assert not judge(wanted, [thing("cat"), dogs[0], thing("dog", 60)]).correct, "no colour is no match"


def test_only_the_surest_are_judged() -> None:
    wanted = row({"class": "cat", "count": 1, "color": "red"})
    sure, unsure = thing("cat", color="red", score=0.9), thing("cat", 30, color="blue", score=0.8)
    assert judge(wanted, [unsure, sure]).correct
    assert not judge(wanted, [{**unsure, "score": 0.95}, sure]).correct


def test_positions_hold_for_every_pair() -> None:
    wanted = row({"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["right of", 0]})
    assert judge(wanted, [thing("cat"), thing("cat", 0, 20), thing("dog", 60)]).correct
    verdict = judge(wanted, [thing("cat"), thing("cat", 90), thing("dog", 60)])
    assert verdict.reasons == ("dog: wanted right of the cat, got left of",)
    verdict = judge(wanted, [thing("cat"), thing("dog", 60)])
    assert verdict.reasons == ("cat: wanted 2, got 1", "dog: nothing to be right of")


def test_extra_objects_are_forgiven_except_where_excluded() -> None:
    wanted = row({"class": "cat", "count": 2}, tag="counting")
    three = [thing("cat", 30 * i) for i in range(3)]
    assert judge(wanted, three).correct
    wanted["exclude"] = [{"class": "cat", "count": 3}]
    assert not judge(wanted, three).correct
    assert judge(wanted, three[:2]).correct
    assert judge(wanted, [*three[:2], thing("dog")]).correct


def test_thresholds_are_genevals() -> None:
    wanted = row({"class": "cat", "count": 1})
    assert not judge(wanted, [thing("cat", score=0.3)]).correct
    assert judge(wanted, [thing("cat", score=0.31)]).correct
    counting = {**wanted, "tag": "counting"}
    assert not judge(counting, [thing("cat", score=0.9)]).correct
    assert judge(counting, [thing("cat", score=0.91)]).correct
    assert judge(counting, [thing("cat", score=0.1)], SCENE_RULES).correct
    many = row({"class": "cat", "count": 17})
    assert not judge(many, [thing("cat", 20 * i) for i in range(17)]).correct
    assert judge(many, [thing("cat", 20 * i) for i in range(17)], Rules(max_objects=17)).correct


# ---- the exam's own requests: every true scene is right, every wrong variant is wrong ----------


def test_every_true_exam_scene_is_right() -> None:
    for i, request in enumerate(exam_requests()):
        scene = exam_scene(i)
        assert judge(request.metadata(), detections(scene.items)).correct, request.prompt


def test_every_wrong_variant_of_an_exam_scene_is_wrong() -> None:
    tried = {tag: 0 for tag in TAGS}
    for i, request in enumerate(exam_requests()):
        items, data = list(exam_scene(i).items), request.metadata()
        other = next(n for n in OBJECTS if all(n != g.name for g in request.groups))
        wrong = [items[1:], [dataclasses.replace(items[0], name=other), *items[1:]]]
        if request.tag == "counting":
            wrong.append([*items, items[0]])
        if request.groups[0].color:
            bad = next(c for c in COLORS if all(c != it.color for it in items))
            wrong.append([dataclasses.replace(items[0], color=bad), *items[1:]])
        if request.tag == "color_attr":
            a, b = items
            wrong.append([dataclasses.replace(a, color=b.color), dataclasses.replace(b, color=a.color)])
        if request.relation:
            a, b = items
            wrong.append([dataclasses.replace(a, x=b.x, y=b.y), dataclasses.replace(b, x=a.x, y=a.y)])
            turned = dataclasses.replace(a, x=b.y, y=b.x), dataclasses.replace(b, x=a.y, y=a.x)
            wrong.append(list(turned))
            wrong.append([a, dataclasses.replace(b, x=a.x, y=a.y)])
        for variant in wrong:
            assert not judge(data, detections(variant)).correct, (request.prompt, variant)
            tried[request.tag] += 1
    assert tried == {
        "single_object": 200, "two_object": 200, "counting": 300, "colors": 300, "position": 500,
        "color_attr": 400,
    }  # fmt: skip


def test_the_relation_is_read_from_either_side() -> None:
    for request in exam_requests()[400:500]:
        data = request.metadata()
        relation, first = str(request.relation), request.groups[0].name
        for asked in RELATIONS:
            a, b = {"left of": ((0, 28), (56, 28)), "above": ((28, 0), (28, 56))}.get(asked) or (
                ((56, 28), (0, 28)) if asked == "right of" else ((28, 56), (28, 0))
            )
            found = [thing(first, *a), thing(request.groups[1].name, *b)]
            assert judge(data, found).correct == (asked == relation)


# ---- many pictures --------------------------------------------------------------------------


def test_overall_is_the_plain_mean_of_the_tags() -> None:
    results = [
        {"tag": "colors", "index": 0, "correct": True},
        {"tag": "single_object", "index": 1, "correct": True},
        {"tag": "single_object", "index": 1, "correct": False},
        {"tag": "single_object", "index": 2, "correct": False},
        {"tag": "single_object", "index": 2, "correct": False},
    ]
    figures = summarise(results)
    assert figures["tags"] == {"single_object": 0.25, "colors": 1.0}
    assert list(figures["tags"]) == ["single_object", "colors"], "GenEval's order"
    assert figures["overall"] == 0.625
    assert figures["any_correct"] == pytest.approx(2 / 3)
    assert (figures["pictures"], figures["prompts"]) == (5, 3)
    assert figures["interval"]["single_object"] == wilson(0.25, 2)
    with pytest.raises(ValueError, match="no results"):
        summarise([])


def test_genevals_own_results_can_be_summarised() -> None:
    """Its rows have no index; the prompt tells them apart."""
    rows = [{"tag": "colors", "prompt": p, "correct": c} for p, c in [("a", True), ("a", False), ("b", False)]]
    figures = summarise(rows)
    assert figures["any_correct"] == 0.5 and figures["tags"] == {"colors": pytest.approx(1 / 3)}


def test_wilson_interval() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # textbook values
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0.0
    assert wilson(0.3, 0) == (0.0, 1.0)


def test_score_refuses_a_wrong_number_of_prompts() -> None:
    with pytest.raises(ValueError, match="must have 1 prompts, got 0"):
        score([row({"class": "cat", "count": 1})], [])


# ---- folders --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two prompts with two pictures each; the second picture of the second prompt is wrong."""
    scenes = [exam_scene(0), exam_scene(450)]
    pictures = [[Image.fromarray(s.image())] * 2 for s in scenes]
    pictures[1] = [pictures[1][0], pictures[0][0]]
    write_folder(tmp_path, [s.request.metadata() for s in scenes], pictures)
    return tmp_path


def test_folder_has_genevals_layout_and_scores(folder: Path) -> None:
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == [
        f"{i:05d}/{name}" for i in (0, 1) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    rows, pictures = read_folder(folder)
    assert rows[1] == exam_scene(450).request.metadata() and len(pictures[0]) == 2
    steps: list = []
    figures = score_folder(folder, on_progress=lambda *step: steps.append(step))
    assert figures["tags"] == {"single_object": 1.0, "position": 0.5}
    assert figures["any_correct"] == 1.0 and steps == [(2, 4), (4, 4)]
    assert [r["correct"] for r in figures["results"]] == [True, True, True, False]
    assert figures["results"][3]["reason"]


def test_folder_with_enlarged_pictures(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            picture.resize((384, 384), Image.Resampling.NEAREST).save(path)
    assert score_folder(folder)["overall"] == 0.75


def test_folder_with_detections_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    table = {
        f"{i:05d}/samples/{k:04d}.png": [{**d, "score": 0.95} for d in detections(exam_scene(s).items)]
        for i, s in enumerate((0, 450))
        for k in (0, 1)
    }
    table["00001/samples/0000.png"][0]["score"] = 0.2  # below GenEval's threshold
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(table))
    assert score_folder(folder, path)["tags"] == {"single_object": 1.0, "position": 0.5}
    del table["00001/samples/0001.png"]
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="no entry '00001/samples/0001.png'"):
        score_folder(folder, path)
    for text in ("[", "[1]", '{"a": 1}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="detections.json"):
            score_folder(folder, path)


def test_broken_folders_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FileNotFoundError, match="no folder 00000"):
        score_folder(tmp_path_factory.mktemp("empty"))
    with pytest.raises(FileNotFoundError, match="no folder 00000"):
        score_folder(folder / "missing")
    picture = folder / "00000/samples/0000.png"
    picture.write_bytes(picture.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable picture"):
        score_folder(folder)
    Image.new("RGB", (96, 48)).save(picture)
    with pytest.raises(ValueError, match="must be square, got 96 x 48"):
        score_folder(folder)
    for path in folder.glob("00000/samples/*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no picture in"):
        score_folder(folder)
    (folder / "00000/metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="metadata.jsonl"):
        score_folder(folder)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "must be an object with a tag"),
        ({"tag": "colors", "include": []}, "prompt must be a string"),
        (row(), "include must not be empty"),
        (row({"count": 1}), "needs a class name"),
        (row({"class": "cat", "count": 0}), "count must be an integer >= 1, got 0"),
        (row({"class": "cat", "count": True}), "count must be an integer >= 1, got True"),
        (row({"class": "cat", "count": 1, "position": ["left of", 0]}), "position must be"),
        (row({"class": "c", "count": 1}, {"class": "d", "count": 1, "position": ["beside", 0]}), "position must be"),
        (row({"class": "cat", "count": 1}, exclude=[1]), "exclude must be a list of objects"),
    ],
)  # fmt: skip
def test_bad_metadata_is_refused(bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(bad, [])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (1, "object with a class"),
        ({"box": box(0, 0)}, "object with a class"),
        ({"class": "cat", "box": [0, 0, 1]}, "box must be"),
        ({"class": "cat", "box": [0, 0, 1, float("nan")]}, "box must be"),
        ({"class": "cat", "box": [0, 0, 1, "2"]}, "box must be"),
        (thing("cat", score="high"), "score must be a number"),
    ],
)
def test_bad_detections_are_refused(bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(row({"class": "cat", "count": 1}), [bad])


# ---- the exams ------------------------------------------------------------------------------


class Painter:
    """Stands in for ``Pipeline``: paints the true exam scenes, except where told to leave the paper white."""

    config = SimpleNamespace(guidance=2.5, image_temperature=1.0, image_top_k=0, image_top_p=1.0)

    def __init__(self, fails: tuple[int, ...] = (), scenes: list | None = None) -> None:
        scenes = [exam_scene(i) for i in range(600)] if scenes is None else scenes
        self.scenes = {s.request.prompt: s for s in reversed(scenes)}
        self.fails, self.asked, self.settings = fails, [], []

    def paint(self, prompts: list, seeds: list, on_progress: object = None, **settings: object) -> list:
        self.asked += list(zip(prompts, seeds, strict=True))
        self.settings.append(settings)
        if on_progress:
            on_progress(len(prompts), len(prompts))
        white = np.full((96, 96, 3), 255, np.uint8)
        return [
            Image.fromarray(white if seed in self.fails else self.scenes[p].image())
            for p, seed in zip(prompts, seeds, strict=True)
        ]

    def ask(self, pictures: list, questions: list, batch: int = 64) -> list[str]:
        """Answers from the picture alone, as a perfect model would."""
        return [answer(picture, question) for picture, question in zip(pictures, questions, strict=True)]


def answer(picture: Image.Image, question: str) -> str:
    """A right answer in words, in another order than the scene's own."""
    found = sorted(read_picture(picture), key=lambda d: d.name, reverse=True)
    names = list(dict.fromkeys(d.name for d in found))
    counts = {n: sum(d.name == n for d in found) for n in names}
    colors = {d.name: d.color for d in found}
    asked = answers.named(question)
    number = ["zero", "one", "two", "three", "four"]
    if question.startswith("How many"):
        return number[counts.get(next(iter(asked)), 0)] + "."
    if question.startswith("What color"):
        return str(colors[next(iter(asked))]).capitalize()
    if question.startswith("Where"):
        first, second = sorted(asked, key=question.index)
        a, b = (next(d for d in found if d.name == n) for n in (first, second))
        dx, dy = a.corner[0] - b.corner[0], a.corner[1] - b.corner[1]
        across, down = ("left of", "right of")[dx > 0], ("above", "below")[dy > 0]
        return f"{across if abs(dx) > abs(dy) else down} the {question.split(' the ')[-1].rstrip('?')}"
    if question.startswith("What is"):
        return " and ".join(f"{number[counts[n]]} {n}" for n in names)
    return " and ".join(f"{number[counts[n]]} {colors[n]} {n}" for n in names)


def test_a_perfect_painter_scores_one() -> None:
    painter, steps = Painter(), []
    figures = exam.generation_exam(
        painter, per_tag=4, images_per_prompt=2, guidance=3.0, seed=5, on_progress=lambda *s: steps.append(s)
    )
    assert figures["tags"] == dict.fromkeys(TAGS, 1.0)
    assert figures["overall"] == figures["any_correct"] == figures["exact"] == 1.0
    assert figures["pictures"] == 48 and figures["prompts"] == 24 and steps == [(48, 48)]
    assert painter.asked == [(r.prompt, s) for r in exam_requests(4) for s in (5, 6)]
    assert painter.settings[0]["guidance"] == 3.0 and "temperature" not in painter.settings[0]
    assert figures["settings"] == {
        "images_per_prompt": 2, "seed": 5, "guidance": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "exam_seed": 2024,
    }  # fmt: skip
    assert "results" not in figures
    json.dumps(figures)


def test_a_painter_that_fails_every_second_picture(tmp_path: Path) -> None:
    figures = exam.generation_exam(Painter(fails=(1,)), 3, 2, folder=tmp_path, keep_results=True)
    assert figures["tags"] == dict.fromkeys(TAGS, 0.5)
    assert figures["overall"] == figures["exact"] == 0.5 and figures["any_correct"] == 1.0
    assert figures["settings"]["guidance"] == 2.5
    again = score_folder(tmp_path)
    assert again["results"] == figures["results"]
    with pytest.raises(ValueError, match="images_per_prompt must be >= 1, got 0"):
        exam.generation_exam(Painter(), 1, 0)


def test_extra_objects_cost_only_exactness() -> None:
    class Generous(Painter):
        full = 0

        def paint(self, prompts: list, seeds: list, **settings: object) -> list:
            out = []
            for prompt in prompts:
                items = [(i.name, i.color, i.x, i.y) for i in self.scenes[prompt].items]
                other = next(n for n in OBJECTS if all(n != i[0] for i in items))
                room = [
                    (x, y)
                    for x, y in itertools.product(range(0, 57, 8), repeat=2)
                    if all(max(abs(x - i[2]), abs(y - i[3])) >= SPRITE for i in items)
                ]
                self.full += not room
                out.append(Image.fromarray(draw([*items, *[(other, "green", *r) for r in room[:1]]])))
            return out

    painter = Generous()
    figures = exam.generation_exam(painter, 2, 1)
    assert figures["overall"] == 1.0
    assert figures["exact"] == pytest.approx(painter.full / 12) and painter.full < 8


def test_guidance_is_swept_on_training_prompts_only() -> None:
    requests = exam.sweep_requests(2)
    assert [r.tag for r in requests] == [t for t in TAGS for _ in range(2)]
    assert not {r.prompt for r in requests} & {r.prompt for r in exam_requests()}
    painter = Painter(scenes=[training_scene(exam.SWEEP_SEED, i) for i in range(300)])
    steps: list = []
    figures = exam.guidance_sweep(
        painter, [1.0, 3.0], per_tag=2, temperature=0.9, on_progress=lambda *s: steps.append(s)
    )
    assert set(figures) == {1.0, 3.0} and figures[3.0]["settings"]["guidance"] == 3.0
    assert [s["guidance"] for s in painter.settings] == [1.0, 3.0]
    assert all(s["temperature"] == 0.9 for s in painter.settings)
    assert figures[1.0]["overall"] == 1.0 and steps == [(12, 24), (24, 24)]


def test_a_perfect_answerer_scores_one() -> None:
    steps: list = []
    figures = exam.understanding_exam(Painter([]), per_tag=4, on_progress=lambda *s: steps.append(s))
    for name in ("naming", "naming_counts", "color", "counting", "position", "caption"):
        assert figures[name] == 1.0, name
    assert 0.5 <= figures["caption_exact"] < 1.0, "this answerer never says a relation"
    scenes = exam.exam_scenes(4)
    groups = sum(len(s.request.groups) for s in scenes)
    assert figures["asked"]["naming"] == figures["asked"]["caption"] == len(scenes) == 24
    assert figures["asked"]["color"] == groups and figures["asked"]["counting"] == groups + 24
    assert figures["asked"]["position"] >= 2 * 4 and figures["asked"]["position"] % 2 == 0
    kinds = ("naming", "caption", "color", "counting", "position")
    assert steps[-1] == (sum(figures["asked"][k] for k in kinds),) * 2
    json.dumps(figures)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("", {"naming": 0.0, "color": 0.0, "counting": 0.0, "position": 0.0, "caption": 0.0}),
        ("zero", {"naming": 0.0, "color": 0.0, "position": 0.0, "caption": 0.0}),
        (" and ".join(OBJECTS), {"naming": 0.0, "color": 0.0, "counting": 0.0, "caption": 1.0}),
    ],
)
def test_constant_answers_score_what_they_deserve(reply: str, expected: dict) -> None:
    class Parrot(Painter):
        def ask(self, pictures: list, questions: list, batch: int = 64) -> list[str]:
            return [reply] * len(questions)

    figures = exam.understanding_exam(Parrot([]), per_tag=2)
    assert {k: figures[k] for k in expected} == expected
    if reply == "zero":
        asked = figures["asked"]["counting"]
        assert figures["counting"] == pytest.approx(12 / asked), "right about each absent object, no more"


def test_sentences_are_compared_by_what_they_say() -> None:
    assert answers.said("Two red cats, and a dog.") == answers.said("a dog and two red cats")
    assert answers.said("a cat left of a dog") == answers.said("a dog right of a cat")
    assert answers.said("a cat above a dog") != answers.said("a dog above a cat")
    assert answers.said("a red cat and a blue dog") != answers.said("a blue cat and a red dog")
    assert answers.said("two cats") != answers.said("a cat")
    assert answers.named("There are butterflies; also fish, I think!") == {"butterfly", "fish"}
    for i in range(0, 600, 11):
        scene = exam_scene(i)
        groups, relation = answers.said(caption(scene))
        assert groups == {(g.name, g.count, g.color) for g in seen_groups(scene)}
        assert (relation is None) == (not any(f" {r} " in caption(scene) for r in RELATIONS))


class FakeTokenizer:
    """Keeps pictures whole (``blur`` 0) or averages them over blocks."""

    codebook_size = 4
    stride = 8

    def __init__(self, blur: int = 0) -> None:
        self.blur = blur

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.kept = pixels
        ids = torch.tensor([0, 1, 1, 3]).repeat(len(pixels), 12, 3)  # [B, 12, 12]: the same in every row
        ids[0, :, ::4] = 1  # and in the first picture of a batch other ones
        return ids

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.blur:
            return self.kept
        small = torch.nn.functional.avg_pool2d(self.kept, self.blur)
        return small.repeat_interleave(self.blur, 2).repeat_interleave(self.blur, 3)


def test_tokenizer_exam() -> None:
    perfect = exam.tokenizer_exam(FakeTokenizer(), n=20, batch=8)
    assert perfect["read_true"] == perfect["read_reconstructed"] == 1.0
    assert perfect["box_psnr"] > 90 and perfect["psnr"] > 90
    assert perfect["codes_used"] == 0.75
    assert 0.5 < perfect["steady_ids"] < 1
    poor = exam.tokenizer_exam(FakeTokenizer(blur=8), n=12)
    assert poor["read_true"] == 1.0 and poor["read_reconstructed"] < 0.5
    low, high = poor["box_psnr_middle"]
    assert low <= poor["box_psnr"] <= high and low < high
    assert poor["box_psnr"] < poor["psnr"] < 30, "white paper flatters"
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        exam.tokenizer_exam(FakeTokenizer(), n=0)


def test_steadiness_by_hand() -> None:
    """Three cats of two tokens, one dog: the columns' commonest are 2 of 3, 3 of 3, and the dog's own."""
    cats, dog = np.array([[1, 5], [1, 5], [2, 5]]), np.array([[3, 4]])
    assert exam._steadiness([cats, dog]) == (2 + 3 + 1 + 1) / 8


def test_box_psnr_of_the_exam_is_the_closed_form() -> None:
    """Every ink pixel off by 10 levels: 20 log10(255 / 10) inside and outside the boxes."""

    class Off(FakeTokenizer):
        def decode(self, ids: torch.Tensor) -> torch.Tensor:
            levels = torch.round((self.kept + 1) * 127.5)
            return torch.where(levels >= 128, levels - 10, levels + 10) / 127.5 - 1

    figures = exam.tokenizer_exam(Off(), n=4)
    expected = 20 * np.log10(255 / 10)
    assert figures["box_psnr"] == pytest.approx(expected, abs=1e-3)
    assert figures["psnr"] == pytest.approx(expected, abs=1e-3)
