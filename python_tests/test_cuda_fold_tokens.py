"""fold_tokens, its backward and fold_ids by the emulator: see test_cuda_emulated.py."""

import pytest
import torch
from cuda_cases import UNPACKED, check

from synergen_ext import ops
from synergen_ext.ops import reference
from synergen_ext.testing import DTYPES, LAYOUTS, laid_out, normal


def fold_args(batch, h, w, dim, m=2, n=2, vocab=11, dtype=torch.float32, layout="contiguous", skew=False):
    ids = torch.randint(vocab, (batch, h, w), generator=torch.Generator().manual_seed(3))
    if skew:  # one id fills most of the pictures, as a white background does
        ids = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.8, 5, ids)
    table, pos = normal(vocab, dim, dtype=dtype), normal(h, w, dim, dtype=dtype, seed=1)
    return laid_out(ids, layout), laid_out(table, layout), laid_out(pos, layout), m, n


def fold_backward_args(batch, h, w, dim, m=2, n=2, vocab=11, dtype=torch.float32, layout="contiguous", skew=False):
    ids = fold_args(batch, h, w, 1, m, n, vocab, skew=skew, layout=layout)[0]
    dy = normal(batch, (h // m) * (w // n), m * n * dim, dtype=dtype, seed=5)
    return laid_out(dy, layout), ids, vocab, m, n


#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {
    "fold_tokens": lambda: fold_args(2, 4, 4, 40, dtype=torch.bfloat16),
    "fold_tokens_backward": lambda: fold_backward_args(20, 8, 8, 8, vocab=300, skew=True),
    "fold_ids": lambda: (torch.arange(48).view(2, 4, 6), 2, 3),
}


def unpacked(dtype, lay):
    ids, table, pos, m, n = fold_args(1, 4, 4, 16, dtype=dtype)
    dy = fold_backward_args(1, 4, 4, 16, dtype=dtype)[0]
    return [("fold_tokens", (ids, lay(table), lay(pos), m, n)), ("fold_tokens_backward", (lay(dy), ids, 11, m, n))]


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    yield "fold_tokens_backward", fold_backward_args(40, 8, 8, 1)  # counts of 3 tiles, next to nothing else
    outside = torch.tensor([[[3, -1], [11, 4]]])
    for dtype in DTYPES:
        for dim in (1, 9, 40):
            yield "fold_tokens", fold_args(1, 2, 3, dim, n=3, dtype=dtype)  # 6 tokens: not whole blocks
            yield "fold_tokens_backward", fold_backward_args(1, 2, 3, dim, n=3, dtype=dtype)
        yield "fold_tokens_backward", (normal(1, 1, 160, dtype=dtype), outside, 11, 2, 2)
        yield "fold_tokens", fold_args(1, 2, 2, 64 * 16 // dtype.itemsize, dtype=dtype)  # a row of 64 accesses
        for lay in UNPACKED:
            yield from unpacked(dtype, lay)


@pytest.mark.parametrize("lay", UNPACKED)
def test_fold_tokens_of_rows_that_cannot_be_read_in_packs(emulated, lay, dtype):
    for op, args in unpacked(dtype, lay):
        check(emulated, op, *args)


@pytest.mark.parametrize("dim", [1, 6, 8, 40, 300])
def test_fold_tokens(emulated, dim, dtype):
    args = fold_args(2, 4, 6, dim, n=3, dtype=dtype)
    ours = check(emulated, "fold_tokens", *args)
    assert torch.equal(ours, ops.fold_tokens(*args))
    check(emulated, "fold_tokens_backward", *fold_backward_args(2, 4, 6, dim, n=3, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fold_tokens_layouts(emulated, layout, dtype):
    check(emulated, "fold_tokens", *fold_args(2, 4, 4, 8, dtype=dtype, layout=layout))
    check(emulated, "fold_tokens_backward", *fold_backward_args(2, 4, 4, 8, dtype=dtype, layout=layout))


@pytest.mark.parametrize("vocab", [1, 11, 255, 256, 300])
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_fold_tokens_backward_sums_by_id(emulated, batch, vocab):
    """Tokens of one piece and of several, of one tile and of several, one sorting pass and two."""
    args = fold_backward_args(batch, 8, 8, 32, vocab=vocab, dtype=torch.float64, skew=vocab > 5)
    dtable, _ = check(emulated, "fold_tokens_backward", *args)
    unused = torch.ones(vocab, dtype=torch.bool).index_fill(0, args[1].flatten(), False)
    assert torch.equal(dtable[unused], torch.zeros_like(dtable[unused]))


def test_fold_tokens_backward_is_the_cpu_kernel_to_the_bit_within_a_piece(emulated):
    args = fold_backward_args(3, 8, 8, 16, dtype=torch.bfloat16, skew=True)
    for ours, cpu in zip(
        emulated.fold_tokens_backward(*args), torch.ops.synergen.fold_tokens_backward(*args), strict=True
    ):
        assert torch.equal(ours, cpu)


def test_fold_tokens_empty(emulated):
    assert emulated.fold_tokens(*fold_args(0, 4, 4, 8)).shape == (0, 4, 32)
    assert emulated.fold_tokens(*fold_args(2, 4, 4, 0)).shape == (2, 4, 0)
    for args in (fold_backward_args(0, 4, 4, 8), fold_backward_args(2, 4, 4, 0), fold_backward_args(2, 0, 4, 8)):
        check(emulated, "fold_tokens_backward", *args)


def test_fold_tokens_marks_ids_outside_the_table(emulated):
    ids, table, pos, m, n = fold_args(1, 2, 2, 8)
    ids = torch.tensor([[[3, -1], [11, 4]]])
    y = emulated.fold_tokens(ids, table, pos, m, n).view(4, 8)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    dtable, dpos = emulated.fold_tokens_backward(torch.ones(1, 1, 32), ids, 11, m, n)
    assert dtable.sum(1).tolist() == [8.0 if id in (3, 4) else 0.0 for id in range(11)]
    assert torch.equal(dpos, torch.ones(2, 2, 8))


def test_fold_ids(emulated):
    ids = torch.randint(99, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    folded = emulated.fold_ids(ids, 2, 3)
    assert torch.equal(folded, reference.fold_ids(ids, 2, 3))
    assert torch.equal(emulated.unfold_ids(folded, 4, 6, 2, 3), ids)
    assert torch.equal(emulated.fold_ids(laid_out(ids, "transposed"), 2, 3), folded)
