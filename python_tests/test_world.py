"""Several processes train as one would: the same step, the same run, one set of files."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_training import RECIPE, STAGES

from synergen_ext.training.checkpoints import load_state
from synergen_ext.training.run import run_recipe
from synergen_ext.training.world import World

#: Rows that two processes share evenly; float32, so that only the order of sums differs.
SHARED = {
    **RECIPE,
    "bfloat16": False,
    "sample_every": 2,
    "stages": [
        dict(STAGES[0], text=4),
        dict(STAGES[1], paint=4, describe=2),
        dict(STAGES[2], paint=2, describe=4, optimizer="muon"),
    ],
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(recipe: Path, out: Path, processes: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={free_port()}",
        "-m", "synergen_ext", "train", str(recipe), "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("world") / "recipe.yaml"
    path.write_text(yaml.safe_dump(SHARED))
    return path


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    run_recipe(recipe, out)
    return out


def assert_same_run(a: Path, b: Path) -> None:
    for stage in ("text", "stage1", "tuning"):
        one, two = (load_state(out / "stages" / f"{stage}.safetensors")[0] for out in (a, b))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(
                two[name], value, rtol=1e-3, atol=3e-5, msg=lambda m, w=f"{stage}: {name}": f"{w}: {m}"
            )


def test_two_processes_train_as_one(recipe, alone, tmp_path):
    """All three stages, through the command line; one of the two writes, and the other finds its files."""
    done = torchrun(recipe, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == len((alone / "log.jsonl").read_text().splitlines())
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == sorted(
        p.name for p in (alone / "checkpoint").iterdir()
    )


def test_a_run_of_one_goes_on_in_two(recipe, alone, tmp_path):
    """Stages that one process finished are taken over; the text stage alone was kept here."""
    for name in ("text", "image_tokenizer", "stages"):
        (tmp_path / name).mkdir()
    for name in ("text/tokenizer.json", "image_tokenizer/image_tokenizer.json", "stages/text.safetensors",
                 "image_tokenizer/image_tokenizer.safetensors", "recipe.yaml"):  # fmt: skip
        (tmp_path / name).write_bytes((alone / name).read_bytes())
    done = torchrun(recipe, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, tmp_path)


def test_rows_that_cannot_be_shared_are_refused(recipe, tmp_path):
    done = torchrun(recipe, tmp_path / "out", 4)
    assert done.returncode != 0
    assert "stage 'stage1': describe must be a multiple of the 4 processes, got 2" in done.stderr
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.join()
    assert world == World(0, 1)
    assert world.first(lambda: 3) == 3
    assert world.sum([1.5, 2.0]) == [1.5, 2.0]
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, 2.0])
    world.average_gradients([p])
    assert p.grad.tolist() == [1.0, 2.0]
    world.leave()
