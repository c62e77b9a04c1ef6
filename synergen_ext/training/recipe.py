"""A recipe is one YAML file: the model, its tokenizers, its data and the stages, in the order they run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml

from ..model.config import SynerGenConfig
from ..processing.image_tokenizer import CONFIG_FIELDS
from .sources.recipe import SourceRecipe, SourcesRecipe
from .tokenizer import TokenizerRecipe

MAX_RECIPE_BYTES = 1 << 20

#: What a stage may train. The paper's stage 1 is ``vision``, stage 2 adds ``attention``, tuning adds the rest.
PARTS = ("vision", "attention", "language_model")
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")
PARALLEL = ("ddp", "fsdp", "hsdp")
BAD_STEP = ("stop", "skip")


def _require(fits: object, where: str, name: str, wanted: str, got: Any) -> None:
    if not fits:
        raise ValueError(f"recipe: {where}: {name} must be {wanted}, got {got!r}")


@dataclass
class DataRecipe:
    """Scenes: how many are tokenised (each is seen several times, with other words), and from which stream."""

    scenes: int = 100_000
    seed: int = 1
    text_vocab: int = 512

    def __post_init__(self) -> None:
        for name in ("scenes", "text_vocab"):
            _require(getattr(self, name) >= 1, "data", name, "at least 1", getattr(self, name))
        _require(self.seed >= 0, "data", "seed", "at least 0", self.seed)


@dataclass
class StageRecipe:
    """One stage. Batch sizes are sequences a step; all tasks with a size above 0 stand in every step."""

    name: str
    train: list[str]
    steps: int
    learning_rate: float
    schedule: str = "constant"
    optimizer: str = "adamw"
    warmup: int = 50
    weight_decay: float = 0.05
    paint: int = 0  # caption -> picture
    describe: int = 0  # picture + questions -> answers
    text: int = 0  # words only
    questions: int = 3  # question-answer pairs a picture
    unconditional: float = 0.1  # share of captions replaced by <UNCOND> (guidance)
    pack: int = 0  # positions of a row that several samples share; 0: one sample a row, padded
    clip: float = 1.0  # gradient norm
    ema: float = 0.0  # decay of the averaged weights that the stage ends with; 0 keeps the last weights
    copy_experts: bool = False  # begin by copying every text FFN to its vision expert
    place_codes: bool = False  # begin with the tokenizer's code vectors in the tables over image ids

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        # The name becomes part of file names.
        _require(re.fullmatch(r"[\w-]{1,64}", self.name), where, "name", "letters, digits, - and _", self.name)
        known = bool(self.train) and all(p in PARTS for p in self.train)
        _require(known, where, "train", f"a list of some of {', '.join(PARTS)}", self.train)
        known = self.schedule in SCHEDULES
        _require(known, where, "schedule", f"one of {', '.join(SCHEDULES)}", self.schedule)
        _require(self.optimizer in OPTIMIZERS, where, "optimizer", f"one of {', '.join(OPTIMIZERS)}", self.optimizer)
        for name in ("steps", "questions"):
            _require(getattr(self, name) >= 1, where, name, "at least 1", getattr(self, name))
        for name in ("paint", "describe", "text", "pack", "warmup", "weight_decay"):
            _require(0 <= getattr(self, name) < math.inf, where, name, "at least 0", getattr(self, name))
        for name in ("learning_rate", "clip"):
            _require(0 < getattr(self, name) < math.inf, where, name, "above 0", getattr(self, name))
        sizes = (self.paint, self.describe, self.text)
        _require(any(sizes), where, "paint, describe or text", "above 0: a stage needs a task", sizes)
        _require(0 <= self.unconditional <= 1, where, "unconditional", "in [0, 1]", self.unconditional)
        _require(0 <= self.ema < 1, where, "ema", "in [0, 1)", self.ema)


@dataclass
class ParallelRecipe:
    """How several processes share the work; one process alone trains the same way with any of these.

    ``ddp``: every process holds the whole model. ``fsdp``: a part of each layer's weights, gradients and moments.
    ``hsdp``: groups of ``shard`` processes hold the model together, and the groups share the rows.
    """

    kind: str = "ddp"
    shard: int = 0  # hsdp: processes that hold a model together, as a rule those of one machine
    accumulate: int = 1  # parts of a step's rows that go through the model one after another
    async_save: bool = False  # fsdp, hsdp: write checkpoints while the next steps run

    def __post_init__(self) -> None:
        _require(self.kind in PARALLEL, "parallel", "kind", f"one of {', '.join(PARALLEL)}", self.kind)
        hsdp = self.kind == "hsdp"
        wanted = "at least 1 with hsdp" if hsdp else f"0 with {self.kind}: it is the size of hsdp's groups"
        _require(self.shard >= 1 if hsdp else self.shard == 0, "parallel", "shard", wanted, self.shard)
        _require(self.accumulate >= 1, "parallel", "accumulate", "at least 1", self.accumulate)
        saves = self.sharded or not self.async_save
        _require(saves, "parallel", "async_save", "false with ddp: one process writes one file", self.async_save)

    @property
    def sharded(self) -> bool:
        return self.kind != "ddp"


@dataclass
class GuardRecipe:
    """What a bad step is, and what happens then: a loss or gradient norm that is not finite, or that exploded."""

    policy: str = "stop"  # or skip: leave the weights as they are and go on
    explode: float = 0.0  # bad above this many times the mean over the good steps before; 0: never
    after: int = 20  # good steps of a stage before `explode` counts
    max_skips: int = 10  # steps skipped in a row; one more stops the run

    def __post_init__(self) -> None:
        _require(self.policy in BAD_STEP, "guard", "policy", f"one of {', '.join(BAD_STEP)}", self.policy)
        fits = self.explode == 0 or 1 < self.explode < math.inf
        _require(fits, "guard", "explode", "0 or above 1", self.explode)
        for name in ("after", "max_skips"):
            _require(getattr(self, name) >= 1, "guard", name, "at least 1", getattr(self, name))


@dataclass
class Recipe:
    name: str
    model: dict[str, Any]  # preset, and fields of SynerGenConfig to change
    tokenizer: TokenizerRecipe
    data: DataRecipe
    stages: list[StageRecipe]
    seed: int = 0
    bfloat16: bool = True  # autocast; weights and optimizer stay float32
    save_every: int = 250  # steps between resumable checkpoints
    sample_every: int = 500  # steps between sample pictures; 0: none
    sources: SourcesRecipe | None = None  # data from files; none: scenes
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    guard: GuardRecipe = field(default_factory=GuardRecipe)
    wandb: str = ""  # project of Weights & Biases that figures also go to (the extra wandb); empty: none

    def __post_init__(self) -> None:
        if self.parallel.sharded:
            self._check_sharded()
        if self.sources is not None:
            self._check_tasks(self.sources)
        _require(self.save_every >= 1, "recipe", "save_every", "at least 1", self.save_every)
        for name in ("seed", "sample_every"):
            _require(getattr(self, name) >= 0, "recipe", name, "at least 0", getattr(self, name))

    def _check_sharded(self) -> None:
        kind = self.parallel.kind
        for stage in self.stages:
            where = f"stage {stage.name!r}"
            wanted = f"adamw with parallel.kind {kind}: muon needs whole matrices, and no process holds one"
            _require(stage.optimizer != "muon", where, "optimizer", wanted, stage.optimizer)
            # A layer with both FFNs frozen lays them side by side for good, in memory that sharding gives back.
            wanted = f"more than attention with parallel.kind {kind}"
            _require(set(stage.train) != {"attention"}, where, "train", wanted, stage.train)

    def _check_tasks(self, sources: SourcesRecipe) -> None:
        for stage in self.stages:
            where = f"stage {stage.name!r}"
            _require(not stage.text, where, "text", "0 with sources: words only are rows of understand", stage.text)
            for task, sort in (("paint", "generate"), ("describe", "understand")):
                size = getattr(stage, task)
                _require(not size or getattr(sources, sort), where, task, f"0 without sources.{sort}", size)
            codes = stage.place_codes and self.without_image_tokenizer
            _require(not codes, where, "place_codes", "false without sources.image_tokenizer", True)

    @property
    def without_image_tokenizer(self) -> bool:
        """All pictures are ids already and no tokenizer is named: the run has none, and leaves none."""
        return self.sources is not None and self.sources.tokenised and not self.sources.image_tokenizer

    def config(self, vocab_size: int, codebook_size: int) -> SynerGenConfig:
        """The model's config, with the sizes that the trained tokenizers decide."""
        changes = dict(self.model)
        preset = changes.pop("preset", "demo")
        return SynerGenConfig.preset(preset, **{**changes, "vocab_size": vocab_size, "codebook_size": codebook_size})


