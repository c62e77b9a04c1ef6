"""Local files and fsspec URLs, read within bounds; lines of a JSONL file by number."""

from __future__ import annotations

import json
import os
import posixpath
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from .sample import BadSample

#: Longest line of a JSONL file. A conversation that fills 8,192 tokens is about 32 KiB.
MAX_LINE_BYTES = 4 << 20
#: Largest picture file; what it decodes to is bounded by ``processing.pictures``.
MAX_FILE_BYTES = 256 << 20
_CHUNK = 1 << 20


def is_url(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """A local path or a URL that fsspec knows, open for reading and seeking.

    Raises:
        OSError: it cannot be opened.
        ValueError: fsspec does not know the protocol.
    """
    if not is_url(path):
        return open(path, "rb")
    import fsspec

    return cast(BinaryIO, fsspec.open(path, "rb").open())


def read_text(path: str, most: int = MAX_LINE_BYTES) -> str:
    """A whole small file.

    Raises:
        OSError, ValueError: it is missing, larger than ``most`` bytes, or not UTF-8.
    """
    with open_file(path) as f:
        data = f.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} must have at most {most} bytes, got more")
    return data.decode()


def read_bytes(path: str) -> bytes:
    """A picture file.

    Raises:
        BadSample: it is missing, larger than ``MAX_FILE_BYTES``, or cannot be read.
    """
    if not is_url(path) and not Path(path).is_file():  # nor a device or a pipe, which would never end
        raise BadSample("missing file", f"no file {path}")
    try:
        with open_file(path) as f:
            data = f.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise BadSample("missing file", f"no file {path}") from None
    except (OSError, ValueError) as e:  # ValueError: a name that no file system takes
        raise BadSample("unreadable file", f"{path}: {e}") from e
    if len(data) > MAX_FILE_BYTES:
        raise BadSample("large file", f"{path} must have at most {MAX_FILE_BYTES} bytes, got more")
    return data


def inside(root: str, name: Any) -> str:
    """``name`` of a row below ``root``.

    Raises:
        BadSample: no text, an absolute path, a URL, or a way out of ``root``.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadSample("wrong row", f"image must be a path, got {name!r:.80}")
    parts = name.replace("\\", "/").split("/")
    if is_url(name) or os.path.isabs(name) or posixpath.isabs(name) or ".." in parts or ":" in parts[0]:
        raise BadSample("path outside root", f"image must be a path below {root!r}, got {name[:200]!r}")
    return f"{root.rstrip('/')}/{name}" if root else name


class Lines:
    """Rows of a JSONL file by number. Only where lines begin is held in memory, 8 bytes each; empty lines are left out.

    Raises:
        ValueError: the file is missing, cannot be read, or holds no line.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        begins, ends, at, begin, blank = [], [], 0, 0, True
        try:
            with open_file(path) as f:
                while chunk := f.read(_CHUNK):
                    start = 0
                    while (stop := chunk.find(b"\n", start)) >= 0:
                        if not (blank and not chunk[start:stop].strip()):
                            begins.append(begin)
                            ends.append(at + stop)
                        start = stop + 1
                        begin, blank = at + start, True
                    blank = blank and not chunk[start:].strip()
                    at += len(chunk)
        except (OSError, ValueError) as e:
            raise ValueError(f"sources: {path} cannot be read: {e}") from e
        if not blank:
            begins.append(begin)
            ends.append(at)
        if not begins:
            raise ValueError(f"sources: {path} must hold at least one line, got none")
        self.begins, self.ends = np.array(begins, np.int64), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self.begins)

    def row(self, index: int) -> dict[str, Any]:
        """The JSON object of line ``index``.

        Raises:
            BadSample: too long, not JSON, or no object.
        """
        begin, end = int(self.begins[index]), int(self.ends[index])
        if end - begin > MAX_LINE_BYTES:
            raise BadSample("long line", f"a line must have at most {MAX_LINE_BYTES} bytes, got {end - begin}")
        try:
            with open_file(self.path) as f:
                f.seek(begin)
                data = json.loads(f.read(end - begin))
        except OSError as e:
            raise BadSample("unreadable file", f"{self.path}: {e}") from e
        except (ValueError, RecursionError) as e:  # broken JSON or UTF-8, or nested without end
            raise BadSample("wrong JSON", str(e)) from e
        if not isinstance(data, dict):
            raise BadSample("wrong JSON", f"a line must hold an object, got {type(data).__name__}")
        return data

    def where(self, index: int) -> str:
        return f"{self.path}@{int(self.begins[index])}"


class LineSource:
    """What sources have in common whose samples are the lines of a JSONL file."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, index: int) -> str:
        return self.lines.where(index)
