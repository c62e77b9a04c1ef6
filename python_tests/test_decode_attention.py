"""decode_attention: values against float64, the model's cache, padding, extremes, errors, torch.compile."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from synergen_ext import _C, kernels, ops
from synergen_ext.model.cache import KVCache
from synergen_ext.ops import eager, reference
from synergen_ext.testing import LAYOUTS, ODD_SIZES, assert_as_accurate, laid_out, normal, to_float64

NAN = float("nan")


def inputs(lengths, keys, heads, dim, dtype, device="cpu", starts=None, outside=NAN):
    """Rows of these lengths; the caches hold `outside` where no row may look."""
    q_heads, kv_heads = heads
    q = normal(len(lengths), q_heads, dim, dtype=dtype, device=device)
    k, v = (normal(len(lengths), keys, kv_heads, dim, dtype=dtype, device=device, seed=s) for s in (1, 2))
    for row, length in enumerate(lengths):
        for cache in (k, v):
            cache[row, length:] = outside
            cache[row, : starts[row] if starts else 0] = outside
    places = [None if p is None else torch.tensor(p, device=device) for p in (lengths, starts)]
    return q, k, v, *places


def check(args, rival=None, **options):
    """Against float64, at most twice as far off as PyTorch at the dtype of args."""
    ours, truth = (
        f(*a, **options) for f, a in ((ops.decode_attention, args), (reference.decode_attention, to_float64(args)))
    )
    assert_as_accurate(ours, (rival or reference.decode_attention)(*args, **options), truth, "decode_attention")
    return ours


@pytest.mark.parametrize("dim", ODD_SIZES)
def test_accurate(dim, dtype, device):
    check(inputs([9, 1, 5], 9, (4, 2), dim, dtype, device))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (7, 1), (18, 2)])
def test_accurate_for_every_group(heads, dtype, device):
    check(inputs([33, 20], 40, heads, 24, dtype, device, starts=[0, 7]))


def test_accurate_beside_torch(dtype, device):
    args = inputs([300, 77, 256], 300, (4, 2), 64, dtype, device, starts=[0, 0, 11], outside=0.0)
    check(args, rival=eager.decode_attention)
    check(args, rival=eager.decode_attention, scale=0.3)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 513])
def test_accurate_where_tiles_and_splits_end(length, device):
    for start in (0, 1, length - 1):
        check(inputs([length], 520, (2, 1), 16, torch.float32, device, starts=[start]))


def test_is_scaled_dot_product_attention(device):
    q, k, v, lengths = inputs([12, 12], 12, (4, 2), 16, torch.float64, device)[:4]
    wanted = F.scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)
    torch.testing.assert_close(ops.decode_attention(q, k, v, lengths), wanted[:, :, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    args = inputs([19, 30], 30, (4, 2), 13, dtype, device, starts=[2, 0])
    assert check([laid_out(t, layout) for t in args]).is_contiguous()


def test_cache_of_the_model(dtype, device):
    """[layers, B, Hkv, S, Dh] as it is, against the model's own attention over the filled part."""
    cache = KVCache(2, 3, 2, 20, 16, dtype, device)
    k, v = (normal(3, 2, 11, 16, dtype=dtype, device=device, seed=s) for s in (1, 2))
    k, v = cache.append(1, k, v)
    q = normal(3, 4, 16, dtype=dtype, device=device)
    lengths = torch.full((3,), 11, device=device)
    views = cache.keys[1].transpose(1, 2), cache.values[1].transpose(1, 2)
    ours = ops.decode_attention(q, *views, lengths)
    wide = (t.double() for t in (q[:, :, None], k, v))
    truth = F.scaled_dot_product_attention(*wide, enable_gqa=True)[:, :, 0]
    rival = F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    assert_as_accurate(ours, rival, truth)


@pytest.mark.parametrize("starts", [None, [0, 0, 3, 5, 0]])
def test_rows_without_keys_are_zero(starts, dtype, device):
    out = check(inputs([0, 4, 3, 2, 0], 6, (4, 2), 10, dtype, device, starts))
    empty = [length <= start for length, start in zip([0, 4, 3, 2, 0], starts or [0] * 5, strict=True)]
    assert not out[torch.tensor(empty)].any() and out[1].all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 1, 8), (2, 0, 2, 1, 8), (2, 5, 0, 1, 8), (2, 5, 2, 1, 0)])
def test_empty(shape, dtype, device):
    batch, keys, heads, kv_heads, dim = shape
    q, k = torch.ones(batch, heads, dim), torch.ones(batch, keys, kv_heads, dim)
    q, k = (t.to(device, dtype) for t in (q, k))
    out = ops.decode_attention(q, k, k, torch.zeros(batch, dtype=torch.int64, device=device))
    assert out.shape == q.shape and not out.any()


def test_a_row_depends_on_its_keys_alone(dtype, device):
    """Not on the batch, the padding on either side or the cache's size: the same bits."""
    q, k, v, _, _ = inputs([200], 200, (4, 2), 24, dtype, device)
    wanted = ops.decode_attention(q, k, v, torch.tensor([200], device=device))
    for keys, start in ((200, 0), (300, 77), (512, 300)):
        wide = [t.new_full((3, keys, 2, 24), NAN) for t in (k, v)]
        for cache, own in zip(wide, (k, v), strict=True):
            cache[1, start : start + 200] = own[0]
        places = torch.tensor([[0, start + 200, 0], [0, start, 0]], device=device)
        assert torch.equal(ops.decode_attention(q.repeat(3, 1, 1), *wide, *places)[1], wanted[0])


