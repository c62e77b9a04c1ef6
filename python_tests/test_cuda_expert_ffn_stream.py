"""expert_ffn of at most 64 pairs by the emulator, whose weights stream from memory: see test_cuda_emulated.py."""

import ctypes

import emulator
import pytest
import torch
from cuda_cases import UNPACKED, same_bits_under_every_schedule
from test_expert_ffn import inputs, plain

from synergen_ext.ops import reference
from synergen_ext.testing import DTYPES, assert_as_accurate, to_float64

SMALL = {}  # test_cuda_expert_ffn.py has one for the op


def make(*sizes, lay=None, **options):
    args = inputs(*sizes, **options, grad=False)
    if lay is not None:
        args = (*(lay(a) for a in args[:4]), *args[4:])
    return args if len(args) == 6 else (*args, None)


def check(emulated, *args):
    """The rival computes in the dtype of x: on tensor cores the hidden layer has it too."""
    ours = emulated.expert_ffn(*args)
    assert_as_accurate(ours, plain(*args), reference.expert_ffn(*to_float64(args)), "expert_ffn")
    return ours


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        for dim, hidden in ((1, 1), (24, 40), (136, 72), (37, 150)):
            for tokens in (1, 9):
                yield "expert_ffn", make(tokens, dim, hidden, dtype=dtype)
        for lay in UNPACKED:
            yield "expert_ffn", make(3, 16, 24, dtype=dtype, lay=lay)
    yield "expert_ffn", make(20, 64, 64, 2, 3, dtype=torch.bfloat16)
    yield "expert_ffn", make(2, 128, 256, 3, 4, dtype=torch.bfloat16)  # one launch
    yield "expert_ffn", make(9, 64, 64, 2, dtype=torch.bfloat16, expert_dtype=torch.float32)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64])
def test_rows(emulated, tokens, dtype):
    """Every number of tiles of 8 rows; beyond 8 rows the depth of the second product is split over blocks."""
    check(emulated, *make(tokens, 64, 288, 1, dtype=dtype))
    check(emulated, *make(tokens, 64, 64, 2, dtype=dtype))


