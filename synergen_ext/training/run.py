"""Runs a recipe from nothing to a checkpoint folder that ``from_pretrained`` loads. Every part resumes."""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Emu3VQVAEConfig

from ..model import SynerGenConfig, SynerGenVL
from ..processing.image_tokenizer import WEIGHTS_FILE as TOKENIZER_WEIGHTS
from ..processing.image_tokenizer import ImageTokenizer
from ..processing.sequences import SequenceBuilder
from ..processing.text import TOKENIZER_FILE, TextTokenizer
from ..scenes import CANVAS
from .checkpoints import load_state, replacing, save_state
from .data import Batches, SceneBatches, SceneCache, train_text_tokenizer
from .loop import run_stage
from .parallel import check_shares, is_sharded, whole_state
from .recipe import Recipe, StageRecipe, load_recipe
from .report import Reporter
from .sources.batches import Rules, SourceBatches
from .sources.build import Wanted, build_mixture, check_paths, missing_paths
from .sources.order import mix
from .sources.tokenize import encoder
from .stores import FileStore
from .tokenizer import train_tokenizer
from .world import World, losing

STATE_FILE = "state.safetensors"


def run_recipe(path: str | Path, out: str | Path, resume: bool = True, dry_run: bool = False) -> Path:
    """Train everything a recipe names; returns the folder of the finished checkpoint, ``out/checkpoint``.

    Args:
        path: the recipe (YAML).
        out: working folder: logs, samples, resumable state, token cache.
        resume: go on from what ``out`` holds; otherwise ``out`` must be empty or absent.
        dry_run: check the recipe, print the plan and what files are missing, train nothing. Sizes that a missing
            tokenizer would decide are the preset's.

    Raises:
        FileNotFoundError, ValueError: the recipe is missing or wrong, or ``out`` holds another run.
    """
    recipe, out = load_recipe(path), Path(out)
    if recipe.sources is not None and not dry_run:
        check_paths(recipe.sources)
    described = plan(recipe)  # builds the model on no memory, so wrong sizes fail here and not after an hour
    if dry_run:
        print(described)
        if recipe.sources is not None and (missing := missing_paths(recipe.sources)):
            more = f"\nmissing: and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            print("\n".join(f"missing: {line}" for line in missing[:3]) + more)
        return out / "checkpoint"
    text = Path(path).read_text()
    kept = out / "recipe.yaml"
    if out.exists() and any(out.iterdir()):
        if not resume:
            raise ValueError(f"train: {out} is not empty; remove it, choose another folder, or resume")
        if kept.is_file() and kept.read_text() != text:
            raise ValueError(f"train: {out} holds a run of another recipe (its recipe.yaml differs from {path})")
    world = World.join()
    check_shares(recipe, world.size)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if world.rank == 0:
            with replacing(kept) as temporary:
                temporary.write_text(text)
        advice = f"start again to go on from the last checkpoint in {out}"
        with losing(world, advice), Reporter(recipe, out, silent=world.rank != 0) as reporter:
            return _Run(recipe, out, reporter, world).go()
    finally:
        world.leave()


def plan(recipe: Recipe) -> str:
    """What a recipe would do, in words: sizes, stages, samples.

    Raises:
        ValueError: sizes that cannot be built or do not fit together.
    """
    config = model_config(recipe)
    with torch.device("meta"):
        try:
            model = SynerGenVL(config)
            tokenizer = _given_tokenizer(recipe) or ImageTokenizer(Emu3VQVAEConfig(**recipe.tokenizer.model))
        except OSError:
            raise
        except Exception as e:  # transformers checks types with exceptions of its own
            raise ValueError(f"recipe: these sizes cannot be built: {' '.join(str(e).split())}") from e
    side = CANVAS // tokenizer.stride
    if recipe.sources is None and config.image_grid != (side, side):
        raise ValueError(
            f"recipe: model.image_grid must be [{side}, {side}] ({CANVAS} pixels, {tokenizer.stride} a token), "
            f"got {list(config.image_grid)}"
        )
    lines = [
        f"{recipe.name}: {model.num_parameters():,} parameters, {model.num_parameters(active=True):,} active a token",
        f"pictures {config.image_grid[0]} x {config.image_grid[1]} tokens, fold {config.fold[0]} x {config.fold[1]}, "
        f"{config.image_tokens} folded tokens each; " + _plan_data(recipe),
        f"image tokenizer: {recipe.tokenizer.steps:,} steps of {recipe.tokenizer.batch} crops, "
        f"{recipe.tokenizer.decoder_steps:,} of its decoder alone",
    ]
    if recipe.without_image_tokenizer:
        lines[2] = "image tokenizer: none, every picture is ids already"
    elif recipe.sources and recipe.sources.image_tokenizer:
        lines[2] = f"image tokenizer: {recipe.sources.image_tokenizer}"
    for s in recipe.stages:
        lines.append(
            f"stage {s.name}: {s.steps:,} steps x ({s.paint} paint + {s.describe} describe + {s.text} text), "
            f"trains {', '.join(s.train)}, lr {s.learning_rate:g} {s.schedule}"
        )
    return "\n".join(lines)


