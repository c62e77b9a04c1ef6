"""Weights of a folder, one tensor at a time: safetensors, GGUF, and ``.bin`` without its pickled code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: Largest JSON file read. Indexes of the largest published models are about 10 MB.
MAX_JSON = 64 << 20
#: Most tensors in a checkpoint; the names alone take memory.
MAX_TENSORS = 1_000_000


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may come from anywhere.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too large, not JSON, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"convert: no {path.name} in {path.parent}")
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"convert: {path} must be at most {MAX_JSON} bytes, got {size}")
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"convert: {path} is not JSON: {e}") from e
    if not isinstance(data, dict):
        raise ValueError(f"convert: {path} must hold a JSON object, got {type(data).__name__}")
    return data


class Weights:
    """Names and shapes of a checkpoint's tensors, and each tensor when asked for.

    Args:
        folder: has ``<stem>.safetensors`` or ``<stem>.bin``, or an index ``<stem>.safetensors.index.json`` of shards.
            Stems are ``model`` and ``pytorch_model``. Safetensors are preferred.
        on_note: called with a sentence when ``.bin`` files are read.

    A file is opened for each tensor anew: closing it drops its mapped pages, so memory holds one tensor at a time.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: a file is broken, an index points outside the folder or does not fit its shards.
    """

    def __init__(self, folder: Path, on_note: Callable[[str], None] = lambda note: None) -> None:
        self.folder = folder
        self._file: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files, index = _find(folder)
        if files[0].suffix == ".bin":
            on_note(f"reading {files[0].name} with torch.load(weights_only=True): tensors only, no pickled code")
        for path in files:
            for name, shape in _open_shapes(path).items():
                if name in self._file:
                    raise ValueError(f"convert: {name} is in {self._file[name].name} and in {path.name}")
                self._file[name], self.shapes[name] = path, shape
        if len(self.shapes) > MAX_TENSORS:
            raise ValueError(f"convert: {folder} must hold at most {MAX_TENSORS} tensors, got {len(self.shapes)}")
        for name, file in (index or {}).items():
            held = self._file.get(name)
            if held is None or held.name != file:
                raise ValueError(f"convert: the index has {name} in {file}, got {held.name if held else 'nothing'}")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        path = self._file[name]
        if path.suffix == ".bin":
            return _load_bin(path)[name]
        with safe_open(str(path), "pt") as f:
            return f.get_tensor(name)


def _find(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder, and the index that names them, if one does."""
    if not folder.is_dir():
        raise FileNotFoundError(f"convert: no folder {folder}")
    for kind in ("safetensors", "bin"):
        for stem in ("model", "pytorch_model"):
            if (folder / f"{stem}.{kind}").is_file():
                return [folder / f"{stem}.{kind}"], None
            path = folder / f"{stem}.{kind}.index.json"
            if path.is_file():
                index = read_json(path).get("weight_map")
                if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
                    raise ValueError(f"convert: weight_map of {path} must map names to files")
                files = sorted(set(index.values()))
                for file in files:
                    if Path(file).name != file or "\\" in file or not file.endswith(f".{kind}"):
                        raise ValueError(f"convert: {path.name} must name .{kind} files in its folder, got {file!r}")
                    if not (folder / file).is_file():
                        raise FileNotFoundError(f"convert: no {file} in {folder}, which {path.name} names")
                return [folder / file for file in files], index
    raise FileNotFoundError(f"convert: no model.safetensors, pytorch_model.bin or index of shards in {folder}")


def _open_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".bin":
        return {k: tuple(v.shape) for k, v in _load_bin(path).items()}
    try:
        with safe_open(str(path), "pt") as f:
            return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise ValueError(f"convert: {path} is not a safetensors file: {e}") from e


def _load_bin(path: Path) -> dict[str, Tensor]:
    """The state dict of a ``.bin`` file, its tensors mapped, not read."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # the unpickler raises whatever it meets
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"convert: {path} holds more than tensors, or is broken: {reason}") from e
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"convert: {path} must hold a dict of tensors, got {type(state).__name__}")
    return state
