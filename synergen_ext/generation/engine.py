"""The native engine's front end: what `oracle` computes, in C++ over packed weights."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import ops
from .._build import load
from ..convert.writer import write_safetensors
from ..model import SynerGenConfig, SynerGenVL
from ..weights import check_names
from . import packing
from .oracle import Sampling
from .packing import Formats

#: Of a packed file, in its metadata.
KIND, VERSION = "synergen engine", "1"

OnPatch = Callable[[int, int, Tensor], bool | None]


class Engine:
    """A model for generation alone, on the CPU: packed weights, a cache, and the loops in C++ without the interpreter.

    It gives the ids of `oracle.generate_text`, `generate_image_ids` and `generate_interleaved`: with float32 weights
    those of the float32 model, with bfloat16 weights those of a float32 model whose matrices and embeddings were
    rounded to bfloat16, as far as float32 sums in another order allow. Integer weights move the logits; activations
    beside them are rounded to 8 bits, 64 (or 32) columns to a scale. A row's result does not depend on the rows beside
    it, on the number of threads, or on how a prompt was cut: the same bits.

    Calls may come from several threads; each has a cache of its own. `OMP_NUM_THREADS` and
    `torch.set_num_threads` say how many cores a call takes.

    >>> engine = Engine.from_pretrained(folder, "int8")
    >>> ids = engine.generate_image_ids([prompt], unconditional, seeds=[7])  # [1, h, w]
    """

    def __init__(self, config: SynerGenConfig, formats: Formats) -> None:
        self.config, self.formats = config, formats
        self._module = load().engine
        self._native = self._module.Engine(packing.sizes(config, formats))
        self._kept: list[Any] = []  # arrays and files that the native side looks into

    # ---- loading ----------------------------------------------------------------------------------------------

    @classmethod
    def from_model(cls, model: SynerGenVL, formats: Formats | str = "float32") -> Engine:
        """Pack the weights of a model in memory; the model is not needed afterwards."""
        state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
        return cls._packed(model.config, state.__getitem__, _formats(formats))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, formats: Formats | str = "bfloat16", packed: str | Path | None = None
    ) -> Engine:
        """Load a checkpoint folder; weights are read and packed one at a time, and never all in memory unpacked.

        Args:
            folder: with config.json and model.safetensors.
            formats: how to keep matrices; a string is for all of them.
            packed: a file that keeps the packed weights: mapped into memory if it is there, written first if it is
                not. It belongs to one model.safetensors; a file of other weights or formats is refused.

        Raises:
            FileNotFoundError: no config or no weights.
            ValueError: a file does not fit, by the name of the weight.
        """
        formats = _formats(formats)
        model, path, wanted = SynerGenVL.on_meta(folder, "engine")
        config = model.config
        check_names(path, wanted, "engine")
        with safe_open(str(path), "pt") as f:
            if packed is None:
                return cls._packed(config, f.get_tensor, formats)
            if not Path(packed).exists():
                write_packed(Path(packed), config, f.get_tensor, formats, _source(path))
        return cls._from_packed(Path(packed), config, formats, _source(path))

    @classmethod
    def _packed(cls, config: SynerGenConfig, read: packing.Read, formats: Formats) -> Engine:
        engine = cls(config, formats)
        pack = engine._module.PackedMatrix.pack
        for m in packing.matrices(config, read, formats):
            engine._native.put(m.name, pack(m.name, m.make(), m.form, m.group))
        for name, vector in packing.vectors(config, read):
            engine._native.put_vector(name, vector)
        for name, table in packing.tables(config, read, formats.floats):
            engine._native.put_table(name, table)
        engine._native.bind()
        return engine

    @classmethod
    def _from_packed(cls, path: Path, config: SynerGenConfig, formats: Formats, source: str) -> Engine:
        engine = cls(config, formats)
        view = engine._module.PackedMatrix.view
        try:
            f = safe_open(str(path), "pt")
        except SafetensorError as e:
            raise ValueError(f"engine: {path} is not a safetensors file: {e}") from e
        with f:
            about = f.metadata() or {}
            wanted = _metadata(config, formats, source)
            for key, value in wanted.items():
                if about.get(key) != value:
                    raise ValueError(f"engine: {key} must be {value} in {path}, got {about.get(key)}")
            there = set(f.keys())

            def get(name: str) -> Tensor:
                if name not in there:
                    raise ValueError(f"engine: {name} is missing in {path}")
                return f.get_tensor(name)

            def nothing(name: str) -> Tensor:
                raise AssertionError(name)

            for m in packing.matrices(config, nothing, formats):
                scales = get(f"{m.name}.scales") if m.group else None
                engine._native.put(m.name, view(m.name, m.form, m.rows, m.columns, m.group, get(m.name), scales))
            for name in sorted(there):
                if name.startswith("vector."):
                    engine._native.put_vector(name.removeprefix("vector."), get(name))
                elif name.startswith("table."):
                    engine._native.put_table(name.removeprefix("table."), get(name))
        engine._native.bind()
        return engine

    # ---- what there is ----------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all packed matrices."""
        return sum(m.nbytes for m in self._native.matrices.values())

    def step_bytes(self) -> tuple[int, int]:
        """Bytes of the matrices that one backbone step of image tokens and one head step read."""
        image = ("qkv", "out", "vision.gate_up", "vision.down")
        backbone = head = 0
        for name, m in self._native.matrices.items():
            if name.startswith("head."):
                head += m.nbytes
            elif name.startswith("layers.") and name.split(".", 2)[2] in image:
                backbone += m.nbytes
        return backbone, head

    # ---- the oracle's functions -------------------------------------------------------------------------------

    def generate_text(
        self, prompts: Sequence[Sequence[int]], image_ids: Tensor | None, max_new_tokens: int,
        stop_ids: Sequence[int], sampling: Sampling | None = None, seeds: Sequence[int] | None = None,
        on_token: Callable[[int, int], bool | None] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """`oracle.generate_text`.

        Args:
            on_token: called with (row, id) for each new id; False ends the call with `Cancelled`.
        """
        seeds = [0] * len(prompts) if seeds is None else list(seeds)
        return self._native.generate_text(
            _lists(prompts), _ids(image_ids), int(max_new_tokens), list(stop_ids),
            _tuple(sampling or Sampling(temperature=0.0)), seeds, on_token,
        )  # fmt: skip

    def generate_image_ids(
        self, prompts: Sequence[Sequence[int]], unconditional: Sequence[int], seeds: Sequence[int],
        guidance: float | None = None, sampling: Sampling | None = None, size: tuple[int, int] | None = None,
        on_patch: OnPatch | None = None,
    ) -> Tensor:  # fmt: skip
        """`oracle.generate_image_ids`: ids ``[N, h, w]``.

        Args:
            on_patch: called with (patches done, patches in all, ids so far ``[N, h, w]``, -1 where nothing is painted
                yet: always the same tensor); False ends the call with `Cancelled`. `paint` of a pipeline makes a
                preview of it.
        """
        c = self.config
        s = c.guidance if guidance is None else guidance
        h, w = size or c.image_grid
        ids = self._native.paint(
            _lists(prompts), list(unconditional) if s != 1.0 else [], list(seeds), float(s),
            _tuple(sampling or Sampling(c.image_temperature, c.image_top_k, c.image_top_p)), h, w,
            None if on_patch is None else lambda done, all_, ids: on_patch(done, all_, torch.from_numpy(ids)),
        )  # fmt: skip
        return torch.from_numpy(ids)

    def generate_interleaved(
        self, prompt: Sequence[int], unconditional: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int],
        seed: int = 0, guidance: float | None = None, text: Sampling | None = None, image: Sampling | None = None,
        image_ids: Tensor | None = None, on_progress: Callable[[int, int], bool | None] | None = None,
    ) -> list[list[int] | Tensor]:  # fmt: skip
        """`oracle.generate_interleaved`; ``on_progress`` is called with (tokens done, tokens at most)."""
        c = self.config
        s = c.guidance if guidance is None else guidance
        segments = self._native.generate_interleaved(
            list(prompt), _ids(image_ids), list(unconditional) if s != 1.0 else [], int(max_new_tokens),
            list(stop_ids), int(seed), float(s), _tuple(text or Sampling(temperature=0.0)),
            _tuple(image or Sampling(c.image_temperature, c.image_top_k, c.image_top_p)), on_progress,
        )  # fmt: skip
        return [part if isinstance(part, list) else torch.from_numpy(part) for part in segments]

    # ---- teacher forcing, for measuring -----------------------------------------------------------------------

    def states(self, ids: Sequence[int], image_ids: Tensor | None = None) -> Tensor:
        """Final states ``[T, D]`` of one sequence, float32."""
        return torch.from_numpy(self._native.states(list(ids), _ids(image_ids)))

    def text_logits(self, states: Tensor) -> Tensor:
        """States ``[N, D]`` -> logits over text and specials ``[N, vocab_size + 3]``."""
        return torch.from_numpy(self._native.text_logits(states.float().contiguous()))

    def head_logits(self, states: Tensor, ids: Tensor) -> Tensor:
        """States ``[N, D]`` and true ids ``[N, m*n]`` -> logits ``[N, m*n, V]``."""
        return torch.from_numpy(self._native.head_logits(states.float().contiguous(), ids.contiguous()))

    def image_nats(self, prompt: Sequence[int], image_ids: Tensor) -> float:
        """What a picture costs after a prompt: ``-log p`` of all its ids ``[h, w]`` (eq. 3), in nats.

        Args:
            prompt: ids up to and including ``<boi>``.
        """
        c = self.config
        windows = ops.fold_ids(image_ids[None], *c.fold)[0]  # [P, m*n]
        states = self.states([*prompt, *[c.image_id] * len(windows)], image_ids[None])[len(prompt) - 1 : -1]
        logits = self.head_logits(states, windows)
        return float(F.cross_entropy(logits.flatten(0, 1), windows.flatten(), reduction="sum"))


