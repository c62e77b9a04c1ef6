"""One stage: steps that mix all tasks, logging, resumable state."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..model import SynerGenVL
from ..model.modeling import IGNORE
from .checkpoints import flatten_optimizers, load_state, prefixed, restore_optimizers, save_state, without_prefix
from .data import Batch, Batches
from .figures import gradient_norms, pace
from .recipe import Recipe, StageRecipe
from .stages import learning_rate, make_optimizers
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
        torch._foreach_lerp_(list(self.weights.values()), [named[k].detach() for k in self.weights], 1 - keep)

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
    bfloat16: bool, world: World = ALONE,
) -> dict[str, float]:  # fmt: skip
    """One update from all tasks: the sum of their losses (eq. 4). Returns the losses and the gradient norm.

    Several processes take the step that one would take on all their rows: a task's text loss is the mean over the
    targets of all of them, and every process has the same number of pictures.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the weights are as before the step.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    targets = [float((batch.labels[:, 1:] != IGNORE).sum()) for _, batch in tasks]
    shares = [n * world.size / max(1.0, total) for n, total in zip(targets, world.sum(targets), strict=True)]
    figures: dict[str, float] = {}
    for (name, batch), share in zip(tasks, shares, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            losses = model(batch.input_ids, batch.labels, batch.image_ids, batch.paint, batch.documents)
        (losses.total + (share - 1) * losses.text).backward()
        figures[f"{name}/text"] = float(losses.text.detach()) * share
        if name == "paint":
            figures["paint/image"] = float(losses.image.detach())
    figures = {k: v / world.size for k, v in zip(figures, world.sum(figures.values()), strict=True)}
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    world.average_gradients(trained)
    by_part = gradient_norms(model)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, clip))
    if not torch.isfinite(torch.tensor([norm, *figures.values()])).all():
        raise FloatingPointError(f"losses {figures}, gradient norm {norm}")
    for optimizer in optimizers:
        optimizer.step()
    return {**figures, "gradient_norm": norm, **by_part}


def run_stage(
    model: SynerGenVL, recipe: Recipe, index: int, batches: Batches, state_file: Path,
    on_step: OnStep | None = None, on_sample: Callable[[str, int], None] | None = None, world: World = ALONE,
    codebook: Tensor | None = None,
) -> None:  # fmt: skip
    """Train one stage to its end, resuming from ``state_file`` if it holds this stage.

    The same recipe gives the same weights, interrupted or not (same machine, thread count and versions).
    """
    stage = recipe.stages[index]
    start, average = 0, None
    tensors: dict[str, Tensor] = {}
    if state_file.is_file():
        tensors, meta = load_state(state_file)
        if meta["stage"] == stage.name:
            start = int(meta["step"])
            model.load_state_dict(without_prefix("model", tensors))
            batches.load_state_dict(meta.get("data", {}))
    if start == 0 and stage.copy_experts:
        model.copy_text_experts()
    if start == 0 and stage.place_codes:
        if codebook is None:
            raise ValueError(f"stage {stage.name!r}: place_codes needs the image tokenizer's codebook")
        model.place_image_codes(codebook)
    optimizers = make_optimizers(model, stage)
    named: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if stage.ema:
        average = Average(named, stage.ema)
    if start:
        restore_optimizers(optimizers, named, tensors)
        if average:
            average.weights = without_prefix("average", tensors)
    del tensors
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
            figures = train_step(model, optimizers, tasks, stage.clip, recipe.bfloat16, world)
            if average:
                average.update(named, step)
            figures["learning_rate"] = rate
            figures |= pace(tasks, world.size, time.perf_counter() - began, waited)
            # Of all positions, those that hold a token: the rest is padding.
            figures["filled"] = sum(b.tokens for _, b in tasks) / sum(b.input_ids.numel() for _, b in tasks)
            if on_step:
                on_step(stage.name, step, figures)
            done = step + 1
            if world.rank == 0 and done % recipe.save_every == 0 and done < stage.steps:
                _save(state_file, model, optimizers, named, average, stage.name, done, batches)
            if on_sample and recipe.sample_every and done % recipe.sample_every == 0:
                on_sample(stage.name, done)
    if average:
        average.store(named)
    model.eval()


def _save(
    path: Path, model: SynerGenVL, optimizers: list[torch.optim.Optimizer], named: dict[str, Tensor],
    average: Average | None, stage: str, step: int, batches: Batches,
) -> None:  # fmt: skip
    tensors = {**prefixed("model", model.state_dict()), **flatten_optimizers(optimizers, named)}
    if average:
        tensors |= prefixed("average", average.weights)
    save_state(path, tensors, {"stage": stage, "step": step, "data": batches.state_dict()})
