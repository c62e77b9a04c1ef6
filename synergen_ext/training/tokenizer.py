"""Trains a small image tokenizer of Emu3's class on scenes.

Straight-through estimator with a commitment loss; the codebook follows the latents by exponential moving averages
and codes that nobody uses restart on live latents. The first steps train a plain autoencoder; the codebook is
then placed by k-means on its latents, so no code is born dead.

The demo encodes in windows (``ImageTokenizer``'s ``window``), so that an object's ids depend on nothing around it.
With whole pictures the encoder's norms spread plain white over 281 codes, and the ids of one object agreed with
their mode in 66 % of its tokens: noise that the language model had to predict (docs/LOG.md).
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
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAESpatialNorm

from ..processing.image_tokenizer import ImageTokenizer, read_window, to_pixels
from ..scenes import CANVAS, COLORS, SPRITE, draw, tokenizer_scene


@dataclass
class TokenizerRecipe:
    """One tokenizer training: a plain autoencoder, then with the codebook, then the decoder alone.

    ``model`` overrides fields of transformers' ``Emu3VQVAEConfig``.
    """

    model: dict[str, Any] = field(default_factory=dict)
    window: list[int] = field(default_factory=list)  # pixels [height, width]; empty: whole pictures
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
    decoder_steps: int = 0  # after `steps`: the decoder alone on whole scenes; the ids are settled
    recolor: float = 0.0  # weight of keeping form and colour in different tokens of a window (`form_and_color_loss`)
    seed: int = 0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "batch": (1, 64), "full_batch": (1, 64),  # a step's scenes are 64 of the stream
            "crop": (SPRITE, CANVAS), "steps": (0, math.inf), "full_steps": (0, math.inf),
            "autoencoder_steps": (0, self.steps), "warmup": (1, math.inf), "restart_after": (0, math.inf),
            "decoder_steps": (0, math.inf), "recolor": (0, 1e6),
            "seed": (0, math.inf), "ema": (0, 1), "learning_rate": (0, 1), "commitment": (0, 1e6),
            "edge_weight": (0, 1e6),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"recipe: tokenizer: {name} must be in [{low:g}, {high:g}], got {value!r}")
        for name, side in (("crop", self.crop), ("the scenes' side", CANVAS)):
            for wanted in self.grid:
                if side % wanted:
                    raise ValueError(f"recipe: tokenizer: {name} must be a multiple of {wanted} pixels, got {side}")

        if self.recolor and (self.grid != (16, 8) or min(self.batch, self.full_batch) < 2):
            raise ValueError(
                "recipe: tokenizer: recolor needs windows two tokens high and one wide, [16, 8], and batches of at "
                f"least 2, got window {self.window}, batches {self.batch} and {self.full_batch}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Pixels ``(height, width)`` of the grid on which crops begin: the windows, or the tokens."""
        window = read_window(self.window or None, "recipe: tokenizer")
        if window is not None and not all(side > 0 for side in window):
            raise ValueError(f"recipe: tokenizer: window must be above 0, got {self.window}")
        return window or (8, 8)