def cancelled() -> type[Exception]:
    """What a call raises that its callback ended."""
    return load().engine.Cancelled


def write_packed(path: Path, config: SynerGenConfig, read: packing.Read, formats: Formats, source: str) -> None:
    """Pack weights into a file, one at a time, complete or not there at all."""
    plan: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    every = list(packing.matrices(config, read, formats))
    for m in every:  # whole lines of 64 bytes first, so that each begins at one
        plan[m.name] = ((m.data_bytes,), torch.uint8)
    for m in every:
        if m.group:
            plan[f"{m.name}.scales"] = ((m.scale_bytes,), torch.uint8)
    small = {f"vector.{k}": v for k, v in packing.vectors(config, read)}
    for name, table in packing.tables(config, _meta(read), formats.floats):
        plan[f"table.{name}"] = (tuple(table.shape), table.dtype)
    plan |= {name: (tuple(v.shape), v.dtype) for name, v in small.items()}
    pack = load().engine.PackedMatrix.pack
    scales: dict[str, Tensor] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for m in every:
            made = pack(m.name, m.make(), m.form, m.group)
            if m.group:
                scales[f"{m.name}.scales"] = torch.frombuffer(bytearray(made.scales()), dtype=torch.uint8)
            yield m.name, torch.frombuffer(bytearray(made.data()), dtype=torch.uint8)
        yield from scales.items()
        for name, table in packing.tables(config, read, formats.floats):
            yield f"table.{name}", table
        yield from small.items()

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".packing-") as folder:
        begun = Path(folder) / path.name
        write_safetensors(begun, plan, tensors(), _metadata(config, formats, source), align=64)
        os.replace(begun, path)


def _meta(read: packing.Read) -> packing.Read:
    return lambda name: read(name).to("meta")


def _metadata(config: SynerGenConfig, formats: Formats, source: str) -> dict[str, str]:
    kept = {part: formats.of(part) for part in ("backbone", "head", "output")}
    groups = {form: formats.group_of(form) for form in sorted(set(kept.values()))}
    return {
        "format": KIND,
        "version": VERSION,
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "formats": json.dumps({**kept, "groups": groups}, sort_keys=True),
        "source": source,
    }


def _source(path: Path) -> str:
    """A weight file, known by its size and time."""
    about = path.stat()
    return f"{about.st_size} bytes, modified {about.st_mtime_ns}"


def _formats(formats: Formats | str) -> Formats:
    return Formats(formats) if isinstance(formats, str) else formats


def _lists(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(p) for p in prompts]


def _ids(ids: Tensor | None) -> Any:
    return None if ids is None or ids.numel() == 0 else ids.cpu().contiguous()


def _tuple(s: Sampling) -> tuple[float, int, float]:
    return float(s.temperature), int(s.top_k), float(s.top_p)
