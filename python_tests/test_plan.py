"""The planner: its memory model against real steps, its FLOPs against counted ones, and the paper's recipe."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from synergen_ext import ops
from synergen_ext.bench import load_suite
from synergen_ext.cli import main, train
from synergen_ext.model import SynerGenConfig, SynerGenVL
from synergen_ext.training.gpus import GPUS
from synergen_ext.training.memory import Piece, Tracer, Work, peak
from synergen_ext.training.plan import Machines, Samples, parameters_by_part, plan_stage, stage_pieces, step_flops
from synergen_ext.training.recipe import PARTS, StageRecipe, load_recipe
from synergen_ext.training.run import model_config
from synergen_ext.training.stages import freeze_all_but

TINY = SynerGenConfig.preset("tiny")


def stage_with(**changes) -> StageRecipe:
    return StageRecipe(**{**dict(name="one", train=list(PARTS), steps=2, learning_rate=1e-3, paint=2), **changes})


def paper():
    recipe = load_recipe(train.RECIPES / "paper.yaml")
    return recipe, model_config(recipe)


def test_planned_memory_is_a_real_steps():
    """One case of the benchmark, which has them all."""
    planned, allocated = load_suite("plan").measure(["vision", "attention"], 2, True, False)
    assert abs(planned / allocated - 1) < 0.1


def test_peak_by_hand():
    a = Piece("a layer", copies=1, kept=10, forward=2, backward=5, gradients=4, output=3)
    b = Piece("b", copies=0, kept=20, forward=50, backward=30, gradients=6, output=7)
    found = peak(100, 40, [[a, b]])
    assert (found.at, found.total) == ("forward, b", 100 + 40 + 31 + 50)
    found = peak(100, 40, [[a, b], [a, b]])  # the second task finds the first one's gradients
    assert (found.at, found.total) == ("forward, b", 100 + 40 + 10 + 31 + 50)
    found = peak(100, 40, [[a, b], [a, b]], ranks=2, gathered=7)
    assert (found.weights, found.optimizer, found.gradients) == (57, 20, 5)
    again = a.again()
    assert (again.copies, again.kept, again.forward, again.backward) == (0, 3, 2 + 11 - 3, 5 + 11 - 3)
    assert peak(100, 40, [[a, b]], checkpoint=True).activations == 3 + 20


def test_nothing_is_kept_of_what_is_frozen_in_front():
    """Attention alone: the first layer's input has no gradient, and its image embedding keeps nothing."""
    work = Work(1, 64, 1, TINY.image_grid, False, 8)
    pieces = {p.name: p for p in Tracer(TINY, ["attention"]).pieces(work)}
    assert pieces["image embedding"].gradients == pieces["image embedding"].backward == 0
    assert pieces["layer"].gradients == 4 * 32 * (32 + 16 + 16 + 32)
    trained = {p.name: p for p in Tracer(TINY, ["vision"]).pieces(work)}
    assert trained["image embedding"].gradients > 0


@pytest.mark.parametrize("train_parts", [["vision"], ["vision", "attention"], list(PARTS)])
def test_parameters_by_part(train_parts):
    with torch.device("meta"):
        model = SynerGenVL(TINY)
    trained = sum(p.numel() for _, p in freeze_all_but(model, train_parts))
    sizes = parameters_by_part(TINY)
    assert sum(sizes[p] for p in train_parts) == trained and sum(sizes.values()) == model.num_parameters()


