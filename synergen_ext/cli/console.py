"""What the commands show while they work. All of it goes to stderr, and only to a terminal: stdout holds results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .checks import refusing

if TYPE_CHECKING:
    from ..generation.pipeline import Pipeline


def printable(text: str) -> str:
    """What a model said, without characters that could steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


#: Called with (done, total).
OnProgress = Callable[[int, int], None]


@contextmanager
def progress(label: str) -> Iterator[OnProgress]:
    """A progress bar with the time left; it disappears when the work is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def status(label: str) -> Iterator[None]:
    """A spinner, for work of which nobody knows how far it is."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(label):
        yield


def load_pipeline(checkpoint: Path | None, weights: str = "float32") -> Pipeline:
    """The checkpoint in a folder, or the one that ships with the package, in the native engine."""
    with status("Loading the model"):
        from ..generation.pipeline import Pipeline

        with refusing():
            return Pipeline.from_pretrained(checkpoint, weights=weights)
