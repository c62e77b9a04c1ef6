"""Training: what each stage may touch, resumed = unbroken, recipes, data, and a whole run in seconds."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cases import SMALL_TOKENIZER, random_image_tokenizer, random_model

from synergen_ext.generation.pipeline import Pipeline
from synergen_ext.model import SynerGenConfig, SynerGenVL
from synergen_ext.model.modeling import IGNORE
from synergen_ext.processing.image_tokenizer import to_pixels
from synergen_ext.processing.sequences import SequenceBuilder
from synergen_ext.scenes import training_scene
from synergen_ext.training import loop, report, run
from synergen_ext.training.checkpoints import flatten_optimizers, load_state, restore_optimizers, save_state
from synergen_ext.training.data import SceneBatches, SceneCache, collate, train_text_tokenizer
from synergen_ext.training.loop import Average, run_stage, train_step
from synergen_ext.training.recipe import OPTIMIZERS, PARTS, StageRecipe, load_recipe, parse_recipe
from synergen_ext.training.run import run_recipe
from synergen_ext.training.stages import freeze_all_but, learning_rate, make_optimizers, part_of

#: Tokenizer of stride 8 for 96 x 96 pixels: 12 x 12 ids, 18 folded tokens.
GRID = (12, 12)
CODES = 48
STAGES = [
    dict(name="text", train=["attention", "language_model"], steps=2, learning_rate=1e-3, text=2),
    dict(name="stage1", train=["vision"], copy_experts=True, steps=3, learning_rate=1e-3, paint=2, describe=2),
    dict(
        name="tuning", train=list(PARTS), steps=4, learning_rate=1e-3, schedule="cosine", paint=2, describe=1, ema=0.5
    ),
]
RECIPE = dict(
    name="small",
    model=dict(preset="tiny", image_grid=list(GRID)),
    tokenizer=dict(
        model={**SMALL_TOKENIZER, "codebook_size": CODES},
        steps=3,
        batch=1,
        crop=40,
        full_steps=1,
        full_batch=1,
        autoencoder_steps=1,
        decoder_steps=1,
    ),
    data=dict(scenes=6, seed=1, text_vocab=300),
    stages=STAGES,
    save_every=2,
    sample_every=0,
)


def recipe_with(**changes):
    return parse_recipe({**copy.deepcopy(RECIPE), **changes})


def stage_with(**changes) -> StageRecipe:
    return StageRecipe(**{**STAGES[1], **changes})


@pytest.fixture(scope="module")
def builder() -> SequenceBuilder:
    text = train_text_tokenizer(1, 300, scenes=40)
    return SequenceBuilder(SynerGenConfig.preset("tiny", image_grid=GRID, codebook_size=CODES), text)


def batches_of(builder: SequenceBuilder, unconditional: float = 0.1, scenes: int = 10) -> SceneBatches:
    ids = np.random.default_rng(0).integers(0, CODES, (scenes, *GRID)).astype(np.uint16)
    return SceneBatches(builder, ids, 1, 7, unconditional)


def fresh_model(builder: SequenceBuilder, **changes) -> SynerGenVL:
    torch.manual_seed(0)
    config = SynerGenConfig.preset("tiny", image_grid=GRID, codebook_size=CODES, **changes)
    return SynerGenVL(config)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# ---- parts and groups ---------------------------------------------------------------------------


def test_parts_of_the_model():
    """Stage 1 trains what the LLM did not have, stage 2 adds attention, tuning the rest (table 8)."""
    parts: dict[str, set[str]] = {p: set() for p in PARTS}
    for name, _ in fresh_model(None, attention_bias=True).named_parameters():
        kind = name.replace("layers.1.", "layers.0.")
        parts[part_of(name)].add(kind)
    assert parts["attention"] == {
        f"layers.0.attention.{n}"
        for n in ("wq.weight", "wk.weight", "wv.weight", "wo.weight", "wq.bias", "wk.bias", "wv.bias")
    }
    assert parts["language_model"] == {
        "tok_embeddings.weight",
        "output.weight",
        "norm.weight",
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        *(f"layers.0.feed_forward.text.{m}" for m in ("gate", "up", "down")),
    }
    prefixes = ("image_embedding.", "unfolding_head.", "special_", "layers.0.feed_forward.vision.")
    assert all(n.startswith(prefixes) for n in parts["vision"])
    assert {"special_embeddings.weight", "special_output.weight", "image_embedding.positions"} <= parts["vision"]


#: Tables with a row for each id or place; the fold's own matrices are decayed.
PLAIN = {
    "tok_embeddings.weight", "special_embeddings.weight", "image_embedding.tokens.weight",
    "image_embedding.positions", "unfolding_head.tokens.weight", "unfolding_head.positions",
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train", [["vision"], ["vision", "attention"], list(PARTS), ["language_model"]], ids=str)
def test_parameter_groups_hold_every_trained_parameter_once(train, tied, kind):
    model = fresh_model(None, tie_word_embeddings=tied)
    optimizers = make_optimizers(model, stage_with(train=train, weight_decay=0.05, optimizer=kind))
    grouped = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    wanted = {id(p) for n, p in model.named_parameters() if part_of(n) in train}
    assert len(grouped) == len(set(grouped)) and set(grouped) == wanted
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    decay = {id(p): g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}
    by = {id(p): type(o).__name__ for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        if id(p) in decay:
            plain = p.ndim == 1 or name in PLAIN
            assert decay[id(p)] == (0 if plain else 0.05), name
            inner = p.ndim == 2 and (name.startswith(("layers.", "unfolding_head.layers.")) or ".proj_" in name)
            assert by[id(p)] == ("Muon" if kind == "muon" and inner else "AdamW"), name
    adamw = [g for o in optimizers if isinstance(o, torch.optim.AdamW) for g in o.param_groups]
    assert adamw and all(g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 for g in adamw)


def test_freezing_is_undone_by_the_next_stage():
    model = fresh_model(None)
    freeze_all_but(model, ["vision"])
    trained = freeze_all_but(model, list(PARTS))
    assert len(trained) == len(list(model.parameters())) and all(p.requires_grad for _, p in trained)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate(schedule):
    stage = stage_with(schedule=schedule, learning_rate=2.0, steps=100, warmup=10)
    rates = [learning_rate(stage, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.2, rel=1e-3) and all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))
    if schedule == "constant":
        assert rates[9:] == [2.0] * 91
    else:
        assert rates[50] == pytest.approx(2 * (0.01 + 0.99 / 2))
        assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
        assert rates[-1] == pytest.approx(0.02, rel=0.05)


# ---- what a stage leaves alone ------------------------------------------------------------------


def run_one(model, builder, tmp_path, **changes):
    recipe = recipe_with(stages=[{**STAGES[1], **changes}])
    run_stage(model, recipe, 0, batches_of(builder), tmp_path / "state.safetensors")


@pytest.mark.parametrize("train", [["vision"], ["vision", "attention"]], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_frozen_parts_stay_bit_identical(builder, tmp_path, train, tied):
    """Stage 1 changes nothing the LLM brought (its text scores cannot move), and everything else moves."""
    model = fresh_model(builder, tie_word_embeddings=tied)
    before = state_of(model)
    ids = torch.tensor([builder.text.encode("two red apples left of a blue car")])
    with torch.no_grad():
        words = model.output(model.states(ids))
    run_one(model, builder, tmp_path, train=train, weight_decay=0.5, ema=0.5)
    after = state_of(model)
    for name, value in before.items():
        frozen = part_of(name) not in train and not name.startswith("special_")
        assert torch.equal(after[name], value) == frozen, name
    with torch.no_grad():
        unchanged = torch.equal(model.output(model.states(ids)), words)
    assert unchanged == ("attention" not in train)


def test_experts_are_copied_when_the_stage_begins(builder, tmp_path):
    model = fresh_model(builder)
    run_one(model, builder, tmp_path, copy_experts=True, steps=1, learning_rate=1e-6, warmup=1)
    for block in model.layers:
        ffn = block.feed_forward
        for m in ("gate", "up", "down"):
            torch.testing.assert_close(getattr(ffn.vision, m), getattr(ffn.text, m), rtol=0, atol=1e-5)
            assert not torch.equal(getattr(ffn.vision, m), getattr(ffn.text, m))


def test_image_tables_begin_with_the_codes(builder, tmp_path):
    """Codes that look alike begin alike in all three tables, at the scale they had."""
    model, codebook = fresh_model(builder), torch.randn(CODES, 4)
    codebook[1] = codebook[0] + 0.01
    torch.manual_seed(0)
    model.place_image_codes(codebook)
    for table in (model.image_embedding.tokens, model.unfolding_head.tokens, model.unfolding_head.classifier):
        rows = table.weight.detach()
        assert rows.std().item() == pytest.approx(0.02, rel=0.25)
        distance = torch.cdist(rows, rows) + torch.eye(CODES)
        assert distance[0, 1] < distance[0, 2:].median()
    recipe = recipe_with(stages=[{**STAGES[1], "place_codes": True}])
    with pytest.raises(ValueError, match="stage 'stage1': place_codes needs the image tokenizer's codebook"):
        run_stage(model, recipe, 0, batches_of(builder), tmp_path / "state.safetensors")


def test_loss_falls(builder, tmp_path):
    """Both tasks, from a fresh tiny model, on ten scenes it sees again and again."""
    model, figures = fresh_model(builder), []
    recipe = recipe_with(stages=[dict(STAGES[2], steps=40, learning_rate=1e-2, warmup=5, paint=4, describe=4, ema=0.0)])
    run_stage(model, recipe, 0, batches_of(builder), tmp_path / "state", on_step=lambda *args: figures.append(args[2]))
    first, last = figures[0], figures[-1]
    assert first["paint/image"] == pytest.approx(math.log(CODES), rel=0.1)  # knows nothing
    assert last["paint/image"] < first["paint/image"] - 0.05
    assert last["describe/text"] < 0.7 * first["describe/text"] and last["paint/text"] < 0.5
    assert all(f["gradient_norm"] > 0 and f["tokens_per_second"] > 0 for f in figures)


# ---- one step -----------------------------------------------------------------------------------


def two_tasks(builder):
    batches = batches_of(builder)
    return [("paint", batches.paint(0, 2)), ("describe", batches.describe(0, 2))]


def test_a_step_adds_the_tasks_losses(builder):
    """SGD at rate 1: the weights move by the sum of both tasks' gradients, exactly once each."""
    model, tasks = fresh_model(builder), two_tasks(builder)
    wanted = []
    for _, b in tasks:
        model.zero_grad()
        model(b.input_ids, b.labels, b.image_ids, b.paint).total.backward()
        wanted.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    before = [p.detach().clone() for p in model.parameters()]
    figures = train_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], tasks, clip=1e9, bfloat16=False)
    for b, p, x, y in zip(before, model.parameters(), *wanted, strict=True):
        torch.testing.assert_close(b - p, x + y, rtol=1e-3, atol=1e-5)
    norm = torch.stack([(x + y).square().sum() for x, y in zip(*wanted, strict=True)]).sum().sqrt()
    assert figures["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert {"paint/text", "paint/image", "describe/text"} <= figures.keys()


def test_gradients_are_clipped(builder):
    model, tasks = fresh_model(builder), two_tasks(builder)
    before = state_of(model)
    train_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], tasks, clip=1e-3, bfloat16=False)
    moved = sum((v - before[k]).square().sum() for k, v in model.state_dict().items()).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=0.02)