# Depths of less than a chunk, of whole rings and of some more, for every number of warps to a tile.
@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (8, 16), (72, 136), (256, 512), (264, 1032), (2056, 40), (77, 130)])
def test_sizes(emulated, sizes, dtype):
    check(emulated, *make(3, *sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_float32_experts(emulated, dtype):
    check(emulated, *make(9, 40, 24, 3, 2, dtype=dtype, expert_dtype=torch.float32))
    check(emulated, *make(9, 37, 25, 2, dtype=dtype, expert_dtype=torch.float32))


@pytest.mark.parametrize("lay", UNPACKED)
def test_rows_that_cannot_be_read_in_packs(emulated, lay, dtype):
    check(emulated, *make(3, 16, 24, dtype=dtype, lay=lay))


@pytest.mark.parametrize("layout", ["sliced", "stepped", "transposed"])
def test_layouts(emulated, layout, dtype):
    check(emulated, *make(5, 24, 40, top_k=2, dtype=dtype, layout=layout))


@pytest.mark.parametrize("experts, top_k", [(4, 2), (3, 5), (70, 1), (1, 1)])
def test_routing(emulated, experts, top_k, dtype):
    check(emulated, *make(12, 16, 32, experts, top_k, dtype=dtype))


def check_no_expert(emulated, args, token):
    """Of three experts: an index past them adds nothing, and `token` has no other; a negative one makes NaN of its
    token alone."""
    args[4].view(-1)[::2] += 3
    args[4][token] = 2**40
    y = check(emulated, *args)
    assert not y[token].any()
    args[4][1] = -1
    again = emulated.expert_ffn(*args)
    assert again[1].isnan().all()
    again[1] = y[1]
    assert torch.equal(again, y)
    args[4].fill_(3)
    assert not emulated.expert_ffn(*args).any()


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("tokens", [6, 20])
def test_an_index_that_names_no_expert(emulated, tokens, top_k):
    """Past the experts it adds nothing; a negative one makes NaN of its token."""
    for dtype in (torch.bfloat16, torch.float32):
        args = make(tokens, 32, 32, 3, top_k, dtype=dtype)
        check_no_expert(emulated, args, 4)


def test_rows_do_not_touch(emulated):
    """NaN in one token stays there, though tokens share every matrix instruction."""
    for dtype in (torch.bfloat16, torch.float32):
        x, *rest = make(11, 72, 40, dtype=dtype)
        y = emulated.expert_ffn(x, *rest)
        x[3] = torch.nan
        broken = emulated.expert_ffn(x, *rest)
        assert broken[3].isnan().all()
        broken[3] = y[3]
        assert torch.equal(broken, y)


class Stats(ctypes.Structure):
    """The first counts of csrc/simt/emulator.h's Stats."""

    _fields_ = [("launches", ctypes.c_uint64), ("switches", ctypes.c_uint64), ("barriers", ctypes.c_uint64)]


def launches(emulated, call):
    """How many launches a call takes in the emulator."""
    library = ctypes.CDLL(str(emulated.library))
    library.simt_stats.restype = ctypes.POINTER(Stats)
    emulated.schedule()
    call()
    return library.simt_stats().contents.launches


# One launch of whole rings, for every number of pairs and of experts; the last has more rounds than blocks.
SINGLE = [(1, 128, 256), (2, 256, 128, 1), (3, 128, 384, 2), (8, 256, 256, 5), (2, 128, 256, 3, 4), (4, 256, 128, 2, 2)]
SINGLE += [(1, 128, 256, 9, 8), (5, 1024, 128, 2), (2, 128, 2048)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SINGLE)
def test_one_launch(emulated, sizes, dtype):
    check(emulated, *make(*sizes, dtype=dtype))


def test_one_launch_is_what_it_says(emulated):
    if not isinstance(emulated, emulator.Emulated):
        pytest.skip("the emulator counts launches")

    def count(*sizes):
        args = make(*sizes, dtype=torch.bfloat16)
        return launches(emulated, lambda: emulated.expert_ffn(*args))

    assert all(count(*sizes) == 1 for sizes in SINGLE)
    # A pair too many, rows of other lengths, rounds that are not whole.
    assert all(count(*sizes) > 1 for sizes in ((9, 128, 256), (2, 160, 256), (2, 128, 288), (2, 128, 128)))


@pytest.mark.parametrize("top_k", [None, 2])
def test_one_launch_and_an_index_that_names_no_expert(emulated, top_k):
    check_no_expert(emulated, make(4, 128, 256, 3, top_k, dtype=torch.bfloat16), 2)


def spread(t):
    """The same, with gaps between rows, and in all but the last dimension."""
    wide = t.new_full([2 * n for n in t.shape[:-1]] + [t.shape[-1] + 16], 1)
    return wide[(*(slice(0, None, 2) for _ in t.shape[:-1]), slice(t.shape[-1]))].copy_(t)


@pytest.mark.parametrize("what", [(0,), (1, 2, 3), (4, 5)])
def test_one_launch_reads_where_strides_say(emulated, what):
    args = list(make(4, 128, 256, 3, 2, dtype=torch.bfloat16))
    for i in what:
        args[i] = spread(args[i])
    check(emulated, *args)
    check(emulated, *args[:5], args[5].float())


def test_one_launch_under_every_schedule(emulated):
    args = make(2, 128, 256, 3, 4, dtype=torch.bfloat16)
    same_bits_under_every_schedule(emulated, lambda: emulated.expert_ffn(*args))


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
def test_one_launch_has_no_races():
    raced = emulator.load("race")
    for policy, seed in ((0, 0), (2, 7)):
        raced.schedule(policy, seed)
        for sizes in ((2, 128, 256, 3, 4), (1, 128, 2048, 1)):
            raced.expert_ffn(*make(*sizes, dtype=torch.bfloat16))
