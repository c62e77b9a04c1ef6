"""What a person may type wrong, refused in one sentence before anything slow begins."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_SEED = 2**63 - 1
#: Longest prompt or question in characters. The pipeline's limit is 256 tokens; no text this long fits that.
MAX_CHARACTERS = 4096


class BadInput(Exception):
    """The person's input cannot be used; the message says what was wanted and what came."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn the library's refusals of a value or a missing file into ``BadInput``."""
    try:
        yield
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise BadInput(str(error)) from error


def check_text(what: str, text: str) -> str:
    """A prompt or question: not empty, not absurdly long, valid Unicode."""
    text = text.strip()
    if not text:
        raise BadInput(f"the {what} is empty")
    if len(text) > MAX_CHARACTERS:
        raise BadInput(f"the {what} must have at most {MAX_CHARACTERS} characters, got {len(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput(f"the {what} is not valid UTF-8") from None
    return text


def check_seed(seed: int, count: int = 1) -> int:
    if not 0 <= seed <= MAX_SEED - (count - 1):
        raise BadInput(f"--seed must be in [0, 2^63 - {count}], got {seed}")
    return seed


def check_guidance(guidance: float | None) -> float | None:
    if guidance is not None and not (math.isfinite(guidance) and 0 <= guidance <= 50):
        raise BadInput(f"--guidance must be a number in [0, 50], got {guidance}")
    return guidance


def check_checkpoint(folder: Path | None) -> Path | None:
    """A checkpoint folder that is there at all; what it holds is checked when it is loaded."""
    if folder is not None and not folder.is_dir():
        raise BadInput(f"--checkpoint must be a folder, and {folder} is {_is(folder)}")
    return folder


def check_file(what: str, path: Path) -> Path:
    if not path.is_file():
        raise BadInput(f"{what} {path} is {_is(path)}")
    return path


def check_output_folder(path: Path) -> Path:
    """Make the folder, and make sure that a file can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise BadInput(f"cannot write to the folder {path}: {error.strerror}") from error
    return path


def check_output_file(path: Path, suffix: str) -> Path:
    if path.suffix.lower() != suffix:
        raise BadInput(f"the output must be a {suffix} file, got {path}")
    if path.is_dir():
        raise BadInput(f"the output must be a file, and {path} is a folder")
    check_output_folder(path.parent)
    return path


def open_picture(path: Path) -> Image.Image:
    from ..processing.pictures import load_picture

    with refusing():
        return load_picture(path)


def _is(path: Path) -> str:
    if not path.exists():
        return "not there"
    return "a folder" if path.is_dir() else "not a folder" if path.is_file() else "not a regular file"