def test_a_step_that_is_not_finite_is_refused_and_changes_nothing(builder):
    model, tasks = fresh_model(builder), two_tasks(builder)
    with torch.no_grad():
        model.image_embedding.tokens.weight[int(tasks[0][1].image_ids[0, 0, 0])] = torch.nan
    before = state_of(model)
    with pytest.raises(FloatingPointError, match="losses .*gradient norm"):
        train_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], tasks, clip=1.0, bfloat16=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(9.0), before[name].nan_to_num(9.0)), name


def test_average_by_hand():
    """decay_t = min(decay, (1 + t) / (10 + t)): 1/10, 2/11, then the decay itself."""
    weight = torch.tensor([1.0])
    average = Average({"w": weight}, 0.15)
    for step, value in enumerate((2.0, 3.0, 5.0)):
        weight.fill_(value)
        average.update({"w": weight}, step)
    mean = 0.1 * 1 + 0.9 * 2
    mean = 0.15 * mean + 0.85 * 3
    mean = 0.15 * mean + 0.85 * 5
    assert weight.item() == 5
    average.store({"w": weight})
    assert weight.item() == pytest.approx(mean)


def test_a_stage_ends_with_its_average(builder, tmp_path):
    """The mean of the weights after each step, with the decay that counts early steps more."""
    model, path = fresh_model(builder), []
    mean = state_of(model)

    def watch(_, step, figures):
        path.append(step)
        keep = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            mean[name].lerp_(value, 1 - keep)

    run_stage(model, recipe_with(stages=[STAGES[2]]), 0, batches_of(builder), tmp_path / "state", watch)
    assert len(path) == 4
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, mean[name], rtol=1e-5, atol=1e-7)


