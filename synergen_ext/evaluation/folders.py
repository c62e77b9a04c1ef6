"""Pictures in GenEval's folder layout: written for its own scorer or ours, read back and scored.

00000/metadata.jsonl, 00000/samples/0000.png, 00000/samples/0001.png, ..., 00001/metadata.jsonl, ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..scenes.render import CANVAS
from .geneval import SCENE_RULES, Row, check_row, score
from .scorer import read_pictures

#: Largest detections file read, bytes: 2,400 pictures with 16 objects take about 4 MB.
MAX_JSON_BYTES = 256 << 20
#: Largest picture opened by ``score_folder``, pixels.
MAX_PIXELS = 16_000_000


def write_folder(folder: str | Path, rows: Sequence[Row], pictures: Sequence[Sequence[Image.Image]]) -> None:
    """Write ``pictures[prompt]`` and their metadata in GenEval's layout, for its own scorer or ``score_folder``."""
    if len(rows) != len(pictures):
        raise ValueError(f"write_folder: pictures must have {len(rows)} prompts, got {len(pictures)}")
    for i, (row, group) in enumerate(zip(rows, pictures, strict=True)):
        samples = Path(folder) / f"{i:05d}" / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        for k, picture in enumerate(group):
            picture.save(samples / f"{k:04d}.png")


def read_folder(folder: str | Path) -> tuple[list[dict[str, Any]], list[list[Path]]]:
    """Metadata rows and picture files of a folder in GenEval's layout.

    Raises:
        FileNotFoundError: no numbered folder, no metadata or no picture.
        ValueError: metadata that is no JSON or lacks a field.
    """
    folder = Path(folder)
    numbered = [p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()] if folder.is_dir() else []
    if not numbered:
        raise FileNotFoundError(f"score_folder: no folder 00000, 00001, ... in {folder}")
    rows, files = [], []
    for sub in sorted(numbered, key=lambda p: (int(p.name), p.name)):
        meta = sub / "metadata.jsonl"
        if not meta.is_file():
            raise FileNotFoundError(f"score_folder: no {meta}")
        row = _json(meta)
        check_row(row, str(meta))
        pictures = sorted(p for p in (sub / "samples").glob("*.png") if p.stem.isdigit())
        if not pictures:
            raise FileNotFoundError(f"score_folder: no picture in {sub / 'samples'}")
        rows.append(row)
        files.append(pictures)
    return rows, files


def score_folder(
    folder: str | Path,
    detections: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a folder of pictures in GenEval's layout.

    Args:
        folder: holds ``00000/metadata.jsonl``, ``00000/samples/0000.png``, ...
        detections: a JSON file ``{"00000/samples/0000.png": [{"class", "box", "score", "color"?}, ...], ...}`` from
            another detector, judged with GenEval's thresholds. None reads the pictures with the scene scorer, which
            knows only the demo's drawings; square pictures of another size are resized to 96 x 96.

    Raises:
        FileNotFoundError, ValueError: see ``read_folder``; a picture without an entry in ``detections``.
    """
    rows, files = read_folder(folder)
    total, done = sum(map(len, files)), 0
    if detections is not None:
        table = _detections(Path(detections))
        return score(rows, [[_entry(table, Path(folder), p) for p in group] for group in files])
    found = []
    for group in files:
        read = read_pictures([_open(p) for p in group])
        found.append([[d.as_dict() for d in r] for r in read])
        done += len(group)
        if on_progress:
            on_progress(done, total)
    return score(rows, found, SCENE_RULES)


def _entry(table: Mapping[str, Any], folder: Path, picture: Path) -> Sequence[Row]:
    key = picture.relative_to(folder).as_posix()
    if key not in table:
        raise ValueError(f"score_folder: the detections file has no entry {key!r}")
    entry: Sequence[Row] = table[key]
    return entry


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{path}: at most {MAX_PIXELS} pixels, got {picture.width} x {picture.height}")
            rgb = picture.convert("RGB")
    except (OSError, SyntaxError) as e:
        raise ValueError(f"{path}: not a readable picture ({e})") from e
    if rgb.width != rgb.height:
        raise ValueError(f"{path}: must be square, got {rgb.width} x {rgb.height}")
    return rgb if rgb.width == CANVAS else rgb.resize((CANVAS, CANVAS), Image.Resampling.BOX)


def _json(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: at most {MAX_JSON_BYTES >> 20} MB, got {path.stat().st_size >> 20} MB")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e})") from e


def _detections(path: Path) -> dict[str, Any]:
    table = _json(path)
    if not isinstance(table, dict) or not all(isinstance(v, list) for v in table.values()):
        raise ValueError(f"{path}: must map each picture to a list of detections")
    return table
