"""Every op against what a PyTorch program would call instead, at the sizes of the demo and of the
paper. A case is checked against the reference before it is timed; a wrong one gives no time.

    pytest benchmarks/bench_ops.py                     # all of them, a few minutes
    pytest benchmarks/bench_ops.py -k "expert_ffn and paper"
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synergen_ext import ops
from synergen_ext.ops import eager, reference
from synergen_ext.testing import assert_as_accurate, normal, to_float64


@dataclass
class Work:
    """One thing to do, in our way and in theirs."""

    args: tuple[Any, ...]
    ours: Callable[..., Any]
    rival: Callable[..., Any]
    truth: Callable[..., Any]  # the reference
    bytes: int = 0  # read and written at least
    flops: int = 0
    exact: bool = False  # ids: compared as they are, with the reference alone
    train: bool = False  # forward and backward


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- The cases, by op and name ----------------------------------------------------------------


def rms_norm(rows: int, dim: int, dtype: torch.dtype, train: bool = False) -> Work:
    x, weight = normal(rows, dim, dtype=dtype), normal(dim, dtype=dtype, seed=1)
    return Work(
        (x.requires_grad_(train), weight.requires_grad_(train)),
        ops.rms_norm,
        lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5),
        reference.rms_norm,
        bytes=(5 if train else 2) * size(x),
        train=train,
    )


def add_rms_norm(rows: int, dim: int, dtype: torch.dtype) -> Work:
    x, residual = normal(rows, dim, dtype=dtype), normal(rows, dim, dtype=dtype, seed=1)
    weight = normal(dim, dtype=dtype, seed=2)
    return Work(
        (x, residual, weight),
        ops.add_rms_norm,
        eager.add_rms_norm,
        reference.add_rms_norm,
        bytes=4 * size(x),
    )


def rope(tokens: int, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> Work:
    q, k = normal(tokens, heads[0], dim, dtype=dtype), normal(tokens, heads[1], dim, dtype=dtype)
    positions = torch.arange(tokens)

    def rotate_half(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequency = 1e6 ** (-torch.arange(0, dim, 2) / dim)
        angle = (positions[:, None] * frequency).repeat(1, 2)[:, None]
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat((-b, a), -1) * sin

        return turn(q), turn(k)

    work = Work((q, k, positions), ops.rope, rotate_half, reference.rope)
    work.bytes = 2 * size(q, k)
    return work


def fold_tokens(batch: int, grid: int, dim: int, fold: tuple[int, int], vocab: int, dtype: torch.dtype) -> Work:
    ids = normal(batch, grid, grid).mul(1e5).long() % vocab
    table, pos = normal(vocab, dim, dtype=dtype), normal(grid, grid, dim, dtype=dtype)

    def gather(ids: Tensor, table: Tensor, pos: Tensor, m: int, n: int) -> Tensor:
        tokens = F.embedding(ids, table) + pos
        windows = tokens.reshape(batch, grid // m, m, grid // n, n, dim).transpose(2, 3)
        return windows.reshape(batch, -1, m * n * dim)

    work = Work((ids, table, pos, *fold), ops.fold_tokens, gather, reference.fold_tokens)
    work.bytes = 2 * batch * size(pos) + size(pos)
    return work


def route_tokens(tokens: int, experts: int) -> Work:
    index = normal(tokens).mul(1e5).long().abs() % experts

    def sort(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        order = index.argsort(stable=True)
        starts = F.pad(index.bincount(minlength=experts).cumsum(0), (1, 0))
        return order.int(), starts.int()

    return Work((index, experts), ops.route_tokens, sort, reference.route_tokens, bytes=12 * tokens, exact=True)


def expert_ffn(tokens: tuple[int, ...], dim: int, hidden: int, dtype: torch.dtype, train: bool = False) -> Work:
    """tokens: the rows of each expert, mixed at random."""
    experts = len(tokens)
    x = normal(sum(tokens), dim, dtype=dtype)
    gate = (normal(experts, hidden, dim, seed=1) * dim**-0.5).to(dtype)
    up = (normal(experts, hidden, dim, seed=2) * dim**-0.5).to(dtype)
    down = (normal(experts, dim, hidden, seed=3) * hidden**-0.5).to(dtype)
    index = torch.arange(experts).repeat_interleave(torch.tensor(tokens))
    index = index[normal(len(index), seed=4).argsort()]

    def loop(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor) -> Tensor:
        """One pass of three linear layers an expert; with one expert no gather and no scatter."""

        def swiglu(x: Tensor, e: int) -> Tensor:
            return F.linear(F.silu(F.linear(x, gate[e])) * F.linear(x, up[e]), down[e])

        if experts == 1:
            return swiglu(x, 0)
        y = torch.zeros_like(x)
        for e in range(experts):
            rows = (index == e).nonzero().squeeze(1)
            if len(rows):
                y = y.index_copy(0, rows, swiglu(x[rows], e))
        return y

    floats = tuple(t.requires_grad_(train) for t in (x, gate, up, down))
    used = sum(n > 0 for n in tokens)
    return Work(
        (*floats, index),
        ops.expert_ffn,
        loop,
        reference.expert_ffn,
        bytes=(3 if train else 1) * size(gate, up, down) * used // experts,
        flops=(18 if train else 6) * sum(tokens) * dim * hidden,
        train=train,
    )


def decode_attention(rows: int, keys: int, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> Work:
    """The model's cache, [B, Hkv, S, Dh], full."""
    q = normal(rows, heads[0], dim, dtype=dtype)
    k, v = (normal(rows, heads[1], keys, dim, dtype=dtype, seed=s).transpose(1, 2) for s in (1, 2))

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)
        return y[:, :, 0]

    args = (q, k, v, torch.full((rows,), keys))
    return Work(args, ops.decode_attention, attend, reference.decode_attention, bytes=size(k, v))


