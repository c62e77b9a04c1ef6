"""expert_ffn_quantized by the emulator: see test_cuda_emulated.py."""

import pytest
import torch
from cuda_cases import UNPACKED
from test_expert_ffn import plain
from test_expert_ffn_quantized import FORMATS, inputs

from synergen_ext import ops
from synergen_ext.ops import reference
from synergen_ext.testing import DTYPES, assert_as_accurate, to_float64


def check(emulated, *args):
    """The rival computes in the dtype of x: on tensor cores the hidden layer has it too."""
    ours = emulated.expert_ffn_quantized(*args, *((None,) if len(args) == 8 else ()))
    x, gate, up, down, gate_scale, up_scale, down_scale, *routing = args
    pairs = ((gate, gate_scale), (up, up_scale), (down, down_scale))
    rival = plain(x, *(ops.dequantize_weight(*pair) for pair in pairs), *routing)
    assert_as_accurate(ours, rival, reference.expert_ffn_quantized(*to_float64(args)), "expert_ffn_quantized")
    return ours


#: A small call, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {
    "expert_ffn_quantized": lambda: inputs(
        5, 128, 256, 3, 2, dtype=torch.bfloat16, bits=4, groups=(32, 64), weight_dtype=torch.float32
    ),
}


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        for bits, dim, hidden in ((8, 5, 3), (8, 64, 144), (4, 8, 16), (4, 160, 96)):
            for tokens in (1, 9):
                yield "expert_ffn_quantized", (*inputs(tokens, dim, hidden, dtype=dtype, bits=bits), None)
        for lay in UNPACKED[:2]:
            yield "expert_ffn_quantized", (*laid(lay, inputs(3, 64, 64, dtype=dtype, bits=4, groups=(32, 32))), None)
    yield "expert_ffn_quantized", inputs(20, 64, 64, 2, 4, dtype=torch.bfloat16, bits=8)


def laid(lay, args):
    return tuple(lay(a) for a in args[:7]) + args[7:]


@pytest.mark.parametrize(("bits", "one", "other"), FORMATS)
def test_formats(emulated, bits, one, other, dtype):
    check(emulated, *inputs(3, dtype=dtype, bits=bits, groups=(one, other)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 33, 64, 65])
def test_rows(emulated, tokens, bits):
    """Every number of tiles of 8 rows; beyond 8 rows the depth is split over blocks; beyond 16 there are chunks."""
    check(emulated, *inputs(tokens, 64, 576, 1, dtype=torch.bfloat16, bits=bits))
    check(emulated, *inputs(min(tokens, 17), 64, 64, 2, bits=bits))


@pytest.mark.parametrize("sizes", [(1, 1, 8), (5, 3, 8), (77, 130, 8), (8, 16, 4), (24, 40, 4), (160, 288, 4)])
def test_sizes(emulated, sizes, dtype):
    dim, hidden, bits = sizes
    check(emulated, *inputs(3, dim, hidden, dtype=dtype, bits=bits))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lay", UNPACKED)
def test_rows_that_cannot_be_read_in_packs(emulated, lay, bits, dtype):
    check(emulated, *laid(lay, inputs(3, 64, 128, dtype=dtype, bits=bits, groups=(64, 64))))


@pytest.mark.parametrize("experts, top_k", [(4, 2), (3, 5), (70, 1)])
def test_routing(emulated, experts, top_k, dtype):
    check(emulated, *inputs(13, 32, 64, experts, top_k, dtype=dtype, bits=4, groups=(32, 32)))


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("tokens", [5, 40, 70])
def test_an_index_that_names_no_expert(emulated, tokens, top_k):
    """Past the experts it adds nothing; a negative one makes NaN of its token."""
    for dtype in (torch.bfloat16, torch.float32):
        args = list(inputs(tokens, 32, 32, 3, top_k, dtype=dtype))
        args[7].view(-1)[::2] += 3
        args[7][4] = 2**40
        y = check(emulated, *args)
        assert not y[4].any()
        args[7][1] = -1
        again = emulated.expert_ffn_quantized(*args, *((None,) if top_k is None else ()))
        assert again[1].isnan().all()
        again[1] = y[1]
        assert torch.equal(again, y)


def test_nothing_to_add(emulated):
    for sizes in (dict(tokens=0), dict(dim=0), dict(hidden=0)):
        args = inputs(**sizes, bits=4)
        y = emulated.expert_ffn_quantized(*args, None)
        assert y.shape == args[0].shape and not y.any()
    *args, index, weight = inputs(4, 64, 64, top_k=2)
    assert not emulated.expert_ffn_quantized(*args, index[:, :0], weight[:, :0]).any()
