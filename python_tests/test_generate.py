"""Generation, cached and batched, against whole sequences run again for every token; guidance; interleaving."""

import pytest
import torch
from cases import image_batch, picture_ids, random_model, text_ids

from synergen_ext import ops
from synergen_ext.generation.oracle import (
    Sampling,
    generate_image_ids,
    generate_interleaved,
    generate_text,
)
from synergen_ext.model import SynerGenVL

FREE = Sampling(temperature=1.0)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> SynerGenVL:
    return random_model("tiny")


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    """Three paint prompts of different lengths."""
    c = model.config
    return [[*text_ids(c, n, seed=n), c.boi_id] for n in (9, 4, 6)]


@pytest.fixture(scope="module")
def unconditional(model) -> list[int]:
    c = model.config
    return [*text_ids(c, 3, seed=77), c.uncond_id, c.boi_id]


# ---- the same without caches, batches or padding ------------------------------------------------


def draw(logits: torch.Tensor, seed: int, position: int, sampling: Sampling) -> int:
    ids, valid = ops.sample_tokens(
        logits[None].float(),
        torch.tensor([seed]),
        torch.tensor([position]),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    assert bool(valid.all())
    return int(ids)


@torch.no_grad()
def slow_text(model, prompt, pictures, steps, stop_ids=(), sampling=GREEDY, seed=0) -> list[int]:
    ids, out = list(prompt), []
    for step in range(steps):
        logits = model.output(model.states(torch.tensor([ids]), pictures)[0, -1])
        token = draw(logits, seed, step, sampling)
        if token in stop_ids:
            break
        out.append(token)
        ids.append(token)
    return out


@torch.no_grad()
def patch_state(model, prompt, pictures, raster, patches) -> torch.Tensor:
    """State before patch number ``patches``: the prompt and the finished patches, all run again."""
    x = model.embed(torch.tensor([prompt]), pictures)
    folded = model.image_embedding(raster[None])[:, :patches]
    visual = torch.tensor([[i == model.config.image_id for i in prompt] + [True] * patches])
    return model.backbone(torch.cat((x, folded), dim=1), visual)[0, -1]


@torch.no_grad()
def slow_picture(model, prompt, unconditional, seed, guidance, sampling=FREE, size=None, pictures=None) -> torch.Tensor:
    """One picture: eq. 3's head in its parallel form, guidance as in section 3.4, a draw a token."""
    c = model.config
    h, w = size or c.image_grid
    m, n = c.fold
    raster = torch.zeros(h, w, dtype=torch.long)
    for patch in range(c.folded_length(h, w)):
        top, left = patch // (w // n) * m, patch % (w // n) * n
        states = [patch_state(model, prompt, pictures, raster, patch)]
        states.append(patch_state(model, unconditional, None, raster, patch))
        v = torch.zeros(c.window, dtype=torch.long)
        for j in range(c.window):
            cond, uncond = (model.unfolding_head(s[None], v[None])[0, j].float() for s in states)
            logits = cond if guidance == 1 else uncond + guidance * (cond - uncond)
            v[j] = draw(logits, seed, patch * c.window + j, sampling)
        raster[top : top + m, left : left + n] = v.view(m, n)
    return raster


# ---- text ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asks(model) -> tuple[list[list[int]], torch.Tensor, list[slice]]:
    """Prompts of different lengths with two, no and one picture; all pictures; which belong to each prompt."""
    c = model.config
    rows = [
        [*text_ids(c, 3), *picture_ids(c), *picture_ids(c), *text_ids(c, 2, seed=1)],
        text_ids(c, 7, seed=2),
        [*picture_ids(c), *text_ids(c, 5, seed=3)],
    ]
    return rows, image_batch(c, 3), [slice(0, 2), slice(0, 0), slice(2, 3)]


@pytest.mark.parametrize("sampling", [GREEDY, FREE, Sampling(0.7, top_k=20, top_p=0.9)], ids=str)
def test_text_is_what_whole_sequences_give(model, asks, sampling):
    """Cached = uncached, a left-padded batch = each prompt alone; with no temperature, the argmax."""
    rows, pictures, own = asks
    seeds = [5, 6, 7]
    got = generate_text(model, rows, pictures, 9, (), sampling, seeds)
    wanted = [
        slow_text(model, row, pictures[part] if part != slice(0, 0) else None, 9, (), sampling, seed)
        for row, part, seed in zip(rows, own, seeds, strict=True)
    ]
    assert got == wanted
    alone = [
        generate_text(model, [row], pictures[part], 9, (), sampling, [seed])[0]
        for row, part, seed in zip(rows, own, seeds, strict=True)
    ]
    assert alone == got


def test_greedy_text_is_the_argmax(model, asks):
    rows, pictures, _ = asks
    (got,) = generate_text(model, rows[:1], pictures[:2], 3, ())
    with torch.no_grad():
        ids = list(rows[0])
        for token in got:
            assert token == int(model.output(model.states(torch.tensor([ids]), pictures[:2])[0, -1]).argmax())
            ids.append(token)


def test_text_stops_row_by_row(model, asks):
    """A stop id ends its row and is left out; the others go on."""
    rows, pictures, _ = asks
    free = generate_text(model, rows, pictures, 8, ())
    stop = free[1][3]
    ended = generate_text(model, rows, pictures, 8, [stop])
    for with_stop, without in zip(ended, free, strict=True):
        cut = without.index(stop) if stop in without else 8
        assert with_stop == without[:cut]
    assert len(ended[1]) <= 3 and max(map(len, ended)) > 3


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_text_has_at_most_max_new_tokens(model, asks, steps):
    rows, pictures, _ = asks
    assert [len(r) for r in generate_text(model, rows, pictures, steps, ())] == [steps] * 3


def test_seeds_choose_the_text(model, asks):
    rows, _, _ = asks
    texts = generate_text(model, [rows[1]] * 4, None, 12, (), FREE, [1, 2, 1, 3])
    assert texts[0] == texts[2] and texts[0] != texts[1] != texts[3]


def test_text_never_writes_specials(model, asks):
    """Only words: the picture's frame is not the text head's to write here."""
    rows, _, _ = asks
    texts = generate_text(model, [rows[1]] * 8, None, 16, (), Sampling(temperature=10.0), range(8))
    assert max(map(max, texts)) < model.config.vocab_size


# ---- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("sampling", [FREE, GREEDY, Sampling(0.8, top_k=9, top_p=0.9)], ids=str)
def test_pictures_are_what_whole_sequences_give(model, prompts, unconditional, guidance, sampling):
    """Cached = uncached, head step by step = in parallel, a padded and doubled batch = each alone."""
    seeds = [3, 4, 5]
    got = generate_image_ids(model, prompts, unconditional, seeds, guidance, sampling)
    assert got.shape == (3, *model.config.image_grid)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        wanted = slow_picture(model, prompt, unconditional, seed, guidance, sampling)
        assert torch.equal(got[row], wanted)
        alone = generate_image_ids(model, [prompt], unconditional, [seed], guidance, sampling)
        assert torch.equal(alone[0], wanted)


@pytest.mark.parametrize("size", [(2, 4), (4, 4), (2, 8)])
def test_smaller_pictures(model, prompts, unconditional, size):
    got = generate_image_ids(model, prompts[:1], unconditional, [3], 2.0, FREE, size)
    assert torch.equal(got[0], slow_picture(model, prompts[0], unconditional, 3, 2.0, size=size))


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_backends_paint_the_same_picture(model, prompts, unconditional, backend):
    wanted = generate_image_ids(model, prompts, unconditional, [3, 4, 5], 3.0, FREE)
    with ops.backend(backend):
        assert torch.equal(generate_image_ids(model, prompts, unconditional, [3, 4, 5], 3.0, FREE), wanted)


def test_seeds_choose_the_picture(model, prompts, unconditional):
    same = [prompts[0]] * 4
    got = generate_image_ids(model, same, unconditional, [1, 2, 1, 2**62], 3.0, FREE)
    assert torch.equal(got[0], got[2])
    assert not torch.equal(got[0], got[1]) and not torch.equal(got[1], got[3])
    again = generate_image_ids(model, same, unconditional, [1, 2, 1, 2**62], 3.0, FREE)
    assert torch.equal(again, got)


def test_prompts_choose_the_picture(model, prompts, unconditional):
    got = generate_image_ids(model, prompts, unconditional, [1, 1, 1], 3.0, FREE)
    assert not torch.equal(got[0], got[1]) and not torch.equal(got[1], got[2])


def test_no_temperature_needs_no_seed(model, prompts, unconditional):
    got = [generate_image_ids(model, prompts[:1], unconditional, [s], 3.0, GREEDY) for s in (1, 2)]
    assert torch.equal(*got)


# ---- guidance: l = l_u + s (l_c - l_u) ----------------------------------------------------------


def test_guidance_1_is_conditional_only(model, prompts, unconditional):
    got = generate_image_ids(model, prompts, unconditional, [1, 2, 3], 1.0, FREE)
    other = generate_image_ids(model, prompts, prompts[0], [1, 2, 3], 1.0, FREE)
    assert torch.equal(got, other)


def test_guidance_0_is_unconditional_only(model, prompts, unconditional):
    got = generate_image_ids(model, prompts, unconditional, [1, 2, 3], 0.0, FREE)
    alone = generate_image_ids(model, [unconditional] * 3, prompts[0], [1, 2, 3], 1.0, FREE)
    assert torch.equal(got, alone)


def test_guidance_from_equal_prompts_does_nothing(model, prompts):
    plain = generate_image_ids(model, prompts[:1], prompts[0], [1], 1.0, FREE)
    for s in (0.0, 3.0, 50.0):
        assert torch.equal(generate_image_ids(model, prompts[:1], prompts[0], [1], s, FREE), plain)


def test_guidance_matters(model, prompts, unconditional):
    got = [generate_image_ids(model, prompts[:1], unconditional, [1], s, FREE) for s in (1.0, 3.0, 7.5)]
    assert not torch.equal(got[0], got[1]) and not torch.equal(got[1], got[2])


def test_defaults_are_the_configs(model, prompts, unconditional):
    c = model.config
    own = Sampling(c.image_temperature, c.image_top_k, c.image_top_p)
    wanted = generate_image_ids(model, prompts, unconditional, [1, 2, 3], c.guidance, own, c.image_grid)
    assert torch.equal(generate_image_ids(model, prompts, unconditional, [1, 2, 3]), wanted)


def test_progress_counts_patches(model, prompts, unconditional):
    seen = []
    generate_image_ids(model, prompts, unconditional, [1, 2, 3], on_patch=lambda *args: seen.append(args))
    assert seen == [(i, 4) for i in (1, 2, 3, 4)]


# ---- text and pictures in turn ------------------------------------------------------------------


@torch.no_grad()
def slow_interleaved(model, prompt, unconditional, budget, stop_ids, seed, guidance, text, pictures):
    c = model.config
    ids, out, words, spent = list(prompt), [], [], 0
    given = [] if pictures is None else list(pictures)
    while spent < budget:
        shown = torch.stack(given) if given else None
        logits = model.text_logits(model.states(torch.tensor([ids]), shown)[0, -1])
        logits[[c.eoi_id, c.uncond_id]] = -torch.inf
        token = draw(logits, seed, spent, text)
        spent += 1
        if token in stop_ids or (token == c.boi_id and spent + c.image_tokens > budget):
            break
        ids.append(token)
        if token != c.boi_id:
            words.append(token)
            continue
        if words:
            out.append(words)
            words = []
        drawn = Sampling(c.image_temperature, c.image_top_k, c.image_top_p)
        picture = slow_picture(model, ids, unconditional, seed + len(out), guidance, drawn, pictures=shown)
        out.append(picture)
        given.append(picture)
        ids += [c.image_id] * c.image_tokens + [c.eoi_id]
        spent += c.image_tokens
    return [*out, words] if words else out


@pytest.fixture(scope="module")
def painter() -> SynerGenVL:
    """A model that likes to begin pictures."""
    model = random_model("tiny")
    with torch.no_grad():
        model.special_output.weight[0] *= 3
    return model


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_interleaved_is_what_whole_sequences_give(painter, unconditional, guidance, seed):
    c = painter.config
    prompt, shown = [*text_ids(c, 3), *picture_ids(c), *text_ids(c, 2, seed=1)], image_batch(c, 1)
    got = generate_interleaved(painter, prompt, unconditional, 24, (7,), seed, guidance, Sampling(1.0), image_ids=shown)
    wanted = slow_interleaved(painter, prompt, unconditional, 24, (7,), seed, guidance, Sampling(1.0), shown)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_interleaved_paints_several_pictures_between_words(painter, unconditional):
    prompt = text_ids(painter.config, 4)
    runs = [generate_interleaved(painter, prompt, unconditional, 60, (), s, 1.0, Sampling(1.0)) for s in range(4)]
    pictures = [[part for part in run if isinstance(part, torch.Tensor)] for run in runs]
    assert max(map(len, pictures)) >= 2
    assert any(not torch.equal(p[0], p[1]) for p in pictures if len(p) > 1)  # each has draws of its own
    for run in runs:
        spent = sum(5 if isinstance(part, torch.Tensor) else len(part) for part in run)  # <boi> and 4 folded
        assert spent <= 60
        kinds = [isinstance(part, torch.Tensor) for part in run]
        assert all(a or b for a, b in zip(kinds, kinds[1:], strict=False))  # words are not torn in two
        words = [i for part in run if not isinstance(part, torch.Tensor) for i in part]
        assert all(i < painter.config.vocab_size for i in words)


def test_interleaved_keeps_to_its_budget(painter, unconditional):
    for budget in (0, 1, 3, 5, 9):
        for seed in range(3):
            out = generate_interleaved(
                painter, text_ids(painter.config, 4), unconditional, budget, (), seed, 1.0, Sampling(1.0)
            )
            spent = sum(5 if isinstance(part, torch.Tensor) else len(part) for part in out)
            assert spent <= budget


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-1.0), "temperature"),
        (Sampling(temperature=float("nan")), "temperature"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(top_p=-0.1), "top_p"),
        (Sampling(top_p=1.5), "top_p"),
    ],
    ids=str,
)
def test_wrong_sampling_is_refused(model, prompts, unconditional, sampling, message):
    with pytest.raises(ValueError, match=message):
        generate_image_ids(model, prompts, unconditional, [1, 2, 3], 1.0, sampling)
    with pytest.raises(ValueError, match=message):
        generate_text(model, prompts, None, 3, (), sampling)


