"""One folder of ours from a language model and an image tokenizer, and the language model back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..model.config import SynerGenConfig
from ..model.modeling import WEIGHTS_FILE, SynerGenVL, init_parameter
from .emu3 import copy_image_tokenizer
from .families import Entry, Family, find_family
from .sources import Weights, read_json
from .tokenizers import convert_text_tokenizer
from .writer import write_safetensors

#: The language model's own config, kept so that ``export_llm`` can give it back.
SOURCE_FILE = "llm_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SEED = 0

OnProgress = Callable[[int, int], None]
OnNote = Callable[[str], None]


class Source(Protocol):
    """Weights by name: their shapes, and each tensor when asked for."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor: ...


def convert(
    llm: str | Path, out: str | Path, image_tokenizer: str | Path | None = None, *, dtype: str | None = None,
    image_size: int = 512, fold: tuple[int, int] = (2, 8), head_layers: int = 4,
    on_progress: OnProgress = lambda done, total: None, on_note: OnNote = lambda note: None,
) -> SynerGenConfig:  # fmt: skip
    """A SynerGen-VL starting checkpoint: the LLM's weights, vision experts copied from its FFNs (or Mono-InternVL's
    own), everything that reads and writes image tokens new.

    Weights pass one tensor at a time. ``out`` appears whole at the end, or not at all.

    Args:
        llm: folder with ``config.json`` and weights, folder with one ``.gguf`` file, or such a file.
        out: folder that is not there yet, or empty.
        image_tokenizer: folder of Emu3's tokenizer in either layout, or of ours. None: the checkpoint has none, and its
            tables are sized for Emu3's 32,768 codes.
        dtype: of the weights, one of ``DTYPES``; default: that of the LLM's embeddings.
        image_size: side of the largest picture in pixels.
        fold: rows and columns of image tokens in a folded token.
        head_layers: layers of the unfolding head.

    Raises:
        FileNotFoundError: a folder or file is missing.
        FileExistsError: ``out`` has something in it.
        ValueError: a weight is missing, surplus or of another shape, by name; or a config that ours cannot compute.
    """
    llm, out = Path(llm), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"convert: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source_config, source = open_llm(llm, on_note)
    family = find_family(source_config.get("model_type"))
    sizes = family.sizes(source_config)
    with _atomic_folder(out) as folder:
        stride, codes = 8, SynerGenConfig.codebook_size
        if image_tokenizer is not None:
            pixels = copy_image_tokenizer(Path(image_tokenizer), folder, on_note)
            stride, codes = pixels.stride, pixels.codebook_size
        if image_size <= 0 or image_size % stride:
            raise ValueError(f"convert: image_size must be a positive multiple of {stride}, got {image_size}")
        config = SynerGenConfig.from_dict(
            {
                **sizes,
                "codebook_size": codes,
                "image_grid": (image_size // stride,) * 2,
                "fold": fold,
                "token_embed_size": sizes["hidden_size"],
                "head_layers": head_layers,
                "image_top_k": min(SynerGenConfig.image_top_k, codes),
            }
        )
        _write_model(folder, config, source_config, source, family, DTYPES.get(dtype or ""), on_progress, on_note)
        config.save(folder)
        (folder / SOURCE_FILE).write_text(json.dumps(source_config, indent=1) + "\n")
        convert_text_tokenizer(llm, folder, config.vocab_size, on_note)
    return config


def export_llm(checkpoint: str | Path, out: str | Path, on_progress: OnProgress = lambda done, total: None) -> None:
    """The backbone without experts, as the plain LLM that ``convert`` read: its config, its names, its layout.

    Args:
        checkpoint: folder that ``convert`` wrote, or that was trained from one (with its ``llm_config.json``).
        out: folder that is not there yet, or empty; gets ``config.json`` and ``model.safetensors``.

    Raises:
        FileNotFoundError: ``checkpoint`` is not a converted one.
        FileExistsError: ``out`` has something in it.
        ValueError: the weights do not fit the config, by name.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config, source_config = SynerGenConfig.load(checkpoint), read_json(checkpoint / SOURCE_FILE)
    family = find_family(source_config.get("model_type"))
    weights, wanted = Weights(checkpoint), _shapes(config)
    _check(wanted, weights.shapes, checkpoint)
    entries = family.entries(source_config, config)
    dtype = weights.read("norm.weight").dtype
    plan = {e.theirs: (_their_shape(e, wanted), dtype) for e in entries}
    # transformers loads in the dtype of the config; `convert --dtype` may have changed the weights'.
    for key in {"dtype", "torch_dtype"} & source_config.keys():
        source_config[key] = str(dtype).removeprefix("torch.")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, entry in enumerate(entries):
            on_progress(done, len(entries))
            yield entry.theirs, entry.join(*(weights.read(name) for name in entry.ours)).to(dtype)
        on_progress(len(entries), len(entries))

    with _atomic_folder(out) as folder:
        write_safetensors(folder / WEIGHTS_FILE, plan, tensors())
        (folder / "config.json").write_text(json.dumps(source_config, indent=1) + "\n")


def open_llm(path: Path, on_note: OnNote) -> tuple[dict[str, Any], Source]:
    """A language model's config and weights, from a folder or a GGUF file."""
    from .gguf import GGUFWeights

    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"convert: {path} must have a config.json or one .gguf file, got {len(files)} .gguf files"
            )
        path = files[0]
    if path.is_file():
        gguf = GGUFWeights(path)
        return gguf.config, gguf
    return read_json(path / "config.json"), Weights(path, on_note)


