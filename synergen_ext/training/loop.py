"""One stage: steps that mix all tasks, logging, resumable state, bad steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..model import SynerGenVL
from ..model.modeling import IGNORE
from .checkpoints import flatten_optimizers, prefixed, restore_optimizers, without_prefix
from .data import Batch, Batches
from .figures import gradient_norms, pace
from .guard import BadStep, Guard, finite
from .microbatch import accumulate
from .parallel import anchor, is_sharded, local, shard, whole
from .recipe import Recipe, StageRecipe
from .stages import freeze_all_but, learning_rate, make_optimizers
from .stores import FileStore, FolderStore, Store
from .world import World

OnStep = Callable[[str, int, dict[str, float]], None]
ALONE = World()


class Average:
    """Exponential moving average of the trained weights; early steps count more: decay_t = min(decay, (1+t)/(10+t))."""

    def __init__(self, named: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in named.items()}

    @torch.no_grad()
    def update(self, named: dict[str, Tensor], step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        mine = [local(v) for v in self.weights.values()]
        torch._foreach_lerp_(mine, [local(named[k].detach()) for k in self.weights], 1 - keep)

    @torch.no_grad()
    def store(self, named: dict[str, Tensor]) -> None:
        """Write the averages into the model."""
        for k, v in self.weights.items():
            named[k].copy_(v)


def _batches(batches: Batches, stage: StageRecipe, step: int, world: World) -> list[tuple[str, Batch]]:
    """This process's share of every task's rows."""
    share = slice(world.rank, None, world.size)
    out = []
    if stage.paint:
        out.append(("paint", batches.paint(step, stage.paint, share)))
    if stage.describe:
        out.append(("describe", batches.describe(step, stage.describe, stage.questions, share)))
    if stage.text:
        out.append(("text", batches.text(step, stage.text, stage.questions, share)))
    return out


def train_step(
    model: SynerGenVL, optimizers: list[torch.optim.Optimizer], tasks: list[tuple[str, Batch]], clip: float,
    bfloat16: bool, world: World = ALONE, guard: Guard | None = None,
) -> dict[str, float]:  # fmt: skip
    """One update from all tasks: the sum of their losses (eq. 4). Returns the losses and the gradient norm.

    Several processes, and several batches of one task (gradient accumulation), take the step that one would take on
    all their rows: a task's text loss is the mean over all targets, its image loss over all pictures.

    Raises:
        BadStep: a loss or gradient is not finite, or the guard refuses it; the weights are as before the step.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    # Of every batch: targets, pictures, pictures with a loss; here and in all processes.
    mine = [(float((b.labels[:, 1:] != IGNORE).sum()), *_pictures(b)) for _, b in tasks]
    sums = world.sum(n for counts in mine for n in counts)
    everywhere = [sums[i : i + 3] for i in range(0, len(sums), 3)]
    total: dict[str, list[float]] = {}  # of every task
    for (name, _), counts in zip(tasks, everywhere, strict=True):
        total[name] = [a + b for a, b in zip(total.get(name, [0.0] * 3), counts, strict=True)]
    sharded, weight = is_sharded(model), model.config.image_loss_weight
    figures: dict[str, float] = {}
    for (name, batch), (targets, _, painted), (any_text, any_pictures, any_painted) in zip(
        tasks, mine, everywhere, strict=True
    ):
        of_text = targets * world.size / max(1.0, total[name][0])
        of_images = painted * world.size / max(1.0, total[name][2])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            losses = model(batch.input_ids, batch.labels, batch.image_ids, batch.paint, batch.documents)
        loss = of_text * losses.text + of_images * (weight * losses.image)
        if sharded:
            loss = loss + anchor(model, any_text > 0, any_pictures > 0, any_painted > 0)
        loss.backward()
        _add(figures, f"{name}/text", float(losses.text.detach()) * of_text)
        if name == "paint":
            _add(figures, "paint/image", float(losses.image.detach()) * of_images)
    figures = {k: v / world.size for k, v in zip(figures, world.sum(figures.values()), strict=True)}
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    if not sharded:
        world.average_gradients(trained)
    by_part = gradient_norms(model)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(trained, clip)))
    if guard:
        guard.judge(figures, norm)
    else:
        finite(figures, norm)
    for optimizer in optimizers:
        optimizer.step()
    return {**figures, "gradient_norm": norm, **by_part}


def _pictures(batch: Batch) -> tuple[float, float]:
    if batch.image_ids is None or batch.paint is None:
        return 0.0, 0.0
    return float(len(batch.image_ids)), float(batch.paint.sum())