def _plan_data(recipe: Recipe) -> str:
    if recipe.sources is None:
        return f"{recipe.data.scenes:,} tokenised scenes"
    return ", ".join(f"{len(getattr(recipe.sources, t))} sources to {t}" for t in ("understand", "generate"))


def model_config(recipe: Recipe) -> SynerGenConfig:
    """The sizes of a recipe's model. A tokenizer that the recipe names and that is not there has the preset's.

    Raises:
        ValueError: sizes that do not fit together.
    """
    return recipe.config(_vocab_size(recipe), _codebook_size(recipe))


def _given_tokenizer(recipe: Recipe) -> ImageTokenizer | None:
    """The sizes of the image tokenizer that the recipe names, if it names one."""
    if (
        recipe.sources is None
        or not recipe.sources.image_tokenizer
        or not Path(recipe.sources.image_tokenizer).is_dir()
    ):
        return None
    return ImageTokenizer.without_weights(recipe.sources.image_tokenizer)


def _vocab_size(recipe: Recipe) -> int:
    if recipe.sources is None or not recipe.sources.text_tokenizer:
        return recipe.data.text_vocab
    if not Path(recipe.sources.text_tokenizer).is_dir():  # a dry run: `run_recipe` has refused it otherwise
        preset = SynerGenConfig.preset(recipe.model.get("preset", "demo"))
        return int(recipe.model.get("vocab_size", preset.vocab_size))
    return TextTokenizer.load(recipe.sources.text_tokenizer).vocab_size


def _codebook_size(recipe: Recipe) -> int:
    if given := _given_tokenizer(recipe):
        return given.codebook_size
    return int(recipe.tokenizer.model.get("codebook_size", 32_768))


