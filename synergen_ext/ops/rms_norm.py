"""Root-mean-square normalisation, alone and of a sum."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import no_second_derivative, reference_on_cuda, substitute


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        x: [..., D], float64, float32, bfloat16 or float16, any strides. Sums are in float32
            (float64 for float64).
        weight: [D], the dtype of x or float32.
        eps: added to the mean square.

    Returns:
        [..., D], the dtype of x, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if (other := substitute()) is not None:
        return other.rms_norm(x, weight, eps)
    return torch.ops.synergen.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """sum = x + residual, rounded to their dtype; y = rms_norm(sum, weight, eps). One pass over memory.

    Args:
        x, residual: [..., D], of one dtype: float64, float32, bfloat16 or float16, any strides.
        weight: [D], the dtype of x or float32.
        eps: added to the mean square.

    Returns:
        y and sum, [..., D] each, the dtype of x, contiguous; the bits of the two steps.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if (other := substitute()) is not None:
        return other.add_rms_norm(x, residual, weight, eps)
    return torch.ops.synergen.add_rms_norm(x, residual, weight, eps)


@torch.library.register_fake("synergen::rms_norm")
def _fake(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("synergen::rms_norm_backward")
def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@torch.library.register_fake("synergen::add_rms_norm")
def _fake_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("synergen::add_rms_norm_backward")
def _fake_add_backward(dy: Tensor, dsum: Tensor, sum: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return sum.new_empty(sum.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    dx, dweight = torch.ops.synergen.rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps)
    return dx, dweight, None


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _backward_add(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dx, dweight = torch.ops.synergen.add_rms_norm_backward(dy, dsum, *ctx.saved_tensors, ctx.eps)
    return dx, dx, dweight, None


torch.library.register_autograd("synergen::rms_norm", _backward, setup_context=_setup)
no_second_derivative("rms_norm")
reference_on_cuda("rms_norm", reference.rms_norm)
reference_on_cuda("rms_norm_backward", reference.rms_norm_backward)

torch.library.register_autograd("synergen::add_rms_norm", _backward_add, setup_context=_setup_add)
no_second_derivative("add_rms_norm")
reference_on_cuda("add_rms_norm", reference.add_rms_norm)
reference_on_cuda("add_rms_norm_backward", reference.add_rms_norm_backward)
