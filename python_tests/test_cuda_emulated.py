"""The CUDA kernels without a GPU: their sources run by the emulator, against float64 and the CPU kernels, under every
schedule, with the race detector and with sanitizers."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch
from emulator import SCHEDULES

from synergen_ext import _C, ops
from synergen_ext.ops import reference
from synergen_ext.testing import DTYPES, LAYOUTS, assert_as_accurate, laid_out, normal, to_float64

pytestmark = pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")


@pytest.fixture(scope="module")
def emulated():
    kernels = emulator.load("plain")
    kernels.schedule()
    return kernels


def check(emulated, op, *args, slow=None):
    """One op against its reference in float64, at most twice as far off as the reference at the dtype of args."""
    slow = slow or getattr(reference, op)
    ours = getattr(emulated, op)(*args)
    assert_as_accurate(ours, slow(*args), slow(*to_float64(args)), op)
    return ours


def padded(x):
    """The values of x in rows one element longer: each begins at another place within 16 bytes."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 1)[..., :-1].copy_(x)


def spaced(x):
    """The values of x, each eighth of a row, so that every row and every stride fits 16 bytes."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] * 8)[..., ::8].copy_(x)


def shifted(x):
    """The values of x, whole rows, beginning one element after 16 bytes."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


def unpacked_calls(dtype, lay):
    """Rows that hold whole accesses of 16 bytes, which may still not be used."""
    x, weight, eps = rms_norm_args(3, 16, dtype=dtype)
    q, k, positions = rope_args(3, dim=32, dtype=dtype)
    ids, table, pos, m, n = fold_args(1, 4, 4, 16, dtype=dtype)
    dy = fold_backward_args(1, 4, 4, 16, dtype=dtype)[0]
    return {
        "rms_norm": (lay(x), weight, eps),
        "rms_norm_backward": (lay(x), lay(x), weight, eps),
        "rope": (lay(q), lay(k), positions, 1e4, False),
        "fold_tokens": (ids, lay(table), lay(pos), m, n),
        "fold_tokens_backward": (lay(dy), ids, 11, m, n),
    }


def rms_norm_args(*shape, dtype, weight_dtype=None, layout="contiguous"):
    weight = 1 + 0.3 * normal(shape[-1], dtype=weight_dtype or dtype, seed=1)
    return (*(laid_out(t, layout) for t in (normal(*shape, dtype=dtype), weight)), 1e-5)


def rope_args(*tokens, heads=3, kv_heads=1, dim=16, dtype=torch.float32, layout="contiguous", most=5000):
    q = laid_out(normal(*tokens, heads, dim, dtype=dtype), layout)
    k = laid_out(normal(*tokens, kv_heads, dim, dtype=dtype, seed=1), layout)
    return q, k, torch.randint(-9, most, tokens, generator=torch.Generator().manual_seed(2))


def fold_args(batch, h, w, dim, m=2, n=2, vocab=11, dtype=torch.float32, layout="contiguous", skew=False):
    ids = torch.randint(vocab, (batch, h, w), generator=torch.Generator().manual_seed(3))
    if skew:  # one id fills most of the pictures, as a white background does
        ids = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.8, 5, ids)
    table, pos = normal(vocab, dim, dtype=dtype), normal(h, w, dim, dtype=dtype, seed=1)
    return laid_out(ids, layout), laid_out(table, layout), laid_out(pos, layout), m, n


