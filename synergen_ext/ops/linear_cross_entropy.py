"""The loss of a linear classifier, without its logits in memory."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import no_second_derivative, reference_on_cuda, substitute


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """loss_i = log(sum_v exp(x_i . w_v)) - x_i . w_t with t = targets_i: cross entropy of the logits x w^T.

    Logits exist block by block, in the forward pass and again in the backward pass, and never as [N, V]. Nothing is
    left out: every logit counts, however small its probability.

    Args:
        x: [N, D], float64, float32, bfloat16 or float16, any strides. Logits and sums are in float32 (float64 for
            float64); where CUDA's tensor cores take part, gradients of logits are rounded to the dtype of x, as in
            PyTorch.
        weight: [V, D], the dtype of x or float32. Where it needs no gradient, none is computed; so with x.
        targets: int64 [N], each in [0, V) or ignore_index.
        ignore_index: rows with this target have the loss 0 and no gradient. On the CPU they cost nothing.
        reduction: "mean" over the rows that are not ignored (NaN where there is none, as in PyTorch), "sum", or "none".

    Returns:
        [] or, with reduction "none", [N]; float32 (float64 for float64). Two runs give the same bits, whatever the
        number of threads.

    Raises:
        ValueError: a shape, dtype or device does not fit, reduction is unknown, or a target is neither in [0, V) nor
            ignore_index. CUDA kernels cannot refuse a target: there the row's loss and gradients are NaN.
    """
    if (other := substitute()) is not None:
        return other.linear_cross_entropy(x, weight, targets, ignore_index, reduction)
    loss, _ = torch.ops.synergen.linear_cross_entropy(x, weight, targets, ignore_index)
    return reference.reduce_loss(loss, targets != ignore_index, reduction)


@torch.library.register_fake("synergen::linear_cross_entropy")
def _fake(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:1], dtype=dtype), x.new_empty(x.shape[:1], dtype=torch.float64)


@torch.library.register_fake("synergen::linear_cross_entropy_backward")
def _fake_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), weight.new_empty(weight.shape if need_weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.ignore_index = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, lse)


def _backward(ctx: Any, dloss: Tensor, dlse: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    need_x, need_weight, *_ = ctx.needs_input_grad
    dx, dweight = torch.ops.synergen.linear_cross_entropy_backward(
        dloss, *ctx.saved_tensors, ctx.ignore_index, need_x, need_weight
    )
    return dx if need_x else None, dweight if need_weight else None, None, None


torch.library.register_autograd("synergen::linear_cross_entropy", _backward, setup_context=_setup)
no_second_derivative("linear_cross_entropy")
reference_on_cuda("linear_cross_entropy", reference.linear_cross_entropy_rows)
reference_on_cuda("linear_cross_entropy_backward", reference.linear_cross_entropy_backward)
