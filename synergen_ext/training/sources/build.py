"""From the recipe's ``sources`` to open mixtures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conversations import Captions, Conversations
from .files import Lines, read_text
from .hub import Rows, is_pattern
from .mixture import Mixture, Part
from .recipe import SourceRecipe, SourcesRecipe, check_repeat_time
from .sample import Source
from .tar import Tar, shards_of
from .tokens import Tokens

#: Keys of a data set in InternVL's meta file.
_META = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")


@dataclass(frozen=True)
class Wanted:
    """What a training asks of its pictures."""

    grid: tuple[int, int]  # tokens
    codebook_size: int
    size: tuple[int, int]  # pixels, height and width; (0, 0) where nothing is decoded


def missing_paths(sources: SourcesRecipe) -> list[str]:
    """What the recipe names and is not there, in a line each; URLs are not looked for."""
    found = []
    for source in (*sources.understand, *sources.generate):
        for path in shards_of(source.path) if source.format == "tar" else [source.path]:
            if not is_pattern(path) and not Path(path).exists():
                found.append(f"source {source.name!r}: no file {path}")
    for name in ("text_tokenizer", "image_tokenizer"):
        if getattr(sources, name) and not Path(getattr(sources, name)).is_dir():
            found.append(f"sources.{name}: no folder {getattr(sources, name)}")
    return found


def check_paths(sources: SourcesRecipe) -> None:
    """Look for every local file and folder that the recipe names, before anything slow begins.

    Raises:
        FileNotFoundError: one is missing.
    """
    if missing := missing_paths(sources):
        raise FileNotFoundError(f"recipe: {missing[0]}")


def build_mixture(sources: list[SourceRecipe], task: str, wanted: Wanted, seed: int) -> Mixture:
    """Open every source of a task and index its rows.

    Raises:
        ValueError: a file is missing or is not what its format says.
    """
    parts: list[Part] = []
    for recipe in sources:
        opened = open_parts(recipe, task, wanted)
        total = sum(part.weight for part in opened)
        for part in opened:
            part.weight *= recipe.weight / total if recipe.weight else 1
        parts += opened
    return Mixture(parts, seed)


def open_parts(recipe: SourceRecipe, task: str, wanted: Wanted) -> list[Part]:
    """The data sets of one source, weighted by their rows; one, but for InternVL's meta file.

    Raises:
        ValueError: as of `build_mixture`.
    """
    if recipe.format == "internvl":
        return _open_meta(recipe, wanted)
    source: Source
    if recipe.format == "tokens":
        source = Tokens(recipe.path, task, wanted.grid, wanted.codebook_size)
    elif recipe.format == "tar":
        source = Tar(recipe.path, task, wanted.size)
    elif recipe.format == "datasets":
        source = Rows(recipe.path, task, recipe.root, wanted.size, recipe.data_augment)
    elif recipe.format == "captions":
        source = Captions(Lines(recipe.path), recipe.root, wanted.size)
    else:
        source = Conversations(Lines(recipe.path), recipe.root, wanted.size, recipe.data_augment)
    return [_part(recipe.name, source, recipe.repeat_time)]


def _part(name: str, source: Source, repeat_time: float) -> Part:
    count = max(1, int(len(source) * min(1.0, repeat_time)))
    return Part(name, source, count * max(1.0, repeat_time), count)


def _open_meta(recipe: SourceRecipe, wanted: Wanted) -> list[Part]:
    where = f"sources: {recipe.path}"
    try:
        meta = json.loads(read_text(recipe.path))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{where} cannot be read: {e}") from e
    if not isinstance(meta, dict) or not meta or not all(isinstance(v, dict) for v in meta.values()):
        raise ValueError(f"{where} must map names of data sets to objects")
    parts = []
    for name, data in meta.items():
        part = _open_dataset(f"{recipe.name}/{name}", data, f"{where}: {name!r}", wanted)
        if recipe.use_data_resampling:
            part.weight = math.sqrt(part.weight)
        parts.append(part)
    return parts


def _open_dataset(name: str, data: dict[str, Any], where: str, wanted: Wanted) -> Part:
    if unknown := sorted(set(data) - set(_META)):
        raise ValueError(f"{where} has no key {unknown[0]!r}; known: {', '.join(_META)}")
    values = {"root": "", "data_augment": False, "repeat_time": 1, "length": None, "max_dynamic_patch": 1, **data}
    annotation, root, repeat = values.get("annotation"), values["root"], values["repeat_time"]
    checks = (
        ("annotation", isinstance(annotation, str) and annotation.endswith(".jsonl"), "a path that ends in .jsonl"),
        ("root", isinstance(root, str), "a path"),
        ("data_augment", isinstance(values["data_augment"], bool), "true or false"),
        ("repeat_time", type(repeat) in (int, float), "a number"),
        # The model sees every picture at one size, so there is nothing to tile.
        ("max_dynamic_patch", values["max_dynamic_patch"] == 1, "1 (pictures are not tiled)"),
    )
    for key, fits, wish in checks:
        if not fits:
            raise ValueError(f"{where}: {key} must be {wish}, got {values.get(key)!r}")
    check_repeat_time(repeat, where)
    lines = Lines(str(annotation))
    if values["length"] is not None and values["length"] != len(lines):
        raise ValueError(f"{where}: length must be the {len(lines)} rows of {annotation}, got {values['length']!r}")
    source = Conversations(lines, root, wanted.size, values["data_augment"])
    return _part(name, source, repeat)
