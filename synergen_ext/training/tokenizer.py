"""Trains a small image tokenizer of Emu3's class on scenes.

Straight-through estimator with a commitment loss; the codebook follows the latents by exponential moving averages
and codes that nobody uses restart on live latents. The first steps train a plain autoencoder; the codebook is
then placed by k-means on its latents, so no code is born dead.

A last phase, *settling*, makes ids stable, which the language model needs more than the last decibel: Emu3's encoder
norms over the whole picture, so plain white was spread over 281 codes (6.7 bits a token) and an object's ids
agreed with their mode in 66 % of its tokens. Settling adds a consistency loss (a patch of pixels keeps its latent
when something else in the picture changes), places codes by squared error in place of density, and chooses codes at
a price for rare ones (entropy-constrained vector quantisation, Chou, Lookabaugh and Gray 1989).
"""

from __future__ import annotations

import itertools
import math
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
from ..scenes import CANVAS, SPRITE, draw, training_scene


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
    settle_steps: int = 0  # after `steps`: whole scenes, stable ids
    settle_learning_rate: float = 5e-4
    consistency: float = 4.0  # weight of latents that keep still when the rest of the picture changes
    rate: float = 0.5  # price of one bit of code length, in mean squared quantisation errors
    merge_every: int = 25  # settling steps between merges of near-equal codes; none in the last 100
    merge_within: float = 0.15  # distance, in standard deviations of the latents, at which codes are near-equal
    seed: int = 0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "batch": (1, 64), "full_batch": (1, 64),  # a step's scenes are 64 of the stream
            "crop": (SPRITE, CANVAS), "steps": (0, math.inf), "settle_steps": (0, math.inf),
            "full_steps": (0, math.inf), "autoencoder_steps": (0, self.steps), "warmup": (1, math.inf),
            "merge_every": (1, math.inf),
            "restart_after": (0, math.inf), "seed": (0, math.inf), "ema": (0, 1), "learning_rate": (0, 1),
            "settle_learning_rate": (0, 1), "commitment": (0, 1e6), "edge_weight": (0, 1e6), "consistency": (0, 1e6),
            "rate": (0, 1e6), "merge_within": (0, 1e6),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"recipe: tokenizer: {name} must be in [{low:g}, {high:g}], got {value!r}")
        if self.crop % 8:
            raise ValueError(f"recipe: tokenizer: crop must be a multiple of 8 pixels, got {self.crop}")


