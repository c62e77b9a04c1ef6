"""The image tokenizer's one-frame path against transformers' four frames, what it refuses, files, and PSNR."""

import copy
import json

import numpy as np
import pytest
import torch
from cases import random_image_tokenizer
from safetensors.torch import load_file, save_file

from synergen_ext.processing.image_tokenizer import (
    ImageTokenizer,
    box_psnr,
    to_pixels,
    to_uint8,
)

SHAPES = [(1, 32, 32), (3, 32, 48), (2, 8, 40), (1, 56, 16)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def theirs(tokenizer: ImageTokenizer, pixels: torch.Tensor) -> torch.Tensor:
    """Ids by transformers: the picture repeated to a clip."""
    sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
    with torch.no_grad():
        return torch.stack(tokenizer.vq.encode(pixels, sizes).image_tokens)


@pytest.fixture(scope="module", params=[4, 2, 1], ids=lambda t: f"{t} frames")
def tokenizer(request) -> ImageTokenizer:
    return random_image_tokenizer(temporal=request.param)


# ---- one frame = four frames --------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode_gives_transformers_ids(tokenizer, shape):
    b, h, w = shape
    pixels = noise(b, 3, h, w)
    ids = tokenizer.encode(pixels)
    assert ids.shape == (b, h // 8, w // 8) and ids.dtype == torch.int64
    assert torch.equal(ids, theirs(tokenizer, pixels))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_gives_transformers_first_frame(tokenizer, shape):
    """The same numbers but for rounding: four frames' convolutions may sum in another order. Measured on this
    tokenizer: 2e-13 in float64 and 4e-5 in float32, of outputs up to 40; often 0."""
    b, h, w = shape
    ids = torch.randint(48, (b, h // 8, w // 8))
    with torch.no_grad():
        wanted = tokenizer.vq.decode(ids)
        got = tokenizer.pixels(tokenizer.lookup(ids))
        wide = copy.deepcopy(tokenizer).double()
        assert (wide.vq.decode(ids) - wide.pixels(wide.lookup(ids))).abs().max() < 1e-11
    assert got.shape == (b, 3, h, w) and wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokenizer.decode(ids), got.clamp(-1, 1))


def test_many_codes_are_compared(tokenizer):
    assert len(tokenizer.encode(noise(4, 3, 64, 64)).unique()) > 12


@pytest.mark.parametrize("stride", [2, 4, 16])
def test_other_strides(stride):
    other = random_image_tokenizer(stride=stride)
    assert other.stride == stride
    pixels = noise(2, 3, 2 * stride, 3 * stride)
    ids = other.encode(pixels)
    assert torch.equal(ids, theirs(other, pixels))
    assert other.decode(ids).shape == pixels.shape


def test_batch_norm_statistics_matter():
    """Else the comparison above would not notice a batch norm left out."""
    tokenizer = random_image_tokenizer()
    pixels = noise(1, 3, 32, 32)
    ids = tokenizer.encode(pixels)
    before = tokenizer.decode(ids)
    for module in tokenizer.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.reset_running_stats()
    assert not torch.equal(tokenizer.encode(pixels), ids)
    assert (tokenizer.decode(ids) - before).abs().max() > 1e-2


def test_a_picture_does_not_depend_on_its_batch(tokenizer):
    pixels = noise(3, 3, 32, 32)
    together = tokenizer.encode(pixels)
    alone = torch.cat([tokenizer.encode(p[None]) for p in pixels])
    assert torch.equal(together, alone)


def test_training_mode_of_the_wrapper_does_not_reach_the_batch_norms(tokenizer):
    """A picture is one frame: its statistics are not a clip's."""
    assert not tokenizer.vq.training
    before = {k: v.clone() for k, v in tokenizer.vq.named_buffers()}
    tokenizer.encode(noise(1, 3, 16, 16))
    assert all(torch.equal(v, before[k]) for k, v in tokenizer.vq.named_buffers())


def test_nearest_takes_the_lowest_of_equals():
    tokenizer = random_image_tokenizer()
    with torch.no_grad():
        codes = tokenizer.vq.quantize.embedding.weight
        codes[7] = codes[31]
    assert tokenizer.nearest(codes[31].detach().view(1, -1, 1, 1)).item() == 7


def test_codes_encode_to_themselves(tokenizer):
    ids = torch.arange(48).view(2, 4, 6)
    assert torch.equal(tokenizer.nearest(tokenizer.lookup(ids)), ids)


def test_half_precision_weights():
    tokenizer = random_image_tokenizer().bfloat16()
    pixels = noise(1, 3, 32, 32)
    ids = tokenizer.encode(pixels)
    assert tokenizer.decode(ids).shape == pixels.shape


# ---- pictures as bytes --------------------------------------------------------------------------


def test_bytes_come_back():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    pixels = to_pixels(every)
    assert pixels.min() == -1 and pixels.max() == 1 and pixels.shape == (1, 3, 16, 16)
    assert np.array_equal(to_uint8(pixels).numpy(), every)


def test_bytes_are_clamped():
    assert to_uint8(torch.tensor([-7.0, -1, 0, 1, 7]).view(1, 1, 1, 5)).flatten().tolist() == [0, 0, 128, 255, 255]


def test_channels_keep_their_order():
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    pixels = to_pixels(red)
    assert (pixels[:, 0] == 1).all() and (pixels[:, 1:] == -1).all()


# ---- PSNR in boxes ------------------------------------------------------------------------------


def test_box_psnr_closed_form():
    """One channel of three is off by 30 in the box: mean squared error 300, 10 log10(255^2 / 300)."""
    a = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    b = a.clone()
    b[0, :, :, 1] = 130
    b[1, :4, :, :] = 130  # outside the box of picture 1
    mask = torch.zeros(2, 8, 8)
    mask[:, 4:, 2:6] = 1
    got = box_psnr(a, b, mask)
    assert got[0].item() == pytest.approx(10 * np.log10(255**2 / 300), rel=1e-6)
    assert got[1] > 100  # nothing wrong inside: the floor of the error, not infinity
    assert torch.equal(got, box_psnr(b, a, mask)) and got.isfinite().all()


def test_box_psnr_of_the_worst_picture():
    black, white = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    assert box_psnr(black, white, torch.ones(1, 4, 4)).item() == pytest.approx(0, abs=1e-5)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(3, 32, 32), (1, 1, 32, 32), (1, 4, 32, 32), (1, 3, 31, 32), (1, 3, 32, 4), (1, 3, 0, 8), (1, 3, 4104, 8)],
    ids=str,
)
def test_wrong_pixels_are_refused(tokenizer, shape):
    with pytest.raises(ValueError, match=r"encode: pixels must be \[B, 3, H, W\]") as error:
        tokenizer.encode(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


def test_bytes_are_not_pixels(tokenizer):
    """0..255 in place of [-1, 1] would encode without a word, to nonsense."""
    with pytest.raises(ValueError, match=r"encode: pixels must be floating point in \[-1, 1\], got torch.uint8"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("bad", [-1, 48, 1 << 40])
def test_ids_outside_the_codebook_are_refused(tokenizer, bad):
    with pytest.raises(ValueError, match=rf"decode: ids must be in \[0, 48\), got {bad}"):
        tokenizer.decode(torch.tensor([[[0, bad], [47, 1]]]))


@pytest.mark.parametrize("shape", [(4,), (4, 4), (1, 1, 4, 4)], ids=str)
def test_wrong_id_shapes_are_refused(tokenizer, shape):
    with pytest.raises(ValueError, match=r"decode: ids must be \[B, h, w\], got \["):
        tokenizer.decode(torch.zeros(shape, dtype=torch.long))


def test_nothing_in_nothing_out(tokenizer):
    assert tokenizer.encode(torch.zeros(0, 3, 16, 24)).shape == (0, 2, 3)
    assert tokenizer.decode(torch.zeros(0, 2, 3, dtype=torch.long)).shape == (0, 3, 16, 24)


# ---- files --------------------------------------------------------------------------------------


def test_saved_is_loaded(tmp_path):
    tokenizer = random_image_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    ours, back = tokenizer.state_dict(), loaded.state_dict()
    assert ours.keys() == back.keys() and all(torch.equal(v, back[k]) for k, v in ours.items())
    assert all(
        getattr(loaded.config, k) == getattr(tokenizer.config, k) for k in ("codebook_size", "channel_multiplier")
    )
    pixels = noise(2, 3, 32, 32)
    assert torch.equal(loaded.encode(pixels), tokenizer.encode(pixels))
    assert not loaded.vq.training


def test_half_precision_on_disk(tmp_path):
    """Twice the same rounding: what is loaded from float16 is saved as float16 to the same bits."""
    random_image_tokenizer().save_pretrained(tmp_path, torch.float16)
    stored = load_file(tmp_path / "image_tokenizer.safetensors")
    kinds = {v.dtype for k, v in stored.items() if not k.endswith("num_batches_tracked")}
    assert kinds == {torch.float16}
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again", torch.float16)
    again = load_file(tmp_path / "again" / "image_tokenizer.safetensors")
    assert all(torch.equal(v, again[k]) for k, v in stored.items())


@pytest.mark.parametrize("name", ["image_tokenizer.json", "image_tokenizer.safetensors"])
def test_missing_files_are_named(tmp_path, name):
    random_image_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"image tokenizer: no {name} in"):
        ImageTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vq.missing", None, None),
        ("quantize.embedding.weight", None, r"quantize.embedding.weight must be \[48, 4\], got nothing"),
        ("quantize.embedding.weight", torch.zeros(47, 4), r"must be \[48, 4\], got \[47, 4\]"),
        ("quantize.embedding.weight", torch.zeros(48, 4, dtype=torch.long), "must be torch.float32, got torch.int64"),
        ("surplus", torch.zeros(2), r"surplus must be nothing, got \[2\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, name, change, message):
    random_image_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "image_tokenizer.safetensors"
    state = load_file(path)
    if change is None:
        state.pop(name, None)
    else:
        state[name] = change
    save_file(state, path)
    if message is None:  # the control: nothing changed
        ImageTokenizer.from_pretrained(tmp_path)
        return
    with pytest.raises(ValueError, match=f"image tokenizer: .*{message}"):
        ImageTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 4000, -3])
def test_torn_weights_are_refused(tmp_path, keep):
    random_image_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "image_tokenizer.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        ImageTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "must hold a JSON object, got list"),
        ({"codebook_size": "many"}, "is not a tokenizer's config"),
        ({"channel_multiplier": 3}, "is not a tokenizer's config"),
        ({"num_res_blocks": 10**9}, "at most 64 blocks a stage, got 1000000000"),
        ({"base_channels": 32 * 10**4}, r"must be \["),  # terabytes, if it were built
        ({"base_channels": 32 * 10**7}, "cannot be built"),
        ({"base_channels": 33}, "cannot be built"),  # 32 groups
        ({"codebook_size": 49}, r"quantize.embedding.weight must be \[49, 4\], got \[48, 4\]"),
    ],
    ids=str,
)
def test_broken_configs_are_refused(tmp_path, change, message):
    random_image_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "image_tokenizer.json"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"image tokenizer: .*{message}"):
        ImageTokenizer.from_pretrained(tmp_path)


