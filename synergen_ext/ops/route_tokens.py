"""The order in which `expert_ffn` takes its rows: pairs of token and expert, sorted by expert."""

import torch
from torch import Tensor

from . import reference
from ._backend import reference_on_cuda, substitute


def route_tokens(expert_index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs (t, j), numbered t * k + j, sorted by expert; those of one expert in the order they come.

    `expert_ffn` does this itself. Where many calls share one index - which tokens are image tokens is the same for all
    layers - it is done once: ``routing = route_tokens(index, E)``, then ``expert_ffn(..., index, routing=routing)``. On
    CUDA that saves three of its launches a call; the CPU sorts in microseconds and does not look at it.

    Args:
        expert_index: int64 [T] or [T, k]. An index >= E names no expert, as in `expert_ffn`; a negative one is refused,
            and on CUDA names none.
        experts: E, the number of experts.

    Returns:
        order: int32 [T * k]: rows offsets[e] <= r < offsets[e + 1] are the pairs order[r] of expert e; -1 after the
            last row, as many as there are pairs without an expert.
        offsets: int32 [E + 1].

    Raises:
        ValueError: a shape or dtype does not fit, or an index is negative (on the CPU).
    """
    if (other := substitute()) is not None:
        return other.route_tokens(expert_index, experts)
    return torch.ops.synergen.route_tokens(expert_index, experts)


@torch.library.register_fake("synergen::route_tokens")
def _fake(expert_index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return (
        expert_index.new_empty(expert_index.numel(), dtype=torch.int32),
        expert_index.new_empty(experts + 1, dtype=torch.int32),
    )


reference_on_cuda("route_tokens", reference.route_tokens)
