"""sample_tokens by the emulator: see test_cuda_emulated.py."""

import itertools

import emulator
import numpy as np
import pytest
import torch
from cuda_cases import same_bits_under_every_schedule

from synergen_ext.testing import DTYPES, laid_out, normal


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


def every_way():
    """Rows with temperature 0, without filters, with both, and with top-p alone, in three tiles and blocks each."""
    options = dict(temperature=[0.0, 1.0, 0.7, 1.0], top_k=[0, 0, 5000, 0], top_p=[1.0, 1.0, 0.8, 0.6])
    tensors = {k: torch.tensor(v, dtype=None if k == "top_k" else torch.float64) for k, v in options.items()}
    return sample_args(4, 9001, torch.bfloat16, grid=0.5, **tensors)


#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {"sample_tokens": every_way}


def sanitized():
    """Calls of odd sizes for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        for vocab in (1, 9, 40):
            yield "sample_tokens", sample_args(2, vocab, dtype, top_k=7, top_p=0.7)
        yield "sample_tokens", sample_args(2, 3, dtype)
        yield "sample_tokens", sample_args(1, 4099, dtype)


def check_same_ids(emulated, *args):
    ids, valid = emulated.sample_tokens(*args)
    cpu_ids, cpu_valid = torch.ops.synergen.sample_tokens(*args)
    assert torch.equal(ids, cpu_ids) and torch.equal(valid, cpu_valid)
    return ids, valid


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
def test_sample_tokens_has_no_races_in_one_block_a_row():
    raced = emulator.load("race")
    raced.schedule(2, 7, 2)
    raced.sample_tokens(*sample_args(7, 5000, torch.bfloat16, top_k=900, top_p=0.8))
    args = sample_args(2, 40)
    args[0][1] = -torch.inf  # no answer, and none is read
    raced.sample_tokens(*args)


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
    """In one thread, in several threads, tiles and blocks."""
    logits = torch.zeros(3, 9001)
    logits[0, [900, 903, 5000, 8999]] = logits[1, [8999, 5000, 4096]] = logits[2, [8500, 8200]] = 4.0
    ids, _ = check_same_ids(emulated, logits, torch.arange(3), torch.tensor(0), None, None, torch.tensor(0.0).double(),
                            None, None)  # fmt: skip
    assert ids.tolist() == [900, 4096, 8200]


@pytest.mark.parametrize("vocab", [4096, 4097, 9001, 20001])
def test_sample_tokens_in_several_blocks_a_row(emulated, vocab, dtype):
    """The emulator holds 12 blocks: 2 and 3 rows are cut into parts of a tile or two, 7 rows are whole."""

    def check(rows, seed, **options):
        check_same_ids(emulated, *sample_args(rows, vocab, dtype, seed, **options))

    uncond = normal(3, vocab, dtype=dtype, seed=9)
    check(2, 1)
    check(7, 2, temperature=0.7)
    check(3, 3, top_k=2048, top_p=0.9, uncond_logits=uncond, guidance=3.0)
    check(2, 4, top_p=0.6)
    check(3, 5, top_k=vocab // 2, grid=0.5, uncond_logits=laid_out(uncond, "stepped"), guidance=-1.5)
    check(7, 6, top_k=3000, top_p=0.97, grid=1.0)


def test_sample_tokens_filters_that_end_in_the_same_logit(emulated, dtype):
    """All equal: top-k ends at an id, and top-p at a smaller one or where top-k did."""
    for vocab, k in ((700, 300), (9001, 5000)):
        logits = torch.zeros(1, vocab, dtype=dtype).expand(24, -1)
        seeds, position = torch.arange(24), torch.tensor(5)
        for p in (0.0, 0.3, 0.999999, 1 - 2**-53, 1.0):
            share = torch.tensor(p, dtype=torch.float64)
            ids, _ = check_same_ids(emulated, logits, seeds, position, None, None, None, torch.tensor(k), share)
            assert ids.max() < max(k * p, 1) and (p < 0.3 or ids.max() > k * p * 0.7)


def test_sample_tokens_top_p_takes_all_that_top_k_left(emulated, dtype):
    """Masses of less than 2^53 together, of which the largest share below 1 is all; equal logits that top-k cut."""
    logits = torch.tensor([3.0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=dtype).expand(64, -1)
    share = torch.tensor(1 - 2**-53, dtype=torch.float64)
    args = (logits, torch.arange(64), torch.tensor(5), None, None, None, torch.tensor(3), share)
    assert set(check_same_ids(emulated, *args)[0].tolist()) == {0, 1, 2}


def test_sample_tokens_top_k_ends_with_many_equal_logits(emulated):
    """Two kinds of 200 in one first digit, and all of the larger kind stays: too many to be compared."""
    logits = torch.full((1, 5000), -3.0)
    logits[0, ::25], logits[0, 7::25] = 2.0, 2.001
    args = (logits.expand(16, -1), torch.arange(16), torch.tensor(5), None, None, None, torch.tensor(200), None)
    ids, _ = check_same_ids(emulated, *args)
    assert (ids % 25 == 7).all()


@pytest.mark.parametrize("vocab, every, k, rows", [(4097, 1, 140, 24), (28673, 13, 150, 12)])
def test_sample_tokens_filters_that_end_in_the_same_logit_under_every_schedule(emulated, vocab, every, k, rows):
    """Top-k and top-p end among the same places, which one warp lists, or two of them in any order."""
    logits = torch.full((rows, vocab), -torch.inf)
    logits[:, ::every] = 0.0
    seeds, position, share = torch.arange(rows), torch.tensor(5), torch.tensor(0.97).double()
    args = (logits, seeds, position, None, None, None, torch.tensor(k), share)
    same_bits_under_every_schedule(emulated, lambda: emulated.sample_tokens(*args)[0])
    check_same_ids(emulated, *args)


@pytest.mark.parametrize("equal", [127, 128, 129, 400])
def test_sample_tokens_filters_that_end_among_equal_logits(emulated, equal, dtype):
    """Up to 128 tokens of one bin are compared with each other; more are counted by their places."""
    logits = torch.full((1, 5000), -3.0, dtype=dtype)
    logits[0, torch.arange(equal) * 11 + 7] = 2.0
    logits[0, 4999] = 2.5
    rows, seeds = logits.expand(16, -1), torch.arange(16)
    for k, p in ((2, 1.0), (equal // 2, 1.0), (equal // 2, 0.5), (equal, 0.99), (equal + 1, 0.3), (equal + 2, 0.999)):
        share = torch.tensor(p, dtype=torch.float64)
        check_same_ids(emulated, rows, seeds, torch.tensor(5), None, None, None, torch.tensor(k), share)


def test_sample_tokens_list_of_any_length(emulated):
    """Places that a thread takes of a tile's list: one to eight, then several chunks a warp; uneven over the tiles."""
    for kept in (1, 31, 33, 200, 257, 2049, 4096, 4500):
        logits = torch.full((2, 9001), -torch.inf)
        logits[0, :kept] = normal(kept, seed=kept)
        logits[1, 9001 - kept :] = normal(kept, seed=kept + 1)
        args = sample_args(2, 9001, seed=kept, top_p=0.95)
        check_same_ids(emulated, logits, *args[1:])
        args = sample_args(2, 9001, seed=kept, top_k=max(kept - 1, 1), top_p=0.999999)
        check_same_ids(emulated, logits, *args[1:])


