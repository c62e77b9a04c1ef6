"""fold_tokens and the ids' own folding: order of windows, values, gradients, determinism, errors,
torch.compile."""

import pytest
import torch

from synergen_ext import ops
from synergen_ext.ops import reference
from synergen_ext.testing import LAYOUTS, assert_op_accurate, laid_out, normal, run_with_gradients

# batch, h, w, m, n, d, V: windows of the paper (2 x 8), of its ablation (2 x 4), trivial, tall,
# whole-image, odd.
SHAPES = [
    (1, 4, 16, 2, 8, 16, 32),
    (3, 4, 8, 2, 4, 13, 11),
    (2, 3, 5, 1, 1, 7, 5),
    (2, 9, 2, 3, 1, 33, 4),
    (2, 3, 5, 3, 5, 1, 9),
    (1, 6, 15, 3, 5, 77, 40),
]


def inputs(batch, h, w, m, n, dim, vocab, *, dtype, device="cpu", layout="contiguous", grad=True):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(vocab, (batch, h, w), generator=generator).to(device)
    table = laid_out(normal(vocab, dim, dtype=dtype, device=device), layout)
    pos = laid_out(normal(h, w, dim, dtype=dtype, device=device, seed=1), layout)
    return laid_out(ids, layout), table.requires_grad_(grad), pos.requires_grad_(grad), m, n


def test_order_by_hand():
    """A 2 x 4 picture in 1 x 2 windows, embeddings that are the ids themselves."""
    ids = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7]]])
    table = torch.arange(8.0)[:, None] * torch.tensor([1.0, 10.0])
    zero = torch.zeros(2, 4, 2)
    wide = ops.fold_tokens(ids, table, zero, 1, 2)
    assert wide.tolist() == [[[0, 0, 1, 10], [2, 20, 3, 30], [4, 40, 5, 50], [6, 60, 7, 70]]]
    square = ops.fold_tokens(ids, table, zero, 2, 2)
    assert square.tolist() == [[[0, 0, 1, 10, 4, 40, 5, 50], [2, 20, 3, 30, 6, 60, 7, 70]]]
    pos = torch.arange(8.0).reshape(2, 4, 1).expand(2, 4, 2) * 100
    moved = ops.fold_tokens(ids, table, pos, 2, 2)
    assert moved[0, 0].tolist() == [0, 0, 101, 110, 404, 440, 505, 550]


@pytest.mark.parametrize("shape", SHAPES)
def test_accurate(shape, dtype, device):
    args = inputs(*shape, dtype=dtype, device=device)
    assert_op_accurate(ops.fold_tokens, reference.fold_tokens, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_layouts(shape, layout, dtype, device):
    args = inputs(*shape, dtype=dtype, device=device, layout=layout)
    assert_op_accurate(ops.fold_tokens, reference.fold_tokens, args)
    assert ops.fold_tokens(*args).is_contiguous()


def test_gradient_of_unused_rows_is_zero(device):
    ids = torch.full((1, 2, 2), 3, device=device)
    table, pos = normal(5, 4, device=device).requires_grad_(), normal(2, 2, 4, device=device)
    (dtable,) = torch.autograd.grad(ops.fold_tokens(ids, table, pos, 2, 2).sum(), table)
    assert torch.equal(dtable[[0, 1, 2, 4]], torch.zeros(4, 4, device=device))
    assert torch.equal(dtable[3], torch.full((4,), 4.0, device=device))


def test_same_result_for_any_number_of_threads():
    args = inputs(8, 16, 16, 2, 4, 64, 7, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run_with_gradients(ops.fold_tokens, args))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("batch", "h", "w", "dim", "vocab"), [(0, 4, 8, 3, 5), (2, 0, 8, 3, 5), (2, 4, 8, 0, 5)])
