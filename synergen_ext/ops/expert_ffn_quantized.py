"""Feed-forward experts with weights of 8 or 4 bits, for inference."""

from typing import Any

import torch
from torch import Tensor

from ._backend import substitute


def expert_ffn_quantized(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_scale: Tensor,
    up_scale: Tensor,
    down_scale: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None = None,
) -> Tensor:
    """`expert_ffn` with weights that are integers times scales: what `quantize_weight` makes.

    Weights are exact on their way through; the op's own error is that of `expert_ffn`, and the error of quantising is
    the caller's. Half or a quarter of the bytes of bfloat16 make decoding so much faster, which is bound by reading
    weights.

    Args:
        x: [T, D], float64, float32, bfloat16 or float16, any strides. Sums are in float32 (float64 for float64). In
            bfloat16 and float16 on CUDA, silu(gate x) * (up x) is rounded to that dtype, as in PyTorch.
        gate, up: int8 [E, F, D], or uint8 [E, F, D / 2]: two weights of 4 bits a byte.
        down: [E, D, F] or [E, D, F / 2], the dtype of gate.
        gate_scale, up_scale: [E, F, D / group], the dtype of x.
        down_scale: [E, D, F / group], the dtype of x. A group is a power of two, at least 64 (int8) or 32 (uint8), or
            the whole row; that of down may be another.
        expert_index: int64 [T] or [T, k], as in `expert_ffn`.
        expert_weight: the shape of expert_index, the dtype of x or float32; without it all weights are 1.

    Returns:
        [T, D], the dtype of x, contiguous. Two runs give the same bits.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an index is negative (on the CPU).
        RuntimeError: a gradient is asked for.
    """
    args = (x, gate, up, down, gate_scale, up_scale, down_scale, expert_index, expert_weight)
    if (other := substitute()) is not None:
        return other.expert_ffn_quantized(*args)
    return torch.ops.synergen.expert_ffn_quantized(*args)


@torch.library.register_fake("synergen::expert_ffn_quantized")
def _fake(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_scale: Tensor,
    up_scale: Tensor,
    down_scale: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape)


def _refuse(ctx: Any, dy: Tensor) -> None:
    raise RuntimeError("expert_ffn_quantized: there is no gradient; train with expert_ffn and quantise afterwards")


torch.library.register_autograd("synergen::expert_ffn_quantized", _refuse)
