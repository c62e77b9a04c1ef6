"""expert_ffn and its backward by the emulator: see test_cuda_emulated.py. Tiles are 128 rows (64 without tensor cores)
by 256 columns (128 hidden ones), and 32 (8) of the depth."""

import emulator
import pytest
import torch
import torch.nn.functional as F
from cuda_cases import UNPACKED, shifted

from synergen_ext.ops import reference
from synergen_ext.testing import DTYPES, LAYOUTS, assert_as_accurate, laid_out, normal, to_float64

SHORT = (torch.bfloat16, torch.float16)


def ffn_args(
    tokens, dim, hidden, experts=2, top_k=None, dtype=torch.float32, expert_dtype=None, layout="contiguous", index=None
):
    """Outputs of size one; routing weights where top_k is given."""

    def random(*shape, seed, scale=1.0, dtype=expert_dtype or dtype):
        return laid_out((normal(*shape, dtype=torch.float64, seed=seed) * scale).to(dtype), layout)

    x = random(tokens, dim, seed=0, dtype=dtype)
    gate = random(experts, hidden, dim, seed=1, scale=max(dim, 1) ** -0.5)
    up = random(experts, hidden, dim, seed=2, scale=max(dim, 1) ** -0.5)
    down = random(experts, dim, hidden, seed=3, scale=max(hidden, 1) ** -0.5)
    shape = (tokens,) if top_k is None else (tokens, top_k)
    if index is None:
        index = normal(*shape, seed=4).mul(1e4).long().abs() % max(experts, 1)
    weight = None if top_k is None else random(*shape, seed=5).sigmoid()
    return x, gate, up, down, laid_out(index, layout), weight


def within(x):
    """The values of x in rows of 24."""
    return x.new_zeros(*x.shape[:-1], 24)[..., : x.shape[-1]].copy_(x)


def backward_args(args, pre=None, need=(True, True, True)):
    x = args[0]
    return (normal(*x.shape, dtype=x.dtype, seed=6), *args, *(pre or (None, None)), *need)


def rounding(x, gate, up, down, index, weight=None):
    """What a PyTorch program would write, every step at the dtype of x."""
    gate, up, down = (t.to(x.dtype) for t in (gate, up, down))
    pairs = index.reshape(len(x), -1)
    y = torch.zeros_like(x)
    for e in range(len(gate)):
        t, j = torch.where(pairs == e)
        out = F.linear(F.silu(F.linear(x[t], gate[e])) * F.linear(x[t], up[e]), down[e])
        if weight is not None:
            out = out * weight.reshape(pairs.shape)[t, j, None].to(x.dtype)
        y = y.index_add(0, t, out)
    return y


def gradients(function, dy, *args):
    leaves = [a.detach().clone().requires_grad_() if a is not None and a.is_floating_point() else a for a in args]
    wanted = [a for a in leaves if a is not None and a.requires_grad]
    found = torch.autograd.grad(function(*leaves), wanted, dy, allow_unused=True, materialize_grads=True)
    return [*found, *([dy.new_zeros(0)] if args[-1] is None else [])]


def compare(emulated, *args, lay_dy=torch.clone):
    """Forward, what it keeps, and all gradients, with them and without."""
    wide = to_float64(args)
    truth = reference.expert_ffn_train(*wide)
    rival = (rounding(*args), *reference.expert_ffn_train(*args)[1:])
    ours = emulated.expert_ffn_train(*args)
    assert_as_accurate(ours, rival, truth, "expert_ffn_train")
    alone = emulated.expert_ffn(*args)
    if args[4].numel() > 64:
        assert torch.equal(alone, ours[0])
    else:  # few pairs take another way where nothing is kept: test_cuda_expert_ffn_stream.py
        assert_as_accurate(alone, rival[0], truth[0], "expert_ffn")
    dy = backward_args(args)[0]
    truth, rival = gradients(reference.expert_ffn, dy.double(), *wide), gradients(rounding, dy, *args)
    kept, again = (emulated.expert_ffn_backward(lay_dy(dy), *backward_args(args, pre)[1:]) for pre in (ours[1:], None))
    for got in (kept, again):
        assert_as_accurate(got, rival, truth, "expert_ffn_backward")
    return ours, kept


#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {
    # More than 64 pairs; 7 stages through the 4 there are.
    "expert_ffn": lambda: ffn_args(33, 200, 40, 2, 2, dtype=torch.bfloat16),
    "expert_ffn_backward": lambda: backward_args(  # one expert has no rows
        ffn_args(20, 200, 40, 3, 2, dtype=torch.bfloat16, index=torch.tensor([[0, 2], [2, 0]] * 10))
    ),
}