def test_empty(batch, h, w, dim, vocab, device):
    args = inputs(batch, h, w, 2, 4, dim, vocab, dtype=torch.float32, device=device)
    y, dtable, dpos = run_with_gradients(ops.fold_tokens, args)
    assert y.shape == (batch, (h // 2) * 2, 8 * dim)
    assert torch.equal(dtable, torch.zeros(vocab, dim, device=device))
    assert torch.equal(dpos, torch.zeros(h, w, dim, device=device))


def test_gradcheck(device):
    ids, table, pos, m, n = inputs(2, 2, 4, 2, 2, 3, 4, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda t, p: ops.fold_tokens(ids, t, p, m, n), (table, pos))


def test_second_derivative_is_refused():
    ids, table, pos, m, n = inputs(1, 2, 4, 2, 2, 3, 4, dtype=torch.float64)
    (dtable,) = torch.autograd.grad(ops.fold_tokens(ids, table, pos, m, n).square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="fold_tokens: second derivatives are not implemented"):
        dtable.sum().backward()


def test_opcheck(dtype, device):
    args = inputs(2, 4, 8, 2, 4, 5, 11, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.synergen.fold_tokens.default, args)
    dy = normal(2, 4, 40, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.synergen.fold_tokens_backward.default, (dy, args[0], 11, 2, 4))
    torch.library.opcheck(torch.ops.synergen.fold_ids.default, (args[0], 2, 4))
    windows = ops.fold_ids(args[0], 2, 4)
    torch.library.opcheck(torch.ops.synergen.unfold_ids.default, (windows, 4, 8, 2, 4))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    def block(ids, table, pos, m, n):
        raster = ops.unfold_ids(ops.fold_ids(ids, m, n), ids.shape[1], ids.shape[2], m, n)
        return ops.fold_tokens(raster, table * 2, pos, m, n).relu()

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    args = inputs(3, 4, 8, 2, 4, 6, 11, dtype=torch.float32, device=device)
    for got, wanted in zip(run_with_gradients(compiled, args), run_with_gradients(block, args), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fold_ids_and_back(shape, layout, device):
    batch, h, w, m, n, _, _ = shape
    ids = laid_out(torch.arange(batch * h * w, device=device).reshape(batch, h, w), layout)
    windows = ops.fold_ids(ids, m, n)
    assert torch.equal(windows, reference.fold_ids(ids, m, n))
    raster = ops.unfold_ids(laid_out(windows, layout), h, w, m, n)
    assert torch.equal(raster, ids)
    assert torch.equal(reference.unfold_ids(windows, h, w, m, n), ids)


def test_fold_ids_is_the_order_of_fold_tokens():
    ids = torch.arange(32).reshape(1, 4, 8)
    folded = ops.fold_tokens(ids, torch.arange(32.0)[:, None], torch.zeros(4, 8, 1), 2, 4)
    assert torch.equal(folded.long(), ops.fold_ids(ids, 2, 4))


IDS, TABLE, POS = torch.zeros(1, 4, 8).long(), torch.ones(1024, 3), torch.ones(4, 8, 3)


@pytest.mark.parametrize(
    ("ids", "table", "pos", "m", "n", "message"),
    [
        (IDS[0], TABLE, POS, 2, 4, r"fold_tokens: ids must be \[N, h, w\], got \[4, 8\]"),
        (IDS.float(), TABLE, POS, 2, 4, "fold_tokens: ids must be int64, got float32"),
        (IDS, TABLE[0], POS, 2, 4, r"fold_tokens: table must be \[V, d\], got \[3\]"),
        (IDS, TABLE.long(), POS, 2, 4, "fold_tokens: table must be float64, .* got int64"),
        (
            IDS,
            TABLE,
            POS[:2],
            2,
            4,
            r"fold_tokens: pos must be \[h, w, d\] = \[4, 8, 3\], got \[2, 8, 3\]",
        ),
        (IDS, TABLE, POS.half(), 2, 4, "fold_tokens: pos must be float32 like table, got float16"),
        (
            IDS,
            TABLE,
            POS,
            3,
            4,
            "fold_tokens: m x n windows must tile h x w, got m=3, n=4 for h=4, w=8",
        ),
        (
            IDS,
            TABLE,
            POS,
            2,
            5,
            "fold_tokens: m x n windows must tile h x w, got m=2, n=5 for h=4, w=8",
        ),
        (IDS, TABLE, POS, 0, 4, "fold_tokens: m and n must be at least 1, got m=0, n=4"),
    ],
)
def test_errors(ids, table, pos, m, n, message):
    with pytest.raises(ValueError, match=message):
        ops.fold_tokens(ids, table, pos, m, n)


@pytest.mark.parametrize("bad", [1024, -1])
def test_ids_outside_the_table_are_refused_by_value(bad):
    ids = IDS.clone()
    ids[0, 3, 2] = bad
    message = rf"fold_tokens: ids must be in \[0, V=1024\), got {bad} at \[0, 3, 2\]"
    with pytest.raises(ValueError, match=message):
        ops.fold_tokens(ids, TABLE, POS, 2, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (torch.zeros(1, 4, 7).long(), 4, 8, 2, 4),
            r"unfold_ids: ids must be .* = \[1, 4, 8\], got \[1, 4, 7\]",
        ),
        ((torch.zeros(4, 8).long(), 4, 8, 2, 4), r"unfold_ids: ids must be .* got \[4, 8\]"),
        ((torch.zeros(1, 4, 8), 4, 8, 2, 4), "unfold_ids: ids must be int64, got float32"),
        (
            (torch.zeros(1, 4, 8).long(), 4, 8, 3, 4),
            "unfold_ids: m x n windows must tile h x w, got m=3, n=4",
        ),
        ((torch.zeros(1, 4, 8).long(), -4, -8, 2, 4), "unfold_ids: h and w must not be negative"),
    ],
)
def test_unfold_errors(args, message):
    with pytest.raises(ValueError, match=message):
        ops.unfold_ids(*args)


def test_fold_ids_errors():
    with pytest.raises(ValueError, match="fold_ids: m x n windows must tile h x w, got m=2, n=3"):
        ops.fold_ids(IDS, 2, 3)
    with pytest.raises(ValueError, match=r"fold_ids: ids must be \[N, h, w\], got \[8\]"):
        ops.fold_ids(IDS[0, 0], 2, 4)