class EmaCodebook:
    """Moving averages of the latents that chose each code (van den Oord et al. 2017, appendix A.1)."""

    def __init__(self, weight: Tensor, decay: float) -> None:
        self.weight = weight  # [V, c], updated in place
        self.decay = decay
        self.count = torch.ones(len(weight))
        self.total = weight.clone()
        self.idle = torch.zeros(len(weight), dtype=torch.long)

    def place(self, latents: Tensor, generator: torch.Generator, rounds: int = 12) -> None:
        """K-means on ``latents`` ``[N, c]`` from a start spread by squared error (k-means++).

        A random start would spend most codes on the patches that are most frequent.
        """
        v = len(self.weight)
        if len(latents) < v:
            raise ValueError(f"codebook of {v} codes needs at least {v} latents, got {len(latents)}")
        centres = latents[torch.randperm(len(latents), generator=generator)[:v]].clone()
        distance = (latents - centres[0]).square().sum(1)
        for i in range(1, v):
            chosen = torch.multinomial(distance + 1e-12, 1, generator=generator)
            centres[i] = latents[chosen]
            distance = torch.minimum(distance, (latents - centres[i]).square().sum(1))
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
            # Where the codebook is worst, so a frequent patch that is already well coded draws no further codes.
            error = (latents - self.weight[ids]).square().sum(1)
            chosen = latents[torch.multinomial(error + 1e-12, restarted, replacement=True, generator=generator)]
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
    model = ImageTokenizer(Emu3VQVAEConfig(**recipe.model), read_window(recipe.window or None, "recipe: tokenizer"))
    for module in model.modules():
        if isinstance(module, Emu3VQVAESpatialNorm):
            with torch.no_grad():
                for conv, bias in ((module.conv_y, 1.0), (module.conv_b, 0.0)):
                    conv.weight.zero_()
                    torch.as_tensor(conv.bias).fill_(bias)
        if isinstance(module, nn.GroupNorm):
            # On channels-last inputs torch's bfloat16 group norm takes 3x as long as with this (68 against 20 ms at
            # [32, 32, 48, 48], forward and backward, 1 core); on contiguous ones the cast costs 6 to 12 against 2 ms.
            module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    nn.init.normal_(model.vq.decoder.conv_out.weight, std=0.01)
    return model


@dataclass
class Pictures:
    """One step's pictures; of recoloured pairs the second half shows the first in other colours."""

    pixels: Tensor  # float32 [B, 3, S, S] in [-1, 1]
    colors: Tensor  # int64 [B, R, C]: the colour of the object that a cell of the grid lies in, -1 outside of objects


