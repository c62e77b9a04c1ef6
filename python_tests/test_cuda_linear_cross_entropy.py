"""linear_cross_entropy and its backward by the emulator: see test_cuda_emulated.py. Tiles are 128 rows (64 without
tensor cores) by 256 columns, and 32 (8) of the depth; the backward pass takes pieces of at most 8192 columns."""

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import UNPACKED

from synergen_ext.ops import reference
from synergen_ext.testing import DTYPES, LAYOUTS, assert_as_accurate, laid_out, normal, to_float64

SHORT = (torch.bfloat16, torch.float16)


def inputs(rows, dim, vocab, dtype=torch.float32, weight_dtype=None, layout="contiguous"):
    """Logits of size one to three; every fifth row is ignored, from the fifth on."""
    x = normal(rows, dim, dtype=torch.float64)
    weight = normal(vocab, dim, dtype=torch.float64, seed=1) * 2 * max(dim, 1) ** -0.5
    targets = normal(rows, seed=2).abs().mul(1e6).long() % vocab
    targets[4::5] = -100
    x, weight = laid_out(x.to(dtype), layout), laid_out(weight.to(weight_dtype or dtype), layout)
    return x, weight, laid_out(targets, layout), -100


def backward_args(args, need=(True, True)):
    x, weight, targets, ignore_index = args
    _, lse = reference.linear_cross_entropy_rows(x, weight, targets, ignore_index)
    dloss = normal(len(x), dtype=torch.promote_types(x.dtype, torch.float32), seed=3)
    return dloss, x, weight, targets, lse, ignore_index, *need


def rounding(x, weight, targets, ignore_index):
    """What a PyTorch program would write: logits at the dtype of x, the loss in float32."""
    logits = F.linear(x, weight.to(x.dtype))
    wide = logits.to(torch.promote_types(x.dtype, torch.float32))
    loss = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none")
    return loss, wide.logsumexp(-1).masked_fill(targets == ignore_index, 0)


def gradients(function, dloss, x, weight, targets, ignore_index):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(function(*leaves, targets, ignore_index)[0], leaves, dloss)


def compare(emulated, *args, lay_dloss=torch.clone):
    """Forward, and each gradient, together and alone."""
    wide = to_float64(args)
    ours = emulated.linear_cross_entropy(*args)
    truth = reference.linear_cross_entropy_rows(*wide)
    assert_as_accurate((ours[0], ours[1].to(ours[0].dtype)), rounding(*args), truth, "linear_cross_entropy")
    dloss, x, weight, targets, _, ignore_index, *_ = backward_args(args)
    truth, rival = (
        gradients(reference.linear_cross_entropy_rows, dloss.double(), *wide),
        gradients(rounding, dloss, *args),
    )
    call = lay_dloss(dloss), x, weight, targets, ours[1], ignore_index
    both = emulated.linear_cross_entropy_backward(*call, True, True)
    assert_as_accurate(both, rival, truth, "linear_cross_entropy_backward")
    for i, need in enumerate(((True, False), (False, True))):
        one = emulated.linear_cross_entropy_backward(*call, *need)
        assert torch.equal(one[i], both[i]) and one[1 - i].shape == (0,)
    return ours, both


#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {
    "linear_cross_entropy": lambda: inputs(135, 24, 300, dtype=torch.bfloat16),
    "linear_cross_entropy_backward": lambda: backward_args(inputs(135, 40, 300, dtype=torch.bfloat16)),
}


def unpacked(dtype, lay):
    x, weight, *rest = inputs(9, 16, 24, dtype=dtype)
    yield lay(x), weight, *rest
    yield x, lay(weight), *rest


def sanitized():
    """Calls of odd sizes and layouts for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        for sizes in ((5, 9, 3), (66, 8, 7), (1, 16, 257)):
            args = inputs(*sizes, dtype=dtype)
            yield "linear_cross_entropy", args
            yield "linear_cross_entropy_backward", backward_args(args)
    for args in unpacked(torch.bfloat16, UNPACKED[2]):
        yield "linear_cross_entropy", args
        yield "linear_cross_entropy_backward", backward_args(args)
    yield "linear_cross_entropy_backward", backward_args(inputs(130, 264, 9, dtype=torch.float16))


@pytest.mark.parametrize("sizes", [(1, 1), (9, 5), (8, 8), (40, 300), (24, 257), (264, 40)])
@pytest.mark.parametrize("rows", [3, 33])
def test_linear_cross_entropy(emulated, rows, sizes, dtype):
    compare(emulated, *inputs(rows, *sizes, dtype=dtype))


# 64 columns of a row are four threads', 256 a block's; rows are tiles of 64 or 128, and joined 32 at a time.
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 300), (64, 63), (65, 64), (128, 65), (129, 255), (7, 256), (31, 511), (32, 2310)]
)
def test_linear_cross_entropy_at_every_edge_of_a_tile(emulated, rows, vocab):
    for dtype in (torch.float32, torch.bfloat16):
        compare(emulated, *inputs(rows, 8, vocab, dtype=dtype))


def test_linear_cross_entropy_of_more_row_tiles_than_a_group(emulated):
    compare(emulated, *inputs(1030, 8, 260))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_backward_in_pieces(emulated, dtype):
    """8,203 columns in two pieces, the second not a multiple of 8."""
    compare(emulated, *inputs(3, 8, 8203, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_linear_cross_entropy_layouts(emulated, layout, dtype):
    compare(emulated, *inputs(9, 16, 24, dtype=dtype, layout=layout), lay_dloss=lambda t: laid_out(t, layout))


@pytest.mark.parametrize("lay", UNPACKED)
@pytest.mark.parametrize("dtype", SHORT)
def test_linear_cross_entropy_of_rows_that_cannot_be_read_in_packs(emulated, lay, dtype):
    for args in unpacked(dtype, lay):
        compare(emulated, *args)


@pytest.mark.parametrize("dtype", SHORT)
def test_linear_cross_entropy_with_a_float32_weight(emulated, dtype):
    compare(emulated, *inputs(9, 16, 24, dtype=dtype, weight_dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_of_ignored_rows(emulated, dtype):
    """No loss and no gradient, whatever stands in them; also with an ignore_index inside the vocabulary."""
    x, weight, targets, _ = inputs(12, 16, 24, dtype=dtype)
    targets = targets.clamp(min=7)
    targets[[1, 4, 11]], x[1] = 7, torch.inf
    loss, lse = emulated.linear_cross_entropy(x, weight, targets, 7)
    ignored = targets == 7
    assert not loss[ignored].any() and not lse[ignored].any() and (loss[~ignored] > 0).all()
    x[1] = 0
    (loss, lse), (dx, _) = compare(emulated, x, weight, targets, 7)
    assert not loss[ignored].any() and not dx[ignored].any()
    x[1] = torch.inf
    again, _ = emulated.linear_cross_entropy_backward(torch.ones(12), x, weight, targets, lse, 7, True, False)
    assert again.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [24, -1, 2**40, -(2**40)])
def test_linear_cross_entropy_of_a_target_outside_the_vocabulary(emulated, target, dtype):
    """NaN where nobody can refuse: the row's loss and gradient, and so dweight."""
    x, weight, targets, _ = inputs(6, 16, 24, dtype=dtype)
    targets[2] = target
    loss, lse = emulated.linear_cross_entropy(x, weight, targets, -100)
    dx, dweight = emulated.linear_cross_entropy_backward(torch.ones(6), x, weight, targets, lse, -100, True, True)
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    assert dx[2].isnan().all() and dx[[0, 1, 3, 4, 5]].isfinite().all() and dweight.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 33, 200, 520, 1800])
def test_linear_cross_entropy_of_extreme_logits(emulated, place, dtype):
    """No overflow in either direction wherever the largest stands, a sure row has no loss, and columns past the last
    stay out of the sum."""
    vocab = place + 3
    x, weight = torch.zeros(4, 8, dtype=dtype), torch.zeros(vocab, 8, dtype=dtype)
    x[:, 0] = torch.tensor([1024.0, -1024.0, 80.0, 256.0])
    weight[:, 0], weight[place, 0] = -1, 1
    weight[:, 1], x[3, 1] = -1, 1024  # the largest logit of this row is -768
    targets = torch.full((4,), place)
    loss, lse = emulated.linear_cross_entropy(x, weight, targets, -100)
    others = torch.tensor(vocab - 1.0, dtype=torch.float64).log()
    assert_as_accurate(loss, loss, torch.stack((0 * others, 2048 + others, 0 * others, 0 * others)))
    assert lse[[0, 2, 3]].tolist() == [1024.0, 80.0, -768.0]
    dx, dweight = emulated.linear_cross_entropy_backward(torch.ones(4), x, weight, targets, lse, -100, True, True)
    assert (dx[:, 0] - torch.tensor([0, -2, 0, 0])).abs().max() < 1e-4 and dweight.isfinite().all()


def test_linear_cross_entropy_of_a_depth_that_is_not_in_eights(emulated):
    """Rows of 9 in room for 16, so that every row begins at a multiple of 16 bytes."""
    args = list(inputs(5, 9, 7, dtype=torch.bfloat16))
    wide = [args[i].new_full((len(args[i]), 16), torch.nan)[:, :9].copy_(args[i]) for i in (0, 1)]
    compare(emulated, *wide, *args[2:])


@pytest.mark.parametrize("which", [0, 1])
def test_linear_cross_entropy_backward_into_memory_that_cannot_be_written_in_packs(emulated, which):
    if not hasattr(emulated, "module"):
        pytest.skip("torch chooses where its outputs lie")
    args = backward_args(inputs(5, 16, 24, dtype=torch.bfloat16))
    emulated.schedule()
    out = [torch.empty(5, 16, dtype=torch.bfloat16), torch.empty(24, 16, dtype=torch.bfloat16)]
    out[which] = UNPACKED[2](out[which])
    emulated.module.linear_cross_entropy_backward(*args, out=tuple(out))
    truth = reference.linear_cross_entropy_backward(*to_float64(args))
    assert_as_accurate(out, reference.linear_cross_entropy_backward(*args), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_of_what_is_not_a_number(emulated, dtype):
    x, weight, targets, _ = inputs(4, 16, 24, dtype=dtype)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    loss, _ = emulated.linear_cross_entropy(x, weight, targets, -100)
    assert loss.isnan().tolist() == [False, True, True, False]


def test_linear_cross_entropy_without_rows_or_depth(emulated, dtype):
    for sizes in ((0, 8, 5), (3, 0, 5), (0, 0, 1)):
        args = inputs(*sizes, dtype=dtype)
        loss, lse = emulated.linear_cross_entropy(*args)
        assert_as_accurate((loss, lse), (loss, lse), reference.linear_cross_entropy_rows(*to_float64(args)))
        dx, dweight = emulated.linear_cross_entropy_backward(*backward_args(args))
        assert dx.shape == args[0].shape and torch.equal(dweight, torch.zeros_like(args[1]))
