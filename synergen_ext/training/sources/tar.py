"""WebDataset tars, read in place: nothing is unpacked, so a member's name leads nowhere."""

from __future__ import annotations

import json
import re
import tarfile
from typing import Any, NamedTuple

from .conversations import MAX_PICTURES, caption_of, turns_of
from .files import MAX_FILE_BYTES, MAX_LINE_BYTES, open_file
from .pictures import fit
from .sample import BadSample, Sample

_PICTURES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_MAX_SHARDS = 100_000


class Member(NamedTuple):
    """Where a member's bytes lie in its tar."""

    begin: int
    size: int


def shards_of(path: str) -> list[str]:
    """``part-{000..002}.tar`` as three paths; any other path as itself.

    Raises:
        ValueError: a range that runs backwards, or of more than 100,000.
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if found is None:
        return [path]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _MAX_SHARDS:
        raise ValueError(f"sources: {path} must name 1 to {_MAX_SHARDS} tars, got {first}..{last}")
    width = len(found[1])
    return [f"{path[: found.start()]}{i:0{width}d}{path[found.end() :]}" for i in range(first, last + 1)]


class Tar:
    """Samples of tars: members that share a name up to its first dot.

    Generation wants a picture (``jpg``, ``jpeg``, ``png``, ``webp``) and its caption, as ``txt`` or as ``caption`` of a
    ``json``; understanding wants a ``json`` with ``conversations`` and as many pictures as it names, by the order of
    their endings. Only where members lie is held in memory; files of other kinds are left alone.

    Raises:
        ValueError: a file is missing, is no plain tar, or holds no sample.
    """

    def __init__(self, path: str, task: str, size: tuple[int, int]) -> None:
        self.task, self.size = task, size
        self.samples: list[tuple[str, str, dict[str, Member]]] = []
        for shard in shards_of(path):
            groups: dict[str, dict[str, Member]] = {}
            try:
                with open_file(shard) as f, tarfile.open(fileobj=f, mode="r:") as tar:
                    for info in tar:
                        folder, _, name = info.name.rpartition("/")
                        stem, _, ending = name.partition(".")
                        kind = ending.lower().rpartition(".")[2]
                        if info.isreg() and not info.issparse() and kind in (*_PICTURES, *_TEXTS):
                            group = groups.setdefault(f"{folder}/{stem}", {})
                            group[ending.lower()] = Member(info.offset_data, info.size)
                        tar.members = []  # type: ignore[attr-defined] # tarfile keeps them all otherwise
            except (OSError, ValueError, tarfile.TarError) as e:
                raise ValueError(f"sources: {shard} cannot be read as a tar: {e}") from e
            self.samples += [(shard, key, members) for key, members in groups.items()]
        if not self.samples:
            raise ValueError(f"sources: {path} must hold pictures or texts, got none")

    def __len__(self) -> int:
        return len(self.samples)

    def where(self, index: int) -> str:
        shard, key, _ = self.samples[index]
        return f"{shard}:{key}"

    def read(self, index: int, salt: int) -> Sample:
        shard, key, members = self.samples[index]
        kinds = {ending: ending.rpartition(".")[2] for ending in members}
        pictures = sorted(e for e in members if kinds[e] in _PICTURES)
        if len(pictures) > MAX_PICTURES:
            raise BadSample("wrong row", f"{key} must have at most {MAX_PICTURES} pictures, got {len(pictures)}")
        row = self._row(shard, key, members)
        text: str | list[tuple[str, str]]
        if self.task == "generate":
            if len(pictures) != 1:
                raise BadSample("wrong row", f"{key} must have one picture, got {len(pictures)}")
            text = caption_of(row)
        else:
            text = turns_of(row, len(pictures))
        return Sample(text, [self._picture(shard, f"{key}.{e}", members[e]) for e in pictures])

    def _picture(self, shard: str, name: str, member: Member) -> Any:
        data = _bytes(shard, name, member, MAX_FILE_BYTES)
        return fit(data, f"{shard}:{name}", self.size, crop=self.task == "generate")

    def _row(self, shard: str, key: str, members: dict[str, Member]) -> dict[str, Any]:
        try:
            row: Any = {}
            if "json" in members:
                row = json.loads(_bytes(shard, f"{key}.json", members["json"], MAX_LINE_BYTES))
            if not isinstance(row, dict):
                raise BadSample("wrong JSON", f"{key}.json must hold an object, got {type(row).__name__}")
            if "txt" in members:
                row["caption"] = _bytes(shard, f"{key}.txt", members["txt"], MAX_LINE_BYTES).decode().strip()
        except (ValueError, RecursionError) as e:
            raise BadSample("wrong JSON", f"{key}: {e}") from e
        return row


def _bytes(shard: str, name: str, member: Member, most: int) -> bytes:
    if member.size > most:
        raise BadSample("large file", f"{shard}:{name} must have at most {most} bytes, got {member.size}")
    try:
        with open_file(shard) as f:
            f.seek(member.begin)
            return f.read(member.size)
    except OSError as e:
        raise BadSample("unreadable file", f"{shard}: {e}") from e
