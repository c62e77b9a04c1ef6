"""rope: values and gradients against float64, far positions, layouts, broadcast positions, errors,
torch.compile."""

import pytest
import torch

from synergen_ext import ops
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


def inputs(*lead, dtype, device="cpu", heads=(3, 1), dim=16, layout="contiguous", grad=True):
    q = laid_out(normal(*lead, heads[0], dim, dtype=dtype, device=device), layout)
    k = laid_out(normal(*lead, heads[1], dim, dtype=dtype, device=device, seed=1), layout)
    positions = torch.arange(lead[-1], device=device) * 7 - 3
    return q.requires_grad_(grad), k.requires_grad_(grad), positions


@pytest.mark.parametrize("dim", [2, 6, 16, 26, 32, 64, 74, 128])
def test_accurate(dim, dtype, device):
    args = inputs(2, 5, dtype=dtype, device=device, dim=dim)
    assert_op_accurate(ops.rope, reference.rope, args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    args = inputs(2, 3, 4, dtype=dtype, device=device, dim=26, layout=layout)
    assert_op_accurate(ops.rope, reference.rope, args)
    assert all(y.is_contiguous() for y in ops.rope(*args))


def test_heads_before_tokens(device):
    """[B, H, T, Dh] in memory, as attention wants it, seen as [B, T, H, Dh]."""
    q = normal(2, 3, 5, 8, device=device).transpose(1, 2)
    k = normal(2, 1, 5, 8, device=device, seed=1).transpose(1, 2)
    assert_op_accurate(ops.rope, reference.rope, (q, k, torch.arange(5, device=device)))


def test_angles_of_far_positions_are_exact(dtype, device):
    """The truth here is written in complex numbers, so that it shares nothing with the op or its
    reference."""
    dim, theta = 8, 1e6
    q = normal(4, 2, dim, dtype=dtype, device=device)
    positions = torch.tensor([0, 1, 32767, 32768], device=device)
    frequency = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    angle = positions.double()[:, None, None] * frequency.to(device)
    z = torch.complex(*q.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    truth = torch.cat((z.real, z.imag), -1)
    rounded = truth.to(dtype)  # nobody can be closer at this dtype
    for y in ops.rope(q, q, positions, theta):
        assert_as_accurate(y, rounded, truth, "rope")


def test_distant_positions_take_the_path_without_a_table(dtype, device):
    """Positions wider apart than there are tokens are not tabled; the result must not show it."""
    q, k, _ = inputs(6, dtype=dtype, device=device, grad=False)
    far = torch.tensor([5, 30000, 5, 17, 30001, 2], device=device)
    near = torch.tensor([5, 3, 5, 0, 4, 2], device=device)
    for positions in (far, near):
        assert_op_accurate(ops.rope, reference.rope, (q, k, positions))
    together, alone = ops.rope(q, k, far)[0][1], ops.rope(q[1:2], k[1:2], far[1:2])[0][0]
    assert torch.equal(together, alone)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3), (2, 1), (1,)])
