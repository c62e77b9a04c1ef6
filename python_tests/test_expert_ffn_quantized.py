"""expert_ffn_quantized: values against float64 of the same integers and scales, what quantising keeps, routing, odd
sizes, layouts, errors, torch.compile."""

import pytest
import torch
from test_expert_ffn import plain

from synergen_ext import kernels, ops
from synergen_ext.ops import reference
from synergen_ext.testing import LAYOUTS, assert_as_accurate, laid_out, normal, to_float64

#: Bits, group of gate and up, group of down: of rows of 128 and 256.
FORMATS = [(8, None, None), (8, 64, 128), (4, None, None), (4, 32, 64), (4, 64, 256), (4, 128, 32)]


def inputs(
    tokens=5,
    dim=128,
    hidden=256,
    experts=2,
    top_k=None,
    dtype=torch.float32,
    weight_dtype=None,
    bits=8,
    groups=(None, None),
    layout="contiguous",
    device="cpu",
):
    """Outputs of size one: rows of the weights have length one, routing weights are in (0, 1)."""

    def quantised(*shape, seed, group):
        w = normal(*shape, dtype=torch.float64, seed=seed, device=device) * max(shape[-1], 1) ** -0.5
        return (laid_out(t, layout) for t in ops.quantize_weight(w.to(dtype), bits, group))

    x = laid_out(normal(tokens, dim, dtype=dtype, seed=0, device=device), layout)
    gate, gate_scale = quantised(experts, hidden, dim, seed=1, group=groups[0])
    up, up_scale = quantised(experts, hidden, dim, seed=2, group=groups[0])
    down, down_scale = quantised(experts, dim, hidden, seed=3, group=groups[1])
    shape = (tokens,) if top_k is None else (tokens, top_k)
    index = laid_out(normal(*shape, seed=4, device=device).mul(1e4).long() % max(experts, 1), layout)
    args = (x, gate, up, down, gate_scale, up_scale, down_scale, index)
    if top_k is None:
        return args
    weight = normal(*shape, dtype=torch.float64, seed=5, device=device).sigmoid()
    return (*args, laid_out(weight.to(weight_dtype or dtype), layout))


def check(*args):
    """The rival: PyTorch's own products of the weights at the dtype of x."""
    ours = ops.expert_ffn_quantized(*args)
    x, gate, up, down, gate_scale, up_scale, down_scale, *routing = args
    pairs = ((gate, gate_scale), (up, up_scale), (down, down_scale))
    rival = plain(x, *(ops.dequantize_weight(*pair) for pair in pairs), *routing)
    assert_as_accurate(ours, rival, reference.expert_ffn_quantized(*to_float64(args)), "expert_ffn_quantized")
    return ours


@pytest.mark.parametrize(("bits", "one", "other"), FORMATS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_accurate(tokens, bits, one, other, dtype, device):
    check(*inputs(tokens, dtype=dtype, bits=bits, groups=(one, other), device=device))


@pytest.mark.parametrize("sizes", [(1, 1, 8), (5, 3, 8), (77, 130, 8), (8, 16, 4), (24, 40, 4), (72, 136, 4)])
def test_sizes(sizes, dtype, device):
    dim, hidden, bits = sizes
    check(*inputs(7, dim, hidden, dtype=dtype, bits=bits, device=device))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 2), (3, 5)])
def test_top_k(experts, top_k, bits, dtype, device):
    check(*inputs(9, 64, 32, experts, top_k, dtype=dtype, bits=bits, device=device))
    check(*inputs(9, 64, 32, experts, top_k, dtype=dtype, weight_dtype=torch.float32, bits=bits, device=device))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, bits, dtype, device):
    check(*inputs(3, 64, 128, top_k=2, dtype=dtype, bits=bits, groups=(64, 64), layout=layout, device=device))


@pytest.mark.parametrize("top_k", [None, 2])
def test_an_index_past_the_experts_adds_nothing(top_k, dtype, device):
    args = list(inputs(20, 64, 64, experts=3, top_k=top_k, dtype=dtype, device=device))
    args[7] = torch.where(normal(*args[7].shape, seed=6, device=device) > 0, args[7], args[7] + 3)
    y = check(*args)
    nobody = (args[7] >= 3) if top_k is None else (args[7] >= 3).all(-1)
    assert nobody.any() and not y[nobody].any() and y[~nobody].any(-1).all()


