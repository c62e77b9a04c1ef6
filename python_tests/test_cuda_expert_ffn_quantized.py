"""expert_ffn_quantized by the emulator: see test_cuda_emulated.py."""

import emulator
import pytest
import torch
from cuda_cases import UNPACKED, cut, same_bits_under_every_schedule, spaced
from test_cuda_expert_ffn_stream import launches, spread
from test_expert_ffn import plain
from test_expert_ffn_quantized import FORMATS, inputs

from synergen_ext import ops
from synergen_ext.ops import reference
from synergen_ext.testing import DTYPES, LAYOUTS, assert_as_accurate, to_float64


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
        9, 128, 256, 3, 2, dtype=torch.bfloat16, bits=4, groups=(32, 64), weight_dtype=torch.float32
    ),
}


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        for bits, dim, hidden in ((8, 5, 3), (8, 64, 144), (4, 8, 16), (4, 160, 96)):
            for tokens in (1, 9):
                yield "expert_ffn_quantized", (*inputs(tokens, dim, hidden, 1, dtype=dtype, bits=bits), None)
        for lay in UNPACKED[:2]:
            yield "expert_ffn_quantized", (*laid(lay, inputs(3, 64, 64, 1, dtype=dtype, bits=4, groups=(32, 32))), None)
        yield "expert_ffn_quantized", (*inputs(3, 160, 96, 1, dtype=dtype, bits=4, groups=(32, 32)), None)
        yield "expert_ffn_quantized", (*inputs(3, 64, 256, 1, dtype=dtype, bits=8), None)  # whole rings
    yield "expert_ffn_quantized", (*laid(cut, inputs(3, 40, 40, 1, dtype=torch.bfloat16, bits=8)), None)
    yield "expert_ffn_quantized", inputs(20, 64, 64, 2, 4, dtype=torch.bfloat16, bits=8)
    for bits, hidden in ((8, 256), (4, 512)):  # one launch; of one expert what is read last has nothing behind it
        args = inputs(3, hidden, hidden, 1, dtype=torch.bfloat16, bits=bits, groups=(64, 128))
        yield "expert_ffn_quantized", (*args, None)
        yield "expert_ffn_quantized", inputs(2, hidden, hidden, 3, 2, dtype=torch.bfloat16, bits=bits, groups=(64, 128))


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


@pytest.mark.parametrize("bits, hidden", [(8, 800), (4, 1600)])
def test_depths_of_several_rings_and_warps(emulated, bits, hidden, dtype):
    check(emulated, *inputs(3, 32, hidden, dtype=dtype, bits=bits))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(emulated, layout, dtype):
    check(emulated, *inputs(3, 64, 64, top_k=2, dtype=dtype, bits=8, layout=layout))


@pytest.mark.parametrize("bits", [8, 4])
def test_only_some_of_it_can_be_read_in_packs(emulated, bits, dtype):
    """Rows that end within an access of 16 bytes, though all begin at one; scales with gaps."""
    args = list(inputs(3, 24, 32, dtype=dtype, bits=bits))
    for i in (1, 2):
        row = args[i].shape[-1]
        wide = args[i].new_full((*args[i].shape[:-1], 32), 77)
        args[i] = wide[..., :row].copy_(args[i])
    check(emulated, *args)
    args = list(inputs(3, 64, 64, dtype=dtype, bits=4, groups=(32, 32)))
    check(emulated, *args[:4], *(spaced(a) for a in args[4:7]), args[7])


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
        args[7].fill_(3)
        assert not emulated.expert_ffn_quantized(*args, *((None,) if top_k is None else ())).any()


def test_nothing_to_add(emulated):
    for sizes in (dict(tokens=0), dict(dim=0), dict(hidden=0)):
        args = inputs(**sizes, bits=4)
        y = emulated.expert_ffn_quantized(*args, None)
        assert y.shape == args[0].shape and not y.any()
    *args, index, weight = inputs(4, 64, 64, top_k=2)
    assert not emulated.expert_ffn_quantized(*args, index[:, :0], weight[:, :0]).any()


