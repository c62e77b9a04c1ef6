"""The whole model: who sees what, which expert works where, cached = uncached, the losses by hand, torch.compile."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cases import image_batch, mixed_batch, picture_ids, random_model, scaled_down, text_ids

from synergen_ext import ops
from synergen_ext.model import PRESETS, SynerGenConfig, SynerGenVL
from synergen_ext.model.modeling import IGNORE

CLOSE = dict(rtol=0, atol=1e-10)
VARIANTS = {
    "plain": {},
    "biased": dict(attention_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "one group a head": dict(num_kv_heads=4),
    "one group": dict(num_kv_heads=1),
}


def variant(name: str) -> SynerGenVL:
    return random_model(SynerGenConfig.preset("tiny", **VARIANTS[name]))


# ---- the paper's equations, written out ---------------------------------------------------------


def slow_states(model: SynerGenVL, input_ids: torch.Tensor, image_ids: torch.Tensor) -> torch.Tensor:
    """Sections 3.1 and 3.2 in loops over rows, tokens and heads; shares no code with the model."""
    c = model.config
    m, n = c.fold
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)

    def norm(v, layer):
        return v / (v.square().mean() + c.rms_norm_eps).sqrt() * layer.weight

    def rotate(v, position):
        z = torch.complex(*v.chunk(2)) * torch.polar(torch.ones_like(frequency), position * frequency)
        return torch.cat((z.real, z.imag))

    def windows():
        e = model.image_embedding
        for picture in image_ids:
            h, w = picture.shape
            for top in range(0, h, m):
                for left in range(0, w, n):
                    tokens = [(y, x) for y in range(top, top + m) for x in range(left, left + n)]
                    parts = [e.tokens.weight[picture[t]] + e.positions[t] for t in tokens]
                    yield e.proj_out(F.gelu(e.proj_in(torch.cat(parts))))

    folded, rows = windows(), []
    for row in input_ids.tolist():
        x = []
        for i in row:
            if i < c.vocab_size:
                x.append(model.tok_embeddings.weight[i])
            elif i == c.image_id:
                x.append(next(folded))
            else:
                x.append(model.special_embeddings.weight[i - c.vocab_size])
        for block in model.layers:
            a, keys, values, after = block.attention, [], [], []
            for t, token in enumerate(x):
                h = norm(token, block.attention_norm)
                keys.append([rotate(k, t) for k in a.wk(h).view(c.num_kv_heads, -1)])
                values.append(a.wv(h).view(c.num_kv_heads, -1))
                mixed = []
                for head, q in enumerate(a.wq(h).view(c.num_heads, -1)):
                    kv = head * c.num_kv_heads // c.num_heads
                    scores = torch.stack([rotate(q, t) @ k[kv] for k in keys]) / math.sqrt(c.head_dim)
                    mixed.append(scores.softmax(0) @ torch.stack([v[kv] for v in values]))
                token = token + a.wo(torch.cat(mixed))
                h = norm(token, block.ffn_norm)
                visual = row[t] == c.image_id
                ffn = block.feed_forward.vision if visual else block.feed_forward.text
                after.append(token + ffn.down @ (F.silu(ffn.gate @ h) * (ffn.up @ h)))
            x = after
        rows.append(torch.stack([norm(token, model.norm) for token in x]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_states_are_the_paper(name):
    model = variant(name)
    input_ids, image_ids = mixed_batch(model.config)
    with torch.no_grad():
        wanted = slow_states(model, input_ids, image_ids)
        torch.testing.assert_close(model.states(input_ids, image_ids), wanted, **CLOSE)
    torch.testing.assert_close(model.states(input_ids, image_ids), wanted, **CLOSE)  # training's path
    assert 0.3 < wanted.std() < 3


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_of_every_preset(preset):
    model = random_model(scaled_down(preset))
    input_ids, image_ids = mixed_batch(model.config)
    with torch.no_grad():
        states = model.states(input_ids, image_ids)
        torch.testing.assert_close(states, slow_states(model, input_ids, image_ids), **CLOSE)
    assert model.text_logits(states).shape == (*input_ids.shape, model.config.vocab_size + 3)


def test_long_sequences_take_the_other_attention():
    """More than 128 tokens in training, where scores are no longer multiplied out."""
    model = random_model("tiny")
    ids = torch.tensor([text_ids(model.config, 150)])
    with torch.no_grad():
        wanted = model.states(ids)
    torch.testing.assert_close(model.states(ids), wanted, **CLOSE)
    torch.testing.assert_close(model.states(ids)[:, :100], model.states(ids[:, :100]), **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_backends_agree(backend, dtype):
    model = random_model("tiny", dtype)
    input_ids, image_ids = mixed_batch(model.config)
    labels, paint = input_ids.clamp_max(model.config.uncond_id), torch.tensor([True, False, True])

    def losses_and_gradients():
        losses = model(input_ids, labels, image_ids, paint)
        return [losses.total, *torch.autograd.grad(losses.total, list(model.parameters()))]

    ours = losses_and_gradients()
    with ops.backend(backend):
        theirs = losses_and_gradients()
    limit = CLOSE if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-4)
    for name, a, b in zip(["loss", *dict(model.named_parameters())], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **limit, msg=lambda text, name=name: f"{name}: {text}")


# ---- who sees what ------------------------------------------------------------------------------


def moved_by(model, before, input_ids, image_ids) -> torch.Tensor:
    """Largest change of each position's state, [B, T]."""
    with torch.no_grad():
        return (model.states(input_ids, image_ids) - before).abs().amax(-1)