# ---- resumed = unbroken -------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for a machine that goes away."""


@pytest.mark.parametrize(
    ("stop_after", "ema", "kind"),
    [(1, 0.9, "adamw"), (2, 0.9, "adamw"), (3, 0.0, "adamw"), (6, 0.9, "adamw"), (4, 0.9, "muon")],
)
def test_a_resumed_stage_is_unbroken(builder, tmp_path, stop_after, ema, kind):
    """Saved every second step; what came after the last save is done again, to the same bits."""
    stage = dict(STAGES[2], steps=7, ema=ema, weight_decay=0.1, optimizer=kind)
    recipe = recipe_with(stages=[stage])

    def train(name, on_step=None):
        model = fresh_model(builder)
        run_stage(model, recipe, 0, batches_of(builder), tmp_path / name, on_step)
        return state_of(model)

    whole = train("whole")
    steps = []

    def stopping(_, step, figures):
        steps.append(step)
        if len(steps) == stop_after:
            raise Stopped

    with pytest.raises(Stopped):
        train("broken", stopping)
    torch.manual_seed(99)
    resumed = train("broken", lambda _, step, f: steps.append(step))
    saved = (stop_after - 1) // 2 * 2  # the step that stopped was not saved
    assert steps == [*range(stop_after), *range(saved, 7)]
    assert_equal_bits(resumed, whole)