def _fill(cls: type, data: Any, where: str) -> Any:
    """A dataclass from a mapping, with every wrong name or type refused by its place in the file."""
    if not isinstance(data, dict):
        raise ValueError(f"recipe: {where} must be a mapping, got {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(fields)):
        raise ValueError(f"recipe: {where} has no field {unknown[0]!r}; known: {', '.join(fields)}")
    needed = [
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [n for n in needed if n not in data]:
        raise ValueError(f"recipe: {where} lacks {missing[0]!r}")
    hints = get_type_hints(cls)
    values = {}
    for name, value in data.items():
        kind = hints[name]
        if kind is float and type(value) is int:
            value = float(value)
        if kind is float and isinstance(value, str):  # YAML reads 1e-3 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        if kind in (int, float, str, bool) and type(value) is not kind:
            raise ValueError(f"recipe: {where}.{name} must be {kind.__name__}, got {value!r}")
        if get_origin(kind) in (list, dict) and not isinstance(value, get_origin(kind)):
            raise ValueError(f"recipe: {where}.{name} must be a {get_origin(kind).__name__}, got {value!r}")
        values[name] = value
    return cls(**values)


def _fill_sources(data: Any) -> SourcesRecipe:
    if isinstance(data, dict):
        data = dict(data)
        for task in ("understand", "generate"):
            listed = data.get(task, [])
            if not isinstance(listed, list):
                raise ValueError(f"recipe: sources.{task} must be a list, got {listed!r}")
            data[task] = [_fill(SourceRecipe, s, f"sources.{task}[{i}]") for i, s in enumerate(listed)]
    filled: SourcesRecipe = _fill(SourcesRecipe, data, "sources")
    return filled


def parse_recipe(data: Any) -> Recipe:
    """A recipe from parsed YAML.

    Raises:
        ValueError: an unknown or missing field, a wrong type or value, by name.
    """
    if not isinstance(data, dict):
        raise ValueError(f"recipe: the file must hold a mapping, got {type(data).__name__}")
    data = dict(data)
    data["tokenizer"] = _fill(TokenizerRecipe, data.get("tokenizer", {}), "tokenizer")
    if unknown := sorted(set(data["tokenizer"].model) - set(CONFIG_FIELDS)):
        # transformers' config takes any name, so a misspelt one would be lost silently.
        raise ValueError(f"recipe: tokenizer.model has no field {unknown[0]!r}; known: {', '.join(CONFIG_FIELDS)}")
    data["data"] = _fill(DataRecipe, data.get("data", {}), "data")
    if "sources" in data:
        data["sources"] = _fill_sources(data["sources"])
    if "parallel" in data:
        short = isinstance(data["parallel"], str)
        given = {"kind": data["parallel"]} if short else data["parallel"]
        data["parallel"] = _fill(ParallelRecipe, given, "parallel")
    if "guard" in data:
        data["guard"] = _fill(GuardRecipe, data["guard"], "guard")
    stages = data.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ValueError("recipe: stages must be a list with at least one stage")
    data["stages"] = [_fill(StageRecipe, s, f"stages[{i}]") for i, s in enumerate(stages)]
    recipe: Recipe = _fill(Recipe, data, "recipe")
    names = [s.name for s in recipe.stages]
    if len(set(names)) != len(names):
        raise ValueError(f"recipe: stage names must differ, got {names}")
    return recipe


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too large, not YAML, or not a recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe: no file {path}")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise ValueError(f"recipe: {path} must be at most {MAX_RECIPE_BYTES} bytes, got {path.stat().st_size}")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"recipe: {path} is not YAML: {str(e).splitlines()[0]}") from e
    return parse_recipe(data)