def unpacked(dtype, lay):
    x, gate, up, down, index, weight = ffn_args(9, 16, 24, 2, 2, dtype=dtype)
    yield lay(x), gate, up, down, index, weight
    yield x, lay(gate), up, down, index, weight
    yield x, gate, lay(up), down, index, weight
    yield x, gate, up, lay(down), index, weight


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        index = torch.tensor([[0, 3], [-1, 2], [2, 2], [0, 0], [9, 9]])
        for args in (ffn_args(5, 9, 3, dtype=dtype), ffn_args(5, 8, 8, 3, 2, dtype=dtype, index=index)):
            yield "expert_ffn_train", args
            yield "expert_ffn_backward", backward_args(args)
    yield "expert_ffn_train", ffn_args(3, 8, 8, dtype=torch.float16, index=torch.tensor([-1, 5, 1]))
    for args in unpacked(torch.bfloat16, UNPACKED[2]):
        yield "expert_ffn", args
    # 256 bytes of pairs, or as many of their tokens, the last of the scratch memory; backward of hidden gradients.
    for whole in (ffn_args(64, 8, 8, 2, dtype=torch.bfloat16), ffn_args(32, 8, 8, 2, 2, dtype=torch.bfloat16)):
        yield "expert_ffn_train", whole  # few pairs take another way in expert_ffn
        yield "expert_ffn_backward", backward_args(whole)
    yield "expert_ffn_backward", backward_args(ffn_args(3, 264, 264, 1, 2, dtype=torch.float16))


def exact_args(tokens, dim, hidden, experts, top_k, dtype, density=0.02):
    """Integers for which every sum and every stored number is exact: gate x is so large that silu(g) = g."""

    def sparse(*shape, seed):
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(shape, generator=generator) < density
        return torch.where(kept, torch.randint(-1, 2, shape, generator=generator), 0).to(torch.float64)

    x, gate = sparse(tokens, dim, seed=0), sparse(experts, hidden, dim, seed=1)
    x[:, 0], gate[:, :, 0] = 1, 24
    up, down = sparse(experts, hidden, dim, seed=2), sparse(experts, dim, hidden, seed=3)
    index = torch.randint(experts, (tokens, top_k), generator=torch.Generator().manual_seed(4))
    weight = torch.randint(1, 3, (tokens, top_k), generator=torch.Generator().manual_seed(5)).to(torch.float64)
    return [x.to(dtype), gate.to(dtype), up.to(dtype), down.to(dtype), index, weight.to(dtype)], sparse(
        tokens, dim, seed=6
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("sizes", "experts", "top_k"),
    [((40, 40, 264), 3, 2), ((270, 72, 136), 2, 1), ((20, 264, 40), 1, 1)],
)
def test_expert_ffn_is_exact_where_floats_are(emulated, sizes, experts, top_k, dtype):
    """Several tiles in every direction, each of 1 to 17 stages; a wrong index anywhere changes an integer."""
    args, dy = exact_args(*sizes, experts, top_k, dtype)
    wide = to_float64(args)
    ours = emulated.expert_ffn_train(*args)
    truth = reference.expert_ffn_train(*wide)
    assert max(t.abs().max() for t in truth[1:]) <= 128 and truth[0].any(-1).float().mean() > 0.5
    for a, t in zip(ours, truth, strict=True):
        assert torch.equal(a, t.round().to(dtype))  # in float64, silu(24) is still 1e-9 off
    truth = reference.expert_ffn_backward(dy.double(), *wide, None, None, True, True, True)
    for pre in ((None, None), ours[1:]):
        got = emulated.expert_ffn_backward(dy, *args, *pre, True, True, True)
        for name, a, t in zip(("dx", "dgate", "dup", "ddown", "dweight"), got, truth, strict=True):
            assert t.any(), name
            assert torch.equal(a, t.round().to(dtype)), name


