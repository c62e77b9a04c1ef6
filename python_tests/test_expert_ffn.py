"""expert_ffn: values and gradients against float64, routing, empty experts, sizes around every
block, layouts, determinism, errors, torch.compile."""

import pytest
import torch
import torch.nn.functional as F

from synergen_ext import kernels, ops
from synergen_ext.ops import reference
from synergen_ext.testing import (
    LAYOUTS,
    assert_as_accurate,
    assert_op_accurate,
    laid_out,
    normal,
    run_with_gradients,
    to_float64,
)


def inputs(
    tokens=7,
    dim=13,
    hidden=22,
    experts=2,
    top_k=None,
    dtype=torch.float32,
    expert_dtype=None,
    layout="contiguous",
    device="cpu",
    grad=True,
):
    """Outputs of size one: rows of the weights have length one, routing weights are in (0, 1)."""

    def parameter(*shape, seed, scale=1.0, dtype=expert_dtype or dtype):
        wide = normal(*shape, dtype=torch.float64, seed=seed, device=device) * scale
        return laid_out(wide.to(dtype), layout).requires_grad_(grad)

    x = parameter(tokens, dim, seed=0, dtype=dtype)
    gate = parameter(experts, hidden, dim, seed=1, scale=dim**-0.5 if dim else 1)
    up = parameter(experts, hidden, dim, seed=2, scale=dim**-0.5 if dim else 1)
    down = parameter(experts, dim, hidden, seed=3, scale=hidden**-0.5 if hidden else 1)
    shape = (tokens,) if top_k is None else (tokens, top_k)
    index = laid_out(normal(*shape, seed=4, device=device).mul(1e4).long() % experts, layout)
    if top_k is None:
        return x, gate, up, down, index
    weight = normal(*shape, dtype=torch.float64, seed=5, device=device).sigmoid()
    weight = laid_out(weight.to(expert_dtype or dtype), layout).requires_grad_(grad)
    return x, gate, up, down, index, weight


def plain(x, gate, up, down, index, weight=None):
    """What a PyTorch program would write, every step at the dtype of x."""
    gate, up, down = (t.to(x.dtype) for t in (gate, up, down))
    index = index if index.dim() == 2 else index[:, None]
    y = torch.zeros_like(x)
    for e in range(gate.shape[0]):
        t, j = torch.where(index == e)
        out = F.linear(F.silu(F.linear(x[t], gate[e])) * F.linear(x[t], up[e]), down[e])
        if weight is not None:
            out = out * weight[t, j, None].to(x.dtype)
        y = y.index_add(0, t, out)
    return y


def check(*args):
    assert_op_accurate(ops.expert_ffn, reference.expert_ffn, args, rival=plain)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (16, 32), (31, 45), (130, 97), (256, 300)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_accurate(tokens, sizes, dtype, device):
    check(*inputs(tokens, *sizes, dtype=dtype, device=device))


# Rows of an expert: each step of the dot products (1, 2, 4, 8 rows), the first packed product, half
# and whole panels of lanes, chunks of 192 rows, windows of 1024.
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 191, 193, 385, 1023, 1025, 2100])
def test_accurate_at_every_number_of_rows(tokens, device):
    check(*inputs(tokens, 17, 23, experts=1, device=device))


# Columns: blocks of 96 and 192, depth blocks of 256.
@pytest.mark.parametrize("sizes", [(95, 97), (129, 255), (191, 193), (257, 96), (513, 128)])
def test_accurate_at_every_block_of_columns(sizes, device):
    check(*inputs(37, *sizes, device=device))


# bfloat16 with even D and F is multiplied in pairs where the CPU can. Rows: each step of the dot products, half and
# whole panels of lanes, odd ends of the sums over rows in the gradients, chunks of 192 and 264 rows, depth blocks of
# 256 pairs.
@pytest.mark.parametrize(
    "tokens", [1, 2, 3, 5, 8, 9, 12, 16, 17, 31, 32, 33, 63, 191, 193, 263, 265, 511, 513, 1025, 2100]
)
def test_accurate_in_pairs_at_every_number_of_rows(tokens, device):
    check(*inputs(tokens, 34, 46, experts=1, dtype=torch.bfloat16, device=device))


