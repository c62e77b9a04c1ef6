"""route_tokens: pairs of token and expert sorted by expert, and expert_ffn over them."""

import pytest
import torch

from synergen_ext import kernels, ops
from synergen_ext.ops import reference
from synergen_ext.testing import LAYOUTS, laid_out


def random_index(*shape, experts, seed=0):
    return torch.randint(experts + 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "experts"), [((1,), 1), ((7,), 2), ((50, 4), 9), ((300,), 64)])
def test_equals_the_reference(shape, experts, layout, device):
    index = laid_out(random_index(*shape, experts=experts), layout).to(device)
    order, offsets = ops.route_tokens(index, experts)
    wanted = reference.route_tokens(index, experts)
    assert order.dtype == offsets.dtype == torch.int32
    assert torch.equal(order, wanted[0]) and torch.equal(offsets, wanted[1])


def test_rows_of_an_expert_are_its_pairs_in_order(device):
    """Against the definition, not the reference."""
    index = random_index(40, 3, experts=5).to(device)
    order, offsets = ops.route_tokens(index, 5)
    for e in range(5):
        assert order[offsets[e] : offsets[e + 1]].tolist() == (index.flatten() == e).nonzero().flatten().tolist()
    assert (order[offsets[5] :] == -1).all() and len(order) == 120


@pytest.mark.parametrize(("shape", "experts"), [((0,), 3), ((0, 2), 3), ((4, 0), 3), ((5,), 0), ((0,), 0)])
def test_nothing_to_route(shape, experts, device):
    order, offsets = ops.route_tokens(torch.zeros(shape, dtype=torch.long, device=device), experts)
    assert order.tolist() == [-1] * torch.Size(shape).numel() and offsets.tolist() == [0] * (experts + 1)


def test_expert_ffn_gives_the_same_bits_with_it(device):
    generator = torch.Generator().manual_seed(1)
    x, gate, up, down = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((90, 16), (3, 24, 16), (3, 24, 16), (3, 16, 24))
    )
    index = random_index(90, 2, experts=3).to(device)
    results = []
    for routing in (None, ops.route_tokens(index, 3)):
        leaves = [t.clone().requires_grad_() for t in (x, gate, up, down)]
        y = ops.expert_ffn(*leaves, index, routing=routing)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3), 2), "route_tokens: expert_index must be int64, got float32"),
        ((torch.zeros(1, 2, 3, dtype=torch.long), 2), r"route_tokens: expert_index must be \[T\] or \[T, k\]"),
        ((torch.tensor([0, -2]), 2), r"route_tokens: expert_index must not be negative, got -2 at \[1\]"),
        ((torch.zeros(3, dtype=torch.long), -1), r"route_tokens: experts must be in \[0, 2\^31 - 1\), got -1"),
    ],
)
def test_refuses(args, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.route_tokens(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda order, offsets: (order, None), "order and offsets must come together or not at all"),
        (lambda order, offsets: (order[1:], offsets), r"order must be \[T \* k\] = \[5\], got \[4\]"),
        (lambda order, offsets: (order, offsets[1:]), r"offsets must be \[E \+ 1\] = \[3\], got \[2\]"),
        (lambda order, offsets: (order.long(), offsets), "order must be int32, got int64"),
        (lambda order, offsets: (order.repeat(2)[::2], offsets), r"order must be contiguous, got strides \[2\]"),
    ],
)
def test_expert_ffn_refuses_a_routing_that_does_not_fit(change, message):
    x, weight = torch.zeros(5, 4), torch.zeros(2, 4, 4)
    index = torch.zeros(5, dtype=torch.long)
    with pytest.raises((ValueError, RuntimeError), match="expert_ffn: " + message):
        ops.expert_ffn(x, weight, weight, weight, index, routing=change(*ops.route_tokens(index, 2)))


def test_opcheck(device):
    index = random_index(9, 2, experts=3).to(device)
    torch.library.opcheck(torch.ops.synergen.route_tokens, (index, 3))
    x, gate, down = (torch.randn(*shape, device=device) for shape in ((9, 4), (3, 8, 4), (3, 4, 8)))
    routing = ops.route_tokens(index, 3)
    torch.library.opcheck(torch.ops.synergen.expert_ffn, (x, gate, gate, down, index, None, *routing))
    torch.library.opcheck(torch.ops.synergen.expert_ffn_train, (x, gate, gate, down, index, None, *routing))


def test_under_compile(device):
    def routed(x, gate, down, index):
        return ops.expert_ffn(x, gate, gate, down, index, routing=ops.route_tokens(index, 3))

    args = [torch.randn(*shape, device=device) for shape in ((9, 4), (3, 8, 4), (3, 4, 8))]
    args.append(random_index(9, experts=3).to(device))
    assert torch.equal(torch.compile(routed, fullgraph=True)(*args), routed(*args))


def test_plain_arrays():
    order, offsets = kernels.route_tokens(random_index(20, experts=4).numpy(), 4)
    wanted = reference.route_tokens(random_index(20, experts=4), 4)
    assert order.tolist() == wanted[0].tolist() and offsets.tolist() == wanted[1].tolist()
