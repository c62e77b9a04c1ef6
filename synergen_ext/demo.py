"""The demo: pictures painted from words, and drawn pictures described, on two sheets and one page.

Everything asked of the model is fixed here or drawn from the held-out exam by seed; nothing is picked by its result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ._version import __version__
from .scenes import CAPTION_INSTRUCTION, Group, Scene, caption, phrase
from .scenes.compose import exam_scene, is_held_out
from .scenes.language import (
    NAME_QUESTION,
    NUMBERS,
    color_question,
    count_question,
    naming_answer,
    position_answer,
    position_question,
)

if TYPE_CHECKING:
    from .generation.pipeline import Pipeline

OnProgress = Callable[[int, int], None]

#: What is painted: every kind of request, half of them with a combination that training never saw.
REQUESTS: tuple[tuple[tuple[Group, ...], str | None], ...] = (
    ((Group("cat", 1, "red"),), None),
    ((Group("dog", 1, "blue"),), None),
    ((Group("duck", 3, "yellow"),), None),
    ((Group("house", 1, "purple"),), None),
    ((Group("apple", 2, "red"), Group("car", 1, "blue")), "left of"),
    ((Group("umbrella", 1, "pink"), Group("teapot", 1, "orange")), None),
    ((Group("butterfly", 1, "purple"), Group("flower", 1, "red")), "above"),
    ((Group("fish", 4, "green"),), None),
)
#: Exam scenes shown: one of each of the six tags, 100 apart.
TAGS, PER_TAG = 6, 100

PAINTED, DESCRIBED, PAGE = "painted.png", "described.png", "demo.md"
_INK, _GRAY, _GREEN, _RED = (20, 20, 20), (110, 110, 110), (20, 120, 50), (190, 30, 30)


@dataclass(frozen=True)
class Painted:
    path: Path
    prompts: list[str]
    new: list[bool]  # the prompt holds a combination that training never saw
    seed: int  # of the first picture; the next has the next
    guidance: float


@dataclass(frozen=True)
class Answer:
    question: str
    text: str  # the model's
    truth: str

    @property
    def right(self) -> bool:
        return same_answer(self.text, self.truth)


@dataclass(frozen=True)
class Picture:
    """One drawn picture: what the model says it shows, what was drawn, and the questions."""

    caption: str
    truth: str
    answers: list[Answer]


@dataclass(frozen=True)
class Described:
    path: Path
    pictures: list[Picture]

    @property
    def score(self) -> tuple[int, int]:
        """Questions answered right, and questions asked."""
        answers = [a for p in self.pictures for a in p.answers]
        return sum(a.right for a in answers), len(answers)


def check_can_draw() -> None:
    """Raises ValueError where the package that draws the scenes is missing."""
    try:
        exam_scene(0).image()
    except ImportError as error:
        raise ValueError(str(error)) from error


def prompts() -> list[str]:
    return [phrase(groups, relation) for groups, relation in REQUESTS]


def paint(pipeline: Pipeline, out: Path, seed: int = 0, on_progress: OnProgress | None = None) -> Painted:
    """Paint ``prompts()``, the k-th with seed ``seed + k``, and write the contact sheet ``out/painted.png``.

    The folder must exist.
    """
    words = prompts()
    seeds = list(range(seed, seed + len(words)))
    pictures = pipeline.paint(words, seeds=seeds, on_progress=on_progress)
    new = [is_held_out(groups, relation) for groups, relation in REQUESTS]
    guidance = pipeline.config.guidance
    note = f"synergen_ext {__version__}, seeds {seed} to {seeds[-1]}, guidance {guidance:g}. "
    note += "* = a combination never seen in training."
    path = out / PAINTED
    _contact_sheet(pictures, [w + "*" * n for w, n in zip(words, new, strict=True)], note).save(path)
    return Painted(path, words, new, seed, guidance)


def describe(pipeline: Pipeline, out: Path, seed: int = 0, on_progress: OnProgress | None = None) -> Described:
    """Show the model one held-out scene of each exam tag, ask about it, and write ``out/described.png``."""
    scenes = [exam_scene(tag * PER_TAG + seed % PER_TAG) for tag in range(TAGS)]
    images = [Image.fromarray(s.image()) for s in scenes]
    pictures = []
    for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        pairs = scene_questions(scene)
        asked = [CAPTION_INSTRUCTION, *(q for q, _ in pairs)]
        said = pipeline.ask([image] * len(asked), asked)
        answers = [Answer(q, text, truth) for (q, truth), text in zip(pairs, said[1:], strict=True)]
        pictures.append(Picture(said[0], caption(scene), answers))
        if on_progress:
            on_progress(i + 1, len(scenes))
    path = out / DESCRIBED
    _table(images, pictures).save(path)
    return Described(path, pictures)


def scene_questions(scene: Scene) -> list[tuple[str, str]]:
    """The demo's questions about a scene with their true answers: names, then colour and count, then place."""
    groups = scene.request.groups
    shown = {i.name: i.color for i in scene.items}
    first = groups[0]
    pairs = [
        (NAME_QUESTION, naming_answer(scene)),
        (color_question(first.name, first.count), shown[first.name]),
        (count_question(first.name), NUMBERS[first.count]),
    ]
    if scene.request.relation:
        pairs.append((position_question(*groups), position_answer(scene.request.relation, groups[1])))
    return pairs


