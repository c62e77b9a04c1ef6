"""linear_cross_entropy: values and gradients against float64, ignored rows, frozen sides, sizes around every block,
layouts, memory, determinism, errors, torch.compile."""

import pytest
import torch
import torch.nn.functional as F

from synergen_ext import kernels, ops
from synergen_ext.ops import eager, reference
from synergen_ext.testing import LAYOUTS, assert_op_accurate, laid_out, normal, run_with_gradients


def inputs(
    rows=7, dim=13, vocab=29, dtype=torch.float32, weight_dtype=None, layout="contiguous", device="cpu", grad=True
):
    """Logits of size one to three, so that some tokens are likely and some are not; every fifth row is ignored."""
    x = normal(rows, dim, dtype=torch.float64, device=device)
    weight = normal(vocab, dim, dtype=torch.float64, device=device, seed=1) * 2 * max(dim, 1) ** -0.5
    targets = normal(rows, seed=2).abs().mul(1e6).long().to(device) % vocab
    targets[4::5] = -100
    x, weight = laid_out(x.to(dtype), layout), laid_out(weight.to(weight_dtype or dtype), layout)
    return x.requires_grad_(grad), weight.requires_grad_(grad), laid_out(targets, layout)


def check(*args, **options):
    for reduction in ("sum", "none"):
        assert_op_accurate(
            lambda *a, r=reduction: ops.linear_cross_entropy(*a, **options, reduction=r),
            lambda *a, r=reduction: reference.linear_cross_entropy(*a, **options, reduction=r),
            args,
            rival=lambda *a, r=reduction: eager.linear_cross_entropy(*a, **options, reduction=r),
        )


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (16, 31), (45, 33), (97, 130), (300, 257)])
@pytest.mark.parametrize("rows", [1, 40])
def test_accurate(rows, sizes, dtype, device):
    check(*inputs(rows, *sizes, dtype=dtype, device=device))


# Rows: half and whole panels of lanes, tasks of 192. Some are ignored, so the counts are around those too.
@pytest.mark.parametrize("rows", [2, 9, 16, 20, 33, 191, 193, 240, 241, 500])
def test_accurate_at_every_number_of_rows(rows, device):
    check(*inputs(rows, 17, 23, device=device))


# Columns: blocks of 96, strips of 960, groups of 4608; depth blocks of 256, blocks of 128 columns of dx.
@pytest.mark.parametrize("sizes", [(127, 95), (129, 97), (257, 961), (13, 4609), (5, 9300)])
def test_accurate_at_every_block_of_columns(sizes, device):
    check(*inputs(37, *sizes, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_accurate_where_the_vocabulary_passes_in_pieces(dtype, device):
    """With 3,000 rows a piece is 2,688 columns in float32 and 1,344 in float64."""
    check(*inputs(3750, 5, 5400, dtype=dtype, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    check(*inputs(37, 21, 50, dtype=dtype, layout=layout, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_float32_weight_beside_another_x(dtype, device):
    args = inputs(33, 40, 24, dtype=dtype, weight_dtype=torch.float32, device=device)
    check(*args)
    assert [t.dtype for t in run_with_gradients(ops.linear_cross_entropy, args)][1:] == [dtype, torch.float32]


def test_is_cross_entropy_of_the_logits(dtype, device):
    x, weight, targets = inputs(dtype=dtype, device=device, grad=False)
    for reduction in ("mean", "sum", "none"):
        truth = F.cross_entropy(F.linear(x, weight).double(), targets, reduction=reduction)
        ours = ops.linear_cross_entropy(x, weight, targets, reduction=reduction)
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-2, atol=2e-2)
    loss, lse = torch.ops.synergen.linear_cross_entropy(x, weight, targets)
    wanted = F.linear(x, weight).double().logsumexp(-1).masked_fill(targets == -100, 0)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-2, atol=2e-2)
    assert not loss[targets == -100].any()


def test_ignored_rows_have_no_loss_and_no_gradient(device):
    """Whatever stands in them."""
    x, weight, targets = inputs(30, dtype=torch.float64, device=device)
    ignored = targets == -100
    with torch.no_grad():
        x[ignored] = torch.nan
    targets[ignored] = 5
    targets[3] = 6
    targets = torch.where(ignored, 11, torch.where(targets == 11, 12, targets))
    loss = ops.linear_cross_entropy(x, weight, targets, 11, "none")
    assert not loss[ignored].any() and (loss[~ignored] > 0).all()
    dx, dweight = torch.autograd.grad(loss.sum(), (x, weight))
    assert not dx[ignored].any() and dweight.isfinite().all()
    kept = x.detach()[~ignored].requires_grad_()
    alone = ops.linear_cross_entropy(kept, weight, targets[~ignored], 11, "none")
    assert torch.equal(alone, loss[~ignored])
    for got, wanted in zip(torch.autograd.grad(alone.sum(), (kept, weight)), (dx[~ignored], dweight), strict=True):
        assert torch.equal(got, wanted)


def test_an_ignore_index_inside_the_vocabulary(device):
    x, weight, targets = inputs(40, dtype=torch.float64, device=device)
    check(x, weight, targets.clamp(min=0), ignore_index=3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(reduction, device):
    x, weight, targets = inputs(dtype=torch.float64, device=device)
    args = x, weight, targets.fill_(-100), -100, reduction
    ours, theirs = (run_with_gradients(f, args) for f in (ops.linear_cross_entropy, eager.linear_cross_entropy))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 8, 5), (3, 0, 5), (0, 0, 1)])
def test_empty(shape, device):
    loss, dx, dweight = run_with_gradients(
        lambda *a: ops.linear_cross_entropy(*a, reduction="sum"), inputs(*shape, device=device)
    )
    torch.testing.assert_close(loss, torch.tensor(shape[0] * float(shape[2])).to(device).log().nan_to_num(neginf=0) * 0
                               + shape[0] * torch.tensor(float(shape[2])).log().to(device))  # fmt: skip
    assert dx.shape == (shape[0], shape[1]) and torch.equal(dweight, torch.zeros(shape[2], shape[1], device=device))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_side_costs_nothing(frozen, device):
    x, weight, targets = inputs(dtype=torch.float64, device=device)
    both = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets), (x, weight))
    (x if frozen == "x" else weight).requires_grad_(False)
    (one,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets), [weight if frozen == "x" else x])
    assert torch.equal(one, both[frozen == "x"])
    _, lse = torch.ops.synergen.linear_cross_entropy(x, weight, targets)
    dx, dweight = torch.ops.synergen.linear_cross_entropy_backward(
        torch.ones_like(lse), x, weight, targets, lse, -100, frozen == "weight", frozen == "x"
    )
    assert (dx.shape, dweight.shape)[frozen == "weight"] == (0,)


