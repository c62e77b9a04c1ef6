"""The slow truth of generation, in plain torch: ids in, ids out, one token at a time. Faster engines must agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..model import KVCache, SynerGenVL


@dataclass
class Sampling:
    """How ids are drawn. ``top_k`` 0 and ``top_p`` 1 keep all; ``temperature`` 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class _Decoder:
    """Rows of different lengths, padded on the left, advancing together through one cache."""

    def __init__(
        self, model: SynerGenVL, prompts: Sequence[Sequence[int]], image_ids: Tensor | None, new_tokens: int
    ) -> None:
        if not all(map(len, prompts)):
            raise ValueError("generate: prompts must hold at least one id each, got an empty one")
        self.model = model
        self.device = model.tok_embeddings.weight.device
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        self.valid = torch.zeros(len(prompts), longest, dtype=torch.bool, device=self.device)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), device=self.device)
            self.valid[row, longest - len(prompt) :] = True
        self.cache: KVCache = model.new_cache(len(prompts), longest + new_tokens)
        self.padded = not bool(self.valid.all())
        self.state = self._advance(model.embed(ids, image_ids), ids == model.config.image_id)

    def _advance(self, x: Tensor, is_image: Tensor) -> Tensor:
        """Run embeddings ``[B, T, D]`` through the backbone; returns the last states ``[B, D]``."""
        t, filled = x.shape[1], self.cache.length
        positions = (self.valid.long().cumsum(1) - 1).clamp_min(0)[:, filled : filled + t]
        mask = None
        if self.padded:
            total = filled + t
            causal = torch.ones(t, total, dtype=torch.bool, device=self.device).tril(filled)
            mask = (causal & self.valid[:, None, :])[:, None]  # [B, 1, T, S]
            # A padding row must look at something, or its softmax is 0/0; it looks at itself.
            mask = mask | torch.eye(t, total, dtype=torch.bool, device=self.device).roll(filled, 1)
        return self.model.backbone(x, is_image, positions, mask, self.cache)[:, -1]

    def push(self, x: Tensor, image: bool) -> None:
        """Append one embedding a row, ``[B, 1, D]``."""
        ones = torch.ones(len(x), 1, dtype=torch.bool, device=self.device)
        self.valid = torch.cat((self.valid, ones), dim=1)
        self.state = self._advance(x, ones if image else ~ones)

    def push_ids(self, ids: Tensor) -> None:
        self.push(self.model.embed(ids[:, None]), image=False)