# ---- windows ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed() -> ImageTokenizer:
    whole = random_image_tokenizer(codebook_size=64)
    tokenizer = ImageTokenizer(whole.config, window=(16, 8)).eval()
    tokenizer.load_state_dict(whole.state_dict())
    with torch.no_grad():  # codes where latents are, so that noise has many ids
        tokenizer.codebook.copy_(tokenizer.latents(noise(4, 3, 32, 32, seed=5)).permute(0, 2, 3, 1).reshape(-1, 4))
    return tokenizer


def test_a_window_is_encoded_as_a_picture_of_its_own(windowed):
    """Also the cuts and joins: every window of two pictures, in its place."""
    pixels = noise(2, 3, 48, 24)
    ids = windowed.encode(pixels)
    assert ids.shape == (2, 6, 3) and len(ids.unique()) > 10
    alone = ImageTokenizer(windowed.config)
    alone.load_state_dict(windowed.state_dict())
    for row in range(3):
        for column in range(3):
            window = pixels[:, :, 16 * row : 16 * row + 16, 8 * column : 8 * column + 8]
            assert torch.equal(ids[:, 2 * row : 2 * row + 2, column : column + 1], alone.encode(window))


def test_ids_do_not_move_with_the_rest_of_the_picture(windowed):
    pixels = noise(1, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, 16:, 8:16] = noise(1, 3, 16, 8, seed=1)
    same = windowed.encode(pixels) == windowed.encode(changed)
    kept = torch.ones(1, 4, 4, dtype=torch.bool)
    kept[:, 2:, 1] = False
    assert same[kept].all() and not same.all()


