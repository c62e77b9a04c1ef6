"""Feed-forward experts: every token goes through the experts that its indices name."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import no_second_derivative, reference_on_cuda, substitute


def expert_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None = None,
    *,
    recompute: bool = False,
    routing: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y_t = sum_j w_tj * down[e] (silu(gate[e] x_t) * (up[e] x_t)), with e = expert_index[t, j].

    With E = 2 and the index 1 where a token is visual, else 0, this is the paper's eq. 2: FFN_V(x)
    if x is visual, FFN_T(x) otherwise. With a router's top-k indices and weights it is a general
    mixture of experts. No token is dropped, none is padded, and an expert without tokens costs
    nothing; its gradient is exactly zero.

    Args:
        x: [T, D], float64, float32, bfloat16 or float16, any strides. Sums are in float32 (float64
            for float64). In bfloat16 and float16, CUDA's tensor cores take part where the experts
            have the dtype of x, D and F are multiples of 8 and rows are contiguous and aligned to
            16 bytes; silu(gate x) * (up x) is then rounded to the dtype, as in PyTorch.
        gate, up: [E, F, D], the dtype of x or float32.
        down: [E, D, F], the dtype of gate.
        expert_index: int64 [T] or [T, k]. An index >= E names no expert: the pair adds zero and
            gets no gradient (expert parallelism marks other ranks' experts so). A negative index
            is refused; a CUDA kernel cannot stop its caller and makes NaN of the token's row and of
            its gradient instead.
        expert_weight: the shape of expert_index, the dtype of x or float32; without it all weights
            are 1.
        recompute: where gradients are wanted, keep only the inputs for the backward pass and
            compute gate[e] x and up[e] x again there, instead of keeping both ([T * k, F] each, the
            dtype of x).
        routing: what `route_tokens(expert_index, E)` returned, for callers that use one index many times; without it
            the op sorts for itself. That it belongs to this index is not checked.

    Returns:
        [T, D], the dtype of x, contiguous. Two runs give the same bits, whatever the number of
        threads.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an index is negative (on the CPU).
    """
    if (other := substitute()) is not None:
        return other.expert_ffn(x, gate, up, down, expert_index, expert_weight)
    order, offsets = routing or (None, None)
    inputs = (x, gate, up, down, expert_weight)
    wants_gradient = any(t is not None and t.requires_grad for t in inputs)
    if wants_gradient and torch.is_grad_enabled() and not recompute:
        y, _, _ = torch.ops.synergen.expert_ffn_train(x, gate, up, down, expert_index, expert_weight, order, offsets)
        return y
    return torch.ops.synergen.expert_ffn(x, gate, up, down, expert_index, expert_weight, order, offsets)


@torch.library.register_fake("synergen::expert_ffn")
def _fake(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("synergen::expert_ffn_train")
def _fake_train(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    pre = (expert_index.numel(), gate.shape[1])
    return x.new_empty(x.shape), x.new_empty(pre), x.new_empty(pre)


@torch.library.register_fake("synergen::expert_ffn_backward")
def _fake_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None,
    gate_pre: Tensor | None,
    up_pre: Tensor | None,
    need_x: bool,
    need_experts: bool,
    need_weight: bool,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight = x if expert_weight is None else expert_weight
    return (
        x.new_empty(x.shape if need_x else (0,)),
        gate.new_empty(gate.shape if need_experts else (0,)),
        gate.new_empty(up.shape if need_experts else (0,)),
        gate.new_empty(down.shape if need_experts else (0,)),
        weight.new_empty(expert_index.shape if need_weight and expert_weight is not None else (0,)),
    )


def _whole(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """With order and offsets, which torch leaves out where they are the schema's defaults."""
    return (*inputs, *(None,) * (8 - len(inputs)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*_whole(inputs), None, None)


def _setup_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, gate_pre, up_pre = output
    ctx.mark_non_differentiable(gate_pre, up_pre)
    ctx.save_for_backward(*_whole(inputs), gate_pre, up_pre)


def _backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_gate, need_up, need_down, _, need_weight = ctx.needs_input_grad[:6]
    *inputs, order, offsets, gate_pre, up_pre = ctx.saved_tensors
    need = (need_x, need_gate or need_up or need_down, need_weight)
    dx, dgate, dup, ddown, dweight = torch.ops.synergen.expert_ffn_backward(
        dy, *inputs, gate_pre, up_pre, *need, order, offsets
    )
    return (
        dx if need_x else None,
        dgate if need_gate else None,
        dup if need_up else None,
        ddown if need_down else None,
        None,
        dweight if need_weight else None,
        *(None for _ in ctx.needs_input_grad[6:]),
    )


torch.library.register_autograd("synergen::expert_ffn", _backward, setup_context=_setup)
torch.library.register_autograd("synergen::expert_ffn_train", _backward, setup_context=_setup_train)
no_second_derivative("expert_ffn")
reference_on_cuda("expert_ffn", lambda *args: reference.expert_ffn(*args[:6]))  # without order and offsets
reference_on_cuda("expert_ffn_train", lambda *args: reference.expert_ffn_train(*args[:6]))
reference_on_cuda("expert_ffn_backward", lambda *args: reference.expert_ffn_backward(*args[:12]))
