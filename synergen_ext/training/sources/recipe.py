"""The ``sources`` section of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ...processing.text import CHAT_TEMPLATES

#: What a source's files hold, and the tasks it can serve.
FORMATS = {
    "internvl": ("understand",),
    "conversations": ("understand",),
    "captions": ("generate",),
    "tar": ("understand", "generate"),
    "tokens": ("understand", "generate"),
    "datasets": ("understand", "generate"),
}


def _require(fits: object, where: str, name: str, wanted: str, got: Any) -> None:
    if not fits:
        raise ValueError(f"recipe: {where}: {name} must be {wanted}, got {got!r}")


@dataclass
class SourceRecipe:
    """One source. Weights are relative to the others of its task; without any, every row counts the same."""

    name: str
    format: str
    path: str
    root: str = ""  # where picture names begin
    weight: float = 0.0  # 0: as many as its rows
    repeat_time: float = 1.0  # below 1: that share of the rows, from the first on; above: rows counted that often
    data_augment: bool = False
    use_data_resampling: bool = False  # internvl: its datasets share the weight by the square root of their length

    def __post_init__(self) -> None:
        where = f"source {self.name!r}"
        _require(self.name, where, "name", "a text", self.name)
        _require(self.format in FORMATS, where, "format", f"one of {', '.join(FORMATS)}", self.format)
        _require(self.path, where, "path", "a path or URL", self.path)
        _require(0 <= self.weight < math.inf, where, "weight", "at least 0", self.weight)
        check_repeat_time(self.repeat_time, f"recipe: {where}")
        own = self.format == "internvl" and (self.repeat_time != 1 or self.root)
        _require(not own, where, "repeat_time and root", "left to the meta file", (self.repeat_time, self.root))
        augments = self.format in ("conversations", "datasets")
        _require(not self.data_augment or augments, where, "data_augment", "false", True)
        sqrt = self.use_data_resampling
        _require(not sqrt or self.format == "internvl", where, "use_data_resampling", "false", sqrt)


def check_repeat_time(value: float, where: str) -> None:
    """Raises:
    ValueError: neither in (0, 1] nor a whole number.
    """
    if not (0 < value <= 1 or (math.isfinite(value) and value > 1 and value == int(value))):
        raise ValueError(f"{where}: repeat_time must be in (0, 1] or a whole number, got {value!r}")


@dataclass
class SourcesRecipe:
    """Data from files, in place of scenes: ``understand`` for a stage's ``describe``, ``generate`` for ``paint``."""

    understand: list[SourceRecipe] = field(default_factory=list)
    generate: list[SourceRecipe] = field(default_factory=list)
    text_tokenizer: str = ""  # folder; empty: one is trained on the scenes' sentences
    image_tokenizer: str = ""  # folder; empty: one is trained on scenes, unless every picture is tokenised already
    template: str = "internlm2-chat"
    max_tokens: int = 4096  # longest sample; a stage's ``pack`` bounds it too
    max_bad: float = 0.01  # share of a source's draws that may be bad
    bad_after: int = 200  # draws of a source before its share counts
    workers: int = 2  # threads that read and decode; the order does not depend on them

    def __post_init__(self) -> None:
        where = "sources"
        known = self.template in CHAT_TEMPLATES
        _require(known, where, "template", f"one of {', '.join(CHAT_TEMPLATES)}", self.template)
        _require(self.max_tokens >= 1, where, "max_tokens", "at least 1", self.max_tokens)
        _require(0 <= self.max_bad < 1, where, "max_bad", "in [0, 1)", self.max_bad)
        _require(self.bad_after >= 1, where, "bad_after", "at least 1", self.bad_after)
        _require(0 <= self.workers <= 64, where, "workers", "in [0, 64]", self.workers)
        _require(self.understand or self.generate, where, "understand or generate", "a list of sources", [])
        names = [s.name for s in (*self.understand, *self.generate)]
        _require(len(set(names)) == len(names), where, "names", "different from each other", names)
        for task in ("understand", "generate"):
            sources = getattr(self, task)
            weighted = sum(s.weight > 0 for s in sources)
            _require(weighted in (0, len(sources)), where, f"weight in {task}", "in all sources or in none", weighted)
            for s in sources:
                fits = task in FORMATS[s.format]
                _require(fits, f"source {s.name!r}", "format", f"one that serves {task}", s.format)

    @property
    def tokenised(self) -> bool:
        """Every picture is tokenised already."""
        return all(s.format == "tokens" for s in (*self.understand, *self.generate))
