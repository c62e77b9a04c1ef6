"""What `suite_cuda.py` times on a GPU: each op at the sizes that decide, beside what else computes the same.

A case is a function of (device, tiny). `tiny` shrinks every size, so that tests can run the cases, rivals and checks
included, on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synergen_ext import ops
from synergen_ext.ops import eager, reference
from synergen_ext.testing import normal

BF16 = torch.bfloat16


@dataclass
class Case:
    """One call, ours and others'. The first rival's error is the measure of ours; `args` are rotated through copies, so
    that what counts as coming from memory does."""

    args: tuple[Any, ...]
    ours: Callable[..., Any]
    rivals: dict[str, Callable[..., Any]]
    truth: Callable[..., Any]
    bytes: int = 0  # read and written at least
    flops: int = 0
    train: bool = False  # forward and backward
    ids: bool = False  # results are ids: ours equal those of the CPU kernel; rivals draw their own
    missing: dict[str, str] = field(default_factory=dict)  # rivals that are not here, and why


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def rms_norm(device: str, tiny: bool, train: bool = False) -> Case:
    rows, dim = (3, 64) if tiny else (8192, 2048)
    x, weight = normal(rows, dim, dtype=BF16, device=device), normal(dim, dtype=BF16, device=device, seed=1)
    return Case(
        (x.requires_grad_(train), weight.requires_grad_(train)),
        ops.rms_norm,
        {"torch": lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5)},
        reference.rms_norm,
        bytes=(5 if train else 2) * size(x),
        train=train,
    )


def rope(device: str, tiny: bool) -> Case:
    tokens, heads, kv_heads, dim = (3, 2, 1, 16) if tiny else (8192, 16, 8, 128)
    q = normal(tokens, heads, dim, dtype=BF16, device=device)
    k = normal(tokens, kv_heads, dim, dtype=BF16, device=device, seed=1)

    def rotate_half(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequency = 1e6 ** (-torch.arange(0, dim, 2, device=q.device) / dim)
        angle = (positions[:, None] * frequency).repeat(1, 2)[:, None]
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat((-b, a), -1) * sin

        return turn(q), turn(k)

    positions = torch.arange(tokens, device=device)
    return Case((q, k, positions), ops.rope, {"torch": rotate_half}, reference.rope, 2 * size(q, k))


def fold_tokens(device: str, tiny: bool, train: bool = False) -> Case:
    batch, grid, dim, (m, n), vocab = (1, 4, 8, (2, 2), 11) if tiny else (8, 64, 2048, (2, 8), 32768)
    ids = (normal(batch, grid, grid).mul(1e5).long() % vocab).to(device)
    table, pos = normal(vocab, dim, dtype=BF16, device=device), normal(grid, grid, dim, dtype=BF16, device=device)

    def gather(ids: Tensor, table: Tensor, pos: Tensor, m: int, n: int) -> Tensor:
        tokens = F.embedding(ids, table) + pos
        windows = tokens.reshape(batch, grid // m, m, grid // n, n, dim).transpose(2, 3)
        return windows.reshape(batch, -1, m * n * dim)

    args = (ids, table.requires_grad_(train), pos.requires_grad_(train), m, n)
    moved = 2 * batch * size(pos) + size(pos)  # a read of the row of every token, a write, and the positions
    if train:
        moved += batch * size(pos) + size(table, pos)
    return Case(args, ops.fold_tokens, {"torch": gather}, reference.fold_tokens, moved, train=train)


def _experts(device: str, tokens: tuple[int, ...], dim: int, hidden: int) -> tuple[Tensor, ...]:
    experts = len(tokens)
    x = normal(sum(tokens), dim, dtype=BF16, device=device)
    gate = (normal(experts, hidden, dim, device=device, seed=1) * dim**-0.5).to(BF16)
    up = (normal(experts, hidden, dim, device=device, seed=2) * dim**-0.5).to(BF16)
    down = (normal(experts, dim, hidden, device=device, seed=3) * hidden**-0.5).to(BF16)
    index = torch.arange(experts).repeat_interleave(torch.tensor(tokens))
    return x, gate, up, down, index[normal(len(index), seed=4).argsort()].to(device)


def _grouped_mm(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor) -> Tensor:
    """torch's grouped GEMM over rows sorted by expert."""
    order = index.argsort(stable=True)
    ends = F.one_hot(index, len(gate)).sum(0).cumsum(0).to(torch.int32)
    rows = x[order]
    g, u = (F.grouped_mm(rows, w.transpose(1, 2), offs=ends) for w in (gate, up))
    out = F.grouped_mm(F.silu(g) * u, down.transpose(1, 2), offs=ends)
    return torch.empty_like(out).index_copy(0, order, out)