@pytest.mark.parametrize("size", [(3, 4), (2, 6), (8, 8), (0, 4)])
def test_wrong_sizes_are_refused(model, prompts, unconditional, size):
    with pytest.raises(ValueError, match="image tokens must be multiples of 2 x 4 up to 4 x 8"):
        generate_image_ids(model, prompts, unconditional, [1, 2, 3], size=size)


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3, 4, 5, 6]])
def test_a_seed_a_prompt(model, prompts, unconditional, seeds):
    with pytest.raises(ValueError, match=f"seeds must be 3, one a prompt, got {len(seeds)}"):
        generate_image_ids(model, prompts, unconditional, seeds)
    if seeds:
        with pytest.raises(ValueError, match=f"seeds must be 3, one a prompt, got {len(seeds)}"):
            generate_text(model, prompts, None, 3, (), FREE, seeds)


def test_empty_prompts_are_refused(model, unconditional):
    with pytest.raises(ValueError, match="prompts must hold at least one id each"):
        generate_text(model, [[1], []], None, 3, ())
    with pytest.raises(ValueError, match="prompts must hold at least one id each"):
        generate_image_ids(model, [[]], unconditional, [1])


def test_nothing_asked_nothing_made(model, unconditional):
    assert generate_text(model, [], None, 3, ()) == []
    assert generate_image_ids(model, [], unconditional, []).shape == (0, 4, 8)


def test_broken_weights_are_reported(prompts, unconditional):
    model = random_model("tiny")
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits are not finite in row 0"):
        generate_image_ids(model, prompts, unconditional, [1, 2, 3])
    with pytest.raises(FloatingPointError, match="logits are not finite in row 0"):
        generate_text(model, prompts, None, 3, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(prompts, unconditional, dtype):
    model = random_model("tiny", dtype)
    got = generate_image_ids(model, prompts, unconditional, [1, 2, 3], 3.0, FREE)
    assert got.min() >= 0 and got.max() < model.config.codebook_size and len(got.unique()) > 8
    assert len(generate_text(model, prompts, None, 3, ())[0]) == 3
