"""decode_attention by the emulator: see test_cuda_emulated.py."""

import emulator
import pytest
import torch
from cuda_cases import UNPACKED, check, same_bits_under_every_schedule

from synergen_ext.testing import DTYPES, LAYOUTS, laid_out, normal


def decode_args(lengths, keys, heads, dim, dtype=torch.bfloat16, starts=None, scale=None, outside=torch.nan):
    """A call of rows with these lengths, whose cache holds `outside` where no row may look."""
    q_heads, kv_heads = heads
    q = normal(len(lengths), q_heads, dim, dtype=dtype)
    k, v = (normal(len(lengths), keys, kv_heads, dim, dtype=dtype, seed=s) for s in (1, 2))
    for row, (length, start) in enumerate(zip(lengths, starts or [0] * len(lengths), strict=True)):
        for cache in (k, v):
            cache[row, length:] = outside
            cache[row, :start] = outside
    return q, k, v, torch.tensor(lengths, dtype=torch.int64), None if starts is None else torch.tensor(starts), scale


#: One call for each kernel: tensor cores and FMA, a row in one block and in several.
PATHS = {
    "mma": lambda: decode_args([16, 37], 40, (4, 2), 64, starts=[0, 3]),
    "mma-split": lambda: decode_args([300, 514], 530, (3, 1), 64, starts=[0, 9]),
    "fma": lambda: decode_args([3, 70], 70, (3, 1), 24, torch.float32, starts=[0, 3]),
    "fma-split": lambda: decode_args([300, 514], 530, (2, 1), 16, torch.float32, starts=[0, 9]),
}
#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {"decode_attention": PATHS["mma-split"]}


def unpacked(which, lay, dim, dtype):
    """Only one of q, k and v lies so that 16 bytes cannot be read at once."""
    args = list(decode_args([19, 30], 30, (4, 2), dim, dtype))
    args[which] = lay(args[which])
    return args


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    for path in PATHS.values():
        yield "decode_attention", path()
    for dtype in DTYPES:
        for dim in (5, 40, 64):
            yield "decode_attention", decode_args([0, 1, 17], 17, (3, 1), dim, dtype)
        for which in range(3):
            for lay in UNPACKED:
                yield "decode_attention", unpacked(which, lay, 64, dtype)


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
@pytest.mark.parametrize("path", PATHS)
def test_decode_attention_has_no_races_on_any_path(path):
    raced = emulator.load("race")
    for policy, seed in ((0, 0), (2, 7)):
        raced.schedule(policy, seed, 2)
        raced.decode_attention(*PATHS[path]())


@pytest.mark.parametrize("path", PATHS)
def test_decode_attention_has_the_same_bits_under_every_schedule(emulated, path):
    args = PATHS[path]()
    same_bits_under_every_schedule(emulated, lambda: emulated.decode_attention(*args), resident_blocks=2)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (4, 1), (7, 1), (34, 2)])
@pytest.mark.parametrize("dim", [64, 128, 72])
def test_decode_attention_of_groups(emulated, heads, dim, dtype):
    """One to seventeen query heads for each of keys and values: eight are answered at once."""
    check(emulated, "decode_attention", *decode_args([33, 20], 40, heads, dim, dtype))


@pytest.mark.parametrize("dim", [1, 3, 8, 40, 64, 128, 136, 300])
def test_decode_attention_of_dims(emulated, dim, dtype):
    check(emulated, "decode_attention", *decode_args([21, 5], 21, (2, 1), dim, dtype))


