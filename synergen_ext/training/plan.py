"""What a recipe costs at full scale: parameters, memory, FLOPs and bytes of each stage, and days on given cards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..model import SynerGenConfig, SynerGenVL
from .gpus import Gpu
from .memory import Peak, Piece, Tracer, Work, peak
from .recipe import PARTS, Recipe, StageRecipe
from .stages import part_of

#: Of a card's memory, what a plan may fill: the driver, kernels' scratch and fragments need the rest. Assumed.
USABLE = 0.9


@dataclass(frozen=True)
class Machines:
    """``nodes`` times ``per_node`` cards of one kind, and how a training uses them.

    Attributes:
        utilisation: share of the cards' bfloat16 FLOP/s that the model's own FLOPs reach (MFU).
        sharded: weights, gradients and optimizer states are divided among all cards; else each has them all.
    """

    gpu: Gpu
    nodes: int = 1
    per_node: int = 8
    utilisation: float = 0.4
    sharded: bool = True

    def __post_init__(self) -> None:
        for name in ("nodes", "per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"plan: utilisation must be in (0, 1], got {self.utilisation}")

    @property
    def cards(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Samples:
    """What a sample is taken to be, since that is not in a recipe.

    Attributes:
        text: text tokens of a sample, its template's among them.
        learned: of these, those with a loss in samples of understanding.
        pictures: in a sample of understanding.
    """

    text: int = 64
    learned: int = 32
    pictures: int = 1

    def __post_init__(self) -> None:
        for name in ("text", "learned", "pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} must be at least 1, got {getattr(self, name)}")
        if self.learned > self.text:
            raise ValueError(f"plan: learned must be at most text = {self.text}, got {self.learned}")


@dataclass(frozen=True)
class StagePlan:
    """One stage. Memory is of one card, in bytes; FLOPs are the model's own, of all cards together."""

    stage: StageRecipe
    parameters: dict[str, int]
    trained: int
    plain: Peak
    checkpointed: Peak
    at_once: int  # samples of a card at once, all tasks together, that fit with checkpointing; 0: none
    share: int  # samples of a card in a step
    flops: float
    memory_bytes: float
    network_bytes: float
    days: float
    step_seconds: float

    @property
    def frozen(self) -> int:
        return sum(self.parameters.values()) - self.trained


def parameters_by_part(config: SynerGenConfig) -> dict[str, int]:
    """Parameters of ``vision``, ``attention`` and ``language_model``."""
    with torch.device("meta"):
        model = SynerGenVL(config)
    sizes = dict.fromkeys(PARTS, 0)
    for name, p in model.named_parameters():
        sizes[part_of(name)] += p.numel()
    return sizes


def step_flops(config: SynerGenConfig, stage: StageRecipe, samples: Samples) -> float:
    """FLOPs that one step's products need: 2 for each weight and position forward, as many again for the gradient of
    what goes in, and again for the gradient of weights that are trained. What is made twice to save memory is not
    counted."""
    c = config
    width, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    projections = c.hidden_size * (2 * width + 2 * kv)
    ffn = 3 * c.hidden_size * c.intermediate_size
    fold = c.window * c.token_embed_size * c.hidden_size + c.hidden_size**2
    vision, attention, language = (3.0 if part in stage.train else 2.0 for part in PARTS)
    total = 0.0
    for task, size in (("paint", stage.paint), ("describe", stage.describe), ("text", stage.text)):
        pictures = {"paint": 1, "describe": samples.pictures, "text": 0}[task]
        patches = pictures * c.image_tokens
        length = samples.text + patches + 2 * pictures
        learned = {"paint": 1, "describe": samples.learned, "text": samples.text}[task]
        each = c.num_layers * attention * 2 * projections * length
        each += c.num_layers * 2 * ffn * (vision * patches + language * (length - patches))
        each += c.num_layers * 3 * 2 * length**2 * width  # scores and sums, half of them masked
        each += language * 2 * c.hidden_size * c.vocab_size * learned
        each += (3 if "vision" in stage.train else 1) * 2 * fold * patches  # the ids before it have no gradient
        if task == "paint":
            ids = patches * c.window
            each += vision * 2 * ids * (c.head_layers * (projections + ffn) + c.hidden_size * c.codebook_size)
            each += c.head_layers * 3 * 2 * ids * c.window * width
        total += size * each
    return total


