"""Trains a small image tokenizer of Emu3's class on scenes.

Straight-through estimator with a commitment loss; the codebook follows the latents by exponential moving averages
and codes that nobody uses restart on live latents. The first steps train a plain autoencoder; the codebook is
then placed by k-means on its latents, so no code is born dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAESpatialNorm

from ..processing.image_tokenizer import ImageTokenizer, to_pixels
from ..scenes import CANVAS, SPRITE, training_scene


@dataclass
class TokenizerRecipe:
    """One tokenizer training. ``model`` overrides fields of transformers' ``Emu3VQVAEConfig``."""

    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 3000
    batch: int = 32
    crop: int = 48  # pixels; crops around objects, since most of a scene is white
    full_steps: int = 400  # the last steps see whole scenes, so that norms meet their statistics
    full_batch: int = 12
    autoencoder_steps: int = 200  # before the codebook is placed
    learning_rate: float = 1e-3
    warmup: int = 50
    commitment: float = 0.25
    edge_weight: float = 1.0  # weight of the difference between neighbouring pixels: outlines and faces
    ema: float = 0.98
    restart_after: int = 60  # steps without use before a code restarts
    seed: int = 0


class EmaCodebook:
    """Moving averages of the latents that chose each code (van den Oord et al. 2017, appendix A.1)."""

    def __init__(self, weight: Tensor, decay: float) -> None:
        self.weight = weight  # [V, c], updated in place
        self.decay = decay
        self.count = torch.ones(len(weight))
        self.total = weight.clone()
        self.idle = torch.zeros(len(weight), dtype=torch.long)

    def place(self, latents: Tensor, generator: torch.Generator, rounds: int = 12) -> None:
        """K-means on ``latents`` ``[N, c]``, from a random start."""
        v = len(self.weight)
        centres = latents[torch.randperm(len(latents), generator=generator)[:v]].clone()
        if len(centres) < v:
            raise ValueError(f"codebook of {v} codes needs at least {v} latents, got {len(latents)}")
        for _ in range(rounds):
            ids = torch.cdist(latents, centres).argmin(1)
            count = torch.bincount(ids, minlength=v).float()
            total = torch.zeros_like(centres).index_add_(0, ids, latents)
            alive = count > 0
            centres[alive] = total[alive] / count[alive, None]
            spare = torch.randint(len(latents), (int((~alive).sum()),), generator=generator)
            centres[~alive] = latents[spare]
        self.weight.copy_(centres)
        self.total.copy_(centres)
        self.count.fill_(1)
        self.idle.zero_()

    def update(self, latents: Tensor, ids: Tensor, restart_after: int, generator: torch.Generator) -> int:
        """Move codes towards their latents; returns how many dead codes were restarted."""
        v = len(self.weight)
        count = torch.bincount(ids, minlength=v).float()
        total = torch.zeros_like(self.total).index_add_(0, ids, latents)
        self.count.mul_(self.decay).add_(count, alpha=1 - self.decay)
        self.total.mul_(self.decay).add_(total, alpha=1 - self.decay)
        self.idle = torch.where(count > 0, 0, self.idle + 1)
        dead = self.idle > restart_after
        restarted = int(dead.sum())
        if restarted:
            chosen = latents[torch.randint(len(latents), (restarted,), generator=generator)]
            self.count[dead] = 1
            self.total[dead] = chosen
            self.idle[dead] = 0
        self.weight.copy_(self.total / self.count.clamp_min(1e-5)[:, None])
        return restarted

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total, "idle": self.idle}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count, self.total, self.idle = (state[k].clone() for k in ("count", "total", "idle"))


def build(recipe: TokenizerRecipe) -> ImageTokenizer:
    """A fresh tokenizer whose spatial norms start as plain group norms (scale 1, shift 0).

    Emu3's spatial norm multiplies by a 1x1 convolution of the codes; with a random start the decoder's layers
    multiply noise by noise (first loss 117 in place of 2).
    """
    torch.manual_seed(recipe.seed)
    model = ImageTokenizer(Emu3VQVAEConfig(**recipe.model))
    for module in model.modules():
        if isinstance(module, Emu3VQVAESpatialNorm):
            for conv, bias in ((module.conv_y, 1.0), (module.conv_b, 0.0)):
                nn.init.zeros_(conv.weight)
                nn.init.constant_(conv.bias, bias)
        if isinstance(module, nn.GroupNorm):
            # torch's bfloat16 group norm backward is 13x slower than float32's at [32, 32, 48, 48] on CPU.
            module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    nn.init.normal_(model.vq.decoder.conv_out.weight, std=0.01)
    return model


