"""sample_tokens: exact survivors, the drawn id for a known uniform, distribution, independence,
rows without an answer, errors, torch.compile. Every random test has a fixed seed, so it passes
always or never."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from synergen_ext import _C, kernels, ops
from synergen_ext.ops import reference
from synergen_ext.testing import LAYOUTS, laid_out, normal

INF, NAN = float("inf"), float("nan")


def rows(*logits, dtype=torch.float32):
    return torch.tensor(logits, dtype=dtype)


def draw(logits, n, seed=11, **options):
    """n draws from one row of logits, at positions 0 .. n - 1."""
    many = logits[None].expand(n, -1)
    ids, valid = ops.sample_tokens(many, torch.full((n,), seed), torch.arange(n), **options)
    assert valid.all()
    return ids


def survivors(logits, n=3000, **options):
    return sorted(set(draw(logits, n, **options).tolist()))


# --- The random numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_known_answers(counter, key, words):
    """From the Random123 distribution: philox4x32, 10 rounds."""
    assert reference.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == words


def test_kernel_draws_the_philox_word(device):
    """Of 4,096 equally likely tokens the drawn id is the word's upper 12 bits."""
    seed = normal(500, dtype=torch.float64).mul(2.0**61).long().to(device)
    seed[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    position = normal(500, dtype=torch.float64, seed=1).mul(2.0**40).long().to(device)
    position[:8] = torch.tensor([0, 0, 0, 0, 1, -1, 2**32, 2**63 - 1])
    logits = torch.full((500, 4096), 0.3, device=device)
    ids, valid = ops.sample_tokens(logits, seed, position)
    assert valid.all()
    assert torch.equal(ids, reference.philox_word(seed, position) >> 20)
    one_position, _ = ops.sample_tokens(logits, seed, torch.tensor(77, device=device))
    assert torch.equal(one_position, reference.philox_word(seed, torch.tensor(77).to(device)) >> 20)


# --- Who may be drawn -------------------------------------------------------------------------


def test_top_k_keeps_exactly_k(dtype):
    tied = rows(0.4, 0.3, 0.3, 0.0, dtype=dtype)
    assert survivors(tied, top_k=1) == [0]
    assert survivors(tied, top_k=2) == [0, 1]
    assert survivors(tied, top_k=3) == [0, 1, 2]
    assert survivors(tied, top_k=4) == survivors(tied, top_k=9) == [0, 1, 2, 3]
    assert survivors(torch.zeros(9, dtype=dtype), top_k=4) == [0, 1, 2, 3]
    assert survivors(rows(0.0, -0.0, 1.0, -0.0, dtype=dtype), top_k=2) == [0, 2]
    assert survivors(rows(-1.0, -3.0, -2.0, -2.0, -1.0, dtype=dtype), top_k=3) == [0, 2, 4]
    assert survivors(rows(-INF, 1.0, -INF, 0.0, dtype=dtype), top_k=3) == [1, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_p(dtype):
    assert survivors(torch.zeros(8, dtype=dtype), top_p=0.5) == [0, 1, 2, 3]
    assert survivors(torch.zeros(8, dtype=dtype), top_p=0.501) == [0, 1, 2, 3, 4]
    assert survivors(torch.zeros(8, dtype=dtype), top_p=1.0) == list(range(8))
    assert survivors(torch.zeros(8, dtype=dtype), top_p=0.0) == [0]
    uneven = rows(0.1, 0.2, 0.3, 0.4, dtype=torch.float64).log().to(dtype)
    assert survivors(uneven, top_p=0.39) == [3]
    assert survivors(uneven, top_p=0.41) == [2, 3]
    assert survivors(uneven, top_p=0.69) == [2, 3]
    assert survivors(uneven, top_p=0.71) == [1, 2, 3]
    assert survivors(uneven, top_p=0.91) == [0, 1, 2, 3]


def test_top_p_counts_the_mass_that_top_k_left():
    """Sequential, as transformers does it: joint thresholds would keep one token here."""
    logits = rows(0.4, 0.3, 0.2, 0.1, dtype=torch.float64).log()
    assert survivors(logits, top_k=2, top_p=0.58) == [0, 1]
    assert survivors(logits, top_k=2, top_p=0.56) == [0]
    assert survivors(logits, top_p=0.58) == [0, 1]


def test_temperature_comes_before_top_p():
    logits = rows(0.6, 0.3, 0.1, dtype=torch.float64).log()
    assert survivors(logits, top_p=0.65) == [0, 1]
    assert survivors(logits, top_p=0.65, temperature=0.5) == [0]
    assert survivors(logits, top_p=0.65, temperature=9.0) == [0, 1]
    assert survivors(logits, top_p=0.72, temperature=9.0) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(6))
def test_survivors_against_a_sorted_list(seed, dtype):
    """Logits on a grid of halves, so that ties are everywhere; the list is sorted in Python."""
    logits = (normal(40, dtype=torch.float64, seed=seed) * 2).round() / 2
    logits[normal(40, seed=seed + 50) > 1] = -INF
    k, p = 5 + 4 * seed, 0.5 + 0.09 * seed
    ranked = sorted((-x, i) for i, x in enumerate(logits.tolist()) if x > -INF)[:k]
    mass = np.exp(-np.array([x for x, _ in ranked]) / 2.5)
    before = np.concatenate(([0.0], np.cumsum(mass)[:-1])) / mass.sum()
    wanted = sorted(i for (_, i), m in zip(ranked, before, strict=True) if m < p)
    options = dict(top_k=k, top_p=p, temperature=2.5)
    assert np.abs(before - p).min() > 1e-6 and mass.min() / mass.sum() > 2e-3
    assert survivors(logits.to(dtype), n=8000, **options) == wanted


def test_masked_tokens_are_never_drawn(dtype):
    logits = normal(2000, 12, dtype=dtype)
    masked = normal(2000, 12, seed=1) > 0
    masked[:, 5] = False
    logits[masked] = -INF
    seed = torch.arange(2000)
    for options in ({}, {"top_k": 6}, {"top_p": 0.9}, {"temperature": 50.0}, {"temperature": 0}):
        ids, valid = ops.sample_tokens(logits, seed, seed, **options)
        assert valid.all() and not masked.gather(1, ids[:, None]).any()


def test_a_token_masked_on_either_side_of_the_guidance_is_never_drawn():
    cond, uncond = rows(-INF, 0.0, 0.0, 0.0), rows(0.0, -INF, 0.0, 0.0)
    for guidance in (0.0, 1.0, 3.0, -2.0):
        options = dict(uncond_logits=uncond.expand(500, -1), guidance=guidance)
        assert survivors(cond, n=500, **options) == [2, 3]


# --- Which one is drawn -----------------------------------------------------------------------


def inverse_cdf(logits, seed, position, uncond=None, guidance=1.0, temperature=1.0, k=0, p=1.0):
    """The same draw in plain float64, without integers: id, and how far u is from a step of the
    cumulated probability."""
    c = logits.double() if logits.dtype == torch.float64 else logits.float()
    if uncond is not None:
        u = uncond.to(c.dtype)
        c = u + torch.tensor(guidance, dtype=c.dtype) * (c - u)
    z = c.double() / temperature
    order = z.argsort(dim=-1, descending=True, stable=True)
    probability = z.softmax(-1).gather(-1, order)
    if k:
        probability[:, k:] = 0
    probability /= probability.sum(-1, keepdim=True)
    probability[probability.cumsum(-1) - probability >= p] = 0
    cdf = torch.zeros_like(z).scatter(-1, order, probability).cumsum(-1)
    u = (reference.philox_word(seed, position).double() + 0.5) / 2.0**32 * cdf[:, -1]
    return (cdf > u[:, None]).byte().argmax(-1), (cdf - u[:, None]).abs().amin(-1)


OPTIONS = [
    dict(),
    dict(temperature=0.7),
    dict(k=5, temperature=2.0),
    dict(p=0.9),
    dict(k=40, p=0.8, temperature=1.3),
    dict(guidance=3.0),
    dict(guidance=7.5, k=2000, p=0.95),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocab", [1, 2, 37, 1000, 32768])
def test_draws_the_token_of_the_float64_inverse_cdf(vocab, options, dtype, device):
    """Except where u lies within 1e-12 of a step, which none of these does."""
    n = 64
    options = dict(options)
    if "guidance" in options:
        options["uncond"] = 2 * normal(n, vocab, dtype=dtype, seed=1, device=device)
    logits = 2 * normal(n, vocab, dtype=dtype, device=device)
    seed, position = torch.arange(n, device=device) * 977, torch.arange(n, device=device) // 3
    wanted, distance = inverse_cdf(logits, seed, position, **options)
    names = {"uncond": "uncond_logits", "k": "top_k", "p": "top_p"}
    ids, valid = ops.sample_tokens(logits, seed, position, **{names.get(name, name): x for name, x in options.items()})
    assert valid.all() and distance.min() > 1e-12
    assert torch.equal(ids, wanted)


def awkward(n, vocab, dtype, device="cpu"):
    """Rows of every kind: plain, tied, masked, all equal, and without an answer."""
    logits = 3 * normal(n, vocab, dtype=torch.float64)
    logits[1::9] = logits[1::9].round()
    logits[2::9] = 0
    logits[3::9, : vocab // 2] = -INF
    logits[4::9, vocab // 3] = NAN
    logits[5::9, vocab // 2] = INF
    logits[6::9] = -INF
    return logits.to(device, dtype)


@pytest.mark.parametrize("vocab", [1, 3, 50, 4099])
def test_equals_the_reference(vocab, dtype, device):
    n = 180
    logits, uncond = awkward(n, vocab, dtype, device), awkward(n, vocab, dtype, device).flip(0)
    seed = normal(n, dtype=torch.float64, seed=3).mul(2.0**60).long().to(device)
    position = torch.arange(n, device=device)
    for guided in (False, True):
        options = dict(
            uncond_logits=uncond if guided else None,
            guidance=torch.linspace(-1, 9, n, dtype=torch.float64, device=device),
            temperature=torch.linspace(0, 3, n, device=device).roll(5),
            top_k=(torch.arange(n, device=device) * 7) % 60,
            top_p=torch.linspace(0, 1, n, device=device).roll(91),
        )
        for chosen in ({}, options):
            got = ops.sample_tokens(logits, seed, position, **chosen)
            with ops.backend("reference"):
                wanted = ops.sample_tokens(logits, seed, position, **chosen)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
            assert got[1].any() and (vocab == 1 or not got[1].all())


def test_temperature_zero_is_argmax(dtype, device):
    logits = normal(50, 300, dtype=dtype, device=device)
    logits[::2] = (2 * logits[::2]).round()
    seed = torch.arange(50, device=device)
    for options in ({}, {"top_k": 3, "top_p": 0.2}):
        ids, valid = ops.sample_tokens(logits, seed, seed, temperature=0, **options)
        first = (logits == logits.amax(-1, keepdim=True)).byte().argmax(-1)
        assert valid.all() and torch.equal(ids, first)


def test_guidance(device):
    """l = u + s (c - u): 1 is the conditional row exactly, 0 the unconditional one."""
    c, u = normal(200, 50, device=device), normal(200, 50, seed=1, device=device)
    seed = torch.arange(200, device=device)

    def ids(logits, **options):
        return ops.sample_tokens(logits, seed, seed, **options)[0]

    assert torch.equal(ids(c, uncond_logits=u, guidance=1.0), ids(c))
    assert torch.equal(ids(c, uncond_logits=u, guidance=0.0), ids(u))
    assert torch.equal(ids(c, uncond_logits=u, guidance=3.0), ids(u + 3.0 * (c - u)))
    assert torch.equal(ids(c, guidance=3.0), ids(c))


def test_extreme_logits(dtype):
    biggest = torch.finfo(dtype).max
    logits = rows(biggest, -biggest, biggest, 0.0, dtype=dtype)
    assert survivors(logits, n=300) == [0, 2]
    assert survivors(logits, n=300, temperature=1e-30) == [0, 2]
    tiny = torch.finfo(dtype).smallest_normal
    assert survivors(rows(tiny, 0.0, -tiny, dtype=dtype), n=300) == [0, 1, 2]
    assert survivors(rows(tiny, 0.0, -tiny, dtype=dtype), n=300, top_k=2) == [0, 1]


# --- Rows without an answer -------------------------------------------------------------------


def test_a_broken_row_is_marked_and_harms_no_other(dtype, device):
    good = normal(7, 33, dtype=dtype, device=device)
    seed = torch.arange(7, device=device)
    wanted, _ = ops.sample_tokens(good, seed, seed)
    broken = good.clone()
    broken[1, 32] = NAN
    broken[3] = -INF
    broken[4, 0] = INF
    broken[6] = NAN
    bad = torch.tensor([False, True, False, True, True, False, True], device=device)
    for options in ({}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.7}):
        wanted, _ = ops.sample_tokens(good, seed, seed, **options)
        ids, valid = ops.sample_tokens(broken, seed, seed, **options)
        assert torch.equal(valid, ~bad) and not ids[bad].any()
        assert torch.equal(ids[~bad], wanted[~bad])
    uncond = good.clone()
    uncond[2, 5] = NAN
    _, valid = ops.sample_tokens(good, seed, seed, uncond_logits=uncond, guidance=1.0)
    assert valid.tolist() == [r != 2 for r in range(7)]


def test_nan_hidden_behind_a_mask_is_still_found():
    seed = torch.zeros(1, dtype=torch.long)
    for c, u in (((NAN, 0.0), (-INF, 0.0)), ((-INF, 0.0), (NAN, 0.0))):
        _, valid = ops.sample_tokens(rows(c), seed, seed, uncond_logits=rows(u), guidance=2.0)
        assert not valid.any()


# --- Nothing but the row matters --------------------------------------------------------------


def test_batch_order_threads_and_layout_do_not_matter(dtype):
    n = 40
    logits, uncond = normal(n, 777, dtype=dtype), normal(n, 777, dtype=dtype, seed=1)
    seed, position = torch.arange(n) ** 3, torch.arange(n) * 5
    options = dict(guidance=2.0, temperature=0.9, top_k=100, top_p=0.9)

    def ids(order, c=logits, u=uncond):
        return ops.sample_tokens(c[order], seed[order], position[order], uncond_logits=u[order], **options)[0]

    everyone = torch.arange(n)
    wanted = ids(everyone)
    order = torch.randperm(n)
    assert torch.equal(ids(order), wanted[order])
    assert torch.equal(torch.cat([ids(everyone[r : r + 1]) for r in range(n)]), wanted)
    for layout in LAYOUTS:
        c, u = laid_out(logits, layout), laid_out(uncond, layout)
        got, _ = ops.sample_tokens(c, laid_out(seed, layout), laid_out(position, layout), uncond_logits=u, **options)
        assert torch.equal(got, wanted)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ids(everyone), wanted)
    finally:
        torch.set_num_threads(before)


def test_one_number_or_one_a_row():
    n = 30
    logits, seed = normal(n, 90), torch.arange(n)
    numbers = dict(guidance=1.5, temperature=0.8, top_k=20, top_p=0.9)
    uncond = normal(n, 90, seed=1)
    wanted, _ = ops.sample_tokens(logits, seed, seed, uncond_logits=uncond, **numbers)
    for shape in ((), (n,)):
        tensors = {
            name: torch.full(shape, x, dtype=torch.float64 if name != "top_k" else torch.long)
            for name, x in numbers.items()
        }
        got, _ = ops.sample_tokens(logits, seed, seed, uncond_logits=uncond, **tensors)
        assert torch.equal(got, wanted)
    halves = torch.tensor([0, 50]).repeat_interleave(15)
    got, _ = ops.sample_tokens(logits, seed, seed, top_k=halves)
    assert torch.equal(got[:15], ops.sample_tokens(logits, seed, seed)[0][:15])
    assert torch.equal(got[15:], ops.sample_tokens(logits, seed, seed, top_k=50)[0][15:])


DIGEST = """
import hashlib, torch
from synergen_ext import ops
from synergen_ext.testing import normal
digest = hashlib.sha256()
for vocab in (50, 4099):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        c, u = 3 * normal(200, vocab, dtype=dtype), 3 * normal(200, vocab, dtype=dtype, seed=1)
        seed = torch.arange(200)
        ids, _ = ops.sample_tokens(c, seed, seed, uncond_logits=u, guidance=1.7, temperature=1.1,
                                   top_k=40, top_p=0.9)
        digest.update(ids.numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_draws_the_same_ids():
    def digest(isa):
        done = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "SYNERGEN_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    digests = {isa: digest(isa) for isa in _C.available_isas()}
    assert len(next(iter(digests.values()))) == 2 * hashlib.sha256().digest_size
    assert len(set(digests.values())) == 1, digests


# --- Distribution -----------------------------------------------------------------------------

DRAWS, ALPHA = 20_000, 1e-3


def p_value(ids, probability):
    """Pearson's chi-square of counts against probabilities; bins expecting under 5 are pooled."""
    expected = probability * len(ids)
    counts = torch.bincount(ids, minlength=len(probability)).double()
    small = expected < 5
    assert not counts[probability == 0].any()
    expected = torch.cat((expected[~small], expected[small].sum(0, keepdim=True)))
    counts = torch.cat((counts[~small], counts[small].sum(0, keepdim=True)))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    return 1 - torch.special.gammainc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic / 2)


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The wanted distribution, in float64."""
    probability = (logits.double() / temperature).softmax(-1)
    ranked, order = probability.sort(descending=True)
    if top_k:
        ranked[top_k:] = 0
    ranked /= ranked.sum()
    ranked[ranked.cumsum(0) - ranked >= top_p] = 0
    return torch.zeros_like(ranked).scatter(0, order, ranked / ranked.sum())


CASES = [
    dict(),
    dict(temperature=0.6),
    dict(temperature=1.7, top_k=9),
    dict(top_p=0.8),
    dict(temperature=1.4, top_k=30, top_p=0.95),
]


@pytest.mark.parametrize("vocab", [20, 500])
@pytest.mark.parametrize("options", CASES)
def test_frequencies(vocab, options):
    logits = normal(vocab, seed=vocab)
    p = p_value(draw(logits, DRAWS, **options), filtered(logits, **options))
    assert p > ALPHA / (2 * len(CASES))  # Bonferroni


def test_frequencies_over_seeds():
    logits = normal(20, seed=20)
    many, at_zero = logits.expand(DRAWS, -1), torch.tensor(0)
    ids, _ = ops.sample_tokens(many, torch.arange(DRAWS), at_zero)
    assert p_value(ids, filtered(logits)) > ALPHA


@pytest.mark.parametrize("bias", ["temperature", "uniform", "ties"])
def test_frequencies_of_a_biased_sampler_are_refused(bias):
    """The statistic has teeth: it must see a temperature 15 % off, a uniform bent by u^1.05, and one
    tie too many at the top-k boundary."""
    logits = normal(20, seed=20)
    truth = filtered(logits)
    if bias == "temperature":
        ids = draw(logits, DRAWS, temperature=1.15)
    elif bias == "uniform":
        word = reference.philox_word(torch.full((DRAWS,), 11), torch.arange(DRAWS))
        ids = torch.searchsorted(truth.cumsum(0), ((word.double() + 0.5) / 2.0**32) ** 1.05)
    else:
        logits = rows(1.0, 0.0, 0.0, -5.0)
        truth = torch.tensor([1.0, 0.0, 0.0, -INF]).double().softmax(0)  # keeps three for k = 2
        ids = draw(logits, DRAWS, top_k=2)
    assert p_value(ids, truth) < 1e-6


def correlation(bits, lag):
    """Lag correlation of fair bits, in standard deviations."""
    a = bits.double() * 2 - 1
    return ((a[lag:] * a[:-lag]).sum() / (len(a) - lag) ** 0.5).abs().item()


@pytest.mark.parametrize("along", ["position", "seed", "both"])
def test_draws_are_independent(along):
    n = torch.arange(DRAWS)
    seed = n if along != "position" else torch.full_like(n, 5)
    position = n if along != "seed" else torch.full_like(n, 5)
    bits, _ = ops.sample_tokens(torch.zeros(DRAWS, 2), seed, position)
    for lag in (1, 2, 3, 4, 8, 16, 256):
        assert correlation(bits, lag) < 4  # 6e-5 each


def test_dependence_would_be_seen():
    """A sampler that uses each uniform twice, and one whose rows share the seed, must fail."""
    position = torch.arange(DRAWS)
    twice, _ = ops.sample_tokens(torch.zeros(DRAWS, 2), torch.zeros_like(position), position // 2)
    assert correlation(twice, 1) > 40
    shared, _ = ops.sample_tokens(torch.zeros(DRAWS, 2), torch.zeros_like(position), position % 4)
    assert correlation(shared, 4) > 40


# --- As an op ---------------------------------------------------------------------------------


def test_there_is_no_gradient():
    logits = normal(3, 5).requires_grad_()
    seed = torch.arange(3)
    for output in ops.sample_tokens(logits, seed, seed, uncond_logits=logits, guidance=2.0):
        assert not output.requires_grad
    with ops.backend("reference"):
        assert not ops.sample_tokens(logits, seed, seed)[0].requires_grad


def test_no_rows(dtype, device):
    none = torch.empty(0, dtype=torch.int64, device=device)
    ids, valid = ops.sample_tokens(torch.empty(0, 7, dtype=dtype, device=device), none, none)
    assert ids.shape == valid.shape == (0,)
    assert ids.dtype == torch.int64 and valid.dtype == torch.bool


def test_opcheck(dtype, device):
    logits, seed = normal(4, 9, dtype=dtype, device=device), torch.arange(4, device=device)
    one = torch.tensor(0.9, dtype=torch.float64, device=device)
    k = torch.full((4,), 3, device=device)
    op = torch.ops.synergen.sample_tokens.default
    torch.library.opcheck(op, (logits, seed, seed))
    torch.library.opcheck(op, (logits, seed, seed[0], logits.flip(0), one, one, k, one.expand(4)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    def step(logits, uncond, seed, position):
        ids, valid = ops.sample_tokens(
            logits * 2, seed, position, uncond_logits=uncond, guidance=3.0, temperature=0.9, top_k=5
        )
        return ids + 1, valid

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    seed = torch.arange(6, device=device)
    args = normal(6, 40, device=device), normal(6, 40, seed=1, device=device), seed, seed[3]
    for got, wanted in zip(compiled(*args), step(*args), strict=True):
        assert torch.equal(got, wanted)


def test_arrays_without_torch():
    logits, seed = normal(5, 30), torch.arange(5)
    uncond = normal(5, 30, seed=1)
    ids, valid = kernels.sample_tokens(logits.numpy(), seed.numpy(), seed.numpy())
    wanted, _ = ops.sample_tokens(logits, seed, seed)
    assert ids.tolist() == wanted.tolist() and valid.all() and valid.dtype == bool
    ids, _ = kernels.sample_tokens(
        logits.numpy(),
        seed.numpy(),
        np.array(3),
        uncond_logits=uncond.numpy(),
        guidance=np.array(7.5),
        temperature=np.full(5, 0.8),
        top_k=np.array(9),
        top_p=np.array(0.9),
    )
    wanted, _ = ops.sample_tokens(
        logits,
        seed,
        torch.tensor(3),
        uncond_logits=uncond,
        guidance=7.5,
        temperature=0.8,
        top_k=9,
        top_p=0.9,
    )
    assert ids.tolist() == wanted.tolist()


L, S = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((L[0], S, S), {}, r"sample_tokens: logits must be \[R, V\], got \[4\]"),
        ((L[:, :0], S, S), {}, r"logits must be \[R, V\] with V >= 1, got \[3, 0\]"),
        ((L.long(), S, S), {}, "logits must be float64, float32, bfloat16 or float16, got int64"),
        ((L, S[:2], S), {}, r"sample_tokens: seed must be \[R\] = \[3\], got \[2\]"),
        ((L, S[0], S), {}, r"sample_tokens: seed must be \[R\] = \[3\], got \[\]"),
        ((L, S.int(), S), {}, "sample_tokens: seed must be int64, got int32"),
        ((L, S, S[:2]), {}, r"position must be \[\] or \[R\] = \[3\], got \[2\]"),
        ((L, S, S.float()), {}, "sample_tokens: position must be int64, got float32"),
        ((L, S, S), {"uncond_logits": L[:2]}, r"uncond_logits must be as logits = \[3, 4\], got"),
        (
            (L, S, S),
            {"uncond_logits": L.half()},
            "uncond_logits must be float32 like logits, got float16",
        ),
        ((L, S, S), {"guidance": INF}, "guidance must be finite, got inf in row 0"),
        ((L, S, S), {"temperature": -0.5}, "temperature must be finite and >= 0, got -0.5 in row 0"),
        ((L, S, S), {"temperature": NAN}, "temperature must be finite and >= 0, got nan"),
        (
            (L, S, S),
            {"temperature": torch.tensor([1.0, 0.0, -1.0])},
            "temperature must be finite and >= 0, got -1 in row 2",
        ),
        ((L, S, S), {"top_k": -1}, r"top_k must be >= 0 \(0: off\), got -1 in row 0"),
        ((L, S, S), {"top_k": torch.tensor(2.5)}, "top_k must be int64, got float32"),
        ((L, S, S), {"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5 in row 0"),
        ((L, S, S), {"top_p": torch.ones(2)}, r"top_p must be \[\] or \[R\] = \[3\], got \[2\]"),
        ((L, S, S), {"top_p": S}, "top_p must be float64, got int64"),
    ],
)
def test_errors(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.sample_tokens(*args, **options)


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({"guidance": NAN}, "guidance must be finite"),
        ({"temperature": -1.0}, "temperature must be finite and >= 0"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\]"),
    ],
)
def test_wrong_numbers_are_refused_on_every_device(option, wanted):
    for device in ("cpu", "meta"):
        logits, seed = torch.zeros(2, 5, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        with pytest.raises(ValueError, match=f"sample_tokens: {wanted}"):
            ops.sample_tokens(logits, seed, seed, **option)
