"""Bad steps, and a disk that is full: found, said in one line, and nothing good is lost."""

import json
import math
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from test_training import STAGES, assert_equal_bits, batches_of, builder, fresh_model, recipe_with, state_of

from synergen_ext.training import checkpoints, loop
from synergen_ext.training.checkpoints import NotSaved, load_state, save_state
from synergen_ext.training.guard import BAD_STEPS_FILE, BadStep, Guard
from synergen_ext.training.loop import run_stage
from synergen_ext.training.recipe import GuardRecipe
from synergen_ext.training.stores import FolderStore
from synergen_ext.training.world import World

__all__ = ["builder"]  # the fixture


def guard_with(folder: Path, **recipe) -> Guard:
    return Guard(GuardRecipe(**recipe), folder, World())


# ---- what is bad --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad(tmp_path, bad):
    guard = guard_with(tmp_path)
    guard.judge({"paint/text": 1.0}, 1.0)
    for losses, norm in (({"paint/text": bad}, 1.0), ({"paint/text": 1.0}, bad)):
        with pytest.raises(BadStep, match="losses .*, gradient norm"):
            guard.judge(losses, norm)


def test_what_explodes_is_bad_after_some_good_steps(tmp_path):
    guard = guard_with(tmp_path, explode=4.0, after=3)
    for norm in (1.0, 50.0, 1.0):  # the first steps teach it what is usual
        guard.judge({"paint/image": 2.0}, norm)
    mean = 0.98 * (0.98 + 0.02 * 50) + 0.02
    assert guard.means == {"paint/image": pytest.approx(2.0), "gradient_norm": pytest.approx(mean)}
    kept = guard.state_dict()
    guard.judge({"paint/image": 7.9, "new/text": 99.0}, 4 * mean - 0.01)
    for losses, norm, what in (({"paint/image": 9.0}, 1.0, "paint/image"), ({}, 5 * mean, "gradient_norm")):
        again = guard_with(tmp_path, explode=4.0, after=3)
        again.load_state_dict(json.loads(json.dumps(kept)))
        with pytest.raises(BadStep, match=f"{what} exploded: .* \\(4 times its mean\\)"):
            again.judge(losses, norm)
        assert again.steps == 3  # a bad step teaches it nothing
    guard_with(tmp_path).judge({"paint/image": 1e9}, 1e9)


# ---- in a stage ---------------------------------------------------------------------------------


def poisoned(builder, monkeypatch, steps: set[int]):
    """Batches whose describe rows make the loss NaN at these steps, by way of the model."""
    batches, poison = batches_of(builder), []
    describe = batches.describe

    def watched(step, *args, **more):
        poison.append(step in steps)
        return describe(step, *args, **more)

    monkeypatch.setattr(batches, "describe", watched)
    real = loop.SynerGenVL.losses

    def losses(self, *args, **more):
        out = real(self, *args, **more)
        if poison[-1]:
            out.text = out.text * torch.nan
        return out

    monkeypatch.setattr(loop.SynerGenVL, "losses", losses)
    return batches


STAGE = dict(STAGES[2], steps=6)


def run(builder, folder, batches, policy, on_step=None, **guard):
    model = fresh_model(builder)
    recipe = recipe_with(stages=[STAGE], save_every=1, guard=dict(policy=policy, **guard))
    run_stage(model, recipe, 0, batches, folder / "state.safetensors", on_step)
    return model


def test_a_bad_step_stops_the_run_and_names_its_samples(builder, tmp_path, monkeypatch):
    batches = poisoned(builder, monkeypatch, {3})
    with pytest.raises(BadStep, match="stage 'tuning': step 3: losses .*nan.*its samples are listed in .*bad_steps"):
        run(builder, tmp_path, batches, "stop")
    (row,) = [json.loads(line) for line in (tmp_path / BAD_STEPS_FILE).read_text().splitlines()]
    assert (row["stage"], row["step"]) == ("tuning", 3)
    assert row["samples"] == {
        "paint": [f"scene 1:{i}" for i in batches._pick(3, 2, 0)],
        "describe": [f"scene 1:{i}" for i in batches._pick(3, 1, 1)],
    }
    tensors, meta = load_state(tmp_path / "state.safetensors")
    assert meta["step"] == 3 and all(v.isfinite().all() for v in tensors.values())


