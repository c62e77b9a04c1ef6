"""What a run writes down: figures of a step, W&B, and the page it ends with."""

import json
import sys
from types import SimpleNamespace

import pytest
import test_training
import torch
from test_training import batches_of, fresh_model, recipe_with

from synergen_ext.training.figures import gradient_norms, pace
from synergen_ext.training.loop import run_stage
from synergen_ext.training.page import curve, read_log, write_page
from synergen_ext.training.recipe import PARTS
from synergen_ext.training.report import Reporter
from synergen_ext.training.stages import part_of

builder = test_training.builder  # its fixture


def test_gradient_norms_are_the_parts_of_the_whole(builder):
    model = fresh_model(builder)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.01 * (i + 1))
    norms = gradient_norms(model)
    assert sorted(norms) == sorted(f"gradient_norm_{part}" for part in PARTS)
    whole = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert sum(n**2 for n in norms.values()) == pytest.approx(whole**2, rel=1e-5)
    for name, p in model.named_parameters():
        if part_of(name) != "attention":
            p.grad = None
    assert gradient_norms(model) == {"gradient_norm_attention": norms["gradient_norm_attention"]}


def test_pace_by_hand(builder):
    batches = batches_of(builder)
    tasks = [("paint", batches.paint(0, 3)), ("text", batches.text(0, 2))]
    got = pace(tasks, 2, 4.0, 1.5)
    assert got["samples_per_second"] == 2 * 5 / 4 and got["images_per_second"] == 2 * 3 / 4
    assert got["tokens_per_second"] == 2 * sum(b.tokens for _, b in tasks) / 4 and got["data_wait_seconds"] == 1.5
    assert got["memory_bytes"] > 1e7


def test_every_step_has_its_figures(builder, tmp_path):
    rows = []
    recipe = recipe_with()
    run_stage(
        fresh_model(builder), recipe, 1, batches_of(builder), tmp_path / "state",
        on_step=lambda stage, step, figures: rows.append(dict(figures)),
    )  # fmt: skip
    assert len(rows) == 3
    for row in rows:
        assert row["images_per_second"] > 0 and row["data_wait_seconds"] > 0
        assert row["gradient_norm_vision"] == pytest.approx(row["gradient_norm"], rel=1e-5)  # the one part trained
        assert "gradient_norm_attention" not in row


def test_wandb_gets_what_the_log_gets(tmp_path, monkeypatch):
    calls = []
    project = SimpleNamespace(log=lambda row: calls.append(row), finish=lambda code: calls.append(code))
    fake = SimpleNamespace(init=lambda **options: calls.append(options) or project)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = recipe_with(wandb="pictures")
    with Reporter(recipe, tmp_path) as reporter, reporter.task("one", 2, 0):
        reporter.step("one", 0, {"paint/text": 2.5, "tokens_per_second": 10.0, "filled": 1.0})
    options, row, code = calls
    assert (options["project"], options["id"]) == ("pictures", f"small-{tmp_path.name}") and code == 0
    assert row == {"one/paint/text": 2.5, "one/tokens_per_second": 10.0, "one/filled": 1.0, "one/step": 0}
    calls.clear()
    with Reporter(recipe_with(), tmp_path), Reporter(recipe, tmp_path, silent=True):
        assert not calls  # no project, and of several processes one reports


def test_a_missing_wandb_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"synergen_ext\[wandb\]"), Reporter(recipe_with(wandb="x"), tmp_path):
        pass


def test_the_page_holds_every_figure_once(tmp_path):
    rows = [{"stage": "one", "step": i, "paint/text": 5.0 - i, "filled": 1.0} for i in range(3)]
    rows += [
        {"stage": "one", "step": 2, "paint/text": 1.0, "filled": float("nan")},
        {"stage": "<two>", "step": 0, "x": 7},
    ]
    lines = [json.dumps(r) for r in rows]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"stage": "one", "st', "3", ""]))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "one-000002.png").write_bytes(b"picture")
    (tmp_path / "recipe.yaml").write_text("name: <b>\n")
    assert [r["paint/text"] for r in read_log(tmp_path / "log.jsonl")["one"]] == [5.0, 4.0, 1.0]
    text = write_page(tmp_path).read_text()
    assert "paint/text: 5 to 1, least 1, most 5" in text and "filled: 1 to 1" in text and "x: 7 to 7" in text
    assert text.count("<svg") == 3 and "data:image/png;base64,cGljdHVyZQ==" in text
    assert "<two>" not in text and "&lt;two&gt;" in text and "name: &lt;b&gt;" in text
    assert "http" not in text


def test_a_curve_is_means_of_parts():
    points = curve(list(range(400)), [float(i % 2) for i in range(400)]).partition('points="')[2].partition('"')[0]
    assert {p.split(",")[1] for p in points.split()} == {"120.0"} and len(points.split()) == 200
    assert curve([4], [2.0]).count(",") == 1
