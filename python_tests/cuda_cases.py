"""What the tests of emulated CUDA kernels share: comparison with the reference, and layouts that packed access must not
take for its own."""

import torch
from emulator import SCHEDULES

from synergen_ext.ops import reference
from synergen_ext.testing import assert_as_accurate, to_float64


def check(emulated, op, *args, slow=None):
    """One op against its reference in float64, at most twice as far off as the reference at the dtype of args."""
    slow = slow or getattr(reference, op)
    ours = getattr(emulated, op)(*args)
    assert_as_accurate(ours, slow(*args), slow(*to_float64(args)), op)
    return ours


def same_bits_under_every_schedule(emulated, call, resident_blocks=1):
    """`call()` once under each of the emulator's orders."""
    results = []
    for policy, seed in SCHEDULES:
        emulated.schedule(policy, seed, resident_blocks)
        results.append(call())
    emulated.schedule()
    assert all(torch.equal(result, results[0]) for result in results)


def padded(x):
    """The values of x in rows one element longer: each begins at another place within 16 bytes."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 1)[..., :-1].copy_(x)


def spaced(x):
    """The values of x, each eighth of a row, so that every row and every stride fits 16 bytes."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] * 8)[..., ::8].copy_(x)


def shifted(x):
    """The values of x, whole rows, beginning one element after 16 bytes."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


def cut(x):
    """The values of x in rows that begin at 16 bytes, the last of which ends with its memory."""
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    stride = -(-columns // 16) * 16
    where = x.new_zeros((rows - 1) * stride + columns)
    return where.as_strided(x.shape, [*(s // columns * stride for s in x.stride()[:-1]), 1]).copy_(x)


#: Rows that hold whole accesses of 16 bytes, which may still not be used.
UNPACKED = [padded, spaced, shifted]