class EmaCodebook:
    """Moving averages of the latents that chose each code (van den Oord et al. 2017, appendix A.1)."""

    def __init__(self, weight: Tensor, decay: float) -> None:
        self.weight = weight  # [V, c], updated in place
        self.decay = decay
        self.count = torch.ones(len(weight))
        self.total = weight.clone()
        self.idle = torch.zeros(len(weight), dtype=torch.long)

    def place(self, latents: Tensor, generator: torch.Generator, by_error: bool = False, rounds: int = 12) -> None:
        """K-means on ``latents`` ``[N, c]``; the start is random, or spread by squared error (k-means++)."""
        v = len(self.weight)
        if len(latents) < v:
            raise ValueError(f"codebook of {v} codes needs at least {v} latents, got {len(latents)}")
        centres = latents[torch.randperm(len(latents), generator=generator)[:v]].clone()
        if by_error:
            distance = (latents - centres[0]).square().sum(1)
            for i in range(1, v):
                chosen = torch.multinomial(distance + 1e-12, 1, generator=generator)
                centres[i] = latents[chosen]
                distance = torch.minimum(distance, (latents - centres[i]).square().sum(1))
            rounds = 2  # more would drift back to density
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

    def cheapest(self, latents: Tensor, rate: float) -> Tensor:
        """Ids ``[N]`` that minimise squared distance + rate * mean error * code length in bits."""
        distance = torch.cdist(latents, self.weight).square()
        bits = -torch.log2((self.count + 1e-3) / (self.count + 1e-3).sum())
        return (distance + rate * distance.min(1).values.mean() * bits).argmin(1)

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
            # Where the codebook is worst, so a frequent patch that is already well coded draws no further codes.
            error = (latents - self.weight[ids]).square().sum(1)
            chosen = latents[torch.multinomial(error + 1e-12, restarted, replacement=True, generator=generator)]
            self.count[dead] = 1
            self.total[dead] = chosen
            self.idle[dead] = 0
        self.weight.copy_(self.total / self.count.clamp_min(1e-5)[:, None])
        return restarted

    def merge(self, latents: Tensor, within: float, generator: torch.Generator) -> int:
        """Keep only the most used of codes closer than ``within`` standard deviations; returns how many were freed.

        Freed codes restart where the codebook is worst.
        """
        radius = within * float(latents.std(0).mean())
        near = torch.cdist(self.weight, self.weight) < radius
        kept = torch.zeros(len(self.weight), dtype=torch.bool)
        for code in self.count.argsort(descending=True).tolist():
            kept[code] = not bool((near[code] & kept).any())
        freed = ~kept
        count = int(freed.sum())
        if count:
            error = torch.cdist(latents, self.weight[kept]).min(1).values.square()
            chosen = latents[torch.multinomial(error + 1e-12, count, replacement=True, generator=generator)]
            self.weight[freed] = chosen
            self.total[freed] = chosen
            self.count[freed] = 1
            self.idle[freed] = 0
        return count

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
            with torch.no_grad():
                for conv, bias in ((module.conv_y, 1.0), (module.conv_b, 0.0)):
                    conv.weight.zero_()
                    torch.as_tensor(conv.bias).fill_(bias)
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
            x, y = (min(max(c - 8 * int(rng.integers(slack + 1)), 0), CANVAS - size) // 8 * 8 for c in (item.x, item.y))
            picture = picture[y : y + size, x : x + size]
        pictures[i] = picture
    return to_pixels(pictures)


def changed_pixels(recipe: TokenizerRecipe, step: int) -> Tensor:
    """The whole scenes of ``batch_pixels`` with some of their objects gone: ``[B, 3, S, S]``."""
    rng = np.random.default_rng([recipe.seed, 7, step])
    pictures = []
    for i in range(recipe.full_batch):
        items = training_scene(recipe.seed, step * 64 + i).items
        kept = [items[j] for j in rng.permutation(len(items))[: int(rng.integers(len(items)))]]
        pictures.append(draw([(k.name, k.color, k.x, k.y) for k in kept]))
    return to_pixels(np.stack(pictures))


def unchanged_tokens(a: Tensor, b: Tensor, stride: int) -> Tensor:
    """Bool ``[B, H/p, W/p]``: tokens whose own pixels are the same in both pictures ``[B, 3, H, W]``."""
    different = (a != b).any(1, keepdim=True).float()
    return F.max_pool2d(different, stride)[:, 0] == 0


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
    total = recipe.steps + recipe.settle_steps
    for step in range(start, total):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        if step == recipe.autoencoder_steps:
            codebook.place(torch.cat(list(_latents(model, recipe, step))), generator)
        if step == recipe.steps:
            codebook.place(torch.cat(list(_latents(model, recipe, step))), generator, by_error=True)
        figures = _step(model, codebook, optimizer, recipe, step, generator)
        if on_step:
            on_step(step, figures)
        if on_save and save_every and (step + 1) % save_every == 0 and step + 1 < total:
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


def _learning_rate(step: int, recipe: TokenizerRecipe) -> float:
    """Half a cosine for each phase, after a short rise."""
    peak, begin, length = recipe.learning_rate, 0, recipe.steps
    if step >= recipe.steps:
        peak, begin, length = recipe.settle_learning_rate, recipe.steps, recipe.settle_steps
    rise = min(1.0, (step - begin + 1) / recipe.warmup)
    return peak * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - begin) / length)))


@torch.no_grad()
def _latents(model: ImageTokenizer, recipe: TokenizerRecipe, step: int) -> Iterator[Tensor]:
    found = 0
    for i in itertools.count():
        if found >= 24 * model.codebook_size:
            return
        z = model.latents(batch_pixels(recipe, step + i))
        found += z.shape[0] * z.shape[2] * z.shape[3]
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
    settling = step >= recipe.steps
    restarted, used = 0, 0.0
    pictures = torch.cat((x, changed_pixels(recipe, step))) if settling else x
    # float32 where ids must settle: bfloat16 latents chose other ids than float32's for 81 % of tokens.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not settling):
        z = model.latents(pictures).float()
    commitment = consistency = z.new_zeros(())
    if settling:
        same = unchanged_tokens(x, pictures[len(x) :], model.stride)  # [B, h, w]
        z, other = z.chunk(2)
        consistency = (z - other).square().sum(1)[same].mean()
    if step >= recipe.autoencoder_steps:
        flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        left = recipe.steps + recipe.settle_steps - step
        if settling and left > 100 and (step - recipe.steps) % recipe.merge_every == recipe.merge_every - 1:
            codebook.merge(flat, recipe.merge_within, generator)
        ids = codebook.cheapest(flat, recipe.rate if settling else 0.0)
        quantised = codebook.weight[ids].view(*z.shape[:1], *z.shape[2:], -1).permute(0, 3, 1, 2)
        commitment = F.mse_loss(z, quantised)
        z = z + (quantised - z).detach()
        restarted = codebook.update(flat, ids, recipe.restart_after, generator)
        used = float((codebook.idle < recipe.restart_after).float().mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.pixels(z)
    out = out.float()
    loss = reconstruction_loss(out, x, recipe.edge_weight) + recipe.commitment * commitment
    loss = loss + recipe.consistency * consistency
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    mse = F.mse_loss(out.detach().clamp(-1, 1), x)
    return {
        "loss": float(loss.detach()),
        "commitment": float(commitment.detach()),
        "consistency": float(consistency.detach()),
        "psnr": float(10 * torch.log10(4 / mse)),
        "codes_used": used,
        "restarted": float(restarted),
    }
