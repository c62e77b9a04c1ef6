"""rms_norm: values and gradients against float64, layouts, odd sizes, errors, torch.compile."""

import pytest
import torch
import torch.nn.functional as F

from synergen_ext import ops
from synergen_ext.ops import reference
from synergen_ext.testing import (
    LAYOUTS,
    ODD_SIZES,
    assert_as_accurate,
    assert_op_accurate,
    laid_out,
    normal,
    run_with_gradients,
)


def inputs(*shape, dtype, device="cpu", layout="contiguous", grad=True):
    x = laid_out(normal(*shape, dtype=dtype, device=device), layout)
    weight = laid_out(1 + 0.3 * normal(shape[-1], dtype=dtype, device=device, seed=1), layout)
    return x.requires_grad_(grad), weight.requires_grad_(grad)


def torch_rms_norm(x, weight, eps=1e-5):
    return F.rms_norm(x, weight.shape, weight, eps)


@pytest.mark.parametrize("dim", ODD_SIZES)
def test_accurate(dim, dtype, device):
    assert_op_accurate(ops.rms_norm, reference.rms_norm, inputs(5, dim, dtype=dtype, device=device))


def test_accurate_beside_torch(dtype, device):
    args = inputs(300, 512, dtype=dtype, device=device)
    assert_op_accurate(ops.rms_norm, reference.rms_norm, args, rival=torch_rms_norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(37,), (4, 37), (2, 3, 4, 37)])
def test_layouts(shape, layout, dtype, device):
    args = inputs(*shape, dtype=dtype, device=device, layout=layout)
    assert_op_accurate(ops.rms_norm, reference.rms_norm, args)
    assert ops.rms_norm(*args).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weight_beside_short_x(dtype, device):
    x, _ = inputs(6, 33, dtype=dtype, device=device)
    weight = (1 + 0.3 * normal(33, device=device)).requires_grad_()
    assert_op_accurate(ops.rms_norm, reference.rms_norm, (x, weight))
    assert run_with_gradients(ops.rms_norm, (x, weight))[2].dtype == torch.float32


def test_expanded_gradient(device):
    x, weight = inputs(4, 19, dtype=torch.float32, device=device)
    ours = torch.autograd.grad(ops.rms_norm(x, weight).sum(), (x, weight))
    other = torch.autograd.grad(reference.rms_norm(x, weight).sum(), (x, weight))
    truth = torch.autograd.grad(reference.rms_norm(x.double(), weight.double()).sum(), (x, weight))
    assert_as_accurate(ours, other, truth)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 8)])
def test_empty(shape, device):
    y, dx, dweight = run_with_gradients(ops.rms_norm, inputs(*shape, dtype=torch.float32, device=device))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1], device=device))


def test_large_and_tiny_rows_do_not_overflow(device):
    x = torch.tensor([[1e4] * 64, [1e-4] * 64], device=device, dtype=torch.float16)
    y = ops.rms_norm(x, torch.ones(64, device=device, dtype=torch.float16), eps=1e-12)
    assert torch.allclose(y.float(), torch.ones(2, 64, device=device), atol=1e-2)


def test_same_result_for_any_number_of_threads():
    args = inputs(500, 100, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run_with_gradients(ops.rms_norm, args))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_gradcheck(device):
    x, weight = inputs(3, 7, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(ops.rms_norm, (x, weight))


def test_opcheck(dtype, device):
    args = inputs(4, 9, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.synergen.rms_norm.default, (*args, 1e-5))
    plain = inputs(4, 9, dtype=dtype, device=device, grad=False)
    dy = normal(4, 9, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.synergen.rms_norm_backward.default, (dy, *plain, 1e-5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    def block(x, weight):
        return ops.rms_norm(x * 2, weight).relu()

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    args = inputs(6, 24, dtype=torch.float32, device=device)
    for got, wanted in zip(run_with_gradients(compiled, args), run_with_gradients(block, args), strict=True):
        torch.testing.assert_close(got, wanted)


def test_second_derivative_is_refused():
    x, weight = inputs(2, 5, dtype=torch.float64)
    (dx,) = torch.autograd.grad(ops.rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm: second derivatives are not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 8), torch.ones(7)), r"rms_norm: weight must be \[D\] = \[8\], got \[7\]"),
        (
            (torch.ones(2, 8), torch.ones(1, 8)),
            r"rms_norm: weight must be \[D\] = \[8\], got \[1, 8\]",
        ),
        ((torch.tensor(1.0), torch.ones(1)), r"rms_norm: x must be \[..., D\], got \[\]"),
        (
            (torch.ones(2, 8, dtype=torch.int64), torch.ones(8)),
            "rms_norm: x must be float64, float32, bfloat16 or float16, got int64",
        ),
        (
            (torch.ones(2, 8), torch.ones(8, dtype=torch.float16)),
            "rms_norm: weight must be float32 like x, got float16",
        ),
        ((torch.ones(2, 8), torch.ones(8), -1.0), "rms_norm: eps must be >= 0, got -1"),
        ((torch.ones(2, 8), torch.ones(8), float("nan")), "rms_norm: eps must be >= 0, got nan"),
        (
            (torch.ones(2, 8, dtype=torch.complex64), torch.ones(8)),
            "rms_norm: x must be .* got another dtype",
        ),
        ((torch.ones([1] * 9), torch.ones(1)), "at most 8 dimensions, got 9"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(*args)