def test_row_weights_are_the_callers_product(device):
    x, weight, targets = inputs(dtype=torch.float64, device=device)
    scale = normal(len(x), dtype=torch.float64, seed=7, device=device)
    ours, truth = (
        torch.autograd.grad((f(x, weight, targets, reduction="none") * scale).sum(), (x, weight))
        for f in (ops.linear_cross_entropy, reference.linear_cross_entropy)
    )
    torch.testing.assert_close(ours, truth)


def test_extreme_logits(device):
    """No overflow, and a row that is sure of its target has nearly no loss."""
    x = torch.tensor([[1e4], [-1e4], [80.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], device=device, requires_grad=True)
    targets = torch.tensor([0, 0, 0], device=device)
    loss = ops.linear_cross_entropy(x, weight, targets, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 2e4, 0.0], device=device), rtol=1e-6, atol=1e-6)
    dx, _ = torch.autograd.grad(loss.sum(), (x, weight))
    torch.testing.assert_close(dx[:, 0], torch.tensor([0.0, -2.0, 0.0], device=device))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows(value, device):
    x, weight, targets = inputs(4, grad=False, device=device)
    x[1, 2] = value
    loss = ops.linear_cross_entropy(x, weight, targets, reduction="none")
    assert loss[1].isnan() and loss[[0, 2, 3]].isfinite().all()