def _add(figures: dict[str, float], name: str, value: float) -> None:
    figures[name] = figures.get(name, 0.0) + value


def make_store(recipe: Recipe, state_file: Path, world: World) -> Store:
    """One file, or beside it a folder of the name without ending where the recipe shards the weights."""
    if recipe.parallel.sharded:
        return FolderStore(state_file.with_suffix(""), world, recipe.parallel.async_save)
    return FileStore(state_file, world)


def run_stage(
    model: SynerGenVL, recipe: Recipe, index: int, batches: Batches, state_file: Path,
    on_step: OnStep | None = None, on_sample: Callable[[str, int], None] | None = None, world: World = ALONE,
    codebook: Tensor | None = None,
) -> None:  # fmt: skip
    """Train one stage to its end, resuming from ``state_file`` if it holds this stage.

    The same recipe gives the same weights, interrupted or not (same machine, thread count and versions).
    """
    stage = recipe.stages[index]
    start = 0
    store, guard = make_store(recipe, state_file, world), Guard(recipe.guard, state_file.parent, world)
    meta = store.meta()
    if meta and meta["stage"] == stage.name:
        start = int(meta["step"])
        batches.load_state_dict(meta.get("data", {}))
        if "guard" in meta:
            guard.load_state_dict(meta["guard"])
    if start == 0 and stage.copy_experts:
        model.copy_text_experts()
    if start == 0 and stage.place_codes:
        if codebook is None:
            raise ValueError(f"stage {stage.name!r}: place_codes needs the image tokenizer's codebook")
        model.place_image_codes(codebook)
    freeze_all_but(model, stage.train)
    shard(model, recipe.parallel, world)
    optimizers = make_optimizers(model, stage)
    named: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    average = Average(named, stage.ema) if stage.ema else None
    if start:
        _restore(store, model, optimizers, named, average)
    model.train()
    with ops.backend("eager"):
        for step in range(start, stage.steps):
            rate = learning_rate(stage, step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            began = time.perf_counter()
            tasks = _batches(batches, stage, step, world)
            waited = time.perf_counter() - began
            parts = accumulate(tasks, recipe.parallel.accumulate, model.config, world)
            bad = None
            try:
                figures = train_step(model, optimizers, parts, stage.clip, recipe.bfloat16, world, guard)
            except BadStep as e:
                bad = e
            if bad:
                guard.bad(stage.name, step, bad, tasks)
                figures = {}
            elif average:
                average.update(named, step)
            figures["learning_rate"] = rate
            figures |= pace(tasks, world.size, time.perf_counter() - began, waited)
            # Of all positions, those that hold a token: the rest is padding.
            figures["filled"] = sum(b.tokens for _, b in tasks) / sum(b.input_ids.numel() for _, b in tasks)
            if on_step and not bad:
                on_step(stage.name, step, figures)
            done = step + 1
            store.poll()
            if done % recipe.save_every == 0 and done < stage.steps:
                state = _state(model, optimizers, named, average)
                position = {"data": batches.state_dict(), "guard": guard.state_dict()}
                store.save(state, {"stage": stage.name, "step": done, **position})
            if on_sample and recipe.sample_every and done % recipe.sample_every == 0:
                on_sample(stage.name, done)
    store.finish()
    if average:
        average.store(named)
    model.eval()


def _state(
    model: SynerGenVL, optimizers: list[torch.optim.Optimizer], named: dict[str, Tensor], average: Average | None
) -> dict[str, Tensor]:
    tensors = {**prefixed("model", model.state_dict()), **flatten_optimizers(optimizers, named)}
    if average:
        tensors |= prefixed("average", average.weights)
    tensors["rng"] = torch.get_rng_state()
    return tensors


def _restore(
    store: Store, model: SynerGenVL, optimizers: list[torch.optim.Optimizer], named: dict[str, Tensor],
    average: Average | None,
) -> None:  # fmt: skip
    """Read a checkpoint into a stage's model, moments and averages, whatever part of each this process holds."""
    state = model.state_dict()

    def allocate(name: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        kind, _, rest = name.partition(".")
        if kind == "model" and rest in state:
            return state[rest]
        weight = named.get(rest.partition(".")[2] if kind == "optimizer" else rest)
        if weight is not None and weight.shape == shape:
            return torch.zeros_like(weight.detach(), dtype=dtype)
        return torch.zeros(shape, dtype=dtype)

    tensors = store.load(allocate)
    model.load_state_dict(without_prefix("model", tensors))
    restore_optimizers(optimizers, named, tensors)
    if average:
        average.weights = without_prefix("average", tensors)
    if "rng" in tensors:
        torch.set_rng_state(tensors["rng"])