class _Run:
    def __init__(self, recipe: Recipe, out: Path, reporter: Reporter, world: World) -> None:
        self.recipe, self.out, self.reporter, self.world = recipe, out, reporter, world
        self.text = world.first(self._text_tokenizer)
        self.config: SynerGenConfig = recipe.config(self.text.vocab_size, _codebook_size(recipe))
        self.builder = SequenceBuilder(self.config, self.text)

    def go(self) -> Path:
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        model = SynerGenVL(self.config)
        for i, stage in enumerate(recipe.stages):
            finished = self.out / "stages" / f"{stage.name}.safetensors"
            if finished.is_file():
                model = self._load(finished, model)
                continue
            batches = self._batches(i, stage)
            with self.reporter.stage(stage):
                paints = stage.paint and not recipe.without_image_tokenizer
                sample = functools.partial(self._sample, model) if paints else None
                run_stage(
                    model, recipe, i, batches, self.out / STATE_FILE, self.reporter.step, sample, self.world,
                    self.image_tokenizer().codebook if stage.place_codes else None,
                )  # fmt: skip
            state = whole_state(model, self.world)
            if self.world.rank == 0 and isinstance(batches, SourceBatches):
                print(f"stage {stage.name}:\n{batches.summary()}")
            rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
            FileStore(finished, self.world).save(state, {"stage": stage.name, "step": stage.steps, "rng": rng})
            del state
            if is_sharded(model):
                self.world.wait()
                model = self._load(finished, SynerGenVL(self.config))
        return self._export(model) if self.world.rank == 0 else self.out / "checkpoint"

    def _load(self, finished: Path, model: SynerGenVL) -> SynerGenVL:
        """A finished stage's weights, and the random number generator as the stage left it."""
        tensors, meta = load_state(finished)
        model.load_state_dict(tensors)
        if "rng" in meta:
            torch.set_rng_state(torch.tensor(list(base64.b64decode(meta["rng"])), dtype=torch.uint8))
        return model

    def _sample(self, model: SynerGenVL, stage: str, step: int) -> None:
        if is_sharded(model):  # paint with a whole copy: generation lays weights out anew, in place
            state = whole_state(model, self.world)
            with torch.device("meta"):
                model = SynerGenVL(self.config)
            if self.world.rank == 0:
                model.load_state_dict(state, assign=True)
        if self.world.rank == 0:
            self.reporter.sample(model, self.builder, self.image_tokenizer(), stage, step)
        self.world.wait()

    def _text_tokenizer(self) -> TextTokenizer:
        if self.recipe.sources and self.recipe.sources.text_tokenizer:
            return TextTokenizer.load(self.recipe.sources.text_tokenizer)
        folder = self.out / "text"
        if not (folder / TOKENIZER_FILE).is_file():
            trained = train_text_tokenizer(self.recipe.data.seed, self.recipe.data.text_vocab)
            _whole_folder(folder, trained.save)
        return TextTokenizer.load(folder)

    def image_tokenizer(self) -> ImageTokenizer:
        """The recipe's image tokenizer, or the trained one, with the float16 weights that are shipped."""
        if self.recipe.sources and self.recipe.sources.image_tokenizer:
            return ImageTokenizer.from_pretrained(self.recipe.sources.image_tokenizer).eval()
        folder = self.out / "image_tokenizer"
        if not (folder / TOKENIZER_WEIGHTS).is_file():
            state_file = self.out / "image_tokenizer_state.safetensors"
            state = _nest(*load_state(state_file)) if state_file.is_file() else None
            recipe = self.recipe.tokenizer
            total = recipe.steps + recipe.decoder_steps
            # Its steps use generators of their own; the model's weights must not depend on whether it was trained now.
            with (
                torch.random.fork_rng(devices=[]),
                self.reporter.task("image tokenizer", total, int(state["step"]) if state else 0),
            ):
                trained = train_tokenizer(
                    recipe, state, self.reporter.tokenizer_step, self.recipe.save_every,
                    lambda s: save_state(state_file, *_flatten(s)),
                )  # fmt: skip
            _whole_folder(folder, lambda path: trained.save_pretrained(path, torch.float16))
        return ImageTokenizer.from_pretrained(folder).eval()

    def _batches(self, index: int, stage: StageRecipe) -> Batches:
        if self.recipe.sources is not None:
            return self._source_batches(index, stage)
        ids: NDArray[np.uint16] = np.zeros((0, *self.config.image_grid), np.uint16)
        data = self.recipe.data
        if stage.paint or stage.describe:
            cache = SceneCache(self.out / "cache", self.world.first(self.image_tokenizer), data.seed, data.scenes)
            with self.reporter.task("tokenising scenes", data.scenes, 0):
                ids = self.world.first(lambda: cache.build(self.reporter.advance))
        seed = self.recipe.seed * 1000 + index
        return SceneBatches(self.builder, ids, data.seed, seed, stage.unconditional, stage.pack)

    def _source_batches(self, index: int, stage: StageRecipe) -> SourceBatches:
        sources = self.recipe.sources
        assert sources is not None
        encode, (rows, columns), stride = None, self.config.image_grid, 0
        if not self.recipe.without_image_tokenizer:
            tokenizer = self.world.first(self.image_tokenizer)
            encode, stride = encoder(tokenizer), tokenizer.stride

        wanted = Wanted((rows, columns), self.config.codebook_size, (rows * stride, columns * stride))
        mixtures = {
            task: build_mixture(getattr(sources, task), task, wanted, mix(self.recipe.seed, index, number))
            for number, (task, size) in enumerate((("understand", stage.describe), ("generate", stage.paint)))
            if size
        }
        rules = Rules(
            sources.template, sources.max_tokens, sources.max_bad, sources.bad_after, sources.workers,
            stage.unconditional, stage.pack,
        )  # fmt: skip
        return SourceBatches(self.builder, mixtures, rules, encode, self.out, self.world, stage.name)

    def _export(self, model: SynerGenVL) -> Path:
        """The folder that loads: model in bfloat16, both tokenizers, the recipe, the curve."""
        folder = self.out / "checkpoint"
        model.save_pretrained(folder, torch.bfloat16)
        self.text.save(folder)
        if not self.recipe.without_image_tokenizer:
            given = self.recipe.sources is not None and bool(self.recipe.sources.image_tokenizer)
            self.image_tokenizer().save_pretrained(folder, None if given else torch.float16)
        shutil.copy(self.out / "recipe.yaml", folder / "recipe.yaml")
        self.reporter.write_curve(folder)
        return folder


def _whole_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a folder, which gets its name when it is whole."""
    partial = folder.with_name(folder.name + ".partial")
    for rest in (partial, folder):  # of a run that was killed
        shutil.rmtree(rest, ignore_errors=True)
    partial.mkdir()
    write(partial)
    os.rename(partial, folder)


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tokenizer trainer's nested state as named tensors and JSON."""
    tensors: dict[str, Tensor] = {}
    for part in ("model", "codebook"):
        tensors |= {f"{part}.{k}": v for k, v in state[part].items()}
    for index, moments in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    return tensors, {"step": state["step"], "groups": json.loads(json.dumps(state["optimizer"]["param_groups"]))}


def _nest(tensors: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {"model": {}, "codebook": {}, "step": meta["step"]}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, rest = name.split(".", 1)
        if part == "optimizer":
            index, key = rest.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        else:
            state[part][rest] = value
    state["optimizer"] = {"state": moments, "param_groups": meta["groups"]}
    return state
