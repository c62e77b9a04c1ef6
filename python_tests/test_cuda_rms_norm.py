"""rms_norm and add_rms_norm by the emulator: see test_cuda_emulated.py."""

import pytest
import torch
from cuda_cases import UNPACKED, check

from synergen_ext.testing import DTYPES, LAYOUTS, laid_out, normal


def rms_norm_args(*shape, dtype, weight_dtype=None, layout="contiguous"):
    weight = 1 + 0.3 * normal(shape[-1], dtype=weight_dtype or dtype, seed=1)
    return (*(laid_out(t, layout) for t in (normal(*shape, dtype=dtype), weight)), 1e-5)


def add_rms_norm_args(*shape, dtype, weight_dtype=None, layout="contiguous"):
    x, *rest = rms_norm_args(*shape, dtype=dtype, weight_dtype=weight_dtype, layout=layout)
    return x, laid_out(normal(*shape, dtype=dtype, seed=3), layout), *rest


def add_rms_norm_gradients(*shape, dtype, weight_dtype=None, layout="contiguous"):
    """The arguments of add_rms_norm_backward: dy, dsum, sum, weight, eps."""
    dy = laid_out(normal(*shape, dtype=dtype, seed=2), layout)
    return dy, *add_rms_norm_args(*shape, dtype=dtype, weight_dtype=weight_dtype, layout=layout)


#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {
    "rms_norm": lambda: rms_norm_args(5, 264, dtype=torch.bfloat16),
    "rms_norm_backward": lambda: (normal(5, 270, seed=2), *rms_norm_args(5, 270, dtype=torch.float32)),
    "add_rms_norm": lambda: add_rms_norm_args(5, 264, dtype=torch.bfloat16),
    "add_rms_norm_backward": lambda: add_rms_norm_gradients(5, 270, dtype=torch.float32),
}


def unpacked(dtype, lay):
    x, weight, eps = rms_norm_args(3, 16, dtype=dtype)
    return [
        ("rms_norm", (lay(x), weight, eps)),
        ("rms_norm_backward", (lay(x), lay(x), weight, eps)),
        ("add_rms_norm", (x, lay(x), weight, eps)),
        ("add_rms_norm_backward", (x, lay(x), x, weight, eps)),
    ]


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        for dim in (1, 9, 40):
            yield "rms_norm", rms_norm_args(3, dim, dtype=dtype)
            yield "rms_norm_backward", (normal(3, dim, dtype=dtype), *rms_norm_args(3, dim, dtype=dtype))
            yield "add_rms_norm", add_rms_norm_args(3, dim, dtype=dtype)
            yield "add_rms_norm_backward", add_rms_norm_gradients(3, dim, dtype=dtype)
        for lay in UNPACKED:
            yield from unpacked(dtype, lay)


@pytest.mark.parametrize("lay", UNPACKED)
def test_rms_norm_of_rows_that_cannot_be_read_in_packs(emulated, lay, dtype):
    for op, args in unpacked(dtype, lay):
        check(emulated, op, *args)


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


@pytest.mark.parametrize("dim", [1, 7, 8, 33, 256, 264])
def test_add_rms_norm(emulated, dim, dtype):
    check(emulated, "add_rms_norm", *add_rms_norm_args(5, dim, dtype=dtype))
    check(emulated, "add_rms_norm_backward", *add_rms_norm_gradients(5, dim, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_rms_norm_layouts(emulated, layout, dtype):
    check(emulated, "add_rms_norm", *add_rms_norm_args(2, 3, 24, dtype=dtype, layout=layout))
    check(emulated, "add_rms_norm_backward", *add_rms_norm_gradients(2, 3, 24, dtype=dtype, layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [24, 33])
def test_add_rms_norm_with_a_float32_weight(emulated, dim, dtype):
    check(emulated, "add_rms_norm", *add_rms_norm_args(5, dim, dtype=dtype, weight_dtype=torch.float32))
    check(emulated, "add_rms_norm_backward", *add_rms_norm_gradients(5, dim, dtype=dtype, weight_dtype=torch.float32))


@pytest.mark.parametrize("dim", [40, 2051, 8200])
def test_add_rms_norm_has_the_bits_of_two_steps(emulated, dim, dtype):
    """Rows that fit the registers and longer ones, whose sum is read again."""
    x, residual, weight, eps = add_rms_norm_args(3, dim, dtype=dtype)
    y, total = emulated.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, emulated.rms_norm(total, weight, eps))


@pytest.mark.parametrize("dim", [2051, 8200])
def test_add_rms_norm_backward_of_rows_longer_than_the_registers(emulated, dim):
    for dtype in (torch.float32, torch.float64):
        check(emulated, "add_rms_norm_backward", *add_rms_norm_gradients(3, dim, dtype=dtype))


def test_add_rms_norm_without_rows(emulated):
    y, total = emulated.add_rms_norm(*add_rms_norm_args(0, 8, dtype=torch.float32))
    assert y.shape == total.shape == (0, 8)
    dx, dweight = emulated.add_rms_norm_backward(*add_rms_norm_gradients(0, 8, dtype=torch.float32))
    assert dx.shape == (0, 8) and torch.equal(dweight, torch.zeros(8))
