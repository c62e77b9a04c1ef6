"""The image tokenizer's trainer: it learns, uses its codes, and an interrupted run ends in the same bits."""

import dataclasses
import math

import pytest
import torch
from cases import SMALL_TOKENIZER

from synergen_ext.processing.image_tokenizer import ImageTokenizer, to_pixels
from synergen_ext.scenes import CANVAS, tokenizer_scene
from synergen_ext.training.checkpoints import load_state, save_state
from synergen_ext.training.run import _flatten, _nest
from synergen_ext.training.tokenizer import (
    EmaCodebook,
    Pictures,
    TokenizerRecipe,
    batch_pictures,
    build,
    exchange_forms,
    form_and_color_loss,
    reconstruction_loss,
    train_tokenizer,
)

RECIPE = TokenizerRecipe(
    model=SMALL_TOKENIZER,
    steps=40,
    batch=4,
    crop=40,
    full_steps=0,
    autoencoder_steps=12,
    learning_rate=4e-3,
    warmup=5,
    restart_after=8,
)
#: Every phase in a few steps: autoencoder, codes, whole scenes, the decoder alone.
SHORT = dataclasses.replace(
    RECIPE, steps=5, batch=1, full_steps=1, full_batch=1, autoencoder_steps=2, decoder_steps=3, restart_after=1
)