def test_moments_follow_their_names(builder):
    """A state written with the groups in one order is read into another."""
    model, tasks = fresh_model(builder), two_tasks(builder)
    named = dict(model.named_parameters())
    first = [torch.optim.AdamW(named.values())]
    train_step(model, first, tasks, clip=1.0, bfloat16=False)
    kept = flatten_optimizers(first, named)
    second = [torch.optim.AdamW(list(named.values())[::-1])]
    restore_optimizers(second, named, kept)
    for p, moments in first[0].state.items():
        assert_equal_bits(moments, second[0].state[p])
    with pytest.raises(ValueError, match="moments of nowhere, which this stage does not train"):
        restore_optimizers(second, named, {**kept, "optimizer.exp_avg.nowhere": torch.zeros(1)})


def test_looking_at_samples_changes_nothing(builder, tmp_path):
    def train(name, on_sample, every):
        model = fresh_model(builder)
        recipe = recipe_with(stages=[dict(STAGES[2])], sample_every=every)

        def sample(stage, step):
            on_sample.append((stage, step))
            with torch.no_grad():
                b = batches_of(builder).paint(0, 2)
                model.states(b.input_ids, b.image_ids)

        run_stage(model, recipe, 0, batches_of(builder), tmp_path / name, on_sample=sample)
        return state_of(model)

    never, often = [], []
    assert_equal_bits(train("a", never, 0), train("b", often, 1))
    assert never == [] and often == [("tuning", s) for s in (1, 2, 3, 4)]


def test_another_stages_state_is_not_resumed(builder, tmp_path):
    """A state file of the stage before says nothing about this one's steps."""
    save_state(tmp_path / "state", {"model.x": torch.zeros(1)}, {"stage": "stage1", "step": 3})
    steps = []
    recipe = recipe_with(stages=[dict(STAGES[2])])
    run_stage(fresh_model(builder), recipe, 0, batches_of(builder), tmp_path / "state", lambda _, s, f: steps.append(s))
    assert steps == [0, 1, 2, 3]


# ---- state files --------------------------------------------------------------------------------


def test_state_comes_back(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(2), "c": torch.randn(2).bfloat16()}
    save_state(tmp_path / "s", tensors, {"step": 3, "name": "ü"})
    back, meta = load_state(tmp_path / "s")
    assert meta == {"step": 3, "name": "ü"}
    assert_equal_bits(back, tensors)