@pytest.mark.parametrize("keys", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 257])
def test_decode_attention_of_one_block(emulated, keys, dtype):
    """Steps of a warp are 16 and 32 keys, turns of a block 128 and 256."""
    check(emulated, "decode_attention", *decode_args([keys], keys, (2, 1), 64, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_of_borders(emulated, dtype):
    """Splits are 256 keys, counted from a row's start."""
    lengths = [0, 1, 255, 256, 257, 511, 512, 513, 600, 769, 770]
    check(emulated, "decode_attention", *decode_args(lengths, 770, (2, 1), 64, dtype))
    starts = [0, 1, 3, 1, 1, 256, 255, 1, 600, 513, 0]
    check(emulated, "decode_attention", *decode_args(lengths, 770, (2, 1), 64, dtype, starts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keys", [511, 512, 513])
def test_decode_attention_where_one_block_ends(emulated, keys, dtype):
    check(emulated, "decode_attention", *decode_args([keys], keys, (1, 1), 64, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [16, 64])
def test_decode_attention_layouts(emulated, layout, dim, dtype):
    q, k, v, *rest = decode_args([19, 30], 30, (4, 2), dim, dtype, starts=[2, 0])
    args = (*(laid_out(t, layout) for t in (q, k, v)), *(laid_out(t, layout) for t in rest[:2]), None)
    check(emulated, "decode_attention", *args)


@pytest.mark.parametrize("lay", UNPACKED)
@pytest.mark.parametrize("which", range(3))
def test_decode_attention_of_what_cannot_be_read_in_packs(emulated, which, lay, dtype):
    for dim in (40, 64):
        check(emulated, "decode_attention", *unpacked(which, lay, dim, dtype))


def test_decode_attention_of_dims_that_fill_no_pack_in_rows_that_do(emulated, dtype):
    q, k, v, *rest = decode_args([19, 30], 30, (4, 2), 13, dtype)
    q, k, v = (t.new_full((*t.shape[:-1], 16), torch.nan)[..., :13].copy_(t) for t in (q, k, v))
    check(emulated, "decode_attention", q, k, v, *rest)


def test_decode_attention_in_the_layout_of_a_cache(emulated, dtype):
    """[layers, B, Hkv, S, Dh], one layer, transposed: no copy."""
    q, k, v, lengths, _, _ = decode_args([9, 16], 16, (4, 2), 64, dtype)
    caches = [laid_out(t.transpose(1, 2), "contiguous")[None].repeat(2, 1, 1, 1, 1) for t in (k, v)]
    check(emulated, "decode_attention", q, *(c[1].transpose(1, 2) for c in caches), lengths, None, None)


def test_decode_attention_of_a_row_depends_on_its_keys_alone(emulated):
    """The same bits alone, in a batch, padded on the left, and in a cache of any size up to 512 and beyond."""
    q, k, v, _, _, _ = decode_args([200], 200, (2, 1), 64)
    wanted = emulated.decode_attention(q, k, v, torch.tensor([200]), None, None)
    for keys, start in ((512, 0), (512, 111), (600, 0), (600, 300)):
        wide = [t.new_full((2, keys, 1, 64), torch.nan) for t in (k, v)]
        for cache, own in zip(wide, (k, v), strict=True):
            cache[1, start : start + 200] = own[0]
        rows = torch.tensor([0, start + 200]), torch.tensor([0, start])
        got = emulated.decode_attention(q.repeat(2, 1, 1), *wide, *rows, None)
        assert torch.equal(got[1], wanted[0]) and not got[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [512, 600])
def test_decode_attention_of_large_logits(emulated, keys, dtype):
    """Logits of thousands: one key has all the weight, wherever it lies, also in an early step of a warp."""
    q, k, v, _, _, _ = decode_args([keys], keys, (2, 1), 64, dtype)
    for at in (0, 20, 299, keys - 1):
        far = (k * 0 - 60 * q[:, None, :1].sign()).clone()
        far[:, at] *= -1
        got = emulated.decode_attention(q[:, :1], far, v, torch.tensor([keys]), None, 1.0)
        assert torch.equal(got[0, 0], v[0, at, 0])
    low = -60 * q[:, None, :1].sign().expand_as(k)
    check(emulated, "decode_attention", q[:, :1], low, v, torch.tensor([keys]), None, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [40, 600])
def test_decode_attention_of_equal_keys(emulated, keys, dtype):
    """Equal weights, and so the mean; of equal values, that value."""
    q, k, v, lengths, _, _ = decode_args([keys], keys, (2, 1), 64, dtype)
    check(emulated, "decode_attention", q, k[:, :1].expand_as(k), v, lengths, None, None)
    same = v[:, :1].expand_as(v)
    got = emulated.decode_attention(q, k, same, lengths, None, None)
    torch.testing.assert_close(got, same[:, 0].expand_as(got), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_decode_attention_shows_nan_where_it_was_put(emulated, path, which):
    q, k, v, lengths, starts, _ = PATHS[path]()
    if which == "q":
        q[1, 0, 3] = torch.nan
    else:
        (k if which == "k" else v)[1, 20, 0, 3] = torch.nan
    found = emulated.decode_attention(q, k, v, lengths, starts, None).isnan()
    group = q.shape[1] // k.shape[2]
    wanted = torch.zeros_like(found)
    heads = slice(0, 1) if which == "q" else slice(0, group)
    wanted[1, heads, 3 if which == "v" else slice(None)] = True
    assert torch.equal(found, wanted)


def test_decode_attention_stays_inside_the_cache_whatever_a_row_asks(emulated):
    """A GPU cannot refuse: the nearest length and start inside are meant."""
    for path in PATHS.values():
        q, k, v, lengths, _, _ = path()
        k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
        most = torch.iinfo(torch.int64).max
        for length, start, meant in ((most, -most, (k.shape[1], 0)), (-5, 0, (0, 0)), (most, most, (0, 0))):
            got = emulated.decode_attention(q, k, v, *(torch.full_like(lengths, n) for n in (length, start)), None)
            wanted = emulated.decode_attention(q, k, v, *(torch.full_like(lengths, n) for n in meant), None)
            assert torch.equal(got, wanted)


def test_decode_attention_without_keys_or_rows(emulated, dtype):
    for args in (decode_args([0, 0], 0, (2, 1), 64, dtype), decode_args([0], 530, (2, 1), 64, dtype)):
        assert not emulated.decode_attention(*args).any()
    assert emulated.decode_attention(*decode_args([], 5, (2, 1), 64, dtype)).shape == (0, 2, 64)


def test_decode_attention_of_a_scale(emulated, dtype):
    check(emulated, "decode_attention", *decode_args([30], 30, (2, 1), 64, dtype, scale=0.3))