def fold_backward_args(batch, h, w, dim, m=2, n=2, vocab=11, dtype=torch.float32, layout="contiguous", skew=False):
    ids = fold_args(batch, h, w, 1, m, n, vocab, skew=skew, layout=layout)[0]
    dy = normal(batch, (h // m) * (w // n), m * n * dim, dtype=dtype, seed=5)
    return laid_out(dy, layout), ids, vocab, m, n


@pytest.mark.parametrize("lay", [padded, spaced, shifted])
@pytest.mark.parametrize("op", unpacked_calls(torch.float32, padded))
def test_rows_that_cannot_be_read_in_packs(emulated, op, lay, dtype):
    slow = (lambda *a: reference.rope(*a[:4], inverse=a[4])) if op == "rope" else None
    check(emulated, op, *unpacked_calls(dtype, lay)[op], slow=slow)


# ---- rms_norm


@pytest.mark.parametrize("dim", [1, 7, 8, 33, 256, 264])
def test_rms_norm(emulated, dim, dtype):
    check(emulated, "rms_norm", *rms_norm_args(5, dim, dtype=dtype))
    check(emulated, "rms_norm_backward", normal(5, dim, dtype=dtype, seed=2), *rms_norm_args(5, dim, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rms_norm_layouts(emulated, layout, dtype):
    args = rms_norm_args(2, 3, 24, dtype=dtype, layout=layout)
    check(emulated, "rms_norm", *args)
    check(emulated, "rms_norm_backward", laid_out(normal(2, 3, 24, dtype=dtype, seed=2), layout), *args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [24, 33])
def test_rms_norm_with_a_float32_weight(emulated, dim, dtype):
    args = rms_norm_args(5, dim, dtype=dtype, weight_dtype=torch.float32)
    check(emulated, "rms_norm", *args)
    check(emulated, "rms_norm_backward", normal(5, dim, dtype=dtype, seed=2), *args)


@pytest.mark.parametrize("dim", [2051, 8200])
def test_rms_norm_rows_longer_than_the_registers(emulated, dim):
    """By one element at a time and by four; float64 holds nothing, so it reads every row twice."""
    for dtype in (torch.float32, torch.float64):
        args = rms_norm_args(3, dim, dtype=dtype)
        check(emulated, "rms_norm", *args)
        check(emulated, "rms_norm_backward", normal(3, dim, dtype=dtype, seed=2), *args)


def test_rms_norm_backward_of_more_rows_than_blocks(emulated):
    args = rms_norm_args(1030, 8, dtype=torch.float32)
    check(emulated, "rms_norm_backward", normal(1030, 8, seed=2), *args)


def test_rms_norm_without_rows(emulated):
    args = rms_norm_args(0, 8, dtype=torch.float32)
    assert emulated.rms_norm(*args).shape == (0, 8)
    dx, dweight = emulated.rms_norm_backward(normal(0, 8), *args)
    assert dx.shape == (0, 8) and torch.equal(dweight, torch.zeros(8))


# ---- rope


def check_rope(emulated, args, theta=1e4, inverse=False):
    check(emulated, "rope", *args, theta, inverse, slow=lambda *a: reference.rope(*a[:4], inverse=a[4]))


@pytest.mark.parametrize("dim", [2, 6, 16, 64, 130])
def test_rope(emulated, dim, dtype):
    check_rope(emulated, rope_args(5, dim=dim, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_layouts(emulated, layout, dtype):
    check_rope(emulated, rope_args(2, 3, dim=16, dtype=dtype, layout=layout))


@pytest.mark.parametrize("inverse", [False, True])
def test_rope_shares_and_skips(emulated, inverse):
    q, k, _ = rope_args(2, 5, dtype=torch.float64)
    check_rope(emulated, (q, k, torch.arange(5)), inverse=inverse)  # positions broadcast to the batch
    check_rope(emulated, (q[:, :, :0], k, torch.arange(5)), inverse=inverse)
    check_rope(emulated, (q[:, :0], k[:, :0], torch.arange(0)), inverse=inverse)


def test_rope_heads_longer_than_a_launch(emulated):
    # Near positions: an angle is off by position times the last bit of a frequency, which pow may round either way.
    check_rope(emulated, rope_args(2, dim=1030, dtype=torch.float64, most=100))


def test_rope_at_far_positions(emulated):
    q, k, _ = rope_args(7, dim=2, dtype=torch.float64)  # frequency 1, which no rounding touches
    positions = torch.tensor([0, -1, 1 << 20, (1 << 31) + 7, (1 << 40) + 3, -(1 << 50), 1 << 62])
    check_rope(emulated, (q, k, positions))


# ---- fold_tokens


@pytest.mark.parametrize("dim", [1, 6, 8, 40, 300])
def test_fold_tokens(emulated, dim, dtype):
    args = fold_args(2, 4, 6, dim, n=3, dtype=dtype)
    ours = check(emulated, "fold_tokens", *args)
    assert torch.equal(ours, ops.fold_tokens(*args))
    check(emulated, "fold_tokens_backward", *fold_backward_args(2, 4, 6, dim, n=3, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fold_tokens_layouts(emulated, layout, dtype):
    check(emulated, "fold_tokens", *fold_args(2, 4, 4, 8, dtype=dtype, layout=layout))
    check(emulated, "fold_tokens_backward", *fold_backward_args(2, 4, 4, 8, dtype=dtype, layout=layout))


@pytest.mark.parametrize("vocab", [1, 11, 255, 256, 300])
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_fold_tokens_backward_sums_by_id(emulated, batch, vocab):
    """Tokens of one piece and of several, of one tile and of several, one sorting pass and two."""
    args = fold_backward_args(batch, 8, 8, 32, vocab=vocab, dtype=torch.float64, skew=vocab > 5)
    dtable, _ = check(emulated, "fold_tokens_backward", *args)
    unused = torch.ones(vocab, dtype=torch.bool).index_fill(0, args[1].flatten(), False)
    assert torch.equal(dtable[unused], torch.zeros_like(dtable[unused]))


def test_fold_tokens_backward_is_the_cpu_kernel_to_the_bit_within_a_piece(emulated):
    args = fold_backward_args(3, 8, 8, 16, dtype=torch.bfloat16, skew=True)
    for ours, cpu in zip(
        emulated.fold_tokens_backward(*args), torch.ops.synergen.fold_tokens_backward(*args), strict=True
    ):
        assert torch.equal(ours, cpu)


def test_fold_tokens_empty(emulated):
    assert emulated.fold_tokens(*fold_args(0, 4, 4, 8)).shape == (0, 4, 32)
    assert emulated.fold_tokens(*fold_args(2, 4, 4, 0)).shape == (2, 4, 0)
    for args in (fold_backward_args(0, 4, 4, 8), fold_backward_args(2, 4, 4, 0), fold_backward_args(2, 0, 4, 8)):
        check(emulated, "fold_tokens_backward", *args)


def test_fold_tokens_marks_ids_outside_the_table(emulated):
    ids, table, pos, m, n = fold_args(1, 2, 2, 8)
    ids = torch.tensor([[[3, -1], [11, 4]]])
    y = emulated.fold_tokens(ids, table, pos, m, n).view(4, 8)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    dtable, dpos = emulated.fold_tokens_backward(torch.ones(1, 1, 32), ids, 11, m, n)
    assert dtable.sum(1).tolist() == [8.0 if id in (3, 4) else 0.0 for id in range(11)]
    assert torch.equal(dpos, torch.ones(2, 2, 8))


def test_fold_ids(emulated):
    ids = torch.randint(99, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    folded = emulated.fold_ids(ids, 2, 3)
    assert torch.equal(folded, reference.fold_ids(ids, 2, 3))
    assert torch.equal(emulated.unfold_ids(folded, 4, 6, 2, 3), ids)
    assert torch.equal(emulated.fold_ids(laid_out(ids, "transposed"), 2, 3), folded)


# ---- sample_tokens


def sample_args(rows, vocab, dtype=torch.float32, seed=0, grid=0.0, **options):
    """logits, seed, position, and the options in the schema's order; `grid` rounds logits, so that ties are many."""
    logits = 3 * normal(rows, vocab, dtype=torch.float64, seed=seed)
    if grid:
        logits = (logits / grid).round() * grid
    names = ("uncond_logits", "guidance", "temperature", "top_k", "top_p")
    kinds = dict(guidance=torch.float64, temperature=torch.float64, top_k=torch.int64, top_p=torch.float64)
    options = {k: v if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=kinds[k]) for k, v in options.items()}
    return (
        logits.to(dtype), torch.arange(rows) + 100 * seed, torch.arange(rows).flip(0) * 3,
        *(options.get(name) for name in names),
    )  # fmt: skip


def check_same_ids(emulated, *args):
    ids, valid = emulated.sample_tokens(*args)
    cpu_ids, cpu_valid = torch.ops.synergen.sample_tokens(*args)
    assert torch.equal(ids, cpu_ids) and torch.equal(valid, cpu_valid)
    return ids, valid


@pytest.mark.parametrize("vocab", [1, 2, 31, 33, 257, 1500])
def test_sample_tokens_is_the_cpu_kernel_to_the_bit(emulated, vocab, dtype):
    check_same_ids(emulated, *sample_args(6, vocab, dtype))
    check_same_ids(emulated, *sample_args(6, vocab, dtype, seed=1, temperature=0.7, top_k=20, top_p=0.9))
    check_same_ids(emulated, *sample_args(6, vocab, dtype, seed=2, top_p=0.5))
    check_same_ids(emulated, *sample_args(3, vocab, dtype, seed=3, temperature=0.0))


@pytest.mark.parametrize("seed", range(4))
def test_sample_tokens_with_ties(emulated, seed, dtype):
    """Logits on a grid: the last logit that stays is shared by many ids, of which the lowest stay."""
    for options in (dict(top_k=5 + 60 * seed), dict(top_p=0.3 + 0.2 * seed), dict(top_k=150, top_p=0.6)):
        check_same_ids(emulated, *sample_args(8, 700, dtype, seed=seed, grid=1.5, **options))
    args = sample_args(8, 700, dtype, seed=seed, grid=100.0, temperature=0.0)
    assert check_same_ids(emulated, *args)[0].tolist() == args[0].argmax(1).tolist()


def test_sample_tokens_minus_zero_is_zero(emulated, dtype):
    logits = torch.tensor([[-0.0, 0.0, 1.0]], dtype=dtype).expand(64, -1)
    args = (logits, torch.arange(64), torch.tensor(0), None, None, None, torch.tensor(2), None)
    assert set(check_same_ids(emulated, *args)[0].tolist()) == {0, 2}


def test_sample_tokens_argmax_takes_the_first_of_equals(emulated):
    logits = torch.zeros(2, 3000)
    logits[0, [900, 1924, 2948]] = logits[1, [2999, 1975, 951]] = 4.0  # 1,024 apart: one thread sees all three
    ids, _ = check_same_ids(emulated, logits, torch.arange(2), torch.tensor(0), None, None, torch.tensor(0.0).double(),
                            None, None)  # fmt: skip
    assert ids.tolist() == [900, 951]


def test_sample_tokens_rounds_guidance_as_the_cpu_does(emulated):
    """Two tokens that tie after a product and a sum, each rounded, and do not where both are one operation."""
    generator = np.random.default_rng(0)
    c, u = (generator.integers(-999, 999, 40000).astype(np.float32) / np.float32(977) for _ in range(2))
    scale = np.float32(1.7)
    rounded = u + scale * (c - u)
    fused = (u.astype(np.float64) + np.float64(scale) * (c - u).astype(np.float64)).astype(np.float32)
    order = np.lexsort((fused, rounded))
    pairs = [(a, b) for a, b in itertools.pairwise(order) if rounded[a] == rounded[b] and fused[a] < fused[b]][:64]
    assert len(pairs) == 64
    logits, uncond = (torch.from_numpy(np.stack([x[list(pair)] for pair in pairs])) for x in (c, u))
    options = (torch.tensor(float(scale)).double(), torch.tensor(0.0).double(), None, None)
    ids, _ = check_same_ids(emulated, logits, torch.arange(64), torch.tensor(0), uncond, *options)
    assert not ids.any()


def test_sample_tokens_options_by_row(emulated):
    options = dict(
        uncond_logits=normal(5, 90, seed=9),
        guidance=torch.tensor([1.0, 0.0, 2.5, -1.0, 7.0], dtype=torch.float64),
        temperature=torch.tensor([1.0, 0.0, 0.5, 3.0, 1e-9], dtype=torch.float64),
        top_k=torch.tensor([0, 3, 1, 90, 1000]),
        top_p=torch.tensor([1.0, 0.0, 0.7, 0.2, 0.999], dtype=torch.float64),
    )
    args = sample_args(5, 90, **options)
    check_same_ids(emulated, *args)
    check_same_ids(emulated, *(laid_out(a, "stepped") if a is not None and a.dim() else a for a in args))


def test_sample_tokens_rows_without_an_answer(emulated):
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[0, nan, 1], [inf, 0, 0], [-inf] * 3, [-inf, 2, -inf], [-inf, 0, 0]], dtype=torch.float32)
    seeds, position = torch.arange(5), torch.tensor(3)
    ids, valid = check_same_ids(emulated, logits, seeds, position, None, None, None, None, None)
    assert valid.tolist() == [False, False, False, True, True] and ids[:4].tolist() == [0, 0, 0, 1]
    half = torch.tensor(0.5).double()
    _, valid = check_same_ids(emulated, logits, seeds, position, None, None, None, None, half)
    assert valid.tolist() == [False, False, False, True, True]
    uncond = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, nan], [-inf, -inf, 5]])
    _, valid = check_same_ids(emulated, logits, seeds, position, uncond, *[None] * 4)
    assert valid.tolist() == [False, False, False, False, True]


def test_sample_tokens_refuses_rows_whose_options_cannot_be_meant(emulated):
    """The CPU kernel's caller gets an error; on a GPU nobody has looked before, so the row is invalid."""
    wrong = dict(guidance=torch.nan, temperature=-1.0, top_k=-1, top_p=1.5)
    for name, value in wrong.items():
        ids, valid = emulated.sample_tokens(*sample_args(2, 20, **{name: value}))
        assert ids.tolist() == [0, 0] and valid.tolist() == [False, False], name


# ---- Every kernel, under every schedule and gate

SMALL = {
    "rms_norm": lambda: rms_norm_args(5, 264, dtype=torch.bfloat16),
    "rms_norm_backward": lambda: (normal(5, 270, seed=2), *rms_norm_args(5, 270, dtype=torch.float32)),
    "rope": lambda: (*rope_args(3, heads=5, dim=16, dtype=torch.float16), 1e4, False),
    "fold_tokens": lambda: fold_args(2, 4, 4, 40, dtype=torch.bfloat16),
    "fold_tokens_backward": lambda: fold_backward_args(20, 8, 8, 8, vocab=300, skew=True),
    "fold_ids": lambda: (torch.arange(48).view(2, 4, 6), 2, 3),
    "sample_tokens": lambda: sample_args(3, 300, torch.bfloat16, grid=0.5, top_k=200, top_p=0.8),
}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def test_every_cuda_kernel_is_here(emulated):
    assert set(emulated.module.cuda_kernels()) == set(SMALL)
    assert set(_C.cuda_kernels()) <= set(SMALL)


@pytest.mark.parametrize("op", SMALL)
def test_no_schedule_changes_a_bit(emulated, op):
    args = SMALL[op]()
    results = []
    for policy, seed in SCHEDULES:
        for resident in (1, 3):
            emulated.schedule(policy, seed, resident)
            results.append(as_tuple(getattr(emulated, op)(*args)))
    emulated.schedule()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("op", SMALL)
def test_no_races(op):
    raced = emulator.load("race")
    for policy, seed in ((0, 0), (2, 7)):
        raced.schedule(policy, seed, 2)
        getattr(raced, op)(*SMALL[op]())


def test_sanitizers():
    """Every small case, and the odd sizes of this file, in a process under AddressSanitizer and UBSan."""
    emulator.load("sanitize")
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": asan.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.strip().endswith("calls without a finding")


def sanitized_calls():
    sanitized = emulator.load("sanitize")
    calls = 0
    for policy, seed in SCHEDULES[:3]:
        sanitized.schedule(policy, seed, 2)
        for op, args in SMALL.items():
            getattr(sanitized, op)(*args())
            calls += 1
        sanitized.fold_tokens_backward(*fold_backward_args(40, 8, 8, 1))  # counts of 3 tiles, next to nothing else
        calls += 1
    for dtype in DTYPES:
        for dim in (1, 9, 40):
            sanitized.rms_norm(*rms_norm_args(3, dim, dtype=dtype))
            sanitized.rms_norm_backward(normal(3, dim, dtype=dtype), *rms_norm_args(3, dim, dtype=dtype))
            sanitized.rope(*rope_args(3, dim=2 * dim, dtype=dtype), 1e4, False)
            sanitized.fold_tokens(*fold_args(1, 2, 3, dim, n=3, dtype=dtype))  # 6 tokens: not whole blocks
            sanitized.fold_tokens_backward(*fold_backward_args(1, 2, 3, dim, n=3, dtype=dtype))
            sanitized.sample_tokens(*sample_args(2, dim, dtype, top_k=7, top_p=0.7))
            calls += 6
        outside = torch.tensor([[[3, -1], [11, 4]]])
        sanitized.fold_tokens_backward(normal(1, 1, 4 * dim, dtype=dtype), outside, 11, 2, 2)
        sanitized.fold_tokens(*fold_args(1, 2, 2, 64 * 16 // dtype.itemsize, dtype=dtype))  # a row of 64 accesses
        calls += 2
        for lay in (padded, spaced, shifted):
            for op, args in unpacked_calls(dtype, lay).items():
                getattr(sanitized, op)(*args)
                calls += 1
    print(calls, "calls without a finding")


if __name__ == "__main__":
    sanitized_calls()