def test_memory_stays_below_the_logits():
    """The peak of a process that never holds [N, V] floats (128 MB here, twice in PyTorch)."""
    import resource
    import subprocess
    import sys

    code = """
import resource, torch
from synergen_ext import ops
x, w = torch.randn(4096, 16).requires_grad_(), torch.randn(8192, 16).requires_grad_()
t = torch.randint(8192, (4096,))
ops.linear_cross_entropy(x[:8], w, t[:8]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.linear_cross_entropy(x, w, t).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert resource  # Linux and macOS
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 10  # KiB; p is 32 MiB


def test_same_result_for_any_number_of_threads():
    args = inputs(450, 70, 5000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run_with_gradients(ops.linear_cross_entropy, args))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_gradcheck(device):
    x, weight, targets = inputs(6, 5, 7, dtype=torch.float64, device=device)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda x, w, r=reduction: ops.linear_cross_entropy(x, w, targets, reduction=r), (x, weight)
        )


def test_opcheck(dtype, device):
    args = inputs(4, 9, 6, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.synergen.linear_cross_entropy.default, args)
    plain = inputs(4, 9, 6, dtype=dtype, device=device, grad=False)
    loss, lse = torch.ops.synergen.linear_cross_entropy(*plain)
    for need in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.synergen.linear_cross_entropy_backward.default,
            (torch.ones_like(loss), *plain, lse, -100, *need),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    def block(x, weight, targets):
        return ops.linear_cross_entropy(x * 2, weight, targets).square()

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    args = inputs(6, 24, 30, device=device)
    for got, wanted in zip(run_with_gradients(compiled, args), run_with_gradients(block, args), strict=True):
        torch.testing.assert_close(got, wanted)


def test_plain_arrays():
    x, weight, targets = (t.detach().numpy() for t in inputs(dtype=torch.float64))
    loss, lse = kernels.linear_cross_entropy(x, weight, targets)
    args = tuple(map(torch.from_numpy, (x, weight, targets)))
    wanted = reference.linear_cross_entropy_rows(*args)
    torch.testing.assert_close((torch.from_numpy(loss), torch.from_numpy(lse)), wanted)
    dloss = torch.ones(len(x), dtype=torch.float64)
    dx, dweight = kernels.linear_cross_entropy_backward(dloss.numpy(), x, weight, targets, lse)
    truth = reference.linear_cross_entropy_backward(dloss, *args, wanted[1], -100, True, True)
    torch.testing.assert_close((torch.from_numpy(dx), torch.from_numpy(dweight)), truth)


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_other_backends(name):
    args = inputs(dtype=torch.float64)
    ours = run_with_gradients(ops.linear_cross_entropy, args)
    with ops.backend(name):
        theirs = run_with_gradients(ops.linear_cross_entropy, args)
    torch.testing.assert_close(ours, theirs)


def test_the_written_out_gradients_are_those_of_autograd():
    x, weight, targets = inputs(dtype=torch.float64)
    _, lse = reference.linear_cross_entropy_rows(x, weight, targets)
    dloss = normal(len(x), dtype=torch.float64, seed=3)
    loss = reference.linear_cross_entropy(x, weight, targets, reduction="none")
    wanted = torch.autograd.grad(loss, (x, weight), dloss)
    torch.testing.assert_close(
        reference.linear_cross_entropy_backward(dloss, x, weight, targets, lse, -100, True, True), wanted
    )


def test_second_derivative_is_refused():
    x, weight, targets = inputs(dtype=torch.float64)
    (dx,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: second derivatives are not implemented"):
        dx.sum().backward()


ONES, IDS = torch.ones(2, 8), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(8), ONES, IDS), r"linear_cross_entropy: x must be \[N, D\], got \[8\]"),
        ((ONES, torch.ones(8), IDS), r"weight must be \[V, D\], got \[8\]"),
        ((ONES, torch.ones(3, 7), IDS), r"weight must be \[V, D\] = \[3, 8\], got \[3, 7\]"),
        ((ONES, torch.ones(0, 8), IDS), r"weight must be \[V, D\] with V >= 1, got \[0, 8\]"),
        ((ONES, ONES.half(), IDS), "weight must be float32 like x, got float16"),
        ((ONES.long(), ONES, IDS), "x must be float64, float32, bfloat16 or float16, got int64"),
        ((ONES, ONES, IDS[:1]), r"targets must be \[N\] = \[2\], got \[1\]"),
        ((ONES, ONES, IDS.int()), "targets must be int64, got int32"),
        ((ONES, ONES, IDS + 2), r"targets must be in \[0, V=2\) or ignore_index=-100, got 2 at \[0\]"),
        ((ONES, ONES, IDS - 1, 7), r"targets must be in \[0, V=2\) or ignore_index=7, got -1 at \[0\]"),
        ((ONES, ONES, IDS, -100, "max"), "reduction must be mean, sum or none, got 'max'"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(*args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dloss=torch.ones(3)), r"linear_cross_entropy_backward: dloss must be \[N\] = \[2\], got \[3\]"),
        (dict(dloss=torch.ones(2).double()), "dloss must be float32, got float64"),
        (dict(lse=torch.ones(2)), "lse must be float64, got float32"),
        (dict(lse=torch.ones(3)), r"lse must be \[N\] = \[2\], got \[3\]"),
        (dict(lse=torch.ones(4).double()[::2]), r"lse must be contiguous, got strides \[2\]"),
    ],
)
def test_errors_of_the_backward_op(changes, message):
    args = dict(dloss=torch.ones(2), x=ONES, weight=ONES, targets=IDS, lse=torch.ones(2).double()) | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.synergen.linear_cross_entropy_backward(*args.values(), -100, True, True)