@pytest.mark.parametrize("sizes", [(1, 1), (9, 5), (8, 8), (24, 40), (40, 136)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_expert_ffn(emulated, tokens, sizes, dtype):
    compare(emulated, *ffn_args(tokens, *sizes, dtype=dtype))


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 2), (3, 5), (40, 3)])
def test_expert_ffn_of_several_experts_a_token(emulated, experts, top_k, dtype):
    """Also a token that chooses an expert twice (k > E), and experts that nobody chooses."""
    compare(emulated, *ffn_args(11, 16, 24, experts, top_k, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_expert_ffn_layouts(emulated, layout, dtype):
    compare(emulated, *ffn_args(9, 16, 24, top_k=2, dtype=dtype, layout=layout))


@pytest.mark.parametrize("lay", UNPACKED)
@pytest.mark.parametrize("dtype", SHORT)
def test_expert_ffn_of_rows_that_cannot_be_read_in_packs(emulated, lay, dtype):
    for args in unpacked(dtype, lay):
        compare(emulated, *args)
    compare(emulated, *ffn_args(9, 16, 24, dtype=dtype), lay_dy=lay)


@pytest.mark.parametrize("sizes", [(12, 16), (16, 12)])
@pytest.mark.parametrize("dtype", SHORT)
def test_expert_ffn_of_rows_that_are_no_whole_packs(emulated, sizes, dtype):
    """Every row begins at 16 bytes."""
    compare(emulated, *(within(t) if t.is_floating_point() else t for t in ffn_args(9, *sizes, dtype=dtype)[:5]), None)


@pytest.mark.parametrize("dtype", SHORT)
def test_expert_ffn_backward_of_kept_values_that_begin_anywhere(emulated, dtype):
    args = ffn_args(9, 16, 24, dtype=dtype)
    pre = emulated.expert_ffn_train(*args)[1:]
    there = emulated.expert_ffn_backward(*backward_args(args, pre))
    moved = emulated.expert_ffn_backward(*backward_args(args, tuple(shifted(t) for t in pre)))
    for a, b in zip(there, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


def test_expert_ffn_of_more_tiles_than_a_group_of_blocks(emulated):
    """Every token has an expert of its own; two columns of blocks."""
    args = ffn_args(40, 8, 136, 40, dtype=torch.float16, index=torch.arange(40).flip(0))
    truth = reference.expert_ffn(*to_float64(args))
    assert_as_accurate(emulated.expert_ffn(*args), rounding(*args), truth)


@pytest.mark.parametrize("dtype", SHORT)
def test_expert_ffn_with_float32_experts(emulated, dtype):
    compare(emulated, *ffn_args(9, 16, 24, 3, 2, dtype=dtype, expert_dtype=torch.float32))


@pytest.mark.parametrize("layout", ["stepped", "transposed"])
def test_expert_ffn_of_gate_and_up_with_different_strides(emulated, layout, dtype):
    x, gate, up, down, index, weight = ffn_args(9, 16, 80, dtype=dtype)
    compare(emulated, x, laid_out(gate, layout), up, down, index, weight)
    compare(emulated, x, gate, laid_out(up, layout), down, index, weight)


@pytest.mark.parametrize("dtype", SHORT)
def test_expert_ffn_with_float32_routing_weights(emulated, dtype):
    args = ffn_args(9, 16, 24, 3, 2, dtype=dtype)
    compare(emulated, *args[:5], args[5].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_expert_ffn_of_every_number_of_rows(emulated, dtype):
    """Tiles of rows full and not, and the sort: a warp sorts 256 pairs."""
    for tokens in (64, 65, 128, 129, 256, 257):
        args = ffn_args(tokens, 8, 8, 3, dtype=dtype)
        index = args[4]
        ours = emulated.expert_ffn_train(*args)[0]
        alone = torch.empty_like(ours)
        for e in range(3):
            one = [args[0][index == e], *args[1:4], index[index == e], None]
            alone[index == e] = emulated.expert_ffn_train(*one)[0]
        assert torch.equal(ours, alone)  # rows do not depend on their company


@pytest.mark.parametrize("experts", [1, 31, 33, 1024, 2050])
def test_expert_ffn_sorts_pairs_of_many_experts(emulated, experts):
    """down is the number of the expert; more experts than threads scan their counts."""
    tokens, ones = 300, torch.ones(experts, 1, 1)
    index = torch.randint(experts, (tokens, 2), generator=torch.Generator().manual_seed(0))
    down = torch.arange(experts).float().view(-1, 1, 1)
    for schedule in ((0, 0), (1, 0)):  # what the last threads write last may hide what the first wrote there
        emulated.schedule(*schedule)
        y = emulated.expert_ffn(torch.ones(tokens, 1), 24 * ones, ones, down, index, None)
        assert torch.equal(y, 24 * index.sum(1, keepdim=True).float())
    emulated.schedule()


def many_pairs():
    """More than 1024, whose tokens are written by more than one block."""
    return ffn_args(520, 8, 8, 3, 2, dtype=torch.bfloat16)


def test_expert_ffn_of_many_pairs(emulated):
    x, gate, up, down, index, weight = many_pairs()
    y = emulated.expert_ffn(x, gate, up, down, index, weight)
    for rows in (slice(0, 100), slice(420, 520)):
        few = (x[rows], gate, up, down, index[rows], weight[rows])
        assert torch.equal(y[rows], emulated.expert_ffn(*few))


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
def test_expert_ffn_of_many_pairs_has_no_races():
    raced = emulator.load("race")
    raced.schedule(2, 7, 2)
    raced.expert_ffn(*many_pairs())


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_ffn_gives_nothing_for_an_index_past_the_experts(emulated, top_k, dtype):
    index = torch.tensor([[0, 2], [3, 9], [2**40, 2], [1, 0], [3, 3]] * 20)[:, :top_k]
    args = ffn_args(100, 16, 24, 3, top_k, dtype=dtype, index=index)
    ours, (dx, *_, dweight) = compare(emulated, *args)
    nobody = index >= 3
    assert torch.equal((ours[0] == 0).all(1), nobody.all(1)) and torch.equal((dx == 0).all(1), nobody.all(1))
    assert torch.equal((ours[1] == 0).all(1), nobody.flatten())
    assert torch.equal((ours[2] == 0).all(1), nobody.flatten()) and torch.equal(dweight == 0, nobody)
    kept = [torch.full_like(t, 5) for t in ours[1:]]
    emulated.expert_ffn_backward(*backward_args(args, kept))
    assert all((t == 5).all() for t in kept)  # they are the caller's


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_ffn_marks_tokens_with_a_negative_index(emulated, top_k, dtype):
    index = torch.tensor([[0, 2], [-1, 1], [1, -(2**40)], [3, 0]])[:, :top_k]
    args = ffn_args(4, 16, 24, 3, top_k, dtype=dtype, index=index)
    y, gate_pre, up_pre = emulated.expert_ffn_train(*args)
    dx, dgate, dup, ddown, dweight = emulated.expert_ffn_backward(*backward_args(args))
    bad = index < 0
    for row in (y, dx):
        assert torch.equal(row.isnan().all(1), bad.any(1)) and torch.equal(row.isnan().any(1), bad.any(1))
    for pre in (gate_pre, up_pre):
        assert torch.equal(pre.isnan().all(1), bad.flatten()) and torch.equal(pre.isnan().any(1), bad.flatten())
    assert torch.equal(dweight.isnan(), bad)
    assert not any(t.isnan().any() for t in (dgate, dup, ddown))


def test_expert_ffn_of_an_expert_without_tokens_has_zero_gradients(emulated, dtype):
    args = ffn_args(9, 16, 24, 4, dtype=dtype, index=torch.tensor([1, 2] * 4 + [1]))
    for gradient in emulated.expert_ffn_backward(*backward_args(args))[1:4]:
        assert not gradient[[0, 3]].any() and gradient[1:3].any(-1).any(-1).all()


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
def test_expert_ffn_backward_of_what_is_needed(emulated, need):
    args = ffn_args(9, 16, 24, 3, 2, dtype=torch.bfloat16)
    every = emulated.expert_ffn_backward(*backward_args(args))
    some = emulated.expert_ffn_backward(*backward_args(args, need=need))
    needed = (need[0], need[1], need[1], need[1], need[2])
    for wanted, a, b in zip(needed, every, some, strict=True):
        assert torch.equal(a, b) if wanted else b.numel() == 0


@pytest.mark.parametrize(
    ("tokens", "dim", "hidden", "experts", "top_k"),
    [(0, 8, 8, 2, 2), (3, 0, 8, 2, 2), (3, 8, 0, 2, 2), (3, 8, 8, 0, 2), (3, 8, 8, 2, 0)],
)
def test_expert_ffn_of_nothing(emulated, tokens, dim, hidden, experts, top_k, dtype):
    args = ffn_args(tokens, dim, hidden, experts, top_k, dtype=dtype)
    for t in emulated.expert_ffn_train(*args):
        assert not t.any()
    assert not emulated.expert_ffn(*args).any()
    for t, like in zip(emulated.expert_ffn_backward(*backward_args(args)), (*args[:4], args[5]), strict=True):
        assert t.shape == like.shape and not t.any()


def test_expert_ffn_refuses_more_experts_than_it_can_count(emulated):
    with pytest.raises(ValueError, match=r"E must be at most 8192 on CUDA, got 8193"):
        emulated.expert_ffn_train(*ffn_args(1, 1, 1, 8193))
