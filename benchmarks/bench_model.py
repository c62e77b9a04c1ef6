"""Whole parts of the model against the plain way to the same result. A case is checked before it is timed.

    pytest benchmarks/bench_model.py                        # all of them, some minutes
    pytest benchmarks/bench_model.py -k "tokenizer and demo"

- Image tokenizer: one frame (ours) against transformers' clip of four equal frames, encode and decode; in windows,
  equal ones encoded once against every one encoded.
- Painting and writing: with caches against running the whole sequence again for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Emu3VQVAEConfig

from synergen_ext import ops
from synergen_ext.generation.oracle import Sampling, generate_image_ids, generate_text
from synergen_ext.generation.pipeline import shipped_checkpoint
from synergen_ext.model import SynerGenConfig, SynerGenVL
from synergen_ext.processing.image_tokenizer import ImageTokenizer, to_pixels
from synergen_ext.scenes import training_scene


@dataclass
class Work:
    """One thing to do, in our way and in theirs, and what must be equal before either is timed."""

    ours: Callable[[], Any]
    rival: Callable[[], Any]
    rival_name: str
    same: Callable[[Any, Any], None]
    rounds: int = 5


# --- Image tokenizer --------------------------------------------------------------------------


def demo_tokenizer() -> ImageTokenizer:
    """The shipped checkpoint's sizes, with Emu3's clip of four frames."""
    torch.manual_seed(0)
    config = Emu3VQVAEConfig(
        codebook_size=1024, embed_dim=8, latent_channels=8, base_channels=32, channel_multiplier=[1, 1, 2, 4],
        num_res_blocks=1, attn_resolutions=[], hidden_size=128, temporal_downsample_factor=4,
    )  # fmt: skip
    return ImageTokenizer(config).eval()


def emu3_tokenizer() -> ImageTokenizer:
    """Emu3's own: 271 M parameters, here with random weights."""
    torch.manual_seed(0)
    return ImageTokenizer(Emu3VQVAEConfig()).eval()


def encode(tokenizer: ImageTokenizer, pictures: int, side: int) -> Work:
    pixels = torch.rand(pictures, 3, side, side) * 2 - 1
    sizes = torch.tensor([[side, side]] * pictures)

    def same(ours: Tensor, theirs: list[Tensor]) -> None:
        assert torch.equal(ours, torch.stack(theirs))

    return Work(
        lambda: tokenizer.encode(pixels),
        lambda: tokenizer.vq.encode(pixels, sizes).image_tokens,
        "transformers",
        same,
    )


def decode(tokenizer: ImageTokenizer, pictures: int, side: int) -> Work:
    grid = side // tokenizer.stride
    ids = torch.randint(tokenizer.codebook_size, (pictures, grid, grid))
    return Work(
        lambda: tokenizer.decode(ids),
        lambda: tokenizer.vq.decode(ids).clamp(-1, 1),
        "transformers",
        lambda ours, theirs: torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4),
    )


def encode_windows(scenes: int) -> Work:
    """The shipped tokenizer on training scenes."""
    tokenizer = ImageTokenizer.from_pretrained(shipped_checkpoint())
    pixels = to_pixels(np.stack([training_scene(0, i).image() for i in range(scenes)]))

    def same(ours: Tensor, theirs: Tensor) -> None:
        assert tokenizer.window is not None and torch.equal(ours, theirs)

    return Work(
        lambda: tokenizer.encode(pixels),
        lambda: torch.cat([tokenizer.nearest(tokenizer.latents(part)) for part in pixels.split(32)]),
        "every window",
        same,
        rounds=3,
    )


# --- Generation -------------------------------------------------------------------------------


def demo_model() -> tuple[SynerGenVL, list[list[int]], list[int]]:
    """The demo's sizes with random weights, 4 prompts of 40 ids and the unconditional one."""
    torch.manual_seed(0)
    model = SynerGenVL(SynerGenConfig.preset("demo")).eval()
    c = model.config
    rows = torch.randint(c.vocab_size, (5, 39)).tolist()
    prompts = [[*row, c.boi_id] for row in rows]
    return model, prompts[:4], prompts[4]