def batch_pictures(recipe: TokenizerRecipe, step: int) -> Pictures:
    """The pictures of one step, a function of ``(seed, step)`` alone."""
    full = step >= recipe.steps - recipe.full_steps
    size, count = (CANVAS, recipe.full_batch) if full else (recipe.crop, recipe.batch)
    paired = recipe.recolor > 0 and step < recipe.steps
    rng = np.random.default_rng([recipe.seed, 3, step])
    pictures: list[list[NDArray[np.uint8]]] = [[], []]
    colors: list[list[NDArray[np.int64]]] = [[], []]
    gh, gw = recipe.grid
    for i in range(count // 2 if paired else count):
        scene = tokenizer_scene(recipe.seed, step * 64 + i)
        y = x = 0
        if not full:
            item = scene.items[int(rng.integers(len(scene.items)))]
            # Corners stay on the grid, as in the whole picture.
            y, x = (
                min(max(c - g * int(rng.integers((size - SPRITE) // g + 1)), 0), CANVAS - size) // g * g
                for c, g in zip((item.y, item.x), recipe.grid, strict=True)
            )
        for half in range(2 if paired else 1):
            turn = rng.integers(1, len(COLORS), len(scene.items)) if half else np.zeros(len(scene.items), np.int64)
            names = list(COLORS)
            shown = [(names.index(o.color) + int(t)) % len(names) for o, t in zip(scene.items, turn, strict=True)]
            picture = draw([(o.name, names[k], o.x, o.y) for o, k in zip(scene.items, shown, strict=True)])
            cells = np.full((CANVAS // gh, CANVAS // gw), -1)
            for o, k in zip(scene.items, shown, strict=True):
                cells[o.y // gh : -(-(o.y + SPRITE) // gh), o.x // gw : (o.x + SPRITE) // gw] = k
            pictures[half].append(picture[y : y + size, x : x + size])
            colors[half].append(cells[y // gh : (y + size) // gh, x // gw : (x + size) // gw])
    return Pictures(to_pixels(np.stack(pictures[0] + pictures[1])), torch.from_numpy(np.stack(colors[0] + colors[1])))


def exchange_forms(latents: Tensor) -> Tensor:
    """Latents ``[2 B, c, H/8, W/8]`` of recoloured pairs with the upper tokens of each pair's windows exchanged.

    The decoder must restore the pictures from these, so colour can stand in the lower tokens only.
    """
    upper, lower = latents[:, :, 0::2], latents[:, :, 1::2]  # [2 B, c, R, C]
    return torch.stack((upper.roll(len(latents) // 2, 0), lower), dim=3).reshape(latents.shape)


def form_and_color_loss(latents: Tensor, pictures: Pictures, window: tuple[int, int]) -> Tensor:
    """Keeps the form of a window in its upper token and the colour in its lower one.

    Args:
        latents: ``[2 B, c, H/8, W/8]`` of recoloured pairs, in windows two tokens high and one wide.

    Returns:
        Scalar: how far upper tokens differ within a pair, and lower tokens within a colour, each as a share of
        their variance.
    """
    upper, lower = latents[:, :, 0::2], latents[:, :, 1::2]  # [2 B, c, R, C]
    half = len(latents) // 2
    inked = F.max_pool2d((pictures.pixels < 1).any(1, keepdim=True).float(), window)[:, 0] > 0
    inked &= pictures.colors >= 0
    a, b = (part.permute(0, 2, 3, 1)[inked[:half]] for part in upper.chunk(2))
    forms = torch.cat((a, b))
    form = (a - b).square().sum(1).mean() / (2 * forms.var(0).sum() + 1e-6)
    colors, tones = pictures.colors[inked], lower.permute(0, 2, 3, 1)[inked]
    chosen = F.one_hot(colors, len(COLORS)).to(tones.dtype)  # [N, 8]
    means = chosen.T @ tones / chosen.sum(0)[:, None].clamp_min(1)
    color = (tones - means[colors]).square().sum(1).mean() / (tones.var(0).sum() + 1e-6)
    return form + color


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
    total = recipe.steps + recipe.decoder_steps
    for step in range(start, total):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        if step in (recipe.autoencoder_steps, recipe.steps):
            # Again when the encoder is done: codes placed early divide what has since become one.
            codebook.place(torch.cat(list(_latents(model, recipe, step))), generator)
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
    length = recipe.steps
    if step >= recipe.steps:
        step, length = step - recipe.steps, recipe.decoder_steps
    rise = min(1.0, (step + 1) / recipe.warmup)
    return recipe.learning_rate * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / length)))


@torch.no_grad()
def _latents(model: ImageTokenizer, recipe: TokenizerRecipe, step: int) -> Iterator[Tensor]:
    found = 0
    for i in itertools.count():
        if found >= 24 * model.codebook_size:
            return
        z = model.latents(batch_pictures(recipe, step + i).pixels)
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
    pictures = batch_pictures(recipe, step)
    x = pictures.pixels
    restarted, used = 0, 0.0
    settled = step >= recipe.steps
    if settled:
        z = model.lookup(model.encode(x))
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = model.latents(x).float()
    commitment = recolored = z.new_zeros(())
    paired = recipe.recolor > 0 and not settled
    if paired:
        recolored = form_and_color_loss(z, pictures, recipe.grid)
    if step >= recipe.autoencoder_steps and not settled:
        flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        ids = torch.cdist(flat, codebook.weight).argmin(1)
        quantised = codebook.weight[ids].view(*z.shape[:1], *z.shape[2:], -1).permute(0, 3, 1, 2)
        commitment = F.mse_loss(z, quantised)
        z = z + (quantised - z).detach()
        restarted = codebook.update(flat, ids, recipe.restart_after, generator)
        used = float((codebook.idle < recipe.restart_after).float().mean())
    if paired:
        z = exchange_forms(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.pixels(z)
    out = out.float()
    loss = reconstruction_loss(out, x, recipe.edge_weight) + recipe.commitment * commitment
    loss = loss + recipe.recolor * recolored
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    mse = F.mse_loss(out.detach().clamp(-1, 1), x)
    return {
        "loss": float(loss.detach()),
        "commitment": float(commitment.detach()),
        "recolored": float(recolored.detach()),
        "psnr": float(10 * torch.log10(4 / mse)),
        "codes_used": used,
        "restarted": float(restarted),
    }