@pytest.mark.parametrize("sizes", [dict(tokens=0), dict(dim=0), dict(hidden=0)])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_empty(bits, top_k, sizes, dtype, device):
    args = inputs(**sizes, top_k=top_k, dtype=dtype, bits=bits, device=device)
    y = ops.expert_ffn_quantized(*args)
    assert y.shape == args[0].shape and y.dtype == dtype and not y.any()


def test_no_experts_of_a_token(device):
    *args, index, weight = inputs(4, 64, 64, top_k=2, device=device)
    assert not ops.expert_ffn_quantized(*args, index[:, :0], weight[:, :0]).any()


def test_same_bits_for_any_number_of_threads(dtype):
    args = inputs(30, top_k=2, dtype=dtype)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(ops.expert_ffn_quantized(*args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


# ---- quantize_weight


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 64), (4, None), (4, 32), (4, 128)])
def test_quantising_rounds_to_the_nearest_step(bits, group, dtype, device):
    w = normal(3, 5, 256, dtype=dtype, device=device)
    values, scale = ops.quantize_weight(w, bits, group)
    assert values.dtype == (torch.int8 if bits == 8 else torch.uint8) and scale.dtype == dtype
    assert values.shape == (3, 5, 256 * bits // 8) and scale.shape == (3, 5, 256 // (group or 256))
    wide = reference.dequantize_weight(values, scale.double())
    step = scale.double().repeat_interleave(group or 256, -1)
    rounding = 1 + torch.finfo(dtype).eps * 2 ** (bits - 1)  # of the scale: the largest value may stand beyond 127
    assert ((wide - w.double()).abs() <= 0.5 * rounding * step).all()
    assert all(torch.equal(a, b) for a, b in zip(ops.quantize_weight(w, bits, group), (values, scale), strict=True))
    again = ops.quantize_weight(wide.to(torch.float64), bits, group)[0]
    assert torch.equal(again, values)


def test_four_bits_lie_as_documented():
    w = torch.arange(-7.0, 9).clamp(max=7)[None]  # of scale 1
    values, scale = ops.quantize_weight(w, 4)
    assert scale.tolist() == [[1.0]]
    halves = [n for byte in values[0].tolist() for n in (byte & 15, byte >> 4)]
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    assert [n - 8 for n in halves] == [w[0, i].item() for i in [*order, *(8 + i for i in order)]]
    assert torch.equal(ops.dequantize_weight(values, scale), w)


def test_a_group_of_zeros(dtype):
    for bits in (8, 4):
        values, scale = ops.quantize_weight(torch.zeros(2, 64, dtype=dtype), bits)
        assert (scale == 1).all() and not ops.dequantize_weight(values, scale).any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 8), 3), "quantize_weight: bits must be 8 or 4, got 3"),
        ((torch.ones(2, 12), 4), "w must have a multiple of 8 columns for 4 bits, got 12"),
        ((torch.ones(2, 128), 8, 32), "group must be a power of two that divides 128, at least 64, or None, got 32"),
        ((torch.ones(2, 128), 4, 16), "group must be a power of two that divides 128, at least 32, or None, got 16"),
        ((torch.ones(2, 192), 4, 96), "group must be a power of two that divides 192, at least 32, or None, got 96"),
        ((torch.ones(2, 96), 8, 64), "group must be a power of two that divides 96, at least 64, or None, got 64"),
        ((torch.tensor([[1.0, torch.inf]]), 8), "quantize_weight: w must be finite"),
    ],
)
def test_quantising_errors(args, message):
    with pytest.raises(ValueError, match=message):
        ops.quantize_weight(*args)