def batch_pixels(recipe: TokenizerRecipe, step: int) -> Tensor:
    """The pixels of one step, a function of ``(seed, step)`` alone: ``[B, 3, S, S]`` in [-1, 1]."""
    full = step >= recipe.steps - recipe.full_steps
    size, count = (CANVAS, recipe.full_batch) if full else (recipe.crop, recipe.batch)
    rng = np.random.default_rng([recipe.seed, 3, step])
    pictures = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        scene = training_scene(recipe.seed, step * 64 + i)
        picture = scene.image()
        if not full:
            item = scene.items[int(rng.integers(len(scene.items)))]
            # Corners stay on the token grid, as in the whole picture.
            slack = (size - SPRITE) // 8
            x, y = (
                min(max(c - 8 * int(rng.integers(slack + 1)), 0), CANVAS - size) // 8 * 8
                for c in (item.x, item.y)
            )
            picture = picture[y : y + size, x : x + size]
        pictures[i] = picture
    return to_pixels(pictures)


def reconstruction_loss(out: Tensor, target: Tensor, edge_weight: float) -> Tensor:
    """L1 + squared error + L1 of neighbour differences."""
    error = out - target
    edges = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edge_weight * edges


def train_tokenizer(
    recipe: TokenizerRecipe,
    state: dict[str, Any] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    save_every: int = 0,
    on_save: Callable[[dict[str, Any]], None] | None = None,
) -> ImageTokenizer:
    """Run (or resume) one training; equal recipes give equal tokenizers.

    Args:
        state: what ``on_save`` received, to go on from there exactly.
        on_step: called with the step and its figures.
        save_every, on_save: how often the resumable state is handed out.
    """
    model = build(recipe)
    codebook_weight = model.vq.quantize.embedding.weight.requires_grad_(False)
    codebook = EmaCodebook(codebook_weight, recipe.ema)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        codebook.load_state_dict(state["codebook"])
        optimizer.load_state_dict(state["optimizer"])
        start = int(state["step"])
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        if step == recipe.autoencoder_steps:
            codebook.place(torch.cat(list(_latents(model, recipe, step))), generator)
        figures = _step(model, codebook, optimizer, recipe, step, generator)
        if on_step:
            on_step(step, figures)
        if on_save and save_every and (step + 1) % save_every == 0 and step + 1 < recipe.steps:
            on_save(
                {
                    "model": model.state_dict(),
                    "codebook": codebook.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                }
            )
    codebook_weight.requires_grad_(True)
    return model.eval()


def _schedule(step: int, recipe: TokenizerRecipe) -> float:
    rise = min(1.0, (step + 1) / recipe.warmup)
    return rise * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / recipe.steps)))


@torch.no_grad()
def _latents(model: ImageTokenizer, recipe: TokenizerRecipe, step: int) -> Iterator[Tensor]:
    needed = max(1, 12 * model.codebook_size // (recipe.batch * (recipe.crop // 8) ** 2))
    for i in range(needed):
        z = model.latents(batch_pixels(recipe, step + i))
        yield z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).float()


def _step(
    model: ImageTokenizer,
    codebook: EmaCodebook,
    optimizer: torch.optim.Optimizer,
    recipe: TokenizerRecipe,
    step: int,
    generator: torch.Generator,
) -> dict[str, float]:
    # BatchNorm of the temporal blocks stays at its identity statistics: a picture is one frame.
    x = batch_pixels(recipe, step)
    restarted, used = 0, 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model.latents(x).float()
    commitment = z.new_zeros(())
    if step >= recipe.autoencoder_steps:
        flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        ids = model.nearest(z.detach())
        quantised = model.lookup(ids)
        commitment = F.mse_loss(z, quantised)
        z = z + (quantised - z).detach()
        restarted = codebook.update(flat, ids.flatten(), recipe.restart_after, generator)
        used = float((codebook.idle < recipe.restart_after).float().mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.pixels(z)
    out = out.float()
    loss = reconstruction_loss(out, x, recipe.edge_weight) + recipe.commitment * commitment
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    mse = F.mse_loss(out.detach().clamp(-1, 1), x)
    return {
        "loss": float(loss.detach()),
        "commitment": float(commitment.detach()),
        "psnr": float(10 * torch.log10(4 / mse)),
        "codes_used": used,
        "restarted": float(restarted),
    }