def _write_model(
    folder: Path, config: SynerGenConfig, source_config: dict[str, Any], source: Source, family: Family,
    dtype: torch.dtype | None, on_progress: OnProgress, on_note: OnNote,
) -> None:  # fmt: skip
    wanted = _shapes(config)
    entries = family.entries(source_config, config)
    found = dict(source.shapes)
    left = [name for name in found if family.ignored.fullmatch(name)]
    for name in left:
        del found[name]
    if left:
        on_note(f"left behind: {len(left)} tensors that ours has no use for, such as {left[0]}")
    if config.tie_word_embeddings and family.output in found:
        if not torch.equal(source.read(family.output), source.read(entries[0].theirs)):
            raise ValueError(f"convert: {family.output} must equal {entries[0].theirs} in a tied model, got another")
        del found[family.output]
    _check({e.theirs: _their_shape(e, wanted) for e in entries}, found, folder=None)

    dtype = dtype or source.read(entries[0].theirs).dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"convert: weights must be one of {', '.join(DTYPES)}, got {dtype}")
    ours = {name for entry in entries for name in entry.ours}
    # Ours by what it is copied from: a vision expert starts as its layer's text FFN.
    copies = {n: n.replace(".vision.", ".text.") for n in wanted if ".feed_forward.vision." in n and n not in ours}
    copy_of = {text: vision for vision, text in copies.items()}
    new = [n for n in wanted if n not in ours and n not in copies]
    order = [n for e in entries for o in e.ours for n in (o, copy_of.get(o)) if n is not None] + new
    total = len(entries) + len(new)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, entry in enumerate(entries):
            on_progress(done, total)
            for name, tensor in zip(entry.ours, entry.split(source.read(entry.theirs)), strict=True):
                if not tensor.is_floating_point():
                    raise ValueError(f"convert: {entry.theirs} must be floating point, got {tensor.dtype}")
                tensor = tensor.to(dtype)
                yield name, tensor
                if name in copy_of:
                    yield copy_of[name], tensor
        for done, name in enumerate(new):
            on_progress(len(entries) + done, total)
            yield name, init_parameter(config, name, torch.empty(wanted[name])).to(dtype)
        on_progress(total, total)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        write_safetensors(folder / WEIGHTS_FILE, {n: (wanted[n], dtype) for n in order}, tensors())


def _shapes(config: SynerGenConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of our model file."""
    try:
        with torch.device("meta"):
            shapes = {k: tuple(v.shape) for k, v in SynerGenVL(config).state_dict().items()}
    except RuntimeError as e:  # a size past 2^63 bytes
        raise ValueError(f"convert: a model of these sizes cannot be built: {e}") from e
    if config.tie_word_embeddings:
        del shapes["output.weight"]
    return shapes


def _their_shape(entry: Entry, wanted: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(entry.join(*(torch.empty(wanted[name], device="meta") for name in entry.ours)).shape)


def _check(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], folder: Path | None) -> None:
    """Raise ValueError at the first name that is missing, surplus or of another shape."""
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            ours, theirs = (list(s[name]) if name in s else "nothing" for s in (wanted, found))
            where = f" in {folder}" if folder else ""
            raise ValueError(f"convert: {name} must be {ours}, got {theirs}{where}")


@contextmanager
def _atomic_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block is done, and is removed if it fails."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"convert: {out} must not exist or be an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        os.replace(folder, out)  # an empty folder may be replaced
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