def test_large_logits(device):
    """Logits of thousands, rising, falling and equal: no overflow, and the largest has all the weight."""
    q, k, v, lengths, _ = inputs([200], 200, (2, 1), 16, torch.float32, device)
    for factor in (-1.0, 0.0, 1.0):
        slope = factor * torch.linspace(-300, 300, 200, device=device)[None, :, None, None]
        far = slope * q[:, None, :1]
        check((q[:, :1], far, v, lengths))
    at = (far[0, :, 0] @ q[0, 0]).argmax()
    assert torch.equal(ops.decode_attention(q[:, :1], far, v, lengths, scale=1.0)[0, 0], v[0, at, 0])


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_shows_where_it_was_put(which, dtype, device):
    q, k, v, lengths, starts = inputs([100, 37], 100, (4, 2), 24, dtype, device, starts=[0, 3])
    if which == "q":
        q[1, 2, 5] = NAN
    else:
        (k if which == "k" else v)[1, 20, 1, 5] = NAN
    found = ops.decode_attention(q, k, v, lengths, starts).isnan()
    wanted = torch.zeros_like(found)
    wanted[1, 2 : 3 if which == "q" else 4, 5 if which == "v" else slice(None)] = True
    assert torch.equal(found, wanted)


def test_same_result_for_any_number_of_threads():
    args = inputs([500, 3, 77], 500, (8, 4), 32, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.decode_attention(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


EVERY_ISA = """
import torch
from synergen_ext import ops
from synergen_ext.ops import reference
from synergen_ext.testing import assert_as_accurate, normal
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for dim in (7, 64, 77):
        q, k, v = normal(2, 4, dim, dtype=dtype), *(normal(2, 90, 2, dim, dtype=dtype, seed=s) for s in (1, 2))
        args = torch.tensor([90, 41]), torch.tensor([0, 5])
        truth = reference.decode_attention(q.double(), k.double(), v.double(), *args)
        assert_as_accurate(ops.decode_attention(q, k, v, *args), reference.decode_attention(q, k, v, *args), truth)
"""


@pytest.mark.parametrize("isa", _C.available_isas())
def test_every_instruction_set(isa):
    subprocess.run([sys.executable, "-c", EVERY_ISA], env={**os.environ, "SYNERGEN_ISA": isa}, check=True)


# --- As an op ---------------------------------------------------------------------------------


def test_a_gradient_is_refused(device):
    q, k, v, lengths, _ = inputs([4], 4, (2, 1), 8, torch.float32, device)
    out = ops.decode_attention(q.requires_grad_(), k, v, lengths)
    with pytest.raises(RuntimeError, match="decode_attention: there is no gradient; use .*scaled_dot_product"):
        out.sum().backward()
    with torch.no_grad():
        assert not ops.decode_attention(q, k, v, lengths).requires_grad


def test_opcheck(dtype, device):
    args = inputs([4, 7], 7, (4, 2), 8, dtype, device, starts=[0, 2], outside=0.0)
    op = torch.ops.synergen.decode_attention.default
    torch.library.opcheck(op, args[:4])
    torch.library.opcheck(op, (*args, 0.5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    def step(q, k, v, lengths, starts):
        return ops.decode_attention(q * 2, k, v, lengths + 1, starts).relu()

    args = inputs([4, 7], 8, (4, 2), 8, torch.float32, device, starts=[0, 2], outside=0.0)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(*args), step(*args))


def test_arrays_without_torch():
    args = inputs([4, 7], 8, (4, 2), 8, torch.float32, starts=[0, 2])
    wanted = ops.decode_attention(*args, scale=0.4)
    got = kernels.decode_attention(*(t.numpy() for t in args), scale=0.4)
    assert torch.equal(torch.from_numpy(got), wanted)
    assert kernels.decode_attention(*(t.numpy() for t in args[:4])).shape == (2, 4, 8)


Q, K, L = torch.ones(2, 4, 8), torch.ones(2, 5, 2, 8), torch.tensor([3, 5])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((Q[0], K, K, L), r"decode_attention: q must be \[B, Hq, Dh\], got \[4, 8\]"),
        ((Q.long(), K, K, L), "q must be float64, float32, bfloat16 or float16, got int64"),
        ((Q, K[0], K, L), r"k_cache must be \[B, S, Hkv, Dh\], got \[5, 2, 8\]"),
        ((Q, K[:1], K, L), r"k_cache must be \[B, S, Hkv, Dh\] = \[2, 5, 2, 8\], got \[1, 5, 2, 8\]"),
        ((Q, K[..., :7], K, L), r"k_cache must be .* = \[2, 5, 2, 8\], got \[2, 5, 2, 7\]"),
        ((Q, K, K[:, :4], L), r"v_cache must be as k_cache = \[2, 5, 2, 8\], got \[2, 4, 2, 8\]"),
        ((Q, K.half(), K, L), "k_cache must be float32 like q, got float16"),
        ((Q, K, K.half(), L), "v_cache must be float32 like q, got float16"),
        ((Q[:, :3], K, K, L), "Hq must be a multiple of Hkv, got 3 and 2"),
        ((Q, K[:, :, :0], K[:, :, :0], L), "Hq must be a multiple of Hkv, got 4 and 0"),
        ((Q, K, K, L[:1]), r"lengths must be \[B\] = \[2\], got \[1\]"),
        ((Q, K, K, L.int()), "lengths must be int64, got int32"),
        ((Q, K, K, L + 1), r"lengths must be in \[0, S\] = \[0, 5\], got 6 in row 1"),
        ((Q, K, K, L - 4), r"lengths must be in \[0, S\] = \[0, 5\], got -1 in row 0"),
        ((Q, K, K, L, L[0]), r"starts must be \[B\] = \[2\], got \[\]"),
        ((Q, K, K, L, L - 5), r"starts must be in \[0, S\] = \[0, 5\], got -2 in row 0"),
        ((Q, K, K, L, None, NAN), "scale must be finite, got nan"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(*args)