def _transformers(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor) -> Tensor:
    """The grouped_mm experts of transformers, called as its models call them."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    experts = SimpleNamespace(
        num_experts=len(gate), has_gate=True, has_bias=False, is_transposed=False, has_post_expert_norm=False,
        _is_expert_parallel=False, gate_up_proj=torch.cat((gate, up), 1), down_proj=down,
        _apply_gate=lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
    )  # fmt: skip
    weights = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    return grouped_mm_experts_forward(experts, x, index[:, None], weights)


def _dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor) -> Tensor:
    """Every row through the first expert: cuBLAS without any routing, the ceiling and not the same numbers."""
    return eager.swiglu(x, gate[0], up[0], down[0])


def expert_ffn(device: str, tiny: bool, tokens: tuple[int, ...], train: bool = False) -> Case:
    dim, hidden = (16, 32) if tiny else (2048, 8192)
    tokens = tuple(min(n, 5) for n in tokens) if tiny else tokens
    *floats, index = _experts(device, tokens, dim, hidden)
    args = (*(t.requires_grad_(train) for t in floats), index)
    used = sum(n > 0 for n in tokens) * 3 * dim * hidden * 2
    rivals = {"torch, a loop over experts": eager.expert_ffn, "torch grouped_mm": _grouped_mm,
              "transformers grouped_mm": _transformers, "dense, no routing": _dense}  # fmt: skip
    flops = (18 if train else 6) * sum(tokens) * dim * hidden
    return Case(args, ops.expert_ffn, rivals, reference.expert_ffn, (3 if train else 1) * used, flops, train)


def linear_cross_entropy(device: str, tiny: bool, rows: int, vocab: int, train: bool = True) -> Case:
    rows, dim, vocab = (5, 16, 37) if tiny else (rows, 2048, vocab)
    x, targets = normal(rows, dim, dtype=BF16, device=device), (normal(rows, seed=2).abs() * 1e6).long() % vocab
    weight = (normal(vocab, dim, device=device, seed=1) * 2 * dim**-0.5).to(BF16)
    args = (x.requires_grad_(train), weight.requires_grad_(train), targets.to(device))
    flops = (8 if train else 2) * rows * dim * vocab  # with the logits computed twice
    return Case(args, ops.linear_cross_entropy, {"torch": eager.linear_cross_entropy}, reference.linear_cross_entropy,
                size(weight) * (3 if train else 1), flops, train)  # fmt: skip


def sample_tokens(device: str, tiny: bool, rows: int, filtered: bool) -> Case:
    rows, vocab = (2, 50) if tiny else (rows, 32768)
    logits, uncond = (2 * normal(rows, vocab, dtype=BF16, device=device, seed=s) for s in (0, 1))
    seed = torch.arange(rows, device=device)
    options: dict[str, Any] = {"guidance": 7.5, "temperature": 0.9}
    if filtered:
        options |= {"top_k": 20 if tiny else 2048, "top_p": 0.9}
    # Tensors on the device, as an engine holds them: a number would be sent there in every call.
    sent = {k: torch.tensor(v, dtype=torch.int64 if k == "top_k" else torch.float64, device=device)
            for k, v in options.items()}  # fmt: skip

    def ours(logits: Tensor, uncond: Tensor, seed: Tensor) -> Any:
        return ops.sample_tokens(logits, seed, seed, uncond_logits=uncond, **sent)

    def on_cpu(logits: Tensor, uncond: Tensor, seed: Tensor) -> Any:
        return ops.sample_tokens(logits.cpu(), seed.cpu(), seed.cpu(), uncond_logits=uncond.cpu(), **options)

    def scores(logits: Tensor, uncond: Tensor) -> Tensor:
        return (uncond.float() + options["guidance"] * (logits.float() - uncond.float())) / options["temperature"]

    def chain(logits: Tensor, uncond: Tensor, seed: Tensor) -> Tensor:
        """The processors of transformers, then torch.multinomial."""
        s = scores(logits, uncond)
        if filtered:
            s = s.masked_fill(s < s.topk(options["top_k"]).values[:, -1:], -torch.inf)
            ranked, order = s.sort(descending=False)
            removed = ranked.softmax(-1).cumsum(-1) <= 1 - options["top_p"]
            removed[:, -1] = False
            s = s.masked_fill(removed.scatter(1, order, removed), -torch.inf)
        return torch.multinomial(s.softmax(-1), 1)

    case = Case((logits, uncond, seed), ours, {"torch": chain}, on_cpu, size(logits, uncond), ids=True)
    if filtered:
        _other_samplers(case, scores, options)
    return case


def _other_samplers(case: Case, scores: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """FlashInfer's and vLLM's, where they are installed; guidance and temperature are torch's there."""
    try:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits

        case.rivals["FlashInfer"] = lambda logits, uncond, seed: top_k_top_p_sampling_from_logits(
            scores(logits, uncond), options["top_k"], options["top_p"], filter_apply_order="top_k_first"
        )
    except ImportError as error:
        case.missing["FlashInfer"] = str(error)
    try:
        from vllm.v1.sample.ops.topk_topp_sampler import (
            apply_top_k_top_p,
            random_sample,
        )

        def vllm(logits: Tensor, uncond: Tensor, seed: Tensor) -> Tensor:
            k = torch.full((len(logits),), options["top_k"], device=logits.device, dtype=torch.int32)
            p = torch.full((len(logits),), options["top_p"], device=logits.device)
            return random_sample(apply_top_k_top_p(scores(logits, uncond), k, p).softmax(-1), {})

        case.rivals["vLLM"] = vllm
    except ImportError as error:
        case.missing["vLLM"] = str(error)