def batch_pixels(recipe: TokenizerRecipe, step: int) -> torch.Tensor:
    return batch_pictures(recipe, step).pixels


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def weights(model: ImageTokenizer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture(scope="module")
def trained() -> tuple[ImageTokenizer, list[dict[str, float]]]:
    figures: list[dict[str, float]] = []
    model = train_tokenizer(RECIPE, on_step=lambda step, f: figures.append(f))
    return model, figures


# ---- it learns ----------------------------------------------------------------------------------


def test_reconstruction_of_unseen_scenes_improves(trained):
    """In four seconds it beats what no picture of one colour each can do."""
    other = dataclasses.replace(RECIPE, seed=77)
    pixels = torch.cat([batch_pixels(other, step) for step in range(4)])
    after = psnr(trained[0].decode(trained[0].encode(pixels)), pixels)
    untrained = build(RECIPE).eval()
    before = psnr(untrained.decode(untrained.encode(pixels)), pixels)
    one_color_each = psnr(pixels.mean((2, 3), keepdim=True).expand_as(pixels), pixels)
    assert after > before + 3 and after > one_color_each + 0.5


def test_figures_say_what_happened(trained):
    figures = trained[1]
    assert len(figures) == RECIPE.steps
    assert all(math.isfinite(v) for f in figures for v in f.values())
    assert figures[-1]["loss"] < figures[0]["loss"] / 2
    assert all(f["codes_used"] == 0 == f["commitment"] for f in figures[: RECIPE.autoencoder_steps])
    assert all(f["commitment"] > 0 for f in figures[RECIPE.autoencoder_steps :])
    assert figures[-1]["codes_used"] > 0.9


def test_codes_are_in_use(trained):
    pixels = torch.cat([batch_pixels(dataclasses.replace(RECIPE, seed=77), step) for step in range(4)])
    assert len(trained[0].encode(pixels).unique()) > 0.75 * 32


def first_layer_and_codes(recipe: TokenizerRecipe) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The encoder's first weights and the codes after every step but the last."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_save(state):
        model = state["model"]
        seen.append((model["vq.encoder.conv_in.weight"].clone(), model["vq.quantize.embedding.weight"].clone()))

    train_tokenizer(recipe, save_every=1, on_save=on_save)
    return seen


def test_codes_move_from_the_step_that_places_them():
    seen = first_layer_and_codes(SHORT)
    codes_moved = [not torch.equal(a[1], b[1]) for a, b in zip(seen, seen[1:], strict=False)]
    assert codes_moved == [SHORT.autoencoder_steps <= step <= SHORT.steps for step in range(1, len(seen))]


@pytest.mark.parametrize("window", [[], [16, 8]], ids=str)
def test_the_last_phase_moves_the_decoder_alone(window):
    """Ids made in it stay true."""
    recipe = dataclasses.replace(SHORT, window=window, crop=48)
    states: list[dict[str, torch.Tensor]] = []
    train_tokenizer(
        recipe, save_every=1, on_save=lambda s: states.append({k: v.clone() for k, v in s["model"].items()})
    )
    before, after = states[recipe.steps], states[-1]  # its first step has placed the codes anew
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert "vq.decoder.conv_out.weight" in moved
    assert all(name.startswith(("vq.decoder.", "vq.post_quant_conv.")) for name in moved), moved


def test_the_encoder_learns_through_the_codes():
    """The straight-through estimator: with codes from the start and no commitment loss, it is the only gradient."""
    seen = first_layer_and_codes(
        dataclasses.replace(SHORT, steps=3, autoencoder_steps=0, decoder_steps=0, commitment=0)
    )
    moved = [(b[0] - a[0]).abs().max().item() for a, b in zip(seen, seen[1:], strict=False)]
    assert min(moved) > 1e-5  # weight decay alone: 1e-7


def test_batch_norms_keep_their_statistics(trained):
    for module in trained[0].modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            assert (module.running_mean == 0).all() and (module.running_var == 1).all()


# ---- deterministic, resumable -------------------------------------------------------------------


def test_equal_recipes_give_equal_tokenizers():
    torch.manual_seed(1)
    first = weights(train_tokenizer(SHORT))
    torch.manual_seed(2)  # nobody else's seed plays a part
    assert_equal_bits(weights(train_tokenizer(SHORT)), first)
    other = weights(train_tokenizer(dataclasses.replace(SHORT, seed=1)))
    assert any(not torch.equal(v, other[k]) for k, v in first.items())


def test_resumed_is_unbroken(tmp_path):
    """From before and inside each phase, through the file a run writes: the same bits at the end."""

    def on_save(state):
        save_state(tmp_path / f"{state['step']}.safetensors", *_flatten(state))

    whole = weights(train_tokenizer(SHORT, save_every=1, on_save=on_save))
    total = SHORT.steps + SHORT.decoder_steps
    assert sorted(p.stem for p in tmp_path.glob("*")) == [str(i) for i in range(1, total)]
    for step in (SHORT.autoencoder_steps, SHORT.steps - 1, SHORT.steps, total - 1):
        torch.manual_seed(step)
        state = _nest(*load_state(tmp_path / f"{step}.safetensors"))
        assert state["step"] == step
        assert_equal_bits(weights(train_tokenizer(SHORT, state)), whole)


# ---- the codebook -------------------------------------------------------------------------------


def codebook(*codes: float, decay: float = 0.5) -> EmaCodebook:
    return EmaCodebook(torch.tensor(codes)[:, None], decay)


def test_codes_follow_their_latents():
    """One update by hand: N = .5 * 1 + .5 * n, sum = .5 * old + .5 * sum of latents, code = sum / N."""
    book = codebook(0.0, 10.0)
    latents = torch.tensor([[1.0], [3.0], [11.0]])
    restarted = book.update(latents, torch.tensor([0, 0, 1]), 5, torch.Generator())
    assert restarted == 0
    assert book.count.tolist() == [1.5, 1.0]
    assert book.weight.flatten().tolist() == pytest.approx([(0 + 4) / 2 / 1.5, (10 + 11) / 2 / 1.0])


def test_dead_codes_restart_on_live_latents():
    """A code that nobody chooses for more than ``restart_after`` steps lands on a latent; used ones stay."""
    book = codebook(0.0, 1.0, 99.0)
    latents = torch.tensor([[0.0], [1.0], [1.6]])
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        ids = torch.cdist(latents, book.weight).argmin(1)
        assert 2 not in ids
        restarted = book.update(latents, ids, 3, generator)
        assert restarted == (step == 3), step
    assert book.weight[2].item() == pytest.approx(1.6)  # the worst coded of the three
    assert book.idle.tolist() == [0, 0, 0]


def test_a_code_used_now_and_then_is_not_dead():
    book = codebook(0.0, 5.0)
    near, far = torch.tensor([[0.0]]), torch.tensor([[5.0]])
    for step in range(20):
        latents = far if step % 3 == 2 else near
        ids = torch.tensor([1 if step % 3 == 2 else 0])
        assert book.update(latents, ids, 3, torch.Generator()) == 0


def test_placing_leaves_no_code_without_latents():
    """Four clumps of very different sizes, four codes: each clump has its code."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    which = torch.tensor([0] * 400 + [1] * 40 + [2] * 40 + [3] * 20)
    latents = centres[which] + 0.1 * torch.randn(500, 2, generator=generator)
    book = EmaCodebook(torch.zeros(4, 2), 0.9)
    book.place(latents, generator)
    ids = torch.cdist(latents, book.weight).argmin(1)
    assert len(ids.unique()) == 4
    assert torch.cdist(centres, book.weight).min(1).values.max() < 0.3
    assert book.count.tolist() == [1] * 4 and torch.equal(book.total, book.weight)


def test_placing_needs_a_latent_a_code():
    with pytest.raises(ValueError, match="codebook of 4 codes needs at least 4 latents, got 3"):
        EmaCodebook(torch.zeros(4, 2), 0.9).place(torch.zeros(3, 2), torch.Generator())


# ---- pixels and losses --------------------------------------------------------------------------


def test_pixels_are_a_function_of_seed_and_step():
    first = batch_pixels(SHORT, 0)
    assert torch.equal(batch_pixels(SHORT, 0), first)
    assert not torch.equal(batch_pixels(SHORT, 1), first)
    assert not torch.equal(batch_pixels(dataclasses.replace(SHORT, seed=3), 0), first)


def test_crops_hold_an_object_and_the_end_sees_whole_scenes():
    recipe = dataclasses.replace(SHORT, steps=3, full_steps=1, batch=3, crop=48, full_batch=2)
    crops, scenes = batch_pixels(recipe, 1), batch_pixels(recipe, 2)
    assert crops.shape == (3, 3, 48, 48) and scenes.shape == (2, 3, CANVAS, CANVAS)
    assert batch_pixels(recipe, 3).shape == scenes.shape  # the decoder goes on with whole scenes
    for pictures in (crops, scenes):
        assert pictures.min() >= -1 and pictures.max() <= 1
        assert all((p < 0.9).any(0).float().mean() > 0.02 for p in pictures)


def test_crops_begin_on_the_windows():
    """Every crop of 48 pixels holds whole windows of 16 x 8: its ids are those of the whole scene."""
    recipe = dataclasses.replace(SHORT, window=[16, 8], crop=48, full_steps=0, batch=8)
    tokenizer = build(recipe).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        spread = float(tokenizer.latents(batch_pixels(recipe, 0)).std())
        tokenizer.vq.quantize.embedding.weight.normal_(std=spread)
    found = 0
    for i, crop in enumerate(batch_pixels(recipe, 2)):
        scene = tokenizer.encode(to_pixels(tokenizer_scene(recipe.seed, 2 * 64 + i).image()[None]))[0]
        ids = tokenizer.encode(crop[None])[0]
        places = [(y, x) for y in range(0, 7, 2) for x in range(7) if torch.equal(scene[y : y + 6, x : x + 6], ids)]
        found += bool(places)
    assert found == 8


# ---- recoloured pairs ---------------------------------------------------------------------------

PAIRED = dataclasses.replace(SHORT, window=[16, 8], crop=48, recolor=0.3, batch=8, full_batch=4)


@pytest.mark.parametrize("step", [0, SHORT.steps - 1])
def test_pairs_show_the_same_forms_in_other_colours(step):
    pictures = batch_pictures(PAIRED, step)
    first, second = pictures.pixels.chunk(2)
    assert ((first < 1).any(1) == (second < 1).any(1)).float().mean() > 0.995  # the palest edge may vanish
    a, b = pictures.colors.chunk(2)
    assert a.shape[1:] == (first.shape[2] // 16, first.shape[3] // 8)
    assert ((a >= 0) == (b >= 0)).all() and (a >= 0).any() and (a < 0).any()
    assert (a[a >= 0] != b[a >= 0]).all()
    ink = torch.nn.functional.max_pool2d((pictures.pixels < 0.99).any(1).float(), (16, 8)) > 0
    assert (pictures.colors[ink] >= 0).all()  # ink lies in objects only
    assert torch.equal(batch_pictures(PAIRED, step).pixels, pictures.pixels)
    assert len(batch_pictures(PAIRED, PAIRED.steps).pixels) == PAIRED.full_batch  # the decoder's phase: no pairs


def latents_of(form: torch.Tensor, tone: torch.Tensor) -> torch.Tensor:
    """Upper tokens ``[2 B, c, R, C]`` and lower ones, as the encoder would give them."""
    return torch.stack((form, tone), dim=3).flatten(2, 3)


def test_form_and_color_by_hand():
    """Two pairs of two windows, all inked: no loss where forms and tones are pure, and the right loss where not."""
    colors = torch.tensor([[[0, 0]], [[1, 1]], [[1, 1]], [[0, 0]]])
    pictures = Pictures(torch.zeros(4, 3, 16, 16), colors)
    form = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 1, 1, 2).repeat(2, 1, 1, 1)
    tone = torch.where(colors == 0, -1.0, 1.0)[:, None]
    latents = latents_of(form, tone)
    exchanged, loss = exchange_forms(latents), form_and_color_loss(latents, pictures, (16, 8))
    assert torch.equal(exchanged, latents)  # equal forms: nothing to exchange
    assert loss.item() == pytest.approx(0, abs=1e-5)

    other = latents_of(form + torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1, 1), tone)
    exchanged, loss = exchange_forms(other), form_and_color_loss(other, pictures, (16, 8))
    assert torch.equal(exchanged[:, :, 1], other[:, :, 1])  # colours stay
    assert torch.equal(exchanged[:2, :, 0], other[2:, :, 0]) and torch.equal(exchanged[2:, :, 0], other[:2, :, 0])
    forms = torch.tensor([1.0, 2, 3, 4, 2, 3, 4, 5])
    assert loss.item() == pytest.approx(1 / (2 * forms.var().item()), rel=1e-4)

    uneven = tone.clone()
    uneven[0, 0, 0, 0] = -3  # colour 0: -3, -1, -1, -1; its mean is -1.5
    loss = form_and_color_loss(latents_of(form, uneven), pictures, (16, 8))
    spread = (1.5**2 + 3 * 0.5**2) / 8
    assert loss.item() == pytest.approx(spread / uneven.var().item(), rel=1e-4)


def test_white_windows_have_neither_form_nor_colour():
    pictures = Pictures(torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, 2, dtype=torch.long))
    pictures.pixels[:, :, :, 8:] = 1
    latents = torch.randn(2, 3, 2, 2)
    far = latents.clone()
    far[..., 1] += 50
    wanted, got = (form_and_color_loss(z, pictures, (16, 8)) for z in (latents, far))
    assert wanted.item() == got.item() > 0


def test_training_lowers_the_price_of_recolouring():
    """In 16 steps of a tiny model; the demo's reaches 0.01."""
    recipe = dataclasses.replace(
        RECIPE, window=[16, 8], crop=48, recolor=3.0, batch=8, full_batch=2, steps=16, autoencoder_steps=15
    )
    figures: list[dict[str, float]] = []
    train_tokenizer(recipe, on_step=lambda _, f: figures.append(f))
    assert figures[-1]["recolored"] < 0.8 * figures[0]["recolored"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(recolor=0.3), "recolor needs windows two tokens high and one wide, .16, 8., and batches of at least 2"),
        (dict(recolor=0.3, window=[16, 8], crop=48, batch=1), "got window .16, 8., batches 1 and 12"),
        (dict(window=[16]), "window must be .height, width. in pixels, got .16."),
        (dict(window=[0, 8]), "window must be above 0"),
        (dict(window=[32, 8], crop=48), "crop must be a multiple of 32 pixels, got 48"),
        (dict(window=[40, 8], crop=40), "the scenes' side must be a multiple of 40 pixels, got 96"),
    ],
)
def test_windows_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **changes)


def test_reconstruction_loss_by_hand():
    target = torch.zeros(1, 1, 2, 2)
    assert reconstruction_loss(target, target, 1.0) == 0
    flat = reconstruction_loss(target + 0.5, target, 1.0)
    assert flat.item() == pytest.approx(0.5 + 2 * 0.25)  # no edges: neighbours are off by the same
    out = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    assert reconstruction_loss(out, target, 3.0).item() == pytest.approx(0.25 + 2 * 0.25 + 3 * (0.5 + 0.5))


def test_a_fresh_decoder_starts_near_grey():
    """The spatial norms start as plain norms; with transformers' start the first loss is dozens of times larger."""
    model = build(RECIPE)
    pixels = batch_pixels(RECIPE, 0)
    with torch.no_grad():
        out = model.pixels(model.latents(pixels))
    assert out.abs().max() < 3
    assert torch.equal(model.vq.decoder.conv_out.weight, build(RECIPE).vq.decoder.conv_out.weight)