def stage_pieces(
    config: SynerGenConfig, stage: StageRecipe, samples: Samples, counts: dict[str, int], bfloat16: bool
) -> list[list[Piece]]:
    """The pieces of each task's pass in one process that has ``counts`` samples of it.

    Raises:
        ValueError: a sample is longer than a row.
    """
    tracer = Tracer(config, stage.train, bfloat16)
    tasks = []
    for task, count in counts.items():
        if not count:
            continue
        pictures = {"paint": 1, "describe": samples.pictures, "text": 0}[task]
        length = samples.text + pictures * (config.image_tokens + 2)
        learned = {"paint": 1, "describe": samples.learned, "text": samples.text - 1}[task]
        if stage.pack and length > stage.pack:
            raise ValueError(
                f"plan: stage {stage.name!r}: a sample must have at most {stage.pack} tokens, got {length}"
            )
        rows = math.ceil(count / (stage.pack // length)) if stage.pack else count
        work = Work(
            rows, stage.pack or -(-length // 8) * 8, count * pictures, config.image_grid, task == "paint",
            count * learned, bool(stage.pack),
        )  # fmt: skip
        tasks.append(tracer.pieces(work))
    return tasks


def plan_stage(recipe: Recipe, config: SynerGenConfig, stage: StageRecipe, on: Machines, samples: Samples) -> StagePlan:
    """What one stage costs. Moments are AdamW's, 8 bytes a trained parameter; Muon has fewer."""
    sizes = parameters_by_part(config)
    weights, trained = sum(sizes.values()), sum(sizes[part] for part in stage.train)
    ranks = on.cards if on.sharded else 1
    layer = config.hidden_size * (
        config.head_dim * 2 * (config.num_heads + config.num_kv_heads) + 6 * config.intermediate_size
    )
    gathered = 2 * 2 * layer if ranks > 1 else 0  # in bfloat16: the layer at work and the next
    shares = {task: math.ceil(getattr(stage, task) / on.cards) for task in ("paint", "describe", "text")}

    def peak_of(counts: dict[str, int], checkpoint: bool) -> Peak:
        tasks = stage_pieces(config, stage, samples, counts, recipe.bfloat16)
        return peak(4 * weights, 8 * trained, tasks, ranks, gathered, checkpoint)

    plain, checkpointed = peak_of(shares, False), peak_of(shares, True)
    share = sum(shares.values())
    flops = step_flops(config, stage, samples)
    seconds = flops / (on.cards * on.gpu.bfloat16 * on.utilisation)
    network = 0.0
    if on.cards > 1:
        # Sharded: weights come in bfloat16 twice, gradients go in float32. Else: each gradient goes and comes back.
        network = (4 * weights + 4 * trained if on.sharded else 8 * trained) * (on.cards - 1) / on.cards
    # Weights are read forward and backward in bfloat16 and cast once; AdamW reads weight, gradient and moments and
    # writes weight and moments; what is kept is written and read.
    memory = 10 * weights + 28 * trained / ranks + 2 * plain.activations
    return StagePlan(
        stage, sizes, trained, plain, checkpointed, _at_once(peak_of, shares, on.gpu.memory * USABLE), share, flops,
        memory, network, stage.steps * seconds / 86400, seconds,
    )  # fmt: skip


def _at_once(peak_of: object, shares: dict[str, int], memory: float) -> int:
    """Samples at once, all tasks together, by halving the share until it fits."""
    assert callable(peak_of)
    parts = 1
    while True:
        counts = {task: math.ceil(n / parts) for task, n in shares.items()}
        if peak_of(counts, True).total <= memory:
            return sum(counts.values())
        if max(counts.values()) == 1:
            return 0
        parts *= 2


def plan_recipe(recipe: Recipe, config: SynerGenConfig, on: Machines, samples: Samples) -> list[StagePlan]:
    """All stages of a recipe, for a model of the sizes ``config``.

    Raises:
        ValueError: a sample is longer than a stage's rows.
    """
    return [plan_stage(recipe, config, stage, on, samples) for stage in recipe.stages]


def describe(recipe: Recipe, config: SynerGenConfig, on: Machines, samples: Samples) -> str:
    """The plan in words."""
    plans = plan_recipe(recipe, config, on, samples)
    gib = 2**30
    lines = [
        f"{recipe.name} on {on.nodes} x {on.per_node} {on.gpu.name}, {on.gpu.memory / 1e9:.0f} GB each, "
        f"{'sharded among all' if on.sharded else 'all weights on each'}, {on.utilisation:.0%} of "
        f"{on.gpu.bfloat16 / 1e12:,.0f} TFLOP/s",
        f"a sample: {samples.text} text tokens, {samples.learned} of them learned in understanding, "
        f"{samples.pictures} picture(s) of {config.image_tokens} tokens",
    ]
    for p in plans:
        s = p.stage
        lines += [
            f"stage {s.name}: {s.steps:,} steps x ({s.paint:,} paint + {s.describe:,} describe + {s.text:,} text)",
            f"  parameters: {p.trained:,} trained ({', '.join(s.train)}), {p.frozen:,} frozen",
        ]
        for name, m in (("all kept", p.plain), ("gradient checkpointing", p.checkpointed)):
            lines.append(
                f"  memory of a card, {name}: {m.total / gib:,.1f} GiB = weights {m.weights / gib:.1f} + gradients "
                f"{m.gradients / gib:.1f} + optimizer {m.optimizer / gib:.1f} + activations {m.activations / gib:,.1f} "
                f"+ copies of weights {m.copies / gib:.1f} + passing {m.passing / gib:,.1f} + logits 0.0 ({m.at})"
            )
        fits = "all at once" if p.at_once >= p.share else f"{p.at_once} at once" if p.at_once else "not even one"
        lines += [
            f"  a card has {p.share} samples a step; with gradient checkpointing {fits} in {USABLE:.0%} of its memory",
            f"  a step: {p.flops:.3e} FLOP, {p.step_seconds:,.1f} s; at least {p.memory_bytes / 1e9:,.0f} GB through a "
            f"card's memory ({p.memory_bytes / on.gpu.bandwidth:,.2f} s), {p.network_bytes / 1e9:,.1f} GB through its "
            "network",
            f"  days: {p.days:,.1f}",
        ]
    lines.append(f"days in all: {sum(p.days for p in plans):,.1f}")
    return "\n".join(lines)