def sample_tokens(rows: int, vocab: int, dtype: torch.dtype, **options: Any) -> Work:
    logits, uncond = 2 * normal(rows, vocab, dtype=dtype), 2 * normal(rows, vocab, dtype=dtype)
    seed = torch.arange(rows)
    guided = "guidance" in options
    chosen = dict(options, uncond_logits=uncond if guided else None)

    def draw(logits: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        """The processors of transformers, then torch.multinomial."""
        scores = logits if not guided else uncond + options["guidance"] * (logits - uncond)
        scores = scores.float() / options.get("temperature", 1.0)
        if "top_k" in options:
            least = scores.topk(options["top_k"]).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if "top_p" in options:
            ranked, order = scores.sort(descending=False)
            removed = ranked.softmax(-1).cumsum(-1) <= 1 - options["top_p"]
            removed[:, -1] = False
            scores = scores.masked_fill(removed.scatter(1, order, removed), -torch.inf)
        return torch.multinomial(scores.softmax(-1), 1)

    return Work(
        (logits, seed, seed),
        lambda *args: ops.sample_tokens(*args, **chosen),
        draw,
        lambda *args: reference.sample_tokens(*args, **chosen),
        bytes=size(logits) * (2 if guided else 1),
        exact=True,
    )


def linear_cross_entropy(rows: int, dim: int, vocab: int, dtype: torch.dtype, train: bool = True) -> Work:
    x, targets = normal(rows, dim, dtype=dtype), normal(rows, seed=2).abs().mul(1e6).long() % vocab
    weight = (normal(vocab, dim, seed=1) * 2 * dim**-0.5).to(dtype)
    return Work(
        (x.requires_grad_(train), weight.requires_grad_(train), targets),
        ops.linear_cross_entropy,
        eager.linear_cross_entropy,
        reference.linear_cross_entropy,
        bytes=(3 if train else 1) * size(weight),
        flops=(6 if train else 2) * rows * dim * vocab,  # of what must be done: logits are computed twice in ours
        train=train,
    )


def unfold_head(
    pictures: int, dim: int, hidden: int, heads: tuple[int, int], head_dim: int, layers: int, window: int, vocab: int,
    dtype: torch.dtype,
) -> Work:  # fmt: skip
    """Guided: two rows to a picture. Every step reads all weights."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns).mul_(1.5 * columns**-0.5).to(dtype)

    q, kv, one = heads[0] * head_dim, heads[1] * head_dim, torch.ones(dim, dtype=dtype)
    stack = [
        w for _ in range(layers)
        for w in (one, matrix(q, dim), matrix(kv, dim), matrix(kv, dim), matrix(dim, q), one,
                  matrix(hidden, dim), matrix(hidden, dim), matrix(dim, hidden))
    ]  # fmt: skip
    states, seed = normal(2 * pictures, dim, dtype=dtype), torch.arange(pictures)
    tokens, positions, classifier = matrix(vocab, dim), matrix(window, dim), matrix(vocab, dim)
    options: dict[str, Any] = dict(guidance=3.0, heads=heads[0], kv_heads=heads[1])

    def patch(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda states, seed: function(
            states, tokens, positions, stack, [], one, classifier, seed, seed * window, **options
        )

    return Work(
        (states, seed),
        patch(ops.unfold_head),
        patch(eager.unfold_head),
        patch(reference.unfold_head),
        bytes=window * size(*stack, classifier),
        flops=2 * 2 * pictures * window * sum(w.numel() for w in (*stack, classifier)),
        exact=True,
    )


F32, BF16 = torch.float32, torch.bfloat16
CASES: dict[str, dict[str, Callable[[], Work]]] = {
    "rms_norm": {
        "demo-512": lambda: rms_norm(512, 256, F32),
        "demo-512-train": lambda: rms_norm(512, 256, F32, train=True),
        "paper-2": lambda: rms_norm(2, 2048, F32),
        "paper-512": lambda: rms_norm(512, 2048, F32),
        "paper-512-bf16": lambda: rms_norm(512, 2048, BF16),
    },
    "add_rms_norm": {
        "demo-2": lambda: add_rms_norm(2, 256, F32),
        "paper-2": lambda: add_rms_norm(2, 2048, F32),
        "paper-512": lambda: add_rms_norm(512, 2048, F32),
        "paper-512-bf16": lambda: add_rms_norm(512, 2048, BF16),
    },
    "rope": {
        "demo-512": lambda: rope(512, (4, 2), 64, F32),
        "paper-2": lambda: rope(2, (16, 8), 128, F32),
        "paper-512": lambda: rope(512, (16, 8), 128, F32),
        "paper-512-bf16": lambda: rope(512, (16, 8), 128, BF16),
    },
    "fold_tokens": {
        "demo-32": lambda: fold_tokens(32, 12, 64, (2, 4), 1024, F32),
        "paper-1": lambda: fold_tokens(1, 64, 2048, (2, 8), 32768, F32),
        "paper-1-bf16": lambda: fold_tokens(1, 64, 2048, (2, 8), 32768, BF16),
    },
    "route_tokens": {
        "paper-8192": lambda: route_tokens(8192, 2),
        "router-8192-of-128": lambda: route_tokens(8192, 128),
    },
    "expert_ffn": {
        # The weights of the demo (3.4 MB for two experts) stay in a cache, the paper's do not.
        **{f"demo-{n}": lambda n=n: expert_ffn((0, n), 256, 576, F32) for n in (1, 2, 16)},
        "demo-64+448": lambda: expert_ffn((64, 448), 256, 576, F32),
        "demo-400+1600": lambda: expert_ffn((400, 1600), 256, 576, F32),
        "demo-64+448-train": lambda: expert_ffn((64, 448), 256, 576, F32, train=True),
        "demo-400+1600-train": lambda: expert_ffn((400, 1600), 256, 576, F32, train=True),
        **{f"paper-{n}": lambda n=n: expert_ffn((n,), 2048, 8192, F32) for n in (1, 2, 8, 16)},
        "paper-2-bf16": lambda: expert_ffn((2,), 2048, 8192, BF16),
        "paper-64": lambda: expert_ffn((64,), 2048, 8192, F32),
        "paper-64+192": lambda: expert_ffn((64, 192), 2048, 8192, F32),
        "paper-64+192-bf16": lambda: expert_ffn((64, 192), 2048, 8192, BF16),
        "paper-64+192-train": lambda: expert_ffn((64, 192), 2048, 8192, F32, train=True),
    },
    "decode_attention": {
        "demo-2": lambda: decode_attention(2, 60, (4, 2), 64, F32),
        "paper-head-2": lambda: decode_attention(2, 16, (16, 8), 128, F32),
        "paper-2": lambda: decode_attention(2, 400, (16, 8), 128, F32),
        "paper-2-bf16": lambda: decode_attention(2, 400, (16, 8), 128, BF16),
        "paper-16-bf16": lambda: decode_attention(16, 400, (16, 8), 128, BF16),
    },
    "linear_cross_entropy": {
        # 64 pictures of 18 patches of 8 ids, and the text of a batch.
        "demo-9216-train": lambda: linear_cross_entropy(9216, 256, 192, F32),
        "demo-text-1500-train": lambda: linear_cross_entropy(1500, 256, 514, F32),
        "demo-text-1500-bf16-train": lambda: linear_cross_entropy(1500, 256, 514, BF16),
        "paper-512": lambda: linear_cross_entropy(512, 2048, 32768, F32, train=False),
        "paper-512-train": lambda: linear_cross_entropy(512, 2048, 32768, F32),
        "paper-512-bf16-train": lambda: linear_cross_entropy(512, 2048, 32768, BF16),
        "paper-heads-8192-train": lambda: linear_cross_entropy(8192, 64, 32768, F32),  # logits outweigh all else
    },
    "sample_tokens": {
        "demo-16": lambda: sample_tokens(16, 1024, F32, guidance=3.0),
        "paper-1": lambda: sample_tokens(1, 32768, F32),
        "paper-1-guided": lambda: sample_tokens(1, 32768, F32, guidance=7.5, top_k=2000),
        "paper-1-top-p": lambda: sample_tokens(1, 32768, F32, top_p=0.95),
        "paper-16-guided": lambda: sample_tokens(16, 32768, F32, guidance=7.5, top_k=2000),
        "paper-16-all": lambda: sample_tokens(16, 32768, F32, guidance=7.5, temperature=0.9, top_k=2000, top_p=0.95),
    },
    "unfold_head": {
        "demo-1": lambda: unfold_head(1, 256, 576, (4, 2), 64, 2, 8, 1024, F32),
        "paper-1-bf16": lambda: unfold_head(1, 2048, 8192, (16, 8), 128, 4, 16, 32768, BF16),
    },
}


def check(work: Work) -> None:
    """Right before it is timed: against float64, at most twice as far off as the rival."""
    with torch.no_grad():
        ours, truth = work.ours(*work.args), work.truth(*to_float64(work.args))
        if work.exact:
            exact = work.truth(*work.args)
            assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
        else:
            assert_as_accurate(ours, work.rival(*work.args), truth)


def call(work: Work, who: str) -> Callable[[], Any]:
    """The function to time."""
    function = work.ours if who == "synergen_ext" else work.rival
    if not work.train:
        return lambda: function(*work.args)
    leaves = [a for a in work.args if isinstance(a, Tensor) and a.requires_grad]
    upstream = torch.randn_like(function(*work.args))
    return lambda: torch.autograd.grad(function(*work.args), leaves, upstream)


def peak_memory(function: Callable[[], Any]) -> float | None:
    """Bytes that a call takes at its highest beyond what the process holds; None where Linux does not say."""

    def read(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) << 10

    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
        before = read("VmRSS")
        function()
        return read("VmHWM") - before
    except OSError:
        return None


@pytest.mark.parametrize("who", ["synergen_ext", "torch"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in CASES.items() for name in names])
def test_op(op: str, name: str, who: str, benchmark: Any) -> None:
    work = CASES[op][name]()
    check(work)
    benchmark.group = f"{op} {name}"
    with torch.set_grad_enabled(work.train):
        function = call(work, who)
        peak = peak_memory(function)
        benchmark.pedantic(function, rounds=15, iterations=1, warmup_rounds=3)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(op=op, case=name, who=who, threads=torch.get_num_threads(), torch=torch.__version__)
    if peak is not None:
        benchmark.extra_info["peak MB"] = peak / 1e6
    if work.bytes:
        benchmark.extra_info["GB/s"] = work.bytes / seconds / 1e9
    if work.flops:
        benchmark.extra_info["GFLOP/s"] = work.flops / seconds / 1e9