def same_answer(a: str, b: str) -> bool:
    """Equal as lists of things: ``a cat and a dog`` is ``a dog and a cat``."""
    return _things(a) == _things(b)


def _things(text: str) -> list[str]:
    return sorted(re.split(r", | and ", text.strip().rstrip(".").lower()))


def write_page(out: Path, painted: Painted, described: Described) -> Path:
    """Both sheets and the words on one Markdown page, ``out/demo.md``."""
    right, asked = described.score
    lines = [
        "# Painted from words",
        "",
        f"Seeds from {painted.seed}, guidance {painted.guidance:g}. A star: a combination that training never saw.",
        "",
        f"![painted pictures]({PAINTED})",
        "",
        *(f"- {p}{' *' if n else ''}" for p, n in zip(painted.prompts, painted.new, strict=True)),
        "",
        "# Drawn pictures, described",
        "",
        f"Held-out scenes; {right} of {asked} questions answered right.",
        "",
        f"![described pictures]({DESCRIBED})",
        "",
        "| picture | question | answer | truth |",
        "|---|---|---|---|",
    ]
    for i, p in enumerate(described.pictures, 1):
        lines.append(f"| {i} | {CAPTION_INSTRUCTION} | {_cell(p.caption)} | {_cell(p.truth)} |")
        lines += [f"| {i} | {a.question} | {_cell(a.text)} | {_cell(a.truth)} |" for a in p.answers]
    path = out / PAGE
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---- sheets -------------------------------------------------------------------------------------------------

_TILE, _MARGIN, _COLUMNS = 288, 20, 4


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break at spaces so that every line fits; a word too long for a line is cut off there."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines += [word] if lines[-1] else []
            lines[-1] = word
            while font.getlength(lines[-1]) > width:
                lines[-1] = lines[-1][:-1]
    return lines


def _contact_sheet(pictures: list[Image.Image], captions: list[str], note: str) -> Image.Image:
    """Pictures in rows of four, each with its words underneath."""
    font, small = ImageFont.load_default(20), ImageFont.load_default(15)
    texts = [_wrap(c, font, _TILE) for c in captions]
    caption_height = 26 * max(map(len, texts)) + 14
    rows = -(-len(pictures) // _COLUMNS)
    width = _MARGIN + _COLUMNS * (_TILE + _MARGIN)
    sheet = Image.new("RGB", (width, _MARGIN + rows * (_TILE + caption_height) + 34), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x = _MARGIN + i % _COLUMNS * (_TILE + _MARGIN)
        y = _MARGIN + i // _COLUMNS * (_TILE + caption_height)
        sheet.paste(_enlarged(picture, _TILE), (x, y))
        pen.rectangle((x - 1, y - 1, x + _TILE, y + _TILE), outline=(200, 200, 200))
        for j, line in enumerate(text):
            pen.text((x, y + _TILE + 8 + 26 * j), line, _INK, font)
    pen.text((_MARGIN, sheet.height - 30), note, _GRAY, small)
    return sheet


def _table(images: list[Image.Image], pictures: list[Picture]) -> Image.Image:
    """A row a picture: the picture, what the model says it shows, then each question beside the model's answer."""
    font, side, step = ImageFont.load_default(18), 192, 26
    left, middle, width = 2 * _MARGIN + side, 640, 1060
    blocks = []
    for p in pictures:
        rows = [("Caption", p.caption, p.truth if p.caption != p.truth else "", _INK)]
        for a in p.answers:
            rows.append((a.question, a.text, "" if a.right else a.truth, _GREEN if a.right else _RED))
        lines = []
        for question, text, truth, color in rows:
            asked = _wrap(question, font, middle - left - _MARGIN)
            said = [(line, color) for line in _wrap(text, font, width - middle - _MARGIN)]
            said += [(line, _GRAY) for line in _wrap(f"drawn: {truth}", font, width - middle - _MARGIN) if truth]
            lines += list(zip_longest(asked, said))
        blocks.append(lines)
    heights = [max(side, step * len(lines)) + _MARGIN for lines in blocks]
    sheet = Image.new("RGB", (width, _MARGIN + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    y = _MARGIN
    for image, lines, height in zip(images, blocks, heights, strict=True):
        sheet.paste(_enlarged(image, side), (_MARGIN, y))
        pen.rectangle((_MARGIN - 1, y - 1, _MARGIN + side, y + side), outline=(200, 200, 200))
        for j, (question, answer) in enumerate(lines):
            pen.text((left, y + step * j), question or "", _GRAY, font)
            if answer:
                pen.text((middle, y + step * j), *answer, font)
        y += height
    return sheet