def test_a_skipped_step_leaves_no_trace(builder, tmp_path, monkeypatch, capsys):
    """Weights, moments and averages go on as if the step had not been; the run resumes through it."""
    steps, saved, metas, save = [], {}, {}, loop.FileStore.save

    def keep(self, tensors, meta):
        saved[meta["step"]] = {k: v.clone() for k, v in tensors.items()}
        metas[meta["step"]] = meta
        save(self, tensors, meta)

    def watch(_, step, figures):
        steps.append(step)
        assert all(map(math.isfinite, figures.values()))

    monkeypatch.setattr(loop.FileStore, "save", keep)
    batches = poisoned(builder, monkeypatch, {2, 3})
    whole = state_of(run(builder, tmp_path, batches, "skip", watch))
    assert steps == [0, 1, 4, 5]
    assert_equal_bits(saved[2], saved[4])
    assert not torch.equal(saved[5]["model.norm.weight"], saved[4]["model.norm.weight"])
    assert capsys.readouterr().out.count("; skipped") == 2
    save_state(tmp_path / "state.safetensors", saved[3], metas[3])
    assert_equal_bits(state_of(run(builder, tmp_path, batches, "skip")), whole)


def test_too_many_skipped_steps_stop_the_run(builder, tmp_path, monkeypatch):
    with pytest.raises(BadStep, match="step 3: .*guard.max_skips allows 2 in a row"):
        run(builder, tmp_path, poisoned(builder, monkeypatch, {1, 2, 3, 4}), "skip", max_skips=2)


# ---- a full disk --------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int):
    """What a full disk is like: a write ends before its end."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_last_file(tmp_path):
    path = tmp_path / "state.safetensors"
    with (
        files_of_at_most(10_000),
        pytest.raises(NotSaved, match="could not be written .*none before"),
    ):
        save_state(path, {"a": torch.zeros(9_000)}, {"step": 1})
    save_state(path, {"a": torch.ones(9_000)}, {"step": 1})
    with files_of_at_most(10_000), pytest.raises(NotSaved, match="the one before it is kept"):
        save_state(path, {"a": torch.zeros(9_000)}, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]  # the half is gone
    assert load_state(path)[1] == {"step": 1} and load_state(path)[0]["a"].sum() == 9_000


@pytest.mark.parametrize("tensors", [{"model.a": torch.zeros(9_000)}, {}], ids=["tensors", "meta"])
def test_a_full_disk_keeps_the_last_folder(tmp_path, tensors):
    store = FolderStore(tmp_path, World())
    store.save({"model.a": torch.ones(3)}, {"stage": "s", "step": 1})
    more = {"stage": "s", "step": 2, "data": "" if tensors else "x" * 20_000}
    with files_of_at_most(10_000), pytest.raises(NotSaved) as caught:
        store.save(tensors, more)
    line = str(caught.value)
    assert line.count("\n") == 0 and "000001-s-00000001 before it is kept" in line and "too large" in line, line
    assert [p.name for p in tmp_path.iterdir()] == ["000001-s-00000001"]
    assert store.meta()["step"] == 1
    store.save({"model.a": torch.ones(3)}, {"stage": "s", "step": 3})
    assert store.meta()["step"] == 3


def test_a_run_on_a_full_disk_stops_and_goes_on(builder, tmp_path, monkeypatch):
    """The first process says it to all: one line, and the next start begins at the last good checkpoint."""
    steps = []
    whole = state_of(run(builder, tmp_path / "whole", batches_of(builder), "stop"))
    writes = []

    def full(tensors, path, meta):
        writes.append(path)
        Path(path).write_bytes(b"half")
        if len(writes) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, meta)

    real = checkpoints.save_file
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(NotSaved, match=r"No space left on device \(os error 28\)\); the one before it is kept"):
        run(builder, tmp_path, batches_of(builder), "stop")
    resumed = run(builder, tmp_path, batches_of(builder), "stop", lambda _, step, figures: steps.append(step))
    assert steps == [2, 3, 4, 5]
    assert_equal_bits(state_of(resumed), whole)
