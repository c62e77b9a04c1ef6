"""rope by the emulator: see test_cuda_emulated.py."""

import pytest
import torch
from cuda_cases import UNPACKED, check

from synergen_ext.ops import reference
from synergen_ext.testing import DTYPES, LAYOUTS, laid_out, normal


def rope_args(*tokens, heads=3, kv_heads=1, dim=16, dtype=torch.float32, layout="contiguous", most=5000):
    q = laid_out(normal(*tokens, heads, dim, dtype=dtype), layout)
    k = laid_out(normal(*tokens, kv_heads, dim, dtype=dtype, seed=1), layout)
    return q, k, torch.randint(-9, most, tokens, generator=torch.Generator().manual_seed(2))


#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {"rope": lambda: (*rope_args(3, heads=5, dim=16, dtype=torch.float16), 1e4, False)}


def unpacked(dtype, lay):
    q, k, positions = rope_args(3, dim=32, dtype=dtype)
    return [("rope", (lay(q), lay(k), positions, 1e4, False))]


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        for dim in (2, 18, 80):
            yield "rope", (*rope_args(3, dim=dim, dtype=dtype), 1e4, False)
        for lay in UNPACKED:
            yield from unpacked(dtype, lay)


@pytest.mark.parametrize("lay", UNPACKED)
def test_rope_of_rows_that_cannot_be_read_in_packs(emulated, lay, dtype):
    for op, args in unpacked(dtype, lay):
        check(emulated, op, *args, slow=slow_rope)


def slow_rope(q, k, positions, theta, inverse):
    return reference.rope(q, k, positions, theta, inverse=inverse)


def check_rope(emulated, args, theta=1e4, inverse=False):
    check(emulated, "rope", *args, theta, inverse, slow=slow_rope)


@pytest.mark.parametrize("dim", [2, 6, 16, 64, 130])
def test_rope(emulated, dim, dtype):
    check_rope(emulated, rope_args(5, dim=dim, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_layouts(emulated, layout, dtype):
    check_rope(emulated, rope_args(2, 3, dim=16, dtype=dtype, layout=layout))


@pytest.mark.parametrize("inverse", [False, True])
def test_rope_shares_and_skips(emulated, inverse):
    q, k, _ = rope_args(2, 5, dtype=torch.float64)
    check_rope(emulated, (q, k, torch.arange(5)), inverse=inverse)  # positions broadcast to the batch
    check_rope(emulated, (q[:, :, :0], k, torch.arange(5)), inverse=inverse)
    check_rope(emulated, (q[:, :0], k[:, :0], torch.arange(0)), inverse=inverse)


def test_rope_heads_longer_than_a_launch(emulated):
    # Near positions: an angle is off by position times the last bit of a frequency, which pow may round either way.
    check_rope(emulated, rope_args(2, dim=1030, dtype=torch.float64, most=100))


def test_rope_at_far_positions(emulated):
    q, k, _ = rope_args(7, dim=2, dtype=torch.float64)  # frequency 1, which no rounding touches
    positions = torch.tensor([0, -1, 1 << 20, (1 << 31) + 7, (1 << 40) + 3, -(1 << 50), 1 << 62])
    check_rope(emulated, (q, k, positions))
