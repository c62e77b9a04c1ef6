"""add_rms_norm: the bits of the two steps, values and gradients against float64, layouts, errors, torch.compile."""

import pytest
import torch

from synergen_ext import kernels, ops
from synergen_ext.ops import eager, reference
from synergen_ext.testing import LAYOUTS, ODD_SIZES, assert_op_accurate, laid_out, normal, run_with_gradients


def inputs(*shape, dtype, device="cpu", layout="contiguous", grad=True):
    x, residual = (laid_out(normal(*shape, dtype=dtype, device=device, seed=s), layout) for s in (0, 1))
    weight = laid_out(1 + 0.3 * normal(shape[-1], dtype=dtype, device=device, seed=2), layout)
    return tuple(t.requires_grad_(grad) for t in (x, residual, weight))


@pytest.mark.parametrize("dim", ODD_SIZES)
def test_accurate(dim, dtype, device):
    assert_op_accurate(ops.add_rms_norm, reference.add_rms_norm, inputs(5, dim, dtype=dtype, device=device))


def test_accurate_beside_torch(dtype, device):
    args = inputs(300, 512, dtype=dtype, device=device)
    assert_op_accurate(ops.add_rms_norm, reference.add_rms_norm, args, rival=eager.add_rms_norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(37,), (4, 37), (2, 3, 4, 37)])
def test_layouts(shape, layout, dtype, device):
    args = inputs(*shape, dtype=dtype, device=device, layout=layout)
    assert_op_accurate(ops.add_rms_norm, reference.add_rms_norm, args)
    assert all(t.is_contiguous() for t in ops.add_rms_norm(*args))


@pytest.mark.parametrize("dim", [1, 13, 64, 269])
def test_the_bits_of_two_steps(dim, dtype, device):
    x, residual, weight = inputs(7, dim, dtype=dtype, device=device, grad=False)
    y, total = ops.add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(x + residual, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weight_beside_short_x(dtype, device):
    x, residual, _ = inputs(6, 33, dtype=dtype, device=device)
    weight = (1 + 0.3 * normal(33, device=device)).requires_grad_()
    assert_op_accurate(ops.add_rms_norm, reference.add_rms_norm, (x, residual, weight))
    assert run_with_gradients(ops.add_rms_norm, (x, residual, weight))[4].dtype == torch.float32


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_result_alone(used, device):
    args = inputs(3, 9, dtype=torch.float64, device=device)
    ours = torch.autograd.grad(ops.add_rms_norm(*args)[used].square().sum(), args, allow_unused=True)
    other = torch.autograd.grad(reference.add_rms_norm(*args)[used].square().sum(), args, allow_unused=True)
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 8)])
def test_empty(shape, device):
    y, total, dx, dresidual, dweight = run_with_gradients(
        ops.add_rms_norm, inputs(*shape, dtype=torch.float32, device=device)
    )
    assert y.shape == total.shape == dx.shape == dresidual.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1], device=device))


def test_gradcheck(device):
    assert torch.autograd.gradcheck(ops.add_rms_norm, inputs(3, 7, dtype=torch.float64, device=device))


def test_opcheck(dtype, device):
    torch.library.opcheck(torch.ops.synergen.add_rms_norm.default, (*inputs(4, 9, dtype=dtype, device=device), 1e-5))
    x, residual, weight = inputs(4, 9, dtype=dtype, device=device, grad=False)
    torch.library.opcheck(torch.ops.synergen.add_rms_norm_backward.default, (x, residual, x, weight, 1e-5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    def block(x, residual, weight):
        y, total = ops.add_rms_norm(x * 2, residual, weight)
        return y.relu(), total + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    args = inputs(6, 24, dtype=torch.float32, device=device)
    for got, wanted in zip(run_with_gradients(compiled, args), run_with_gradients(block, args), strict=True):
        torch.testing.assert_close(got, wanted)


def test_second_derivative_is_refused():
    x, residual, weight = inputs(2, 5, dtype=torch.float64)
    (dx,) = torch.autograd.grad(ops.add_rms_norm(x, residual, weight)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="add_rms_norm: second derivatives are not implemented"):
        dx.sum().backward()


def test_arrays_without_torch():
    x, residual, weight = inputs(3, 21, dtype=torch.float32, grad=False)
    wanted = ops.add_rms_norm(x, residual, weight)
    for got, want in zip(kernels.add_rms_norm(x.numpy(), residual.numpy(), weight.numpy()), wanted, strict=True):
        assert torch.equal(torch.from_numpy(got), want)


X, W = torch.ones(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, X[:1], W), r"add_rms_norm: residual must be as x = \[2, 8\], got \[1, 8\]"),
        ((X, X.half(), W), "add_rms_norm: residual must be float32 like x, got float16"),
        ((X, X, W[:7]), r"add_rms_norm: weight must be \[D\] = \[8\], got \[7\]"),
        ((X, X, W.half()), "add_rms_norm: weight must be float32 like x, got float16"),
        ((X.long(), X, W), "add_rms_norm: x must be float64, float32, bfloat16 or float16, got int64"),
        ((X, X, W, -1.0), "add_rms_norm: eps must be >= 0, got -1"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        ops.add_rms_norm(*args)


def test_errors_of_the_gradient():
    backward = torch.ops.synergen.add_rms_norm_backward
    with pytest.raises(ValueError, match=r"add_rms_norm_backward: dsum must be as sum = \[2, 8\], got \[8\]"):
        backward(X, W, X, W, 1e-5)
    with pytest.raises(ValueError, match="add_rms_norm_backward: dy must be float32 like sum, got float64"):
        backward(X.double(), X, X, W, 1e-5)