# ---- Around the op


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_other_backends(name, device):
    args = inputs(top_k=2, device=device)
    with ops.backend(name):
        other = ops.expert_ffn_quantized(*args)
    torch.testing.assert_close(ops.expert_ffn_quantized(*args), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck(bits, top_k, dtype, device):
    args = inputs(4, 32, 64, top_k=top_k, dtype=dtype, bits=bits, device=device)
    torch.library.opcheck(torch.ops.synergen.expert_ffn_quantized.default, args if top_k else (*args, None))


def test_a_gradient_is_refused(device):
    x, *rest = inputs(device=device)
    y = ops.expert_ffn_quantized(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="expert_ffn_quantized: there is no gradient; train with expert_ffn"):
        y.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    def block(x, *rest):
        return x + ops.expert_ffn_quantized(x * 2, *rest)

    args = inputs(12, 24, 16, top_k=2, device=device)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, dynamic=dynamic)(*args), block(*args))


@pytest.mark.parametrize("bits", [8, 4])
def test_arrays_without_torch(bits):
    args = inputs(6, 64, 128, top_k=2, bits=bits, groups=(64, 64))
    y = kernels.expert_ffn_quantized(*(a.numpy() for a in args))
    assert torch.equal(torch.from_numpy(y), ops.expert_ffn_quantized(*args))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(3), r"expert_ffn_quantized: x must be \[T, D\], got \[3\]"),
        (0, torch.ones(3, 64).long(), "x must be float64, float32, bfloat16 or float16, got int64"),
        (1, torch.ones(2, 128, 64), "gate must be int8 or uint8, got float32"),
        (1, torch.ones(128, 64).char(), r"gate must be \[E, F, D\], got \[128, 64\]"),
        (1, torch.ones(2, 128, 63).char(), r"gate must be \[E, F, D\] = \[2, 128, 64\], got \[2, 128, 63\]"),
        (2, torch.ones(2, 128, 32).byte(), "up must be int8 like gate, got uint8"),
        (2, torch.ones(1, 128, 64).char(), r"up must be \[E, F, D\] = \[2, 128, 64\], got \[1, 128, 64\]"),
        (3, torch.ones(2, 128, 64).char(), r"down must be \[E, D, F\] = \[2, 64, 128\], got \[2, 128, 64\]"),
        (4, torch.ones(2, 128, 1).half(), "gate_scale must be float32 like x, got float16"),
        (4, torch.ones(2, 128), r"gate_scale must be \[E, F, D / group\], got \[2, 128\]"),
        (4, torch.ones(2, 64, 1), r"gate_scale must be \[E, F, D / group\] = \[2, 128, 1\], got \[2, 64, 1\]"),
        (
            4,
            torch.ones(2, 128, 2),
            "gate_scale must divide 64 columns into groups of a power of two, at least 64, or be",
        ),
        (4, torch.ones(2, 128, 0), "gate_scale must divide 64 columns .* or be one for all, got 0"),
        (6, torch.ones(2, 64, 3), "down_scale must divide 128 columns into groups .* or be one for all, got 3"),
        (7, torch.zeros(2).long(), r"expert_index must be \[T\] = \[3\], got \[2\]"),
        (7, torch.tensor([0, -1, 0]), r"expert_index must not be negative, got -1 at \[1\]"),
        (8, torch.ones(3, 1), r"expert_weight must be as expert_index = \[3\], got \[3, 1\]"),
    ],
)
def test_errors(place, value, message):
    args = [*inputs(3, 64, 128), None]
    args[place] = value
    with pytest.raises(ValueError, match=message):
        ops.expert_ffn_quantized(*args)


def test_errors_of_four_bits():
    args = list(inputs(3, 64, 128, bits=4))
    x = torch.ones(3, 60)
    with pytest.raises(ValueError, match="D and F must be multiples of 8 with 4-bit weights, got 60 and 128"):
        ops.expert_ffn_quantized(x, *args[1:])
    args[1] = args[1][..., :-1]
    with pytest.raises(ValueError, match=r"gate must be \[E, F, D / 2\] = \[2, 128, 32\], got \[2, 128, 31\]"):
        ops.expert_ffn_quantized(*args)


def test_scales_of_gate_and_up_go_together():
    args = list(inputs(3, 256, 128, groups=(64, None)))
    args[5] = args[5][..., :1]
    with pytest.raises(ValueError, match=r"up_scale must be as gate_scale = \[2, 128, 4\], got \[2, 128, 1\]"):
        ops.expert_ffn_quantized(*args)
