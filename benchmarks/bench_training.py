"""Choices that training on a CPU rests on, each against the plain way. A case is checked before it is timed.

    pytest benchmarks/bench_training.py

Forward and backward in bfloat16, at the sizes of the demo's recipe:

- Attention of short sequences, multiplied out (`model.layers.attend`) against `scaled_dot_product_attention`.
- Group norm with its input cast to float32 (`training.tokenizer.build`) against bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synergen_ext.model.layers import attend

Function = Callable[..., Tensor]


def attention(rows: int, length: int) -> tuple[Function, Function, list[Tensor]]:
    q = torch.randn(rows, 4, length, 64, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(rows, 2, length, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return lambda q, k, v: attend(q, k, v, None), sdpa, [q, k, v]


def group_norm(pictures: int, channels: int, side: int) -> tuple[Function, Function, list[Tensor]]:
    # Channels last, where bfloat16 is slow; a contiguous input is faster without the cast.
    x = torch.randn(pictures, channels, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x.requires_grad_()
    weight, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))

    def wide(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x.float(), 32, weight, bias, 1e-6).bfloat16()

    def narrow(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x, 32, weight, bias, 1e-6)  # as under autocast: the weights stay float32

    return wide, narrow, [x, weight, bias]


CASES = {
    "attention head 576 x 8": lambda: attention(576, 8),
    "attention backbone 32 x 56": lambda: attention(32, 56),
    "attention backbone 16 x 96": lambda: attention(16, 96),
    "group norm 32 x 32 x 48 x 48 channels last": lambda: group_norm(32, 32, 48),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Function, Function, list[Tensor]]:
    """Built and checked once for both rows."""
    torch.manual_seed(0)
    ours, rival, inputs = CASES[request.param]()
    torch.testing.assert_close(ours(*inputs), rival(*inputs), rtol=0.05, atol=0.05)
    return request.param, ours, rival, inputs


@pytest.mark.parametrize("who", ["synergen_ext", "rival"])
def test_training(case: tuple[str, Function, Function, list[Tensor]], who: str, benchmark: Any) -> None:
    name, ours, rival, inputs = case
    function = ours if who == "synergen_ext" else rival
    weight = torch.randn_like(function(*inputs))

    def step() -> None:
        torch.autograd.grad(function(*inputs), inputs, weight)

    benchmark.group, benchmark.name = name, who
    benchmark.extra_info.update(case=name, who=who, threads=torch.get_num_threads(), torch=torch.__version__)
    benchmark.pedantic(step, rounds=10, iterations=1, warmup_rounds=2)
