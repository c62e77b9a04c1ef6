"""The planner's memory model against the memory of real training steps, on the CPU.

A model of 13 M parameters takes steps of both tasks (`loop.train_step`, autocast to bfloat16, native ops, AdamW) with
each stage's parts, padded and packed, with everything kept and with layers run again in the backward pass. What torch
allocates is counted by its profiler, byte by byte, from the start of the second step on, so the figure does not depend
on how busy the machine is. The bar: what `synergen plan` says differs from it by at most 10 %. What kernels allocate
inside themselves and what an allocator keeps for later is in neither.
"""

import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from synergen_ext.bench import Progress, Row
from synergen_ext.model import SynerGenConfig, SynerGenVL
from synergen_ext.training.data import Batch
from synergen_ext.training.loop import train_step
from synergen_ext.training.memory import Tracer, Work, peak
from synergen_ext.training.recipe import StageRecipe
from synergen_ext.training.stages import make_optimizers

TITLE = "Memory: what the plan says against what a step takes"

CONFIG = SynerGenConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64,
    max_positions=1024, codebook_size=2048, image_grid=(32, 32), fold=(2, 4), token_embed_size=128, head_layers=2,
)  # fmt: skip
STAGES = (["vision"], ["vision", "attention"], ["vision", "attention", "language_model"])
TEXT = 62


def batch(samples: int, paint: bool, packed: bool) -> tuple[Batch, Work]:
    """Samples of equal length, one a row or two, and the same in the planner's words."""
    c = CONFIG
    one = [5] * TEXT + [c.boi_id] + [c.image_id] * c.image_tokens + [c.eoi_id]
    a_row = 2 if packed else 1
    ids = torch.tensor([one * a_row] * (samples // a_row))
    labels = torch.full_like(ids, -100)
    for i in range(a_row):
        labels[:, i * len(one) + 1 : i * len(one) + TEXT] = 7
    documents = torch.arange(1, a_row + 1).repeat_interleave(len(one)).expand(len(ids), -1) if packed else None
    pictures = torch.randint(0, c.codebook_size, (samples, *c.image_grid))
    made = Batch(ids, labels, pictures, torch.full((samples,), paint), ids.numel(), samples, documents)
    return made, Work(*ids.shape, samples, c.image_grid, paint, samples * (TEXT - 1), packed)


def measure(train: list[str], samples: int, packed: bool, again: bool) -> tuple[int, int]:
    """Bytes at the peak of a step: planned, and allocated by torch."""
    gc.collect()
    torch.manual_seed(0)
    model = SynerGenVL(CONFIG)
    if again:
        for layer in (*model.layers, *model.unfolding_head.layers):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    stage = StageRecipe(name="measured", train=train, steps=1, learning_rate=1e-4, paint=samples)
    optimizers = make_optimizers(model, stage)
    batches = {name: batch(samples, name == "paint", packed) for name in ("paint", "describe")}
    tasks = [(name, made) for name, (made, _) in batches.items()]
    step: Any = functools.partial(train_step, model, optimizers, tasks, 1.0, True)
    step()  # makes the optimizers' states
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    weights = sum(4 * p.numel() for p in model.parameters())
    states = sum(t.nbytes for o in optimizers for s in o.state.values() for t in s.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        figures = step()
    if not all(value == value for value in figures.values()):
        raise RuntimeError(f"plan: the step must have finite losses, got {figures}")
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    tracer = Tracer(CONFIG, train, gpu=False)
    planned = peak(weights, states, [tracer.pieces(work) for _, work in batches.values()], checkpoint=again)
    return planned.total, weights + states + most


def rows(quick: bool, progress: Progress) -> Iterator[Row]:
    cases = [(train, packed, again) for train in STAGES for packed in (False, True) for again in (False, True)]
    for i, (train, packed, again) in enumerate(cases[::5] if quick else cases):
        name = f"{'+'.join(train)}, {'packed' if packed else 'padded'}, {'layers run again' if again else 'all kept'}"
        progress(name, i, len(cases))
        planned, allocated = measure(train, 4 if quick else 8, packed, again)
        note = f"planned {planned / 1e6:,.0f} MB, allocated {allocated / 1e6:,.0f} MB"
        yield Row(f"difference: {name}", abs(planned / allocated - 1), "", "<= 0.1", note=note)