def test_text_is_seen_by_later_positions_only():
    model = random_model("tiny")
    input_ids, image_ids = mixed_batch(model.config)
    with torch.no_grad():
        before = model.states(input_ids, image_ids)
    for t in (0, 4, 10, input_ids.shape[1] - 1):
        assert input_ids[0, t] < model.config.image_id
        changed = input_ids.clone()
        changed[0, t] = (input_ids[0, t] + 1) % model.config.vocab_size
        moved = moved_by(model, before, changed, image_ids)
        assert moved[0, :t].amax() == 0 if t else True
        assert (moved[0, t:] > 1e-9).all()
        assert moved[1].amax() == 0


def test_an_image_token_is_seen_from_its_own_window_on():
    model = random_model("tiny")
    c = model.config
    input_ids, image_ids = mixed_batch(c)
    with torch.no_grad():
        before = model.states(input_ids, image_ids)
    slots = (input_ids[0] == c.image_id).nonzero().flatten()  # the first row holds pictures 0 and 1
    for picture, y, x in ((0, 0, 0), (0, 1, 5), (0, 3, 7), (1, 2, 0)):
        window = (y // 2) * 2 + x // 4
        first = int(slots[picture * c.image_tokens + window])
        changed = image_ids.clone()
        changed[picture, y, x] = (changed[picture, y, x] + 1) % c.codebook_size
        moved = moved_by(model, before, input_ids, changed)
        assert moved[0, :first].amax() == 0
        assert (moved[0, first:] > 1e-9).all()
        assert moved[1].amax() == 0


def test_pictures_stand_in_reading_order():
    """Row 0 holds pictures 0 and 1, row 1 picture 2."""
    model = random_model("tiny")
    input_ids, image_ids = mixed_batch(model.config)
    both = model.states(input_ids, image_ids)
    torch.testing.assert_close(model.states(input_ids[:1], image_ids[:2]), both[:1], **CLOSE)
    torch.testing.assert_close(model.states(input_ids[1:], image_ids[2:]), both[1:], **CLOSE)
    swapped = model.states(input_ids[:1], image_ids[[1, 0]])
    assert (swapped - both[:1]).abs().amax() > 1e-3


# ---- vision experts (eq. 2) ---------------------------------------------------------------------


def last_layer_change(model: SynerGenVL, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the last layer's output moves when one of its weights does: (at images, elsewhere)."""
    input_ids, image_ids = mixed_batch(model.config)
    with torch.no_grad():
        before = model.states(input_ids, image_ids)
        dict(model.layers[-1].named_parameters())[name].mul_(1.1)
        moved = moved_by(model, before, input_ids, image_ids)
    visual = input_ids == model.config.image_id
    return moved[visual], moved[~visual]


@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_vision_expert_works_at_image_positions_only(matrix):
    at_images, elsewhere = last_layer_change(random_model("tiny"), f"feed_forward.vision.{matrix}")
    assert (at_images > 1e-6).all() and (elsewhere == 0).all()


@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_text_expert_works_at_all_other_positions_only(matrix):
    at_images, elsewhere = last_layer_change(random_model("tiny"), f"feed_forward.text.{matrix}")
    assert (at_images == 0).all() and (elsewhere > 1e-6).all()


@pytest.mark.parametrize("name", ["attention.wv.weight", "attention.wo.weight", "ffn_norm.weight"])
def test_attention_and_norms_are_shared(name):
    at_images, elsewhere = last_layer_change(random_model("tiny"), name)
    assert (at_images > 1e-9).all() and (elsewhere > 1e-9).all()


def test_experts_start_as_copies():
    """Section 3.2: every vision FFN begins as its layer's text FFN; afterwards they are apart."""
    model = random_model("tiny")
    blocks = [b.feed_forward for b in model.layers]
    assert not any(torch.equal(b.text.gate, b.vision.gate) for b in blocks)
    text = [p.clone() for b in blocks for p in b.text.parameters()]
    model.copy_text_experts()
    for b in blocks:
        for a, v in zip(b.text.parameters(), b.vision.parameters(), strict=True):
            assert torch.equal(a, v) and a.data_ptr() != v.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(text, [p for b in blocks for p in b.text.parameters()], strict=True))
    at_images, elsewhere = last_layer_change(model, "feed_forward.vision.up")
    assert (at_images > 1e-6).all() and (elsewhere == 0).all()


def test_text_alone_never_meets_the_vision_weights():
    """Without a picture nothing that stage 1 trains plays a part, down to the last bit."""
    model = random_model("tiny")
    ids = torch.tensor([text_ids(model.config, 20)])
    with torch.no_grad():
        before = model.output(model.states(ids))
        for name, p in model.named_parameters():
            if ".vision." in name or name.startswith(("image_", "unfolding_", "special_")):
                p.normal_(std=100)
        assert torch.equal(model.output(model.states(ids)), before)


def test_experts_side_by_side_stay_trainable():
    """Without gradients the two FFNs move into one allocation; training, moving and copying go on as before."""
    model = random_model("tiny", torch.float32)
    input_ids, image_ids = mixed_batch(model.config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():
        wanted = model.states(input_ids, image_ids).clone()
    ffn = model.layers[0].feed_forward
    assert ffn.text.gate.untyped_storage().data_ptr() == ffn.vision.gate.untyped_storage().data_ptr()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids, input_ids.clamp_max(model.config.uncond_id), image_ids).total.backward()
    gradient = ffn.text.up.grad.clone()
    optimizer.step()
    torch.testing.assert_close(ffn.text.up, before["layers.0.feed_forward.text.up"] - 0.1 * gradient)
    with torch.no_grad():
        trained = model.states(input_ids, image_ids)
        assert (trained - wanted).abs().max() > 1e-4
        model.load_state_dict(before)
        assert torch.equal(model.states(input_ids, image_ids), wanted)
        model.double()
        torch.testing.assert_close(model.states(input_ids, image_ids).float(), wanted, rtol=1e-3, atol=1e-3)


# ---- cached = uncached --------------------------------------------------------------------------


def through_cache(model, input_ids, image_ids, pieces, positions=None, mask=None) -> torch.Tensor:
    """States of the same sequences, fed in ``pieces``; mask [B, T, T] of the whole."""
    visual = input_ids == model.config.image_id
    b, t = input_ids.shape
    assert sum(pieces) == t
    cache, start, out = model.new_cache(b, t), 0, []
    with torch.no_grad():
        x = model.embed(input_ids, image_ids)
        for piece in pieces:
            end = start + piece
            out.append(
                model.backbone(
                    x[:, start:end],
                    visual[:, start:end],
                    None if positions is None else positions[:, start:end],
                    None if mask is None else mask[:, None, start:end, :end],
                    cache,
                )
            )
            assert cache.length == end
            start = end
    return torch.cat(out, dim=1)


def pieces_of(total: int) -> dict[str, list[int]]:
    rest = total - 1 - 7 - 2
    return {
        "all at once": [total],
        "one by one": [1] * total,
        "prompt, then one by one": [total - 6, *[1] * 6],
        "chunks": [7, 2, 1, rest],
        "one, then chunks": [1, rest, 7, 2],
    }


@pytest.mark.parametrize("pieces", pieces_of(20))
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_is_uncached(name, pieces):
    model = variant(name)
    input_ids, image_ids = mixed_batch(model.config)
    with torch.no_grad():
        wanted = model.states(input_ids, image_ids)
    sizes = pieces_of(input_ids.shape[1])[pieces]
    torch.testing.assert_close(through_cache(model, input_ids, image_ids, sizes), wanted, **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_cached_is_uncached_on_every_backend(backend):
    model = random_model("tiny")
    input_ids, image_ids = mixed_batch(model.config)
    with ops.backend(backend), torch.no_grad():
        wanted = model.states(input_ids, image_ids)
        sizes = pieces_of(input_ids.shape[1])["chunks"]
        torch.testing.assert_close(through_cache(model, input_ids, image_ids, sizes), wanted, **CLOSE)


@pytest.mark.parametrize("pieces", pieces_of(20))
def test_padding_on_the_left_changes_nothing(pieces):
    """Rows of different lengths end together; what stands before a row is masked and not counted."""
    model = random_model("tiny")
    c = model.config
    rows = [
        [*text_ids(c, 6), *picture_ids(c), *text_ids(c, 4, seed=1)],
        [*text_ids(c, 3, seed=2), *picture_ids(c)],
        text_ids(c, 16, seed=3),
    ]
    pictures = image_batch(c, 2)
    longest = max(map(len, rows))
    input_ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    valid = torch.tensor([[False] * (longest - len(r)) + [True] * len(r) for r in rows])
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = causal & valid[:, None] | torch.eye(longest, dtype=torch.bool)
    sizes = pieces_of(longest)[pieces]
    got = through_cache(model, input_ids, pictures, sizes, positions, mask)
    for i, row in enumerate(rows):
        with torch.no_grad():
            own = pictures[i : i + 1] if i < 2 else None
            wanted = model.states(torch.tensor([row]), own)[0]
        torch.testing.assert_close(got[i, longest - len(row) :], wanted, **CLOSE)


def test_a_full_cache_is_refused_and_can_be_reset():
    model = random_model("tiny")
    cache = model.new_cache(1, 4)
    ids = torch.tensor([text_ids(model.config, 5)])
    text = torch.zeros(1, 5, dtype=torch.bool)
    with torch.no_grad():
        x = model.embed(ids)
        first = model.backbone(x[:, :4], text[:, :4], cache=cache)
        with pytest.raises(ValueError, match="KVCache: capacity is 4 tokens, got 5"):
            model.backbone(x[:, 4:], text[:, 4:], cache=cache)
        assert cache.length == 4
        cache.reset()
        assert torch.equal(model.backbone(x[:, :4], text[:, :4], cache=cache), first)


# ---- losses (eq. 4) -----------------------------------------------------------------------------


def losses_by_hand(model, input_ids, labels, image_ids, paint) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of -log p in loops: a label is predicted from the state before it, an image token by the head."""
    c = model.config
    states = model.states(input_ids, image_ids)
    text, image, picture, patch = [], [], 0, 0
    for row, (ids, wanted) in enumerate(zip(input_ids.tolist(), labels.tolist(), strict=True)):
        for t, i in enumerate(ids):
            if wanted[t] != IGNORE and t > 0:
                logits = torch.cat((model.output.weight, model.special_output.weight)) @ states[row, t - 1]
                text.append(-logits.log_softmax(0)[wanted[t]])
            if i != c.image_id:
                continue
            if bool(paint[picture]):
                rows, columns = c.fold
                per_row = image_ids.shape[2] // columns
                y, x = (patch // per_row) * rows, (patch % per_row) * columns
                v = image_ids[picture, y : y + rows, x : x + columns].flatten()
                p = model.unfolding_head(states[row, t - 1][None], v[None])[0].log_softmax(-1)
                image += [-p[j, v[j]] for j in range(len(v))]
            patch += 1
            if patch == c.image_tokens:
                picture, patch = picture + 1, 0
    zero = states.sum() * 0
    return tuple(torch.stack(x).mean() if x else zero for x in (text, image))


def training_batch(config, seed=0):
    input_ids, image_ids = mixed_batch(config, seed)
    labels = input_ids.masked_fill(input_ids == config.image_id, IGNORE)
    labels[0, :3] = IGNORE
    labels[1, 7:] = IGNORE
    return input_ids, labels, image_ids


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("paint", [(1, 1, 1), (0, 1, 0), (1, 0, 1), (0, 0, 0)], ids=str)
def test_losses_by_hand(name, paint):
    model = variant(name)
    input_ids, labels, image_ids = training_batch(model.config)
    mask = torch.tensor(paint, dtype=torch.bool)
    got = model(input_ids, labels, image_ids, mask)
    text, image = losses_by_hand(model, input_ids, labels, image_ids, mask)
    torch.testing.assert_close(got.text, text, **CLOSE)
    torch.testing.assert_close(got.image, image, **CLOSE)
    torch.testing.assert_close(got.total, text + 2 * image, **CLOSE)
    assert text > 1 and (image > 1) == any(paint)


def test_lambda_comes_from_the_config():
    config = SynerGenConfig.preset("tiny")
    model = random_model(dataclasses.replace(config, image_loss_weight=0.25))
    input_ids, labels, image_ids = training_batch(config)
    got = model(input_ids, labels, image_ids, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(got.total, got.text + 0.25 * got.image)


def test_painting_is_off_unless_asked_for():
    model = random_model("tiny")
    input_ids, labels, image_ids = training_batch(model.config)
    assert model(input_ids, labels, image_ids).image == 0


def test_no_labels_give_zero_text_loss():
    model = random_model("tiny")
    input_ids, labels, image_ids = training_batch(model.config)
    none = torch.full_like(labels, IGNORE)
    got = model(input_ids, none, image_ids, torch.ones(3, dtype=torch.bool))
    assert got.text == 0 and got.total == 2 * got.image
    got.total.backward()
    assert model.output.weight.grad is None and model.unfolding_head.classifier.weight.grad is not None


def test_the_label_at_the_first_position_is_never_learned():
    """Nothing stands before it."""
    model = random_model("tiny")
    input_ids, labels, image_ids = training_batch(model.config)
    changed = labels.clone()
    changed[:, 0] = 5
    assert model(input_ids, labels, image_ids).text == model(input_ids, changed, image_ids).text


def test_padding_on_the_right_does_not_change_the_losses():
    model = random_model("tiny")
    input_ids, labels, image_ids = training_batch(model.config)
    paint = torch.tensor([True, False, True])
    wanted = model(input_ids, labels, image_ids, paint)
    for pad in (0, 7, model.config.eoi_id):
        longer = F.pad(input_ids, (0, 9), value=pad)
        got = model(longer, F.pad(labels, (0, 9), value=IGNORE), image_ids, paint)
        torch.testing.assert_close(got.total, wanted.total, **CLOSE)
        torch.testing.assert_close(got.image, wanted.image, **CLOSE)


def test_image_loss_against_finite_differences():
    """Some weights of every kind, in float64: the analytic derivative is the measured slope."""
    model = random_model("tiny")
    input_ids, labels, image_ids = training_batch(model.config)
    labels, paint = torch.full_like(labels, IGNORE), torch.tensor([True, True, False])

    def loss():
        return model(input_ids, labels, image_ids, paint).image

    loss().backward()
    generator, checked = torch.Generator().manual_seed(1), 0
    for name, p in model.named_parameters():
        if name.startswith(("output.", "special_output.")):
            assert p.grad is None
            continue
        used = p.grad.flatten().nonzero().flatten()  # of embedding tables, the rows in use
        if not len(used):
            raise AssertionError(f"{name} gets no gradient")
        i = int(used[torch.randint(len(used), (), generator=generator)])
        with torch.no_grad():
            flat, eps = p.view(-1), 1e-5
            old = flat[i].item()
            flat[i] = old + eps
            ahead = loss()
            flat[i] = old - eps
            slope = (ahead - loss()).item() / (2 * eps)
            flat[i] = old
        assert p.grad.flatten()[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-9), name
        checked += 1
    assert checked > 40


# ---- what is refused ----------------------------------------------------------------------------


def test_image_positions_without_pictures_are_refused():
    model = random_model("tiny")
    input_ids, _ = mixed_batch(model.config)
    with pytest.raises(ValueError, match="image positions, but no image_ids"):
        model.states(input_ids)


@pytest.mark.parametrize("count", [2, 4])
def test_the_wrong_number_of_pictures_is_refused(count):
    model = random_model("tiny")
    input_ids, _ = mixed_batch(model.config)
    with pytest.raises(ValueError, match=rf"{count} x 4 image positions for image_ids \[{count}, 4, 8\], got 12"):
        model.states(input_ids, image_batch(model.config, count))


@pytest.mark.parametrize("grid", [(3, 8), (4, 6), (6, 8)])
def test_pictures_that_do_not_fold_are_refused(grid):
    model = random_model("tiny")
    input_ids, _ = mixed_batch(model.config)
    with pytest.raises(ValueError, match="fold_tokens: "):
        model.states(input_ids, torch.zeros(3, *grid, dtype=torch.long))


@pytest.mark.parametrize("bad", [-1, 304, 100_000])
def test_ids_past_the_specials_are_refused(bad):
    model = random_model("tiny")  # 300 words, 3 specials, 1 placeholder
    with pytest.raises(ValueError, match=rf"input_ids must be in \[0, 304\), got {bad}"):
        model.embed(torch.tensor([[1, bad, 2]]))


# ---- torch.compile ------------------------------------------------------------------------------


def test_backbone_compiles_whole():
    """One graph without breaks, forward and backward."""
    model = random_model(SynerGenConfig.preset("tiny", num_layers=1), torch.float32)
    input_ids, image_ids = mixed_batch(model.config)
    x = model.embed(input_ids, image_ids).detach().requires_grad_()
    visual = input_ids == model.config.image_id
    compiled = torch.compile(model.backbone, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(x, visual), model.backbone(x, visual)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    weights = [x, model.layers[0].feed_forward.vision.up, model.layers[0].attention.wq.weight]
    upstream = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(got, weights, upstream),
        torch.autograd.grad(wanted, weights, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_states_compile():
    """Counting pictures' places needs numbers, so the graph breaks there; the result must not show it."""
    model = random_model(SynerGenConfig.preset("tiny", num_layers=1), torch.float32)
    compiled = torch.compile(model.states, backend="aot_eager")
    with torch.no_grad():
        for seed in (0, 1):
            input_ids, image_ids = mixed_batch(model.config, seed)
            wanted = model.states(input_ids, image_ids)
            torch.testing.assert_close(compiled(input_ids, image_ids), wanted, rtol=1e-4, atol=1e-4)
