"""What every source gives, and how a sample that cannot be used says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray


@dataclass
class Sample:
    """One sample before it becomes tokens."""

    #: A caption (generation), or a conversation's turns, ``(role, content)``, with ``<image>`` where pictures stand.
    text: str | list[tuple[str, str]]
    #: Pictures in reading order: uint8 ``[H, W, 3]`` pixels, or int64 ``[h, w]`` image token ids.
    pictures: list[NDArray[Any]] = field(default_factory=list)


class BadSample(Exception):
    """A sample that is skipped and counted under ``cause``."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause, self.detail = cause, detail


class Source(Protocol):
    """Samples by number. ``read`` is called from several threads."""

    def __len__(self) -> int: ...

    def read(self, index: int, salt: int) -> Sample:
        """Sample ``index``; ``salt`` decides what is drawn at random in it.

        Raises:
            BadSample: it cannot be used.
        """
        ...

    def where(self, index: int) -> str:
        """The place of a sample, for people: ``rows.jsonl:17``."""
        ...
