"""Rotary position embedding."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import reference_on_cuda, substitute


def rope(
    q: Tensor, k: Tensor, positions: Tensor, theta: float = 1e6, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions, element i of a head paired with element i + Dh /
    2.

    With a = position * theta^(-2 i / Dh):  y_i = x_i cos a - x_{i + Dh/2} sin a,
    y_{i + Dh/2} = x_{i + Dh/2} cos a + x_i sin a.  Angles are computed in float64.

    Args:
        q: [..., T, Hq, Dh], float64, float32, bfloat16 or float16, any strides; Dh even.
        k: [..., T, Hk, Dh], the dtype of q.
        positions: int64 [..., T], or a shape that broadcasts to it, such as [T].
        theta: base of the frequencies.
        inverse: rotate back, by -a.

    Returns:
        (q, k) rotated, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if (other := substitute()) is not None:
        return other.rope(q, k, positions, theta, inverse=inverse)
    return torch.ops.synergen.rope(q, k, positions, theta, inverse)


@torch.library.register_fake("synergen::rope")
def _fake(q: Tensor, k: Tensor, positions: Tensor, theta: float = 1e6, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, positions, ctx.theta, ctx.inverse = inputs
    ctx.save_for_backward(positions)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    # A rotation's transpose is the rotation back, so the op is its own gradient.
    (positions,) = ctx.saved_tensors
    dq, dk = torch.ops.synergen.rope(dq, dk, positions, ctx.theta, not ctx.inverse)
    return dq, dk, None, None, None


def _on_cuda(
    q: Tensor, k: Tensor, positions: Tensor, theta: float = 1e6, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    return reference.rope(q, k, positions, theta, inverse=inverse)


torch.library.register_autograd("synergen::rope", _backward, setup_context=_setup)
reference_on_cuda("rope", _on_cuda)
