"""What a stage trains: parts of the model, parameter groups, learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..model import SynerGenVL
from .recipe import StageRecipe


def part_of(name: str) -> str:
    """Which part a parameter belongs to: ``vision``, ``attention`` or ``language_model``.

    Vision is everything the LLM did not have: image embedding and fold MLP, vision experts, unfolding head, special
    tokens. Attention is the backbone's projections (norms stay with the language model).
    """
    if name.startswith(("image_embedding.", "unfolding_head.", "special_")) or ".feed_forward.vision." in name:
        return "vision"
    return "attention" if ".attention." in name else "language_model"


def freeze_all_but(model: nn.Module, parts: list[str]) -> list[tuple[str, nn.Parameter]]:
    """Set ``requires_grad`` by part; returns the trained parameters by name."""
    trained = []
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in parts)
        if p.requires_grad:
            trained.append((name, p))
    return trained


def make_optimizers(model: SynerGenVL, stage: StageRecipe) -> list[torch.optim.Optimizer]:
    """What a stage's recipe asks for; together they hold every trained parameter once.

    ``adamw`` is the paper's: (0.9, 0.95), eps 1e-8 (table 8). ``muon`` orthogonalises the momentum of the layers'
    matrices (Jordan et al. 2024), with steps as long as AdamW's, and leaves all else to AdamW. Norms, biases,
    embeddings and position tables are not decayed.
    """
    trained = freeze_all_but(model, stage.train)
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, p in trained:
        if p.ndim < 2 or name.endswith(("embeddings.weight", "tokens.weight", "positions")):
            kept.append(p)
        elif stage.optimizer == "muon" and "output" not in name and "classifier" not in name:
            matrices.append(p)
        else:
            decayed.append(p)
    assert len(matrices) + len(decayed) + len(kept) == len({id(p) for _, p in trained})
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=stage.learning_rate, weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if groups := [g for g in groups if g["params"]]:
        optimizers.append(torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True))
    return optimizers


def learning_rate(stage: StageRecipe, step: int) -> float:
    """Linear warm-up, then constant or half a cosine to a hundredth of the peak."""
    rate = stage.learning_rate * min(1.0, (step + 1) / max(1, stage.warmup))
    if stage.schedule == "cosine":
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return rate