def test_sample_tokens_far_below_the_largest(emulated):
    """Logits of many sizes and signs, so that selection goes through every digit of the key."""
    logits = normal(6, 5000, dtype=torch.float64)
    logits = logits.sign() * 10 ** (4 * normal(6, 5000, dtype=torch.float64, seed=1))
    for dtype in (torch.float64, torch.float32):
        for k in (1, 2, 700, 2500, 4999, 5000, 5001):
            args = list(sample_args(6, 5000, dtype, seed=k, temperature=30.0, top_k=k, top_p=0.9999))
            args[0] = logits.to(dtype)
            check_same_ids(emulated, *args)


@pytest.mark.parametrize("vocab", [1500, 4000])
@pytest.mark.parametrize("between", [(63.4, 64.1), (-64.1, -63.4), (0.2, 0.3), (-0.3, 0.3)], ids=str)
def test_sample_tokens_top_k_ends_in_any_first_digit(emulated, between, vocab):
    """A quarter is the least size that first digits tell apart, and 64 the first that they do not; a digit has few
    tokens, which are compared, or more."""
    dtypes = (torch.float32, torch.float64)
    logits = torch.linspace(*between, vocab, dtype=torch.float64)[torch.arange(vocab) * 7 % vocab]
    for k, dtype in itertools.product(range(1, vocab, vocab // 11), dtypes):
        args = sample_args(2, vocab, dtype, seed=k, temperature=between[1] - between[0], top_k=k, top_p=0.999)
        check_same_ids(emulated, logits.to(dtype).expand(2, -1), *args[1:])


def test_sample_tokens_of_all_sizes_there_are(emulated):
    """Keys as far apart as can be: differences of them go round, and the end of a range lies before the first key."""
    signs = normal(4, 3000, dtype=torch.float64, seed=1)
    args = sample_args(4, 3000, torch.float64, temperature=1e300, top_p=1 - 2**-53)
    check_same_ids(emulated, signs.sign() * 1e300 * signs.abs().clamp(max=1), *args[1:])
    logits = -(10 ** (36 * normal(4, 3000, seed=2).sigmoid() + 2))
    logits[:, ::20] = 3e37
    for k in (1, 151, 600, 1500):
        args = sample_args(4, 3000, seed=k, temperature=1e37, top_k=k)
        check_same_ids(emulated, logits, *args[1:])


def test_sample_tokens_guidance_of_one_is_the_conditional_alone(emulated):
    """Whatever the other side has: mixed, 1e30 would leave nothing of a logit."""
    logits = normal(8, 300)
    logits[:, 5::16] = -torch.inf
    args = sample_args(8, 300, uncond_logits=torch.full((8, 300), 1e30), guidance=1.0)
    check_same_ids(emulated, logits, *args[1:])


def test_sample_tokens_many_equal_logits(emulated):
    """More places than two digits of 512 tell apart."""
    logits, k = torch.zeros(2, 70001), torch.tensor(40000)
    for p in (0.5, 1.0):
        share = torch.tensor(p, dtype=torch.float64)
        check_same_ids(emulated, logits, torch.arange(2), torch.tensor(5), None, None, None, k, share)


def test_sample_tokens_in_more_tiles_than_warps(emulated):
    for options in (dict(top_k=30000, top_p=0.9), dict(top_p=0.99), dict()):
        check_same_ids(emulated, *sample_args(2, 70001, torch.float32, grid=0.25, **options))


def test_sample_tokens_masked_on_either_side_of_the_guidance(emulated):
    logits, uncond = (torch.where(normal(1, 50, seed=s) > 0.5, -torch.inf, normal(1, 50, seed=s + 1)) for s in (1, 3))
    for guidance in (0.0, 1.0, 3.0, -2.0):
        args = sample_args(64, 50, uncond_logits=uncond.expand(64, -1), guidance=guidance)
        check_same_ids(emulated, logits.expand(64, -1), *args[1:])


def test_sample_tokens_finds_what_is_wrong_in_any_block(emulated):
    logits = normal(4, 9001)
    logits[0, 9000], logits[1, 4096], logits[2, :8999] = torch.nan, torch.inf, -torch.inf
    ids, valid = check_same_ids(emulated, logits, torch.arange(4), torch.tensor(0), *[None] * 5)
    assert valid.tolist() == [False, False, True, True] and ids[2] >= 8999
    two = torch.tensor(2.0).double()
    _, valid = check_same_ids(emulated, logits, torch.arange(4), torch.tensor(0), logits, two, *[None] * 3)
    assert valid.tolist() == [False, False, True, True]  # infinity minus itself


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


def test_sample_tokens_guided_without_filters_of_rows_with_strides(emulated):
    """Without filters the draw reads logits of both sides once more, each with strides of its own."""
    guidance = torch.tensor(3.0, dtype=torch.float64)
    for layouts in (("stepped", "contiguous"), ("contiguous", "stepped")):
        logits, uncond = (laid_out(normal(16, 90, seed=i), layout) for i, layout in enumerate(layouts))
        check_same_ids(emulated, logits, torch.arange(16), torch.tensor(5), uncond, guidance, None, None, None)


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
    wrong = [("guidance", torch.nan), ("temperature", -1.0), ("temperature", torch.inf)]
    wrong += [("top_k", -1), ("top_p", 1.5), ("top_p", -0.5)]
    for name, value in wrong:
        logits, *args = sample_args(2, 20, **{name: value})
        for given in (logits, torch.zeros(2, 4096)):  # equal ones would have an answer with any temperature
            ids, valid = emulated.sample_tokens(given, *args)
            assert ids.tolist() == [0, 0] and valid.tolist() == [False, False], name