def test_flops_are_those_of_the_models_products():
    """All is trained: forward and backward as torch counts them, on the layers' own path of one token kind."""
    stage, samples = stage_with(paint=3), Samples(text=20, learned=10)
    model, length = SynerGenVL(TINY), 20 + TINY.image_tokens + 2
    ids = torch.tensor([[5] * 20 + [TINY.boi_id] + [TINY.image_id] * TINY.image_tokens + [TINY.eoi_id]] * 3)
    labels = torch.full_like(ids, -100)
    labels[:, 1] = 7
    pictures = torch.zeros(3, *TINY.image_grid, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, ops.backend("eager"):
        model(ids, labels, pictures, torch.ones(3, dtype=torch.bool)).total.backward()
    assert ids.shape[1] == length
    # torch counts attention whole where it is multiplied out, and we count the half that is not masked.
    width, window = TINY.num_heads * TINY.head_dim, TINY.window
    masked = 3 * 3 * 2 * width * (TINY.num_layers * length**2 + TINY.head_layers * TINY.image_tokens * window**2)
    special = 3 * 3 * 2 * TINY.hidden_size * TINY.num_special  # three more classes of the text head
    assert step_flops(TINY, stage, samples) + masked + special == counter.get_total_flops()


def test_frozen_weights_need_no_gradient_work():
    flops = {n: step_flops(TINY, stage_with(train=list(PARTS[:n])), Samples()) for n in (1, 2, 3)}
    assert flops[1] < flops[2] < flops[3]


def test_sharding_divides_what_is_kept_of_weights():
    recipe, config = paper()
    stage = stage_with(paint=8, describe=8, pack=4096)
    alone = plan_stage(recipe, config, stage, Machines(GPUS["h100"], 1, 8, sharded=False), Samples())
    shared = plan_stage(recipe, config, stage, Machines(GPUS["h100"], 1, 8), Samples())
    assert alone.plain.weights == 4 * 3_629_813_760 and alone.plain.optimizer == 8 * 3_629_813_760
    assert shared.plain.optimizer * 8 == alone.plain.optimizer and shared.plain.weights < alone.plain.weights / 6
    assert shared.plain.total < alone.plain.total and shared.checkpointed.total < shared.plain.total
    assert (alone.days, alone.share) == (shared.days, 2)


def test_the_papers_sizes():
    recipe, config = paper()
    plans = [plan_stage(recipe, config, s, Machines(GPUS["h100"], 4), Samples()) for s in recipe.stages]
    assert [p.trained + p.frozen for p in plans] == [3_629_813_760] * 3
    assert 1.88e9 < plans[0].frozen < 1.90e9 and plans[2].frozen == 0  # InternLM2-1.8B
    assert [(p.stage.steps, p.stage.paint, p.stage.describe, p.stage.pack) for p in plans] == [
        (95_000, 6_988, 6_988, 4_096), (35_000, 5_090, 5_090, 8_192), (12_000, 1_760, 1_760, 16_384),
    ]  # fmt: skip


def test_a_thousandth_is_the_paper_in_small():
    large, small = paper()[0], load_recipe(train.RECIPES / "paper-1000th.yaml")
    for a, b in zip(large.stages, small.stages, strict=True):
        for name in ("name", "train", "learning_rate", "schedule", "weight_decay", "copy_experts"):
            assert getattr(a, name) == getattr(b, name)
        assert (b.steps, b.paint, b.describe, b.warmup) == (a.steps / 1000, -(-a.paint // 1000), b.paint, 1)
    sizes = [sum(parameters_by_part(model_config(r)).values()) for r in (large, small)]
    assert 800 < sizes[0] / sizes[1] < 1250


def test_long_samples_are_refused():
    with pytest.raises(ValueError, match="stage 'one': a sample must have at most 16 tokens, got 70"):
        stage_pieces(TINY, stage_with(pack=16), Samples(), {"paint": 1}, True)


@pytest.mark.parametrize(
    "command", [["plan", "paper-1000th", "--gpu", "RTX4090", "--gpus", "1"], ["train", "paper-1000th", "--dry-run"]]
)
def test_the_command_prints_every_stage(capsys, command):
    assert main(command) == 0
    out = capsys.readouterr().out
    for part in ("stage stage1", "stage stage2", "stage tuning", "days in all", "FLOP", "copies of weights"):
        assert part in out
    assert ("RTX 4090, 24 GB" if command[0] == "plan" else "4 x 8 H100") in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "c64"], "--gpu must be one of a100, h100, h200, b200, rtx4090, got 'c64'"),
        (["--nodes", "0"], "plan: nodes must be at least 1, got 0"),
        (["--utilisation", "0"], "plan: utilisation must be in (0, 1], got 0.0"),
        (["--text-tokens", "8"], "plan: learned must be at most text = 8, got 32"),
    ],
)
def test_wrong_options_are_refused(capsys, options, message):
    assert main(["plan", "paper-1000th", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_dry_run_says_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "paper", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "missing: source 'understanding': no file data/understanding.json" in out and "and 1,000 more" in out
    assert main(["train", "paper", "--out", str(tmp_path / "run")]) == 2
    assert "no file data/understanding.json" in capsys.readouterr().err


def test_recipes_are_not_changed_by_planning():
    recipe, config = paper()
    before = copy.deepcopy(recipe)
    plan_stage(recipe, config, recipe.stages[2], Machines(GPUS["b200"], 1), Samples())
    assert recipe == before