# The gradients keep two blocks of 256 pairs of packed rows: 1,024 rows, and then no more.
@pytest.mark.parametrize("tokens", [1024, 1026])
def test_accurate_in_pairs_at_many_rows(tokens, device):
    check(*inputs(tokens, 400, 200, experts=1, dtype=torch.bfloat16, device=device))


# Columns: blocks of 96 and 192; depth blocks of 256 pairs, whole and one pair more.
@pytest.mark.parametrize("sizes", [(96, 98), (130, 192), (194, 254), (512, 30), (514, 36), (40, 1026)])
@pytest.mark.parametrize("tokens", [6, 75])
def test_accurate_in_pairs_at_every_block(tokens, sizes, device):
    check(*inputs(tokens, *sizes, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_pairs(layout, top_k, device):
    for tokens in (3, 50):
        check(*inputs(tokens, 66, 38, 3, top_k, dtype=torch.bfloat16, layout=layout, device=device))


def test_rows_do_not_touch_each_other_in_pairs(device):
    """A row of NaN stays one row of NaN, in its partner of a pair of rows too; no bit of the others moves."""
    x, gate, up, down, index = inputs(101, 20, 30, experts=1, dtype=torch.bfloat16, device=device, grad=False)
    y = ops.expert_ffn(x, gate, up, down, index)
    x[3] = torch.nan
    broken = ops.expert_ffn(x, gate, up, down, index)
    assert broken[3].isnan().all()
    broken[3] = y[3]
    assert torch.equal(broken, y)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 1), (4, 2), (8, 3), (3, 5)])