def test_an_interrupted_save_keeps_the_old_state(tmp_path, monkeypatch):
    save_state(tmp_path / "s", {"a": torch.ones(2)}, {"step": 1})

    def torn(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("synergen_ext.training.checkpoints.save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path / "s", {"a": torch.zeros(2)}, {"step": 2})
    assert load_state(tmp_path / "s")[1] == {"step": 1}


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_broken_state_is_refused(tmp_path, content):
    from safetensors.torch import save_file

    if content is None:  # safetensors, but not ours
        save_file({"a": torch.ones(1)}, tmp_path / "s")
    else:
        (tmp_path / "s").write_bytes(content)
    with pytest.raises(ValueError, match="training state: .*cannot be read"):
        load_state(tmp_path / "s")


# ---- data ---------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step(builder):
    a, b = batches_of(builder), batches_of(builder)
    for task in ("paint", "describe", "text"):
        first, second = getattr(a, task)(3, 4), getattr(b, task)(3, 4)
        assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.labels, second.labels)
        assert not torch.equal(first.input_ids, getattr(a, task)(4, 4).input_ids)


def test_each_pass_sees_each_scene_once(builder):
    """Ten scenes in steps of four: passes end inside steps."""
    batches = batches_of(builder, scenes=10)
    seen = np.concatenate([batches._pick(step, 4, 0) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_pictures_belong_to_their_captions(builder):
    batches = batches_of(builder, unconditional=0.0)
    picked, batch = batches._pick(2, 4, 0), batches.paint(2, 4)
    assert torch.equal(batch.image_ids, torch.from_numpy(batches.ids[picked].astype(np.int64)))
    for row, i in enumerate(picked):
        example = builder.paint(training_scene(1, int(i)).request.prompt)
        length = len(example.ids)
        assert batch.input_ids[row, :length].tolist() == example.ids
        assert batch.labels[row, :length].tolist() == example.labels
        assert (batch.input_ids[row, length:] == 0).all() and (batch.labels[row, length:] == IGNORE).all()
    assert batch.paint.all() and batch.tokens == sum(
        len(builder.paint(training_scene(1, int(i)).request.prompt).ids) for i in picked
    )


def test_describing_is_not_painting(builder):
    batch = batches_of(builder).describe(0, 3)
    assert not batch.paint.any() and len(batch.image_ids) == 3
    assert (batch.labels != IGNORE).any(1).all()
    assert (batch.labels == builder.config.boi_id).sum() == 0


def test_words_alone_have_no_pictures(builder):
    batch = batches_of(builder).text(0, 3)
    assert batch.image_ids is None and batch.paint is None
    assert batch.input_ids.max() < builder.config.vocab_size
    assert (batch.labels != IGNORE).sum() > 0.7 * batch.tokens


def test_batches_are_padded_to_eights(builder):
    example = builder.ask([("two red apples", "yes")], pictures=0)
    batch = collate([example, builder.ask([("a", "b")], pictures=0)], None, paint=False)
    assert batch.input_ids.shape[1] % 8 == 0 and batch.input_ids.shape[1] - len(example.ids) < 8


def unconditional_share(builder, share, draws):
    batches = batches_of(builder, unconditional=share)
    hits = [batches.paint(step, 50).input_ids == builder.config.uncond_id for step in range(draws // 50)]
    return sum(int(h.any(1).sum()) for h in hits) / draws


def test_guidance_dropout_rate(builder):
    """A tenth of the captions (section 3.4), five standard deviations of 1,000 draws allowed."""
    assert unconditional_share(builder, 0.0, 100) == 0
    assert unconditional_share(builder, 1.0, 100) == 1
    assert abs(unconditional_share(builder, 0.1, 1000) - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 1000)


def test_understanding_never_loses_its_question(builder):
    batch = batches_of(builder, unconditional=1.0).describe(0, 8)
    assert (batch.input_ids == builder.config.uncond_id).sum() == 0


@pytest.fixture(scope="module")
def scene_tokenizer():
    return random_image_tokenizer(temporal=1, stride=16, base_channels=32)


def test_scene_cache_holds_the_tokenizers_ids(scene_tokenizer, tmp_path):
    cache = SceneCache(tmp_path, scene_tokenizer, seed=5, count=5)
    counted = []
    ids = cache.build(counted.append, chunk=2)
    assert counted == [2, 2, 1] and ids.dtype == np.uint16
    pixels = to_pixels(np.stack([training_scene(5, i).image() for i in range(5)]))
    assert np.array_equal(ids, scene_tokenizer.encode(pixels).numpy())
    again = []
    assert np.array_equal(SceneCache(tmp_path, scene_tokenizer, 5, 5).build(again.append), ids)
    assert again == []  # nothing left to do
    longer = SceneCache(tmp_path, scene_tokenizer, 5, 7).build(again.append)
    assert again == [2] and np.array_equal(longer[:5], ids)
    assert np.array_equal(SceneCache(tmp_path, scene_tokenizer, 5, 3).build(), ids[:3])


def test_a_half_built_cache_is_continued(scene_tokenizer, tmp_path):
    whole = np.array(SceneCache(tmp_path / "a", scene_tokenizer, 5, 6).build(chunk=2))

    def stop(count):
        raise Stopped

    with pytest.raises(Stopped):
        SceneCache(tmp_path / "b", scene_tokenizer, 5, 6).build(stop, chunk=2)
    counted = []
    assert np.array_equal(SceneCache(tmp_path / "b", scene_tokenizer, 5, 6).build(counted.append, chunk=2), whole)
    assert counted == [2, 2]


def test_another_tokenizer_has_another_cache(scene_tokenizer, tmp_path):
    other = random_image_tokenizer(temporal=1, stride=16)
    with torch.no_grad():
        other.vq.quantize.embedding.weight[0] += 1
    paths = {SceneCache(tmp_path, t, s, 3).path for t in (scene_tokenizer, other) for s in (1, 2)}
    assert len(paths) == 4


# ---- recipes ------------------------------------------------------------------------------------


def test_the_shipped_recipe_is_valid():
    recipe = load_recipe(Path(run.__file__).parent.parent / "recipes" / "demo.yaml")
    assert [s.train for s in recipe.stages][1] == ["vision"]
    assert any(s.copy_experts for s in recipe.stages)
    assert "parameters" in run.plan(recipe)


def changed(path: str, value):
    """RECIPE with one value set by its path, such as ``stages.1.steps``; None removes it."""
    data = copy.deepcopy(RECIPE)
    *parents, last = path.split(".")
    place = data
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place[parent]
    key = int(last) if last.isdigit() else last
    if value is None:
        del place[key]
    else:
        place[key] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimiser", "sgd", "recipe has no field 'optimiser'"),
        ("data.shuffle", True, "data has no field 'shuffle'"),
        ("tokenizer.epochs", 3, "tokenizer has no field 'epochs'"),
        ("tokenizer.model.codebok_size", 3, "tokenizer.model has no field 'codebok_size'"),
        ("stages.1.lr", 0.1, r"stages\[1\] has no field 'lr'; known: .*learning_rate"),
        ("model.num_layer", 3, "unknown field 'num_layer'"),
        ("model.preset", "huge", "preset must be one of tiny, .*got 'huge'"),
        ("name", None, "recipe lacks 'name'"),
        ("stages.0.learning_rate", None, r"stages\[0\] lacks 'learning_rate'"),
        ("stages", [], "stages must be a list with at least one stage"),
        ("stages", "text", "stages must be a list"),
        ("stages.0", 3, r"stages\[0\] must be a mapping, got int"),
        ("model", 3, "model must be a dict, got 3"),
        ("stages.0.train", "vision", "train must be a list, got 'vision'"),
        ("stages.0.train", ["vison"], r"train must be a list of some of vision, .*got \['vison'\]"),
        ("stages.0.train", [], r"train must be .*got \[\]"),
        ("stages.0.schedule", "linear", "schedule must be one of constant, cosine, got 'linear'"),
        ("stages.0.steps", 0, "steps must be at least 1, got 0"),
        ("stages.0.steps", 2.5, "steps must be int, got 2.5"),
        ("stages.0.steps", True, "steps must be int, got True"),
        ("stages.0.learning_rate", "fast", "learning_rate must be float, got 'fast'"),
        ("stages.0.learning_rate", -1.0, "learning_rate must be above 0, got -1.0"),
        ("stages.0.learning_rate", math.nan, "learning_rate must be above 0, got nan"),
        ("stages.0.weight_decay", -0.1, "weight_decay must be at least 0, got -0.1"),
        ("stages.0.warmup", -1, "warmup must be at least 0"),
        ("stages.0.clip", 0.0, "clip must be above 0"),
        ("stages.0.questions", 0, "questions must be at least 1"),
        ("stages.0.text", 0, r"a stage needs a task, got \(0, 0, 0\)"),
        ("stages.0.paint", -1, "paint must be at least 0"),
        ("stages.0.unconditional", 1.5, r"unconditional must be in \[0, 1\], got 1.5"),
        ("stages.0.ema", 1.0, r"ema must be in \[0, 1\), got 1.0"),
        ("stages.0.name", "../../evil", "name must be letters, digits, - and _, got '../../evil'"),
        ("stages.0.name", "stage1", "stage names must differ"),
        ("save_every", 0, "save_every must be at least 1"),
        ("sample_every", -1, "sample_every must be at least 0"),
        ("seed", -1, "seed must be at least 0"),
        ("data.scenes", 0, "data: scenes must be at least 1"),
        ("tokenizer.batch", 65, r"tokenizer: batch must be in \[1, 64\], got 65"),
        ("tokenizer.crop", 44, "crop must be a multiple of 8 pixels, got 44"),
        ("tokenizer.crop", 32, r"crop must be in \[40, 96\], got 32"),
        ("tokenizer.warmup", 0, "warmup must be in"),
        ("tokenizer.autoencoder_steps", 4, r"autoencoder_steps must be in \[0, 3\], got 4"),
        ("model.image_grid", [4, 8], r"image_grid must be \[12, 12\] \(96 pixels, 8 a token\), got \[4, 8\]"),
        ("model.hidden_size", 10**15, "these sizes cannot be built"),
        ("tokenizer.model.base_channels", 33, "these sizes cannot be built"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_refused_by_name_before_anything_is_written(tmp_path, path, value, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(ValueError, match=message):
        run_recipe(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_with_exponents_are_numbers():
    """YAML 1.1 reads 1e-3, without a point, as text."""
    data = yaml.safe_load("{learning_rate: 1e-3, name: a, train: [vision], steps: 1, paint: 1}")
    assert data["learning_rate"] == "1e-3"
    assert recipe_with(stages=[data]).stages[0].learning_rate == 1e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "is not YAML"), ("- 1", "must hold a mapping, got list"), ("", "must hold a mapping, got NoneType"),
     ("a: \x00", "is not YAML"), ("!!python/object/apply:os.system ['true']", "is not YAML"),
     ("a: " + "x" * (1 << 20), "must be at most 1048576 bytes")],
    ids=["torn", "list", "empty", "control", "code", "huge"],
)  # fmt: skip
def test_broken_recipe_files_are_refused(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(FileNotFoundError, match="recipe: no file"):
        load_recipe(tmp_path / "none.yaml")


# ---- a whole run --------------------------------------------------------------------------------


def write_recipe(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The working folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("run")
    out = folder / "out"
    assert run_recipe(write_recipe(folder), out) == out / "checkpoint"
    return out


def test_a_run_ends_in_a_checkpoint_that_paints_and_answers(finished):
    pipeline = Pipeline.from_pretrained(finished / "checkpoint")
    (picture,) = pipeline.paint("a photo of a red car", seeds=3)
    assert picture.size == (96, 96)
    assert isinstance(pipeline.ask(picture, "What is in the picture?", max_new_tokens=4), str)
    model = SynerGenVL.from_pretrained(finished / "checkpoint")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (finished / "checkpoint" / "recipe.yaml").read_text() == (finished / "recipe.yaml").read_text()


def test_a_run_writes_its_curve(finished):
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines() if line]
    per_stage = {s["name"]: s["steps"] for s in STAGES} | {"image_tokenizer": 4}
    assert {s: [r["step"] for r in rows if r["stage"] == s] for s in per_stage} == {
        s: list(range(n)) for s, n in per_stage.items()
    }
    curve = json.loads((finished / "checkpoint" / "curve.json").read_text())
    assert set(curve) == set(per_stage)
    assert curve["tuning"]["step"] == [1, 2, 3, 4] and len(curve["tuning"]["paint/image"]) == 4
    assert curve["text"]["text/text"][0] == pytest.approx(math.log(303), rel=0.1)


def test_stage_1_of_a_run_leaves_the_language_model_alone(finished):
    text, stage1, tuned = (load_state(finished / "stages" / f"{s['name']}.safetensors")[0] for s in STAGES)
    for name, value in text.items():
        assert torch.equal(stage1[name], value) == (part_of(name) != "vision"), name
    assert not any(torch.equal(tuned[n], v) for n, v in stage1.items() if "tok_embeddings" not in n)


def test_finishing_again_changes_nothing(finished):
    before = {p: p.read_bytes() for p in (finished / "checkpoint").glob("*.safetensors")}
    run_recipe(finished / "recipe.yaml", finished)
    assert before == {p: p.read_bytes() for p in (finished / "checkpoint").glob("*.safetensors")}


def test_a_run_stopped_everywhere_is_unbroken(finished, tmp_path, monkeypatch):
    """Killed at every single step of every part, again and again: the checkpoint has the same bytes."""
    path, left = write_recipe(tmp_path), []
    for name in ("step", "tokenizer_step"):
        kept = getattr(run.Reporter, name)

        def stopping(self, *args, kept=kept):
            kept(self, *args)
            left.append(args[:2])
            if len(left) % 4 == 3:
                raise Stopped

        monkeypatch.setattr(run.Reporter, name, stopping)
    stops = 0
    for _ in range(40):
        try:
            folder = run_recipe(path, tmp_path / "out")
            break
        except Stopped:
            stops += 1
            with (tmp_path / "out" / "log.jsonl").open("a") as log:
                log.write('{"stage": "to')  # half a line, as a kill leaves it
    else:
        raise AssertionError("the run never ended")
    assert stops >= 4
    for name in ("model.safetensors", "image_tokenizer.safetensors", "tokenizer.json", "config.json"):
        assert (folder / name).read_bytes() == (finished / "checkpoint" / name).read_bytes(), name


def test_a_folder_with_another_run_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        run_recipe(write_recipe(tmp_path, seed=5), finished)
    with pytest.raises(ValueError, match="is not empty; remove it, choose another folder, or resume"):
        run_recipe(finished / "recipe.yaml", finished, resume=False)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    run_recipe(write_recipe(tmp_path), tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    parameters = random_model(SynerGenConfig.preset("tiny", image_grid=GRID, codebook_size=CODES)).num_parameters()
    assert f"small: {parameters:,} parameters" in shown
    assert "stage tuning: 4 steps x (2 paint + 1 describe + 0 text)" in shown


def test_sample_pictures(tmp_path, builder, monkeypatch):
    """One row of pictures for a fixed set of prompts, named by stage and step, and what is said of each."""
    from PIL import Image

    def say(model, prompts, ids, most, stops):
        assert list(prompts) == [builder.ask_prompt("Provide a one-sentence caption for the image")] * len(ids)
        assert (len(ids), stops) == (8, (builder.text.im_end, builder.text.eos))
        return [builder.text.encode(f"picture\n{i}") for i in range(len(ids))]

    monkeypatch.setattr(report, "generate_text", say)
    recipe = recipe_with()
    with run.Reporter(recipe, tmp_path) as reporter:
        model = fresh_model(builder)
        reporter.sample(model, builder, random_image_tokenizer(temporal=1), "tuning", 12)
        assert model.training
    assert Image.open(tmp_path / "samples" / "tuning-000012.png").size == (8 * 96, 96)
    said = (tmp_path / "samples" / "tuning-000012.txt").read_text().splitlines()
    assert said == [f"{prompt}: picture {i}" for i, prompt in enumerate(report.SAMPLE_PROMPTS)]


def test_training_uses_the_fast_backend(builder, tmp_path, monkeypatch):
    from synergen_ext import ops

    seen = []
    monkeypatch.setattr(loop, "train_step", lambda *args: seen.append(ops.current_backend()) or {})
    run_one(fresh_model(builder), builder, tmp_path, steps=1)
    assert seen == ["eager"] and ops.current_backend() == "native"