# One launch of whole rings: 256 columns of 8 bits, 512 of 4; the last of each has more rounds than blocks.
SINGLE = [
    (8, (2, 256, 512)),
    (8, (2, 256, 256, 3, 3)),
    (8, (3, 512, 256, 3, 2)),
    (8, (8, 256, 256, 9)),
    (8, (2, 256, 1792)),
]
SINGLE += [(4, (2, 512, 512)), (4, (2, 512, 512, 3, 4)), (4, (5, 512, 1024, 4)), (4, (2, 512, 2048))]


@pytest.mark.parametrize("groups", [(None, None), (64, 128), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits, sizes", SINGLE)
def test_one_launch(emulated, bits, sizes, groups, dtype):
    check(emulated, *inputs(*sizes, dtype=dtype, bits=bits, groups=groups))


def test_one_launch_is_what_it_says(emulated):
    if not isinstance(emulated, emulator.Emulated):
        pytest.skip("the emulator counts launches")

    def count(*sizes, **options):
        args = inputs(*sizes, dtype=torch.bfloat16, **options)
        return launches(emulated, lambda: emulated.expert_ffn_quantized(*args, *((None,) if len(args) == 8 else ())))

    for bits, sizes in SINGLE:
        assert count(*sizes, bits=bits, groups=(64, 64)) == 1
    assert count(9, 256, 512, bits=8) > 1
    assert count(2, 512, 512, bits=4, groups=(32, 64)) > 1
    assert count(2, 512, 512, bits=4, groups=(64, 32)) > 1
    assert count(2, 256, 512, bits=4) > 1
    assert count(2, 320, 512, bits=8) > 1


@pytest.mark.parametrize("bits, size", [(8, 256), (4, 512)])
def test_one_launch_under_every_schedule(emulated, bits, size):
    args = inputs(2, size, size, 3, 3, dtype=torch.bfloat16, bits=bits, groups=(64, 128))
    same_bits_under_every_schedule(emulated, lambda: emulated.expert_ffn_quantized(*args))


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
@pytest.mark.parametrize("bits, sizes", [(8, (2, 256, 256, 3, 3)), (4, (2, 512, 512, 2, 2)), (8, (1, 256, 1792, 1))])
def test_one_launch_has_no_races(bits, sizes):
    raced = emulator.load("race")
    *args, routing = inputs(*sizes, dtype=torch.bfloat16, bits=bits, groups=(64, 128))
    args = (*args, routing) if len(args) == 8 else (*args, routing, None)
    for policy, seed in ((0, 0), (2, 7)):
        raced.schedule(policy, seed)
        raced.expert_ffn_quantized(*args)


@pytest.mark.parametrize("top_k", [None, 2])
def test_one_launch_and_an_index_that_names_no_expert(emulated, top_k):
    args = list(inputs(4, 256, 512, 3, top_k, dtype=torch.bfloat16))
    rest = (None,) if top_k is None else ()
    args[7].view(-1)[::2] += 3
    args[7][2] = 2**40
    y = check(emulated, *args)
    assert not y[2].any()
    args[7][1] = -1
    again = emulated.expert_ffn_quantized(*args, *rest)
    assert again[1].isnan().all()
    again[1] = y[1]
    assert torch.equal(again, y)
    args[7].fill_(3)
    assert not emulated.expert_ffn_quantized(*args, *rest).any()


@pytest.mark.parametrize("what", ["x", "weights", "scales", "routing"])
def test_one_launch_reads_where_strides_say(emulated, what):
    args = list(inputs(2, 256, 512, 3, 3, dtype=torch.bfloat16, groups=(64, 128)))
    for i in {"x": (0,), "weights": (1, 2, 3), "scales": (4, 5, 6), "routing": (7, 8)}[what]:
        args[i] = spread(args[i])
    check(emulated, *args)
    check(emulated, *args[:8], args[8].float())


@pytest.mark.parametrize("lay", UNPACKED)
def test_rows_of_whole_rings_that_cannot_be_read_in_packs(emulated, lay):
    check(emulated, *laid(lay, inputs(3, 256, 512, dtype=torch.bfloat16, bits=8, groups=(64, 64))))
