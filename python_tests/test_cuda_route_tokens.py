"""route_tokens by the emulator: see test_cuda_emulated.py. A warp sorts 256 pairs; one block of 1024 threads scans."""

import pytest
import torch
from test_cuda_expert_ffn import backward_args, ffn_args

from synergen_ext.ops import reference
from synergen_ext.testing import LAYOUTS, laid_out


def index_of(*shape, experts, layout="contiguous", low=0, seed=0):
    """Some name no expert: `experts` itself and, from `low` below zero, negative ones."""
    index = torch.randint(low, experts + 1, shape, generator=torch.Generator().manual_seed(seed))
    return laid_out(index, layout), experts


#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {"route_tokens": lambda: index_of(140, 2, experts=3, low=-1)}


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    for shape, experts in (((1,), 1), ((300,), 2), ((64, 4), 40), ((0,), 2), ((5,), 0), ((3, 0), 2)):
        yield "route_tokens", index_of(*shape, experts=experts, low=-1)
    for layout in LAYOUTS:
        yield "route_tokens", index_of(33, 3, experts=5, layout=layout)


def check(emulated, index, experts):
    order, offsets = emulated.route_tokens(index, experts)
    wanted = reference.route_tokens(index, experts)
    assert torch.equal(order, wanted[0]) and torch.equal(offsets, wanted[1])


@pytest.mark.parametrize("experts", [1, 2, 33, 1500])
@pytest.mark.parametrize("shape", [(1,), (255,), (257,), (1000,), (100, 8), (300, 3)])
def test_route_tokens(emulated, shape, experts):
    check(emulated, *index_of(*shape, experts=experts, low=-1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_route_tokens_layouts(emulated, layout):
    check(emulated, *index_of(70, 4, experts=6, layout=layout))


@pytest.mark.parametrize(("shape", "experts"), [((0,), 2), ((5,), 0), ((3, 0), 2), ((0, 4), 0)])
def test_route_tokens_of_nothing(emulated, shape, experts):
    check(emulated, *index_of(*shape, experts=experts))


def test_route_tokens_to_one_expert_of_many(emulated):
    """Also the first and the last, whose counts stand at the ends of what is scanned."""
    for expert in (0, 17, 39):
        check(emulated, torch.full((600,), expert), 40)


def test_route_tokens_refuses_more_experts_than_fit(emulated):
    with pytest.raises(ValueError, match="route_tokens: E must be at most 8192 on CUDA, got 8193"):
        emulated.route_tokens(torch.zeros(3, dtype=torch.long), 8193)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_expert_ffn_with_a_routing_of_route_tokens(emulated, top_k, dtype):
    """The same bits as when the op sorts for itself, forward and backward."""
    args = ffn_args(90, 16, 24, 4, top_k, dtype=dtype)
    args[4][::7] = 4  # without an expert
    routing = emulated.route_tokens(args[4], 4)
    plain, routed = emulated.expert_ffn_train(*args), emulated.expert_ffn_train(*args, *routing)
    assert all(torch.equal(a, b) for a, b in zip(plain, routed, strict=True))
    for pre in (None, plain[1:]):
        a, b = (emulated.expert_ffn_backward(*backward_args(args, pre), *extra) for extra in ((), routing))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_expert_ffn_looks_at_the_routing_of_route_tokens(emulated):
    """Rows in another order, and of another expert, show that it is used."""
    args = ffn_args(90, 16, 24, 2, dtype=torch.bfloat16, index=torch.arange(90) % 2)
    other = emulated.route_tokens(1 - args[4], 2)
    swapped = (*args[:4], 1 - args[4], None)
    assert torch.equal(emulated.expert_ffn_train(*args, *other)[0], emulated.expert_ffn_train(*swapped)[0])