def test_accurate_top_k(experts, top_k, dtype, device):
    """Also with one token choosing an expert twice (k > E)."""
    check(*inputs(23, 24, 33, experts, top_k, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_accurate_with_float32_experts(dtype, device):
    args = inputs(33, 40, 24, 3, 2, dtype=dtype, expert_dtype=torch.float32, device=device)
    check(*args)
    got = run_with_gradients(ops.expert_ffn, args)
    assert [t.dtype for t in got] == [dtype, dtype] + [torch.float32] * 4


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, top_k, dtype, device):
    for tokens in (3, 50):
        args = inputs(tokens, 21, 37, top_k=top_k, dtype=dtype, layout=layout, device=device)
        check(*args)
    assert ops.expert_ffn(*args).is_contiguous()


def test_is_the_papers_equation_2(device):
    """FFN_V(x) where x is visual, FFN_T(x) elsewhere."""
    x, gate, up, down, _ = inputs(20, dtype=torch.float64, device=device, grad=False)
    visual = torch.arange(20, device=device) % 3 == 1

    def ffn(e):
        return F.linear(F.silu(F.linear(x, gate[e])) * F.linear(x, up[e]), down[e])

    truth = torch.where(visual[:, None], ffn(1), ffn(0))
    assert_as_accurate(ops.expert_ffn(x, gate, up, down, visual.long()), truth, truth)


@pytest.mark.parametrize("top_k", [None, 2])
def test_empty_experts(top_k, dtype, device):
    x, gate, up, down, index, *weight = inputs(30, experts=5, top_k=top_k, dtype=dtype, device=device)
    index = index.clamp(1, 3)
    check(x, gate, up, down, index, *weight)
    _, _, *gradients = run_with_gradients(ops.expert_ffn, (x, gate, up, down, index, *weight))
    for gradient in gradients[:3]:
        assert not gradient[[0, 4]].any() and gradient[1:4].any(-1).any(-1).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("top_k", [None, 3])
def test_an_index_past_the_experts_adds_nothing(top_k, recompute, device):
    x, gate, up, down, index, *weight = inputs(40, experts=3, top_k=top_k, dtype=torch.float64, device=device)
    index = torch.where(normal(*index.shape, seed=6, device=device) > 0, index, index + 3)
    index[5] = 2**40
    check(x, gate, up, down, index, *weight)
    y, dx, *_ = run_with_gradients(
        lambda *args: ops.expert_ffn(*args, recompute=recompute),
        (x, gate, up, down, index, *weight),
    )
    nobody = (index >= 3) if top_k is None else (index >= 3).all(-1)
    assert nobody.any() and not y[nobody].any() and not dx[nobody].any()
    assert y[~nobody].any(-1).all() and dx[~nobody].any(-1).all()
    if weight:
        dweight = torch.autograd.grad(ops.expert_ffn(x, gate, up, down, index, *weight).sum(), weight)
        assert torch.equal(dweight[0] == 0, index >= 3)


@pytest.mark.parametrize("sizes", [dict(tokens=0), dict(dim=0), dict(hidden=0), dict(experts=1, tokens=0)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_empty(sizes, top_k, dtype, device):
    args = inputs(**sizes, top_k=top_k, dtype=dtype, device=device)
    for got, leaf in zip(run_with_gradients(ops.expert_ffn, args), (args[0], *args[:4], *args[5:]), strict=True):
        assert got.shape == leaf.shape and not got.any()


def test_no_expert_for_anyone(device):
    """k = 0 and E = 0."""
    x, gate, up, down, index = inputs(4, device=device)
    none = index.new_empty(4, 0)
    for got in run_with_gradients(ops.expert_ffn, (x, gate, up, down, none)):
        assert not got.any()
    got = ops.expert_ffn(x, gate[:0], up[:0], down[:0], index)
    assert got.shape == x.shape and not got.any()


def test_rows_do_not_touch_each_other(device):
    """A row of NaN stays one row of NaN, and rows move with their tokens, bit for bit."""
    for tokens in (6, 100):
        x, gate, up, down, index = inputs(tokens, 20, 30, device=device, grad=False)
        y = ops.expert_ffn(x, gate, up, down, index)
        order = torch.randperm(tokens).to(device)
        assert torch.equal(ops.expert_ffn(x[order], gate, up, down, index[order]), y[order])
        x[3] = torch.nan
        broken = ops.expert_ffn(x, gate, up, down, index)
        assert broken[3].isnan().all()
        broken[3] = y[3]
        assert torch.equal(broken, y)


@pytest.mark.parametrize("top_k", [None, 2])
def test_same_bits_for_any_number_of_threads(top_k, dtype):
    args = inputs(700, 120, 140, experts=3, top_k=top_k, dtype=dtype)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(run_with_gradients(ops.expert_ffn, args))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_recomputing_gives_the_same_bits(dtype, device):
    args = inputs(60, 40, 50, 3, 2, dtype=dtype, device=device)
    saved = run_with_gradients(ops.expert_ffn, args)
    again = run_with_gradients(lambda *args: ops.expert_ffn(*args, recompute=True), args)
    assert all(torch.equal(a, b) for a, b in zip(saved, again, strict=True))


def test_what_the_backward_pass_keeps(dtype, device):
    args = inputs(9, 11, 12, 2, 2, dtype=dtype, device=device, grad=False)
    args[4][2, 1] = 7
    got = torch.ops.synergen.expert_ffn_train(*args)
    truth = reference.expert_ffn_train(*to_float64(args))
    rounded = [t.to(dtype) for t in truth]
    assert_as_accurate(got, rounded, truth)
    assert not got[1][5].any() and not got[2][5].any()


@pytest.mark.parametrize("wanted", range(5))
def test_only_one_gradient(wanted, device):
    args = inputs(20, experts=3, top_k=2, dtype=torch.float64, device=device)
    leaf = [a for a in args if a.requires_grad][wanted]
    frozen = [a if a is leaf else a.detach() for a in args]
    (got,) = torch.autograd.grad(ops.expert_ffn(*frozen).sin().sum(), leaf)
    (truth,) = torch.autograd.grad(reference.expert_ffn(*args).sin().sum(), leaf)
    assert_as_accurate(got, truth, truth)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("top_k", [None, 2])
def test_gradcheck(top_k, recompute, device):
    args = inputs(5, 3, 4, experts=3, top_k=top_k, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda *a: ops.expert_ffn(*a, recompute=recompute), args)


def test_second_derivative_is_refused():
    x, *rest = inputs(dtype=torch.float64)
    (dx,) = torch.autograd.grad(ops.expert_ffn(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expert_ffn: second derivatives are not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize("top_k", [None, 2])
def test_opcheck(top_k, dtype, device):
    args = inputs(6, 5, 4, top_k=top_k, dtype=dtype, device=device)
    args = args if top_k else (*args, None)
    torch.library.opcheck(torch.ops.synergen.expert_ffn.default, args)
    torch.library.opcheck(torch.ops.synergen.expert_ffn_train.default, args)
    x, *rest = (a.detach() if a is not None else None for a in args)
    pre = normal(6 * (top_k or 1), 4, dtype=dtype, device=device)
    for saved in ((pre, pre), (None, None)):
        for need in ((True, True, True), (False, True, False), (True, False, True)):
            torch.library.opcheck(torch.ops.synergen.expert_ffn_backward.default, (x, x, *rest, *saved, *need))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("top_k", [None, 2])
def test_compile(top_k, dynamic, device):
    def block(x, *rest):
        return x + ops.expert_ffn(x * 2, *rest)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    args = inputs(12, 24, 16, top_k=top_k, device=device)
    for got, wanted in zip(run_with_gradients(compiled, args), run_with_gradients(block, args), strict=True):
        torch.testing.assert_close(got, wanted)


def test_arrays_without_torch():
    args = inputs(10, experts=3, top_k=2, grad=False)
    arrays = [a.numpy() for a in args]
    y, gate_pre, up_pre = kernels.expert_ffn_train(*arrays)
    wanted = torch.ops.synergen.expert_ffn_train(*args)
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip((y, gate_pre, up_pre), wanted, strict=True))
    assert torch.equal(torch.from_numpy(kernels.expert_ffn(*arrays)), wanted[0])
    assert kernels.expert_ffn(*arrays[:5]).shape == (10, 13)
    grads = kernels.expert_ffn_backward(arrays[0], *arrays)
    again = kernels.expert_ffn_backward(arrays[0], *arrays, gate_pre=gate_pre, up_pre=up_pre)
    assert [g.shape for g in grads] == [a.shape for a in (*arrays[:4], arrays[5])]
    assert all((a == b).all() for a, b in zip(grads, again, strict=True))


X, GATE, DOWN = torch.ones(3, 4), torch.ones(2, 6, 4), torch.ones(2, 4, 6)
INDEX = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[0], GATE, GATE, DOWN, INDEX), r"expert_ffn: x must be \[T, D\], got \[4\]"),
        ((X, GATE[0], GATE, DOWN, INDEX), r"expert_ffn: gate must be \[E, F, D\], got \[6, 4\]"),
        (
            (X, GATE[..., :3], GATE, DOWN, INDEX),
            r"expert_ffn: gate must be \[E, F, D\] = \[2, 6, 4\], got \[2, 6, 3\]",
        ),
        (
            (X, GATE, GATE[:1], DOWN, INDEX),
            r"expert_ffn: up must be \[E, F, D\] = \[2, 6, 4\], got \[1, 6, 4\]",
        ),
        (
            (X, GATE, GATE, GATE, INDEX),
            r"expert_ffn: down must be \[E, D, F\] = \[2, 4, 6\], got \[2, 6, 4\]",
        ),
        ((X, GATE, GATE, DOWN, INDEX[:2]), r"expert_index must be \[T\] = \[3\], got \[2\]"),
        (
            (X, GATE, GATE, DOWN, INDEX[:2, None]),
            r"expert_index must be \[T, k\] = \[3, 1\], got \[2, 1\]",
        ),
        ((X, GATE, GATE, DOWN, INDEX.int()), "expert_ffn: expert_index must be int64, got int32"),
        ((X, GATE, GATE, DOWN, INDEX - 1), r"expert_index must not be negative, got -1 at \[0\]"),
        (
            (X, GATE, GATE, DOWN, torch.tensor([[0, 1], [1, -5], [0, 0]])),
            r"expert_index must not be negative, got -5 at \[1, 1\]",
        ),
        (
            (X, GATE, GATE, DOWN, INDEX, torch.ones(3, 1)),
            r"expert_weight must be as expert_index = \[3\], got \[3, 1\]",
        ),
        (
            (X, GATE, GATE, DOWN, INDEX, torch.ones(3, dtype=torch.float16)),
            "expert_weight must be float32 like x, got float16",
        ),
        (
            (X.long(), GATE, GATE, DOWN, INDEX),
            "expert_ffn: x must be float64, float32, bfloat16 or float16, got int64",
        ),
        ((X, GATE.half(), GATE, DOWN, INDEX), "expert_ffn: gate must be float32 like x, got float16"),
        (
            (X.half(), GATE, GATE.half(), DOWN, INDEX),
            "expert_ffn: up must be float32 like gate, got float16",
        ),
        (
            (X, GATE, GATE, DOWN.double(), INDEX),
            "expert_ffn: down must be float32 like gate, got float64",
        ),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        ops.expert_ffn(*args)


def test_backward_errors():
    def backward(dy, gate_pre, up_pre):
        args = (dy, X, GATE, GATE, DOWN, INDEX, None, gate_pre, up_pre, True, True, True)
        return torch.ops.synergen.expert_ffn_backward(*args)

    pre = torch.ones(3, 6)
    with pytest.raises(ValueError, match=r"expert_ffn_backward: dy must be \[T, D\] = \[3, 4\]"):
        backward(X[:2], pre, pre)
    with pytest.raises(ValueError, match="gate_pre and up_pre must come together or not at all"):
        backward(X, pre, None)
    with pytest.raises(ValueError, match=r"up_pre must be \[T \* k, F\] = \[3, 6\], got \[6, 3\]"):
        backward(X, pre, pre.T)
    with pytest.raises(ValueError, match=r"gate_pre must be contiguous, got strides \[1, 3\]"):
        backward(X, pre.T.contiguous().T, pre)


@pytest.mark.parametrize("weighted", [False, True])
def test_reference_gradient_is_that_of_the_reference(weighted):
    """Written out, because below autograd, where it stands in for a CUDA kernel, nothing can be differentiated."""
    t, d, f, e, k = 7, 5, 6, 3, 2
    x, gate, up, down, weight = (
        normal(*shape, dtype=torch.float64, seed=i).requires_grad_()
        for i, shape in enumerate([(t, d), (e, f, d), (e, f, d), (e, d, f), (t, k)])
    )
    index = torch.randint(e + 1, (t, k), generator=torch.Generator().manual_seed(5))  # some beyond the experts
    given = weight if weighted else None
    leaves = [x, gate, up, down, *([weight] if weighted else [])]
    dy = normal(t, d, dtype=torch.float64, seed=9)
    wanted = torch.autograd.grad(reference.expert_ffn(x, gate, up, down, index, given), leaves, dy)
    with torch._C._AutoDispatchBelowAutograd():
        ours = reference.expert_ffn_backward(
            dy, *(a.detach() for a in (x, gate, up, down)), index, None if given is None else given.detach(),
            None, None, True, True, True,
        )  # fmt: skip
    for got, want in zip(ours, wanted, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert weighted or ours[4].numel() == 0