def test_positions_broadcast(shape, device):
    q, k, _ = inputs(2, 3, dtype=torch.float64, device=device, grad=False)
    positions = torch.arange(1, 1 + torch.Size(shape).numel(), device=device).reshape(shape)
    got = ops.rope(q, k, positions)
    wanted = ops.rope(q, k, positions.expand(2, 3).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert_op_accurate(ops.rope, reference.rope, (q, k, positions))


def test_inverse_undoes(device):
    q, k, positions = inputs(2, 9, dtype=torch.float64, device=device, grad=False)
    for got, wanted in zip(ops.rope(*ops.rope(q, k, positions), positions, inverse=True), (q, k), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


def test_scores_depend_on_distance_only(device):
    q, k = (
        normal(1, 1, 32, dtype=torch.float64, device=device),
        normal(1, 1, 32, dtype=torch.float64, seed=1),
    )
    k = k.to(device)

    def score(i, j):
        a, _ = ops.rope(q, q, torch.tensor([i], device=device))
        b, _ = ops.rope(k, k, torch.tensor([j], device=device))
        return (a * b).sum()

    torch.testing.assert_close(score(12, 5), score(1007, 1000))
    assert (score(12, 5) - score(12, 6)).abs() > 1e-3


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_empty(lead, device):
    outputs = run_with_gradients(ops.rope, inputs(*lead, dtype=torch.float32, device=device))
    assert [y.numel() for y in outputs] == [0] * 4


def test_no_heads_on_one_side(device):
    q, k, positions = inputs(3, dtype=torch.float64, device=device, heads=(2, 0), grad=False)
    got_q, got_k = ops.rope(q, k, positions)
    assert_as_accurate(got_q, got_q, reference.rope(q, k, positions)[0])
    assert got_k.shape == k.shape


def test_only_one_gradient(device):
    q, k, positions = inputs(4, dtype=torch.float64, device=device)
    for i, wanted in ((0, q), (1, k)):
        (got,) = torch.autograd.grad(ops.rope(q, k, positions)[i].sin().sum(), wanted)
        (truth,) = torch.autograd.grad(reference.rope(q, k, positions)[i].sin().sum(), wanted)
        assert_as_accurate(got, got, truth)


def test_gradcheck_twice(device):
    args = inputs(2, 3, dtype=torch.float64, device=device, dim=4)
    assert torch.autograd.gradcheck(ops.rope, args)
    assert torch.autograd.gradgradcheck(ops.rope, args)


def test_opcheck(dtype, device):
    args = inputs(2, 3, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.synergen.rope.default, (*args, 1e4, False))
    torch.library.opcheck(torch.ops.synergen.rope.default, (*args, 1e4, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    def block(q, k, positions):
        a, b = ops.rope(q + 1, k, positions)
        return a * 2, b

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    args = inputs(2, 6, dtype=torch.float32, device=device)
    for got, wanted in zip(run_with_gradients(compiled, args), run_with_gradients(block, args), strict=True):
        torch.testing.assert_close(got, wanted)


def test_reference_in_float64_is_wide():
    """Guards the guard: in float32 the truth must be further from the op than in float64."""
    args = inputs(8, dtype=torch.float32, grad=False)
    narrow = reference.rope(*args)[0].double()
    truth = reference.rope(*to_float64(args))[0]
    assert 0 < (narrow - truth).abs().max() < 1e-5


ONE = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (torch.ones(3, 4), torch.ones(3, 4), torch.arange(2)),
            r"rope: q must be \[..., T, Hq, Dh\], got \[3, 4\]",
        ),
        (
            (ONE, torch.ones(2, 1, 6), torch.arange(2)),
            r"rope: k must be \[..., T, Hk, Dh\] = \[2, 1, 4\], got \[2, 1, 6\]",
        ),
        (
            (ONE, torch.ones(5, 1, 4), torch.arange(2)),
            r"rope: k must be .* = \[2, 1, 4\], got \[5, 1, 4\]",
        ),
        (
            (ONE, torch.ones(1, 2, 3, 4), torch.arange(2)),
            r"rope: k must be .* = \[2, 3, 4\], got \[1, 2, 3, 4\]",
        ),
        ((ONE, ONE.double(), torch.arange(2)), "rope: k must be float32 like q, got float64"),
        ((ONE, ONE, torch.arange(2).int()), "rope: positions must be int64, got int32"),
        (
            (ONE, ONE, torch.arange(3)),
            r"rope: positions must be \[..., T\] = \[2\] or broadcast to it, got \[3\]",
        ),
        ((ONE, ONE, torch.zeros(1, 2).long()), r"rope: positions must be .* got \[1, 2\]"),
        ((ONE[..., :3], ONE[..., :3], torch.arange(2)), "rope: Dh must be even, got 3"),
        ((ONE, ONE, torch.arange(2), 0.0), "rope: theta must be > 0, got 0"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        ops.rope(*args)
