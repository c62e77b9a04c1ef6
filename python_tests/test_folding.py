"""Folding image tokens (eq. 1): the order fixed by hand, the inverse, one window alone, wrong grids."""

import pytest
import torch
import torch.nn.functional as F
from cases import image_batch, random_model, scaled_down

from synergen_ext import ops
from synergen_ext.model import PRESETS, FoldedEmbedding, SynerGenConfig

CLOSE = dict(rtol=0, atol=1e-12)


def test_order_is_row_major_inside_windows_in_raster_order():
    """4 x 8 tokens numbered along the raster, fold 2 x 4: the order a checkpoint relies on."""
    raster = torch.arange(32).view(1, 4, 8)
    wanted = [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13, 14, 15],
        [16, 17, 18, 19, 24, 25, 26, 27],
        [20, 21, 22, 23, 28, 29, 30, 31],
    ]
    assert ops.fold_ids(raster, 2, 4)[0].tolist() == wanted


def test_paper_window_is_two_rows_of_eight():
    """Figure 5's folded tokens are wide rectangles: 64 x 64 tokens give 32 rows of 8."""
    folded = ops.fold_ids(torch.arange(4096).view(1, 64, 64), *SynerGenConfig.preset("paper").fold)
    assert folded.shape == (1, 256, 16)
    assert folded[0, 0].tolist() == [*range(8), *range(64, 72)]
    assert folded[0, 8].tolist() == [*range(128, 136), *range(192, 200)]


@pytest.mark.parametrize(
    ("grid", "fold"),
    [((4, 8), (2, 4)), ((2, 4), (2, 4)), ((12, 12), (2, 4)), ((6, 9), (3, 1)), ((5, 7), (1, 7)), ((3, 3), (1, 1))],
)
def test_unfold_undoes_fold(grid, fold):
    ids = torch.randint(1000, (3, *grid))
    folded = ops.fold_ids(ids, *fold)
    assert folded.shape == (3, grid[0] * grid[1] // (fold[0] * fold[1]), fold[0] * fold[1])
    assert torch.equal(ops.unfold_ids(folded, *grid, *fold), ids)
    shuffled = torch.randint(1000, folded.shape)  # and the other way round, for any ids
    assert torch.equal(ops.fold_ids(ops.unfold_ids(shuffled, *grid, *fold), *fold), shuffled)


def embedding(preset: str = "tiny") -> tuple[SynerGenConfig, FoldedEmbedding]:
    model = random_model(preset)
    return model.config, model.image_embedding


def by_hand(e: FoldedEmbedding, ids: torch.Tensor) -> torch.Tensor:
    """Eq. 1, one token after another."""
    m, n = e.fold
    pictures = []
    for picture in ids:
        windows = []
        for top in range(0, picture.shape[0], m):
            for left in range(0, picture.shape[1], n):
                parts = [
                    e.tokens.weight[picture[y, x]] + e.positions[y, x]
                    for y in range(top, top + m)
                    for x in range(left, left + n)
                ]
                hidden = F.gelu(e.proj_in.weight @ torch.cat(parts) + e.proj_in.bias)
                windows.append(e.proj_out.weight @ hidden + e.proj_out.bias)
        pictures.append(torch.stack(windows))
    return torch.stack(pictures)


@pytest.mark.parametrize("preset", PRESETS)
def test_embedding_is_equation_1(preset):
    config, e = embedding(preset)
    ids = image_batch(config, 2)
    torch.testing.assert_close(e(ids), by_hand(e, ids), **CLOSE)


@pytest.mark.parametrize("grid", [(2, 4), (4, 4), (2, 8)])
def test_smaller_pictures_take_the_top_left_positions(grid):
    config, e = embedding()
    ids = image_batch(config, 2)[:, : grid[0], : grid[1]]
    torch.testing.assert_close(e(ids), by_hand(e, ids), **CLOSE)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_window_is_a_slice_of_the_whole(preset):
    config, e = embedding(preset)
    ids = image_batch(config, 3)
    whole, folded = e(ids), ops.fold_ids(ids, *config.fold)
    for index in range(config.image_tokens):
        alone = e.one_window(folded[:, index], index, columns=config.image_grid[1])
        torch.testing.assert_close(alone, whole[:, index : index + 1], **CLOSE)


def test_one_window_of_a_narrower_picture():
    config, e = embedding()
    ids = image_batch(config, 2)[:, :, :4]
    whole, folded = e(ids), ops.fold_ids(ids, *config.fold)
    for index in range(2):  # one window a row: the second stands below the first, not beside it
        alone = e.one_window(folded[:, index], index, columns=4)
        torch.testing.assert_close(alone, whole[:, index : index + 1], **CLOSE)


def test_every_place_in_the_picture_counts():
    """Two tokens swapped, inside one window or between two, give another embedding: places are not lost."""
    config, e = embedding()
    ids = torch.arange(32).view(1, 4, 8)
    for other in ((0, 1), (1, 0), (0, 4), (3, 7)):
        swapped = ids.clone()
        swapped[0, 0, 0], swapped[(0, *other)] = ids[(0, *other)], ids[0, 0, 0]
        changed = (e(swapped) - e(ids)).abs().amax(-1)[0] > 1e-6
        windows = {0, (other[0] // 2) * 2 + other[1] // 4}
        assert set(changed.nonzero().flatten().tolist()) == windows


def test_gradients_reach_used_codes_and_places_only():
    config, e = embedding()
    ids = torch.tensor([[[3, 5, 3, 7], [5, 5, 3, 9]]])
    e(ids).square().sum().backward()
    used = e.tokens.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert used == [3, 5, 7, 9]
    places = e.positions.grad.abs().sum(-1).nonzero().tolist()
    assert places == [[y, x] for y in range(2) for x in range(4)]
    assert all(p.grad.abs().max() > 0 for p in e.parameters())


@pytest.mark.parametrize("grid", [(3, 8), (4, 6), (6, 8), (4, 12)])
def test_pictures_that_do_not_fit_are_refused(grid):
    _, e = embedding()
    with pytest.raises(ValueError, match="fold_tokens: "):
        e(torch.zeros(1, *grid, dtype=torch.long))


@pytest.mark.parametrize("bad", [-1, 64])
def test_ids_outside_the_codebook_are_refused(bad):
    _, e = embedding()
    ids = torch.zeros(1, 4, 8, dtype=torch.long)
    ids[0, 3, 7] = bad
    with pytest.raises(ValueError, match=f"fold_tokens: .*64.*got {bad}"):
        e(ids)


def test_scaled_down_presets_keep_what_matters():
    for name in PRESETS:
        full, small = SynerGenConfig.preset(name), scaled_down(name)
        for field in ("num_heads", "num_kv_heads", "fold", "head_layers", "attention_bias", "rope_theta"):
            assert getattr(full, field) == getattr(small, field)
