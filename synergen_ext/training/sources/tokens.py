"""Pictures tokenised once: shards of ids, and the rows that belong to them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .conversations import caption_of, turns_of
from .files import Lines, LineSource
from .sample import BadSample, Sample, Source

INDEX_FILE = "tokens.json"
ROWS_FILE = "rows.jsonl"
BAD_FILE = "bad_samples.jsonl"
_MAX_INDEX_BYTES = 1 << 20


def _shard(folder: Path, number: int) -> Path:
    return folder / f"ids-{number:05d}.safetensors"


def write_tokens(
    source: Source, task: str, encode: Callable[[NDArray[Any]], NDArray[Any]], codebook_size: int, out: str | Path,
    max_bad: float = 0.01, bad_after: int = 200, shard: int = 4096, on_sample: Callable[[int, int], None] | None = None,
) -> Counter[str]:  # fmt: skip
    """Tokenise every picture of ``source`` into the folder ``out``; what `Tokens` reads.

    Shards hold up to about ``shard`` pictures, as unsigned ``ids`` ``[n, h, w]`` of 16 bits (32 for larger codebooks).

    Args:
        task: ``understand`` or ``generate``.
        encode: uint8 ``[H, W, 3]`` to ids ``[h, w]``.

    Returns:
        How many samples were left out, by cause; ``bad_samples.jsonl`` lists them.

    Raises:
        ValueError: ``out`` is not empty, or more than ``max_bad`` of at least ``bad_after`` samples are bad.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"tokenize: {out} must be empty or absent")
    out.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if codebook_size <= 1 << 16 else np.uint32
    counts: list[int] = []
    waiting: list[NDArray[Any]] = []
    bad: Counter[str] = Counter()
    grid: tuple[int, ...] | None = None
    pictures = rows = 0

    def flush() -> None:
        save_file({"ids": np.stack(waiting).astype(dtype)}, str(_shard(out, len(counts))))
        counts.append(len(waiting))
        waiting.clear()

    with open(out / ROWS_FILE, "w") as kept, open(out / BAD_FILE, "w") as listed:
        for index in range(len(source)):
            if on_sample:
                on_sample(index, len(source))
            try:
                sample = source.read(index, 0)
            except BadSample as e:
                bad[e.cause] += 1
                place = source.where(index)
                listed.write(json.dumps({"where": place, "cause": e.cause, "detail": e.detail}) + "\n")
                check_share("tokenize", str(out / BAD_FILE), bad, index + 1, max_bad, bad_after)
                continue
            ids = [encode(p) for p in sample.pictures]
            waiting += ids
            grid = grid or (ids[0].shape if ids else None)
            row: dict[str, Any] = {"ids": list(range(pictures, pictures + len(ids)))}
            if isinstance(sample.text, str):
                row["caption"] = sample.text
            else:
                names = {"user": "human", "assistant": "gpt"}
                row["conversations"] = [{"from": names[r], "value": text} for r, text in sample.text]
            kept.write(json.dumps(row) + "\n")
            pictures, rows = pictures + len(ids), rows + 1
            if len(waiting) >= shard:
                flush()
    if on_sample:
        on_sample(len(source), len(source))
    if waiting:
        flush()
    if not rows:
        raise ValueError(f"tokenize: at least one sample must be good, got {dict(bad)}")
    index_data = {"task": task, "codebook_size": codebook_size, "grid": grid, "shards": counts, "rows": rows}
    (out / INDEX_FILE).write_text(json.dumps(index_data) + "\n")  # last: a folder without it is half written
    return bad


def check_share(who: str, listed: str, bad: Counter[str], draws: int, max_bad: float, bad_after: int) -> None:
    """Raises:
    ValueError: at least ``bad_after`` samples were drawn and more than ``max_bad`` of them are bad.
    """
    if draws >= bad_after and bad.total() > max_bad * draws:
        causes = ", ".join(f"{cause} {n}" for cause, n in bad.most_common())
        raise ValueError(
            f"{who}: at most {max_bad:.2%} of the samples may be bad, got {bad.total()} of {draws} ({causes}); "
            f"they are listed in {listed}"
        )


class Tokens(LineSource):
    """Samples whose pictures are ids already. No image tokenizer is asked.

    Args:
        folder: what ``synergen tokenize`` wrote.
        task, grid, codebook_size: what the training wants of it.

    Raises:
        ValueError: it is not such a folder, or was made for something else.
    """

    def __init__(self, folder: str, task: str, grid: tuple[int, int], codebook_size: int) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX_FILE
        try:
            with open(path) as f:
                data = json.loads(f.read(_MAX_INDEX_BYTES))
            held = (data["task"], data["codebook_size"], data["grid"])
            shards = [int(n) for n in data["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"sources: {path} is not the index that `synergen tokenize` writes: {e!r}") from e
        for name, wanted, got in zip(
            ("task", "codebook_size", "grid"), (task, codebook_size, list(grid)), held, strict=True
        ):
            if got != wanted and not (name == "grid" and got is None):  # words only have no grid
                raise ValueError(f"sources: {path}: {name} must be {wanted}, got {got}")
        self.task, self.grid, self.codebook_size = task, grid, codebook_size
        self.ends = np.cumsum([0, *shards])
        super().__init__(Lines(str(self.folder / ROWS_FILE)))

    def read(self, index: int, salt: int) -> Sample:
        row = self.lines.row(index)
        numbers = row.get("ids")
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < self.ends[-1] for n in numbers):
            raise BadSample("wrong row", f"ids must be numbers in [0, {self.ends[-1]}), got {numbers!r:.80}")
        if self.task == "generate":
            if len(numbers) != 1:
                raise BadSample("wrong row", f"ids must be of one picture, got {len(numbers)}")
            return Sample(caption_of(row), [self._ids(numbers[0])])
        return Sample(turns_of(row, len(numbers)), [self._ids(n) for n in numbers])

    def _ids(self, number: int) -> NDArray[Any]:
        shard = int(np.searchsorted(self.ends, number, "right")) - 1
        path = _shard(self.folder, shard)
        try:
            with safe_open(str(path), "np") as f:
                at = number - int(self.ends[shard])
                ids = f.get_slice("ids")[at : at + 1][0].astype(np.int64)
        except (OSError, SafetensorError, IndexError) as e:
            raise BadSample("broken shard", f"{path}: {e}") from e
        if ids.shape != self.grid or ids.min() < 0 or ids.max() >= self.codebook_size:
            raise BadSample("broken shard", f"{path}: ids must be {list(self.grid)} below {self.codebook_size}")
        return ids
