"""The demo: its files, its honesty about right and wrong, and the README's words."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_tiny_checkpoint
from PIL import Image, ImageFont

from synergen_ext import demo
from synergen_ext.cli import main
from synergen_ext.generation.pipeline import Pipeline
from synergen_ext.scenes import COLORS, OBJECTS, Group, questions
from synergen_ext.scenes.compose import exam_scene
from synergen_ext.scenes.language import vocabulary

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


class Knowing:
    """Stands in for a pipeline that answers one kind of question right and the rest with "no idea"."""

    def ask(self, pictures, asked):
        found = []
        for picture, question in zip(pictures, asked, strict=True):
            scene = next(s for s in self.scenes if np.array_equal(s.image(), np.asarray(picture)))
            truth = dict(demo.scene_questions(scene))
            found.append(truth[question] if question.startswith("How many") else "no | idea")
        return found

    scenes = [exam_scene(100 * tag + 7) for tag in range(6)]


def test_demo_command(capsys, tiny, tmp_path):
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--out", str(out), "--checkpoint", str(tiny), "--seed", "2"]) == 0
    text, err = capsys.readouterr()
    assert err == ""
    for name in (demo.PAINTED, demo.DESCRIBED, demo.PAGE):
        assert str(out / name) in text and (out / name).stat().st_size > 100
    for prompt in demo.prompts():
        assert prompt in text
    with Image.open(out / demo.PAINTED) as sheet:
        assert sheet.width > 1000 and sheet.height > 600
        assert np.asarray(sheet).std() > 20  # there is something on it


def test_demo_is_a_function_of_its_seed(tiny, tmp_path):
    pipeline = Pipeline.from_pretrained(tiny)
    sheets = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        painted = demo.paint(pipeline, tmp_path / name, seed)
        sheets.append(painted.path.read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_painted_prompts_are_ones_the_scenes_can_show():
    words = {*vocabulary(), *COLORS, *OBJECTS, "a", "an", "and", "left", "right", "of", "above", "below", "photo"}
    prompts = demo.prompts()
    assert len(set(prompts)) == len(prompts) >= 8
    assert {w for p in prompts for w in p.split()} <= words
    assert all(sum(g.count for g in groups) <= 4 for groups, _ in demo.REQUESTS)


def test_painting_reports_which_prompts_are_new(tiny, tmp_path):
    painted = demo.paint(Pipeline.from_pretrained(tiny), tmp_path)
    new = dict(zip(painted.prompts, painted.new, strict=True))
    assert new["a blue dog"] and not new["a red cat"]
    assert 3 <= sum(painted.new) <= 5


def test_description_marks_right_and_wrong(tmp_path):
    seen = []
    described = demo.describe(Knowing(), tmp_path, seed=7, on_progress=lambda *p: seen.append(p))
    answers = [a for p in described.pictures for a in p.answers]
    counting = [a for a in answers if a.question.startswith("How many")]
    assert len(described.pictures) == 6 == len(counting) and seen[-1] == (6, 6)
    assert described.score == (6, len(answers)) and all(a.right for a in counting)
    painted = demo.Painted(tmp_path / "x.png", ["a red cat", "a blue dog"], [False, True], 0, 3.0)
    page = demo.write_page(tmp_path, painted, described).read_text()
    assert f"6 of {len(answers)} questions answered right" in page and "- a blue dog *\n" in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6 + len(answers)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}  # the model's own | is escaped


@pytest.mark.parametrize("index", range(0, 600, 37))
def test_truths_agree_with_the_trainings_questions(index):
    """The demo's truths are the exam's own answers, wherever training asks the same question."""
    scene = exam_scene(index)
    known = {}
    for seed in range(20):
        known.update(questions(scene, np.random.default_rng(seed), training=False))
    pairs = demo.scene_questions(scene)
    assert all(known[q] == a for q, a in pairs)
    assert len(pairs) == 3 + (scene.request.tag == "position")


def test_answers_are_compared_as_lists_of_things():
    assert demo.same_answer("a cat and a dog", "A dog and a cat.")
    assert demo.same_answer("a cat, a dog and a car", "a car, a cat and a dog")
    assert not demo.same_answer("two cats and a dog", "a cat and a dog")
    assert not demo.same_answer("", "zero")


@pytest.mark.parametrize("text", ["one two three four five six seven", "w" * 60, "short " + "w" * 60 + " end", ""])
def test_wrapped_lines_fit(text):
    font = ImageFont.load_default(18)
    lines = demo._wrap(text, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    if "w" not in text:
        assert " ".join(lines) == text


def test_requests_need_no_article_help():
    assert demo.phrase((Group("umbrella", 1, "orange"),), None) == "an orange umbrella"


def test_missing_renderer_is_one_line(capsys, tmp_path, monkeypatch):
    def missing(index):
        raise ImportError("drawing scenes needs the package resvg-py: pip install 'synergen_ext[scenes]'")

    monkeypatch.setattr(demo, "exam_scene", missing)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install 'synergen_ext[scenes]'" in err


def test_the_packages_checkpoint_knows_what_it_sees():
    """Far above guessing (8 colours, 16 names, 5 numbers); the exam says how far."""
    pipeline = Pipeline.from_pretrained()
    scenes = [exam_scene(100 * tag) for tag in range(4)]
    pairs = [(Image.fromarray(s.image()), q, a) for s in scenes for q, a in demo.scene_questions(s)]
    pictures, asked, truths = map(list, zip(*pairs, strict=True))
    answers = pipeline.ask(pictures, asked)
    assert sum(map(demo.same_answer, answers, truths)) >= len(truths) / 2


# ---- the README -----------------------------------------------------------------------------------------------


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_examples_run(tmp_path, monkeypatch):
    """With the checkpoint in the package, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    examples = blocks("python")
    assert len(examples) == 2
    for code in examples:
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "apples.png").is_file()


def test_readme_links_and_pictures_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://arxiv.org/") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_scores_are_those_of_the_checkpoint():
    spec = importlib.util.spec_from_file_location("write_scores", ROOT / "tools" / "write_scores.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    readme, scores = (ROOT / "README.md").read_text(), json.loads(tool.SCORES.read_text())
    assert tool.BETWEEN.search(readme)[0].count("\n|") > 20
    assert tool.readme_with(readme, scores) == readme


def test_readme_folders_exist():
    part = (ROOT / "README.md").read_text().split("## How the folders lie")[1].split("##")[0]
    names = [n for line in re.findall(r"^    (\S.*?)  ", part, re.MULTILINE) for n in line.split(", ")]
    assert len(names) >= 15
    for name in names:
        assert (ROOT / name).exists(), name


def test_readme_commands_exist(capsys):
    text = (ROOT / "README.md").read_text()
    for command in set(re.findall(r"`?synergen ([a-z]+) ", text)):
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets
