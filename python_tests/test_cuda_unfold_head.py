"""unfold_head by the emulator, in both its forms: see test_cuda_emulated.py."""

import emulator
import pytest
import torch
from head_cases import assert_drawn, head_args

from synergen_ext.testing import DTYPES, laid_out

FORMS = {"stages": False, "persistent": True}


def both(pictures, guided, dtype, **sizes):
    """Arguments of unfold_head in stages and persistent."""
    return [head_args(pictures, guided, dtype, persistent=p, **sizes) for p in FORMS.values()]


def small():
    return head_args(2, True, torch.bfloat16, guidance=2.0, top_k=60, top_p=0.9, window=2, biases=True, persistent=True)


#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {"unfold_head": small}


def sanitized():
    """Calls of odd sizes for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        for persistent in FORMS.values():
            sizes = dict(dim=17, hidden=9, head_dim=6, vocab=37, window=2, layers=1, persistent=persistent)
            yield "unfold_head", head_args(3, False, dtype, **sizes)
            yield "unfold_head", head_args(1, True, dtype, layers=1, window=3, top_k=7, persistent=persistent)


def check(emulated, args):
    """The CPU kernel's ids in float32 and float64; ids near their draws in short dtypes."""
    ids, valid = emulated.unfold_head(*args)
    assert valid.all()
    if args[0].dtype in (torch.float64, torch.float32):
        assert torch.equal(ids, torch.ops.synergen.unfold_head(*args)[0])
    else:
        assert_drawn(ids, args)
    return ids


SIZES = {
    "plain": dict(),
    "odd": dict(dim=37, hidden=29, head_dim=6, vocab=61, heads=3, kv_heads=1),
    "tiny": dict(dim=1, heads=1, kv_heads=1, head_dim=2, hidden=1, vocab=3),
    "no layers": dict(layers=0),
    "split": dict(dim=272, hidden=520, head_dim=16, vocab=70, layers=1, window=2),
}


@pytest.mark.parametrize("name", SIZES)
def test_unfold_head_in_both_forms(emulated, name, dtype):
    a, b = both(2, True, dtype, guidance=2.0, biases=name != "plain", **SIZES[name])
    assert torch.equal(check(emulated, a), check(emulated, b))


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
def test_unfold_head_has_no_races_where_warps_share_rows():
    """Two warps to a tile, and more rows than one pass of tensor cores has."""
    raced = emulator.load("race")
    sizes = dict(dim=16, hidden=520, head_dim=8, vocab=19, layers=1, window=1)
    for args in both(9, False, torch.bfloat16, **sizes):
        raced.unfold_head(*args)


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
@pytest.mark.parametrize("pictures, vocab, temperature", [(1, 4200, 1.0), (13, 19, 0.0)])
def test_unfold_head_has_no_races_where_blocks_share_a_draw_or_draw_twice(pictures, vocab, temperature):
    raced = emulator.load("race")
    sizes = dict(dim=8, heads=1, kv_heads=1, hidden=8, layers=0, window=2, persistent=True)
    options = dict(top_k=9, temperature=temperature)
    raced.unfold_head(*head_args(pictures, False, torch.bfloat16, vocab=vocab, **options, **sizes))


@pytest.mark.parametrize("pictures,guided", [(1, False), (5, True), (13, False), (17, True), (33, True)])
def test_unfold_head_rows(emulated, pictures, guided):
    """One tile of 8 rows, several, and more rows than pass at once, with more heads of them than warps of the grid."""
    for args in both(pictures, guided, torch.bfloat16, layers=1, heads=8, window=2, guidance=1.5):
        check(emulated, args)
    for args in both(min(pictures, 9), guided, torch.float32, layers=1, window=2, guidance=1.5):
        check(emulated, args)


def test_unfold_head_of_more_columns_than_warps(emulated):
    """32 rows of seven times 32 columns, and 192 warps in the emulator's grid."""
    for args in both(32, False, torch.bfloat16, layers=0, dim=208, window=1, vocab=19):
        check(emulated, args)


def test_unfold_head_eps(emulated):
    """As large as what it is added to."""
    for args in both(3, False, torch.float32, layers=1, eps=2.0):
        check(emulated, args)


def test_unfold_head_layouts_and_options_by_picture(emulated):
    for args in both(5, True, torch.float32, layers=1, window=2):
        options = (
            torch.tensor([1.0, 0.0, 2.5, -1.0, 7.0]).double(), torch.tensor([1.0, 0.0, 0.5, 3.0, 1.0]).double(),
            torch.tensor([0, 3, 1, 90, 1000]), torch.tensor([1.0, 0.0, 0.7, 0.2, 0.999]).double(),
        )  # fmt: skip
        args = (*args[:9], *options, *args[13:])
        ids = check(emulated, args)
        moved = [laid_out(a, "stepped") if i in (0, 7, 8, 9, 10, 11, 12) else a for i, a in enumerate(args)]
        assert torch.equal(check(emulated, moved), ids)


def test_unfold_head_rows_without_an_answer(emulated):
    """NaN at the first id alone: without layers no later one looks back. And options that cannot be meant."""
    for args in both(3, False, torch.float32, layers=0):
        clean, _ = emulated.unfold_head(*args)
        args[0][1] = torch.nan
        ids, valid = emulated.unfold_head(*args)
        assert valid.tolist() == [True, False, True] and ids[1, 0] == 0
        assert torch.equal(ids[::2], clean[::2])
    for args in both(33, False, torch.bfloat16, layers=0):  # the last alone in a second pass
        args[0][32] = torch.nan
        assert emulated.unfold_head(*args)[1].tolist() == [True] * 32 + [False]
    for wrong in (dict(temperature=-1.0), dict(top_k=-1), dict(top_p=1.5)):
        # A whole tile of ids: past its end masses of a temperature below 0 would leave no answer either.
        for args in both(2, False, torch.float32, layers=0, dim=8, window=2, vocab=4096, **wrong):
            ids, valid = emulated.unfold_head(*args)
            assert not ids.any() and not valid.any()


def test_unfold_head_weights_that_are_not_aligned(emulated):
    for place in range(1, 9):
        args = head_args(1, False, torch.bfloat16, layers=1, window=1, persistent=bool(place % 2))
        weight = args[3][place]
        args[3][place] = weight.new_zeros(weight.numel() + 1)[1:].view(weight.shape).copy_(weight)
        check(emulated, args)


def test_unfold_head_long_heads(emulated):
    """More pairs in a head than travel with one launch of setup, and a head that no 16 bytes divide."""
    for args in both(1, False, torch.float32, heads=1, kv_heads=1, head_dim=516, layers=1, window=3, hidden=8):
        check(emulated, args)
    for args in both(1, False, torch.float32, dim=16, heads=2, kv_heads=1, head_dim=6, layers=1, window=3, hidden=8):
        check(emulated, args)


def test_unfold_head_windows(emulated):
    for window in (1, 3, 16, 32):
        check(emulated, head_args(1, False, torch.float32, window=window, layers=1, dim=8, hidden=8, vocab=9))
    with pytest.raises((ValueError, RuntimeError), match="unfold_head: on CUDA positions may have 32 rows, got 33"):
        emulated.unfold_head(*head_args(1, False, window=33))


def test_unfold_head_persistent_wants_few_layers(emulated):
    with pytest.raises(
        (ValueError, RuntimeError), match="unfold_head: layers must be at most 16 where persistent, got 17"
    ):
        emulated.unfold_head(*head_args(1, False, layers=17, dim=8, hidden=8, window=1, persistent=True))
    check(emulated, head_args(1, False, layers=17, dim=8, hidden=8, window=1))


def test_unfold_head_with_a_vocabulary_of_several_tiles(emulated):
    """Several blocks draw an id of one picture; of seven pictures each is one block's."""
    for pictures in (1, 7):
        for args in both(pictures, False, torch.float32, layers=0, dim=8, window=2, vocab=9000, top_k=50):
            check(emulated, args)
