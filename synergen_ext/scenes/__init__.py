"""Scenes of 1-4 drawn objects with known contents: the demo's training data, questions and exam."""

from .compose import (
    RELATIONS,
    TAGS,
    Group,
    Item,
    Request,
    Scene,
    exam_requests,
    place,
    tokenizer_scene,
    training_scene,
)
from .language import CAPTION_INSTRUCTION, caption, phrase, questions
from .render import CANVAS, COLORS, OBJECTS, SPRITE, draw, sprite

__all__ = [
    "CANVAS",
    "CAPTION_INSTRUCTION",
    "COLORS",
    "OBJECTS",
    "RELATIONS",
    "SPRITE",
    "TAGS",
    "Group",
    "Item",
    "Request",
    "Scene",
    "caption",
    "draw",
    "exam_requests",
    "phrase",
    "place",
    "questions",
    "sprite",
    "tokenizer_scene",
    "training_scene",
]
