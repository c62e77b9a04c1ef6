"""Packed matrices of the native engine: the layout as it is documented, and products against their definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synergen_ext._build import load
from synergen_ext.ops import reference
from synergen_ext.testing import assert_as_accurate, laid_out, normal

Packed = load().engine.PackedMatrix

FORMATS = [("float32", 0), ("bfloat16", 0), ("int8", 64), ("int8", 128), ("int4", 32), ("int4", 64)]
#: Rows and columns: whole panels and groups, and neither.
SHAPES = [(32, 64), (100, 200), (37, 131), (1, 1), (17, 8), (64, 1100)]
ROWS = (1, 2, 3, 5, 8, 12, 13, 31)


def packed(w: torch.Tensor, form: str, group: int):
    return Packed.pack("w", w, form, group)


def linear(p, x: torch.Tensor, **how) -> torch.Tensor:
    return torch.from_numpy(p.linear(x.contiguous().numpy(), **how))


@pytest.mark.parametrize(("form", "group"), FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_are_accurate(form, group, n, k):
    w, x = normal(n, k, seed=1) / k**0.5, normal(max(ROWS), k)
    truth = reference.packed_linear(x, w, form, group)
    ours = linear(packed(w, form, group), x)
    if group:
        # Integers are exact; what is left is float32's: a scale, and a sum over groups.
        error = (ours - truth).abs().max()
        assert error <= 4e-6 * truth.abs().max().clamp_min(1), float(error)
    else:
        assert_as_accurate(ours, F.linear(x, w.to(getattr(torch, form)).float()), truth)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_of_short_x_are_accurate(n, k):
    """Beside bfloat16, x may be rounded to bfloat16 too; beside others that changes nothing."""
    w, x = normal(n, k, seed=1) / k**0.5, normal(max(ROWS), k)
    p = packed(w, "bfloat16", 0)
    truth = reference.packed_linear(x.bfloat16(), w, "bfloat16")
    ours = linear(p, x, short_x=True)
    assert (ours - truth).abs().max() <= 2e-6 * truth.abs().max().clamp_min(1)
    assert torch.equal(torch.cat([linear(p, row[None], short_x=True) for row in x]), ours)
    p = packed(w, "int8", 64)
    assert torch.equal(linear(p, x, short_x=True), linear(p, x))


@pytest.mark.parametrize(("form", "group"), FORMATS)
def test_accurate_whatever_the_number_of_rows(form, group):
    """The same bits for a row alone, beside others, and on one thread."""
    w, x = normal(100, 200, seed=1), normal(max(ROWS), 200)
    p = packed(w, form, group)
    alone = torch.cat([linear(p, row[None]) for row in x])
    for rows in ROWS:
        assert torch.equal(linear(p, x[:rows]), alone[:rows])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(linear(p, x), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("form", "group"), FORMATS)
def test_swiglu_is_accurate(form, group):
    w, x = normal(96, 70, seed=1) / 8, normal(13, 70)
    panels = reference.packed_linear(x, w, form, group).unflatten(1, (3, 2, 16))
    truth = (F.silu(panels[:, :, 0]) * panels[:, :, 1]).flatten(1)
    ours = linear(packed(w, form, group), x, swiglu=True)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "stepped", "transposed"])
@pytest.mark.parametrize(("form", "group"), FORMATS[:3])
def test_layouts_and_dtypes_pack_alike(dtype, layout, form, group):
    w = normal(37, 131, dtype=dtype)
    p, q = packed(laid_out(w, layout), form, group), packed(w.float(), form, group)
    assert bytes(p.data()) == bytes(q.data()) and bytes(p.scales()) == bytes(q.scales())


def integers_of(p) -> torch.Tensor:
    """The integers [rows, columns] of a packed matrix, read as csrc/engine/matrix.h says."""
    per_unit = 4 if p.format == "int8" else 8
    raw = np.frombuffer(p.data(), np.uint8).reshape(-(-p.rows // 16), -1, 16, 4)  # panel, unit, row, byte
    if per_unit == 8:
        raw = np.concatenate((raw & 15, raw >> 4), axis=3)
    rows = raw.transpose(0, 2, 1, 3).reshape(raw.shape[0] * 16, -1)[: p.rows, : p.columns]
    return torch.from_numpy(rows.astype(np.int64)) - (128 if per_unit == 4 else 8)


@pytest.mark.parametrize(("form", "group", "most"), [("int8", 64, 127), ("int4", 32, 7)])
def test_layouts_of_integers_are_as_documented(form, group, most):
    w = normal(37, 131)
    p = packed(w, form, group)
    groups = -(-131 // group)
    bits = np.frombuffer(p.scales(), np.uint16).reshape(3, groups, 16).astype(np.uint32) << 16
    scale = torch.from_numpy(bits.view(np.float32)).transpose(1, 2).flatten(0, 1)[:37]  # [rows, groups]
    wide = scale.repeat_interleave(group, 1)[:, :131]
    largest = F.pad(w.abs(), (0, -131 % group)).unflatten(1, (-1, group)).amax(-1)
    assert torch.equal(scale, (largest / most).bfloat16().float())
    assert torch.equal(integers_of(p), (w / wide).round().clamp(-most, most).long())
    assert p.nbytes == len(p.data()) + len(p.scales())
    assert (p.rows, p.columns, p.group) == (37, 131, group)


@pytest.mark.parametrize(
    ("form", "dtype", "per_unit"), [("float32", torch.float32, 1), ("bfloat16", torch.bfloat16, 2)]
)
def test_layouts_of_floats_are_as_documented(form, dtype, per_unit):
    w = normal(37, 131, dtype=dtype)
    p = packed(w, form, 0)
    raw = torch.frombuffer(bytearray(p.data()), dtype=dtype).view(3, -1, 16, per_unit)
    rows = raw.transpose(1, 2).flatten(0, 1).flatten(1)
    assert torch.equal(rows[:37, :131], w)
    assert not rows[37:].any() and not rows[:, 131:].any()


@pytest.mark.parametrize(("form", "group"), FORMATS[2::2])
def test_extreme_values(form, group):
    """Groups of zeros, of one huge number, and too small for a scale; rows of x that are zero, NaN or infinite."""
    w = normal(20, 128)
    w[3] = 0
    w[4, 5] = 1e30
    w[5] = 1e-42
    x = normal(5, 128)
    x[1] = 0
    x[2, 7] = float("nan")
    x[3, 9] = float("inf")
    y = linear(packed(w, form, group), x)
    assert torch.equal(y[1], torch.zeros(20)) and not y[[0, 4], 3].any()
    assert y[2].isnan().all() and y[3].isnan().all()
    assert y[[0, 4]].isfinite().all()


def test_empty_x_gives_no_rows():
    assert linear(packed(normal(20, 30), "int8", 64), torch.empty(0, 30)).shape == (0, 20)


@pytest.mark.parametrize(("form", "group"), FORMATS)
def test_a_view_of_bytes_is_the_same_matrix(form, group):
    w, x = normal(37, 131), normal(3, 131)
    p = packed(w, form, group)
    data, scales = (np.frombuffer(bytes(b), np.uint8) for b in (p.data(), p.scales()))
    view = Packed.view("w", form, 37, 131, group, data, scales if group else None)
    assert torch.equal(linear(view, x), linear(p, x))
    with pytest.raises(
        ValueError, match=rf"engine: w: data must be {len(data)} bytes in a row, got uint8 \[{len(data) - 1}\]"
    ):
        Packed.view("w", form, 37, 131, group, data[:-1], scales if group else None)
    if group:
        with pytest.raises(ValueError, match="engine: w: scales must be given beside integers"):
            Packed.view("w", form, 37, 131, group, data)
        with pytest.raises(ValueError, match=f"engine: w: scales must be {len(scales)} bytes"):
            Packed.view("w", form, 37, 131, group, data, scales[2:])


def test_what_does_not_fit_is_refused():
    w = normal(20, 30)
    with pytest.raises(ValueError, match="engine: format must be float32, bfloat16, int8 or int4, got int2"):
        packed(w, "int2", 32)
    for group in (0, 24, 36, 8192):
        with pytest.raises(ValueError, match=rf"engine: w: group must be a multiple of 8 in \[32, 4096\], got {group}"):
            packed(w, "int8", group)
    with pytest.raises(ValueError, match=r"engine: w must be \[rows, columns\], got \[30\]"):
        packed(w[0], "float32", 0)
    with pytest.raises(ValueError, match="engine: w must be float32, bfloat16 or float16, got float64"):
        packed(w.double(), "float32", 0)
    with pytest.raises(ValueError, match="engine: w must not be empty"):
        packed(w[:0], "float32", 0)
    for bad in (float("nan"), float("inf")):
        w[2, 3] = bad
        with pytest.raises(ValueError, match="engine: w must be finite"):
            packed(w, "int4", 32)
    p = packed(normal(20, 30), "float32", 0)
    with pytest.raises(ValueError, match=r"engine: x must be contiguous \[rows, 30\], got \[2, 31\]"):
        linear(p, normal(2, 31))
    with pytest.raises(ValueError, match="engine: x must be float32, got float64"):
        linear(p, normal(2, 30).double())
    with pytest.raises(ValueError, match="engine: rows must be a multiple of 32 for swiglu, got 20"):
        linear(p, normal(2, 30), swiglu=True)
    with pytest.raises(ValueError, match=r"engine: w must be \[rows, columns\] of a matrix, got \[-1, 4\]"):
        Packed.view("w", "float32", -1, 4, 0, np.zeros(4, np.uint8))