CASES: dict[str, Callable[[str, bool], Case]] = {
    "rms_norm 8192 x 2048": rms_norm,
    "rms_norm 8192 x 2048, forward and backward": lambda d, t: rms_norm(d, t, train=True),
    "rope 8192 tokens": rope,
    "fold_tokens 8 pictures": fold_tokens,
    "fold_tokens 8 pictures, forward and backward": lambda d, t: fold_tokens(d, t, train=True),
    "expert_ffn 2048 text + 6144 image": lambda d, t: expert_ffn(d, t, (2048, 6144)),
    "expert_ffn 2048 text + 6144 image, forward and backward": lambda d, t: expert_ffn(d, t, (2048, 6144), train=True),
    "expert_ffn 8192 image, no text": lambda d, t: expert_ffn(d, t, (0, 8192)),
    **{f"expert_ffn {n} rows": lambda d, t, n=n: expert_ffn(d, t, (0, n)) for n in (1, 2, 8, 64)},
    "linear_cross_entropy 8192 x 32768": lambda d, t: linear_cross_entropy(d, t, 8192, 32768, train=False),
    "linear_cross_entropy 8192 x 32768, forward and backward": lambda d, t: linear_cross_entropy(d, t, 8192, 32768),
    "linear_cross_entropy 4096 x 92544, forward and backward": lambda d, t: linear_cross_entropy(d, t, 4096, 92544),
    **{f"sample_tokens {n} rows": lambda d, t, n=n: sample_tokens(d, t, n, False) for n in (1, 16, 256)},
    **{f"sample_tokens {n} rows, top-k, top-p": lambda d, t, n=n: sample_tokens(d, t, n, True) for n in (1, 16, 256)},
}