def test_equal_windows_are_encoded_once(windowed, monkeypatch):
    rows = []
    encode = windowed._latents
    monkeypatch.setattr(windowed, "_latents", lambda x: rows.append(len(x)) or encode(x))
    pixels = torch.ones(3, 3, 32, 32)
    pixels[1, 0, 3, 9] = 0.5
    ids = windowed.encode(pixels)
    assert rows == [2]
    assert torch.equal(ids, windowed.nearest(windowed.latents(pixels)))


def test_windows_save_and_load(windowed, tmp_path):
    windowed.save_pretrained(tmp_path)
    assert ImageTokenizer.from_pretrained(tmp_path).window == (16, 8)
    data = json.loads((tmp_path / "image_tokenizer.json").read_text())
    for bad, message in (
        ("16", "window must be .height, width. in pixels, got '16'"),
        ([16, 8.0], "window must be .height, width. in pixels"),
        ([16, 12], "window must be two multiples of 8 pixels up to 4096, got .16, 12."),
        ([0, 8], "window must be two multiples of 8 pixels up to 4096"),
    ):
        (tmp_path / "image_tokenizer.json").write_text(json.dumps({**data, "window": bad}))
        with pytest.raises(ValueError, match=message):
            ImageTokenizer.from_pretrained(tmp_path)


def test_pictures_hold_whole_windows(windowed):
    with pytest.raises(ValueError, match="H a multiple of 16 and W of 8 up to 4096, got .1, 3, 24, 24."):
        windowed.encode(noise(1, 3, 24, 24))