def sample(
    logits: Tensor,
    seeds: Tensor,
    position: int,
    sampling: Sampling,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Ids ``[R]`` drawn from logits ``[R, V]``, one uniform number a row from (seed, position).

    Raises:
        FloatingPointError: a row holds NaN or no finite logit.
    """
    ids, valid = ops.sample_tokens(
        logits.float(),
        seeds,
        torch.full_like(seeds, position),
        uncond_logits=None if uncond is None else uncond.float(),
        guidance=guidance,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    if not bool(valid.all()):
        raise FloatingPointError(f"sample: the model's logits are not finite in row {int((~valid).nonzero()[0])}")
    return ids


def _one_each(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
    if len(seeds) != len(prompts):
        raise ValueError(f"generate: seeds must be {len(prompts)}, one a prompt, got {len(seeds)}")


@torch.no_grad()
def generate_text(
    model: SynerGenVL, prompts: Sequence[Sequence[int]], image_ids: Tensor | None, max_new_tokens: int,
    stop_ids: Sequence[int], sampling: Sampling | None = None, seeds: Sequence[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Continue each prompt with text until a stop id (left out) or ``max_new_tokens``.

    Args:
        prompts: token ids, of any lengths.
        image_ids: the pictures of all prompts in order, ``[N, h, w]``.
        sampling: default: the likeliest token each time.
        seeds: one a prompt, for sampling.
    """
    sampling = sampling or Sampling(temperature=0.0)
    seeds = [0] * len(prompts) if seeds is None else list(seeds)
    _one_each(prompts, seeds)
    if not prompts:
        return []
    decoder = _Decoder(model, prompts, image_ids, max_new_tokens)
    seed = torch.tensor(seeds, device=decoder.device)
    out: list[list[int]] = [[] for _ in prompts]
    open_rows = [max_new_tokens > 0] * len(prompts)
    for step in range(max_new_tokens):
        ids = sample(model.output(decoder.state), seed, step, sampling)
        for row, token in enumerate(ids.tolist()):
            if open_rows[row]:
                open_rows[row] = token not in stop_ids
                if open_rows[row]:
                    out[row].append(token)
        if not any(open_rows) or step + 1 == max_new_tokens:
            break
        decoder.push_ids(ids)
    return out


@torch.no_grad()
def generate_image_ids(
    model: SynerGenVL, prompts: Sequence[Sequence[int]], unconditional: Sequence[int], seeds: Sequence[int],
    guidance: float | None = None, sampling: Sampling | None = None, size: tuple[int, int] | None = None,
    on_patch: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Paint one picture a prompt; returns image token ids ``[N, h, w]``.

    Conditional and unconditional rows run as one doubled batch and share the sampled ids; every unfolded token's
    logits are guided: ``l = l_u + s (l_c - l_u)`` (section 3.4). Token ``j`` of patch ``i`` uses draw
    ``i * m * n + j`` of its row's seed, so a picture depends on its prompt and seed alone, not on the batch.

    Args:
        prompts: ids up to and including ``<boi>``.
        unconditional: the prompt with ``<UNCOND>``, likewise.
        guidance: s; default: the config's. 1 runs the conditional rows alone.
        size: rows and columns in image tokens; default: the config's grid.
        on_patch: called with (patches done, patches in all).
    """
    c = model.config
    s = c.guidance if guidance is None else guidance
    h, w = size or c.image_grid
    _one_each(prompts, seeds)
    patches = c.folded_length(h, w)
    if not prompts:
        return torch.empty(0, h, w, dtype=torch.long, device=model.tok_embeddings.weight.device)
    guided = s != 1.0
    rows = [*prompts, *([unconditional] * len(prompts) if guided else [])]
    decoders = [_Decoder(model, rows, None, patches)]
    return _paint(model, decoders, seeds, s, sampling, (h, w), on_patch)


def _paint(
    model: SynerGenVL, decoders: list[_Decoder], seeds: Sequence[int], guidance: float, sampling: Sampling | None,
    size: tuple[int, int], on_patch: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """The painting loop. The decoders' rows, in order, are the conditional ones and, if guided, the unconditional."""
    c = model.config
    sampling = sampling or Sampling(c.image_temperature, c.image_top_k, c.image_top_p)
    h, w = size
    patches, n = c.folded_length(h, w), len(seeds)
    copies = sum(len(d.valid) for d in decoders) // n  # 2 with guidance, 1 without
    device = decoders[0].device
    seed = torch.tensor(list(seeds), device=device)
    chosen = torch.empty(n, patches, c.window, dtype=torch.long, device=device)
    for patch in range(patches):
        cache = model.unfolding_head.new_cache(copies * n)
        previous = torch.cat([d.state for d in decoders])
        for j in range(c.window):
            logits = model.unfolding_head.step(previous, cache)
            uncond = logits[n:] if copies == 2 else None
            chosen[:, patch, j] = sample(logits[:n], seed, patch * c.window + j, sampling, uncond, guidance)
            previous = chosen[:, patch, j].repeat(copies)
        # Pushed after the last patch too: what follows an interleaved picture must have seen all of it.
        x = model.image_embedding.one_window(chosen[:, patch], patch, w).repeat(copies, 1, 1)
        for decoder, part in zip(decoders, x.split([len(d.valid) for d in decoders]), strict=True):
            decoder.push(part, image=True)
        if on_patch:
            on_patch(patch + 1, patches)
    return ops.unfold_ids(chosen, h, w, *c.fold)


@torch.no_grad()
def generate_interleaved(
    model: SynerGenVL, prompt: Sequence[int], unconditional: Sequence[int], max_new_tokens: int,
    stop_ids: Sequence[int], seed: int = 0, guidance: float | None = None, text: Sampling | None = None,
    image: Sampling | None = None, image_ids: Tensor | None = None,
) -> list[list[int] | Tensor]:  # fmt: skip
    """Continue one prompt with text and pictures, as the model chooses: it paints wherever it writes ``<boi>``.

    Args:
        max_new_tokens: text ids plus folded image tokens; a picture that would not fit ends the output.
        unconditional: the guidance row's prompt, restarted for every picture.

    Returns:
        Segments in order: text ids (a list), or a picture's ids (a tensor ``[h, w]``).
    """
    c = model.config
    s = c.guidance if guidance is None else guidance
    text = text or Sampling(temperature=0.0)
    # Room for one <eoi> a picture beside the counted tokens.
    decoder = _Decoder(model, [prompt], image_ids, 2 * max_new_tokens + 1)
    seeds = torch.tensor([seed], device=decoder.device)
    out: list[list[int] | Tensor] = []
    words: list[int] = []
    spent = 0
    while spent < max_new_tokens:
        logits = model.text_logits(decoder.state)
        logits[:, [c.eoi_id, c.uncond_id]] = float("-inf")  # never the model's to write here
        token = int(sample(logits, seeds, spent, text)[0])
        spent += 1
        if token in stop_ids or (token == c.boi_id and spent + c.image_tokens > max_new_tokens):
            break
        decoder.push_ids(torch.tensor([token], device=decoder.device))
        if token != c.boi_id:
            words.append(token)
            continue
        if words:
            out.append(words)
            words = []
        decoders = [decoder]
        if s != 1.0:
            decoders.append(_Decoder(model, [unconditional], None, c.image_tokens))
        # Each picture has draws of its own: the number of segments so far is part of its seed.
        out.append(_paint(model, decoders, [seed + len(out)], s, image, c.image_grid)[0])
        decoder.push_ids(torch.tensor([c.eoi_id], device=decoder.device))
        spent += c.image_tokens
    if words:
        out.append(words)
    return out
