"""Rows of parquet and JSON files, read by Hugging Face ``datasets`` (the extra ``datasets``)."""

from __future__ import annotations

from typing import Any

from .conversations import caption_of, pictures_of, turns_of
from .files import MAX_FILE_BYTES, inside, is_url, read_bytes
from .order import mix
from .pictures import fit
from .sample import BadSample, Sample

#: The endings that name a file's kind. Only these builders of ``datasets`` are used: none runs code of a data set.
KINDS = {"parquet": "parquet", "json": "json", "jsonl": "json"}


class Rows:
    """Rows by number of local files, a pattern (``part-*.parquet``) or a URL that fsspec knows.

    Generation wants ``image`` and ``caption``; understanding wants ``conversations`` in InternVL's form and ``image``,
    one, a list, or none. A picture is the bytes that ``datasets`` keeps in a column of pictures, or a path below
    ``root``. The files are laid down once as Arrow in the cache of ``datasets`` and mapped into memory, so any row is
    read by its number, and the position of a run is the mixture's.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: another kind of file, one that cannot be read, or no rows.
    """

    def __init__(self, path: str, task: str, root: str, size: tuple[int, int], augment: bool = False) -> None:
        kind = KINDS.get(path.rpartition(".")[2].lower())
        if kind is None:
            raise ValueError(f"sources: {path} must end in .{', .'.join(KINDS)}, got {path.rpartition('.')[2]!r}")
        try:
            import datasets
        except ImportError as e:
            raise ImportError(
                f"sources: {path} wants Hugging Face datasets: pip install 'synergen_ext[datasets]'"
            ) from e
        self.path, self.task, self.root, self.size, self.augment = path, task, root, size, augment
        try:
            held = datasets.load_dataset(kind, data_files=path, split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
            raise ValueError(f"sources: {path} cannot be read: {' '.join(str(e).split())}") from e
        if not len(held):
            raise ValueError(f"sources: {path} must hold at least one row, got none")
        # Pictures stay as they are stored: they are decoded here, within this package's bounds.
        self.rows = held.cast_column("image", datasets.Image(decode=False)) if _is_picture(held) else held

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return f"{self.path}#{index}"

    def read(self, index: int, salt: int) -> Sample:
        row: dict[str, Any] = self.rows[index]
        text: str | list[tuple[str, str]]
        if self.task == "generate":
            names, text = [row.get("image")], caption_of(row)
        else:
            names = pictures_of(row)
            text = turns_of(row, len(names))
        pictures = []
        for i, picture in enumerate(names):
            data, name = self._bytes(picture, f"{self.where(index)}[{i}]")
            augment = mix(salt, i) if self.augment else None
            pictures.append(fit(data, name, self.size, crop=self.task == "generate", augment=augment))
        return Sample(text, pictures)

    def _bytes(self, picture: Any, where: str) -> tuple[bytes, str]:
        if isinstance(picture, dict):
            data = picture.get("bytes")
            if isinstance(data, bytes):
                if len(data) > MAX_FILE_BYTES:
                    raise BadSample("large file", f"{where} must have at most {MAX_FILE_BYTES} bytes, got {len(data)}")
                return data, where
            picture = picture.get("path")
        path = inside(self.root, picture)
        return read_bytes(path), path


def _is_picture(rows: Any) -> bool:
    import datasets

    return isinstance(rows.features.get("image"), datasets.Image)


def is_pattern(path: str) -> bool:
    """Whether a path stands for several files, or for one elsewhere, so that it cannot be looked for as it is."""
    return is_url(path) or any(c in path for c in "*?[")