def whole_sequences(model: SynerGenVL, prompts: list[list[int]], unconditional: list[int], guidance: float) -> Tensor:
    """Paint without a cache: backbone and head start again for every token, all pictures in one batch."""
    c = model.config
    (h, w), (m, n) = c.image_grid, c.fold
    count, seeds = len(prompts), torch.arange(len(prompts))
    x = model.embed(torch.tensor([*prompts, *[unconditional] * count]))
    raster = torch.zeros(count, h, w, dtype=torch.long)
    for patch in range(c.image_tokens):
        folded = model.image_embedding(raster)[:, :patch].repeat(2, 1, 1)
        visual = torch.tensor([[False] * x.shape[1] + [True] * patch]).expand(2 * count, -1)
        state = model.backbone(torch.cat((x, folded), dim=1), visual)[:, -1]
        v = torch.zeros(2 * count, c.window, dtype=torch.long)
        for j in range(c.window):
            logits = model.unfolding_head(state, v)[:, j]
            position = torch.full((count,), patch * c.window + j)
            ids, _ = ops.sample_tokens(logits[:count], seeds, position, uncond_logits=logits[count:], guidance=guidance)
            v[:, j] = ids.repeat(2)
        top, left = patch // (w // n) * m, patch % (w // n) * n
        raster[:, top : top + m, left : left + n] = v[:count].view(count, m, n)
    return raster


def equal_ids(ours: Any, theirs: Any) -> None:
    """Sums are taken in another order, so in float32 a draw may fall on the other side: one row in four at most."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    first = (ours != theirs).flatten(1).any(1)
    assert first.float().mean() <= 0.25, f"rows that differ: {first.nonzero().flatten().tolist()}"


def paint() -> Work:
    model, prompts, unconditional = demo_model()
    return Work(
        lambda: generate_image_ids(model, prompts, unconditional, range(4), 3.0, Sampling()),
        lambda: whole_sequences(model, prompts, unconditional, 3.0),
        "uncached",
        equal_ids,
        rounds=3,
    )


def write() -> Work:
    """32 greedy words after each of 4 prompts of 40."""
    model, prompts, _ = demo_model()

    def uncached() -> Tensor:
        ids = torch.tensor(prompts)
        for _ in range(32):
            token = model.output(model.states(ids)[:, -1]).argmax(-1)
            ids = torch.cat((ids, token[:, None]), dim=1)
        return ids[:, 40:]

    return Work(lambda: generate_text(model, prompts, None, 32, ()), uncached, "uncached", equal_ids, rounds=3)


CASES: dict[str, Callable[[], Work]] = {
    "tokenizer encode demo 8 x 96": lambda: encode(demo_tokenizer(), 8, 96),
    "tokenizer decode demo 8 x 96": lambda: decode(demo_tokenizer(), 8, 96),
    "tokenizer encode emu3 1 x 64": lambda: encode(emu3_tokenizer(), 1, 64),
    "tokenizer decode emu3 1 x 64": lambda: decode(emu3_tokenizer(), 1, 64),
    "tokenizer encode 1024 scenes in windows": lambda: encode_windows(1024),
    "paint demo 4 pictures": paint,
    "write demo 4 x 32 words": write,
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Work]:
    """Built and checked once for both rows."""
    work = CASES[request.param]()
    with torch.no_grad():
        work.same(work.ours(), work.rival())
    return request.param, work


@pytest.mark.parametrize("who", ["synergen_ext", "rival"])
def test_model(case: tuple[str, Work], who: str, benchmark: Any) -> None:
    name, work = case
    function, shown = (work.ours, who) if who == "synergen_ext" else (work.rival, work.rival_name)
    benchmark.group, benchmark.name = name, shown
    benchmark.extra_info.update(case=name, who=shown, threads=torch.get_num_threads(), torch=torch.__version__)
    with torch.no_grad():
        benchmark.pedantic(function, rounds=work.rounds, iterations=1, warmup_rounds=1)
