"""InternVL's conversations and our captions: JSONL rows whose pictures are files below a root."""

from __future__ import annotations

import itertools
from typing import Any

from .files import Lines, LineSource, inside, read_bytes
from .order import mix
from .pictures import fit
from .sample import BadSample, Sample

PLACE = "<image>"
#: Most pictures of one sample; they are all decoded before its tokens are counted.
MAX_PICTURES = 256
_ROLES = {"human": "user", "gpt": "assistant"}


def turns_of(row: dict[str, Any], pictures: int) -> list[tuple[str, str]]:
    """The turns of an InternVL row, ``(role, content)``; one picture without a place stands before the first question.

    A first turn that is no human's is dropped, as InternVL does.

    Raises:
        BadSample: turns that do not alternate, no answer, or places that are not as many as the pictures.
    """
    said = row.get("conversations")
    if not isinstance(said, list) or not all(isinstance(t, dict) for t in said):
        raise BadSample("wrong row", f"conversations must be a list of objects, got {type(said).__name__}")
    if said and said[0].get("from") != "human":
        said = said[1:]
    turns = []
    for turn, speaker in zip(said, itertools.cycle(("human", "gpt")), strict=False):
        if turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise BadSample("wrong row", f"a turn must be {speaker}'s, with a text value, got {turn!r:.120}")
        turns.append((_ROLES[speaker], turn["value"]))
    if len(turns) % 2:
        turns.pop()  # a question that nobody answered
    if not turns:
        raise BadSample("wrong row", "conversations must hold a question and its answer, got none")
    if pictures == 1 and PLACE not in turns[0][1]:
        turns[0] = ("user", f"{PLACE}\n{turns[0][1]}")
    places = sum(text.count(PLACE) for role, text in turns if role == "user")
    if places != pictures:
        raise BadSample("wrong row", f"the questions must name {pictures} times {PLACE}, got {places}")
    if any(PLACE in text for role, text in turns if role == "assistant"):
        raise BadSample("wrong row", f"an answer must be words, got {PLACE}")
    return turns


def pictures_of(row: dict[str, Any]) -> list[Any]:
    """The picture names of an InternVL row: none, one or several.

    Raises:
        BadSample: a video, or more than ``MAX_PICTURES``.
    """
    if row.get("video") is not None:
        raise BadSample("video", "videos cannot be read")
    image = row.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if len(names) > MAX_PICTURES:
        raise BadSample("wrong row", f"a sample must have at most {MAX_PICTURES} pictures, got {len(names)}")
    return names


class Conversations(LineSource):
    """Understanding: rows ``{image, conversations: [{from, value}]}``, words only without ``image``.

    Args:
        lines: the JSONL file.
        root: folder or URL that picture names begin at.
        size: pixels of the model's pictures, ``(height, width)``.
        augment: InternVL's ``data_augment``.
    """

    def __init__(self, lines: Lines, root: str, size: tuple[int, int], augment: bool = False) -> None:
        super().__init__(lines)
        self.root, self.size, self.augment = root, size, augment

    def read(self, index: int, salt: int) -> Sample:
        row = self.lines.row(index)
        names = pictures_of(row)
        turns = turns_of(row, len(names))
        pictures = []
        for i, name in enumerate(names):
            path = inside(self.root, name)
            pictures.append(fit(read_bytes(path), path, self.size, False, mix(salt, i) if self.augment else None))
        return Sample(turns, pictures)


class Captions(LineSource):
    """Generation: rows ``{image, caption}``. Other keys are left alone."""

    def __init__(self, lines: Lines, root: str, size: tuple[int, int]) -> None:
        super().__init__(lines)
        self.root, self.size = root, size

    def read(self, index: int, salt: int) -> Sample:
        row = self.lines.row(index)
        caption = caption_of(row)
        path = inside(self.root, row.get("image"))
        return Sample(caption, [fit(read_bytes(path), path, self.size, crop=True)])


def caption_of(row: dict[str, Any]) -> str:
    """Raises:
    BadSample: no caption.
    """
    caption = row.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample("wrong row", f"caption must be a text, got {caption!r:.80}")
    return caption
