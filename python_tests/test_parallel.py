"""Several processes, sharded weights, accumulated gradients, resumed on another number of processes, killed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from synergen_ext.model import SynerGenConfig
from synergen_ext.model.modeling import IGNORE
from synergen_ext.training.data import Batch
from synergen_ext.training.microbatch import accumulate, split
from synergen_ext.training.parallel import check_shares
from synergen_ext.training.recipe import GuardRecipe, ParallelRecipe, parse_recipe
from synergen_ext.training.stores import META_FILE, FolderStore
from synergen_ext.training.world import LostProcess, World, losing

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

from train_forked import exact, make_data, recipe_of, write_recipe  # noqa: E402


def train(jobs: list[dict], folder: Path) -> None:
    """Runs, each in processes of its own that were forked before anything was computed."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, str(TOOLS / "train_forked.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def figures(out: Path) -> dict[str, dict[str, float]]:
    """Losses and gradient norm by stage and step."""
    return {
        step: {k: float.fromhex(v) for k, v in (item.split("=") for item in line.rstrip(";").split())}
        for step, line in exact(out)
    }


def assert_same_curve(a: dict, b: dict) -> None:
    """float32 apart from the order of sums: 16 steps differed by 1e-6 at most when this was written."""
    assert a.keys() == b.keys()
    for step, wanted in a.items():
        assert b[step] == pytest.approx(wanted, rel=2e-5), step


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The same 12 rows a step in one process, in several, sharded and not, at once and in parts."""
    folder = tmp_path_factory.mktemp("runs")
    make_data(folder / "data")
    kinds = {
        "alone": (1, {}),
        "ddp": (2, {}),
        "fsdp": (2, dict(parallel="fsdp")),
        "hsdp": (4, dict(parallel=dict(kind="hsdp", shard=2, async_save=True))),
        "parts": (1, dict(parallel=dict(accumulate=3))),
        "packed": (2, dict(parallel=dict(kind="fsdp", accumulate=3), pack=160)),
    }
    jobs = []
    for name, (processes, changes) in kinds.items():
        recipe = write_recipe(folder / f"{name}.yaml", recipe_of(folder / "data", rows=12, steps=5, **changes))
        jobs.append(dict(recipe=str(recipe), out=str(folder / name), processes=processes))
    train(jobs, folder)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp", "parts", "packed"])
def test_every_way_of_sharing_takes_the_same_steps(runs, kind):
    alone = figures(runs / "alone")
    assert len(alone) == 10 and alone["one 0"]["paint/image"] > alone["two 4"]["paint/image"]
    assert_same_curve(alone, figures(runs / kind))


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_a_sharded_run_ends_in_whole_weights(runs, kind):
    from synergen_ext.model import SynerGenVL

    one, two = (SynerGenVL.from_pretrained(runs / n / "checkpoint").state_dict() for n in ("alone", kind))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0.02, atol=1e-3)  # bfloat16


def test_a_checkpoint_of_two_is_resumed_by_any_number(runs, tmp_path):
    """Two processes stop after step 4 of stage two; 1, 3 and 4 go on, and take the step that two would have taken."""
    whole = figures(runs / "fsdp")
    (state,) = (runs / "fsdp" / "state").iterdir()
    assert len(list(state.glob("*.safetensors"))) == 2
    jobs = []
    for processes in (1, 2, 3, 4):
        out = tmp_path / str(processes)
        for part in ("recipe.yaml", "stages/one.safetensors"):
            (out / part).parent.mkdir(parents=True, exist_ok=True)
            (out / part).write_bytes((runs / "fsdp" / part).read_bytes())
        shutil.copytree(state, out / "state" / state.name)
        jobs.append(dict(recipe=str(runs / "fsdp.yaml"), out=str(out), processes=processes))
    train(jobs, tmp_path)
    for processes in (1, 2, 3, 4):
        resumed = figures(tmp_path / str(processes))
        assert_same_curve({"two 4": whole["two 4"]}, resumed)
    assert figures(tmp_path / "2")["two 4"] == whole["two 4"]  # to the bit


@pytest.mark.parametrize("options", ["--kills 5 --asynchronous", "--kills 3 --parallel ddp --processes 1"])
def test_a_run_killed_again_and_again_is_the_unbroken_one(options):
    """`python tools/kill_run.py --kills 20` is the longer form."""
    command = [sys.executable, str(TOOLS / "kill_run.py"), "--steps", "6", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal to the bit" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["in_writes"] >= 1, done.stdout


# ---- recipes ------------------------------------------------------------------------------------

SMALL = dict(name="r", model={}, stages=[dict(name="s", train=["vision"], steps=1, learning_rate=1e-3, paint=12)])


def test_parallel_has_a_short_form():
    assert parse_recipe({**SMALL, "parallel": "fsdp"}).parallel == ParallelRecipe("fsdp")
    assert parse_recipe(SMALL).parallel == ParallelRecipe("ddp", accumulate=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(parallel="zero"), "parallel: kind must be one of ddp, fsdp, hsdp, got 'zero'"),
        (dict(parallel=dict(kind="hsdp")), "parallel: shard must be at least 1 with hsdp, got 0"),
        (dict(parallel=dict(kind="fsdp", shard=2)), "parallel: shard must be 0 with fsdp"),
        (dict(parallel=dict(accumulate=0)), "parallel: accumulate must be at least 1, got 0"),
        (dict(parallel=dict(async_save=True)), "parallel: async_save must be false with ddp"),
        (dict(parallel=dict(ranks=2)), "parallel has no field 'ranks'"),
        (
            dict(parallel="fsdp", stages=[dict(SMALL["stages"][0], optimizer="muon")]),
            "stage 's': optimizer must be adamw with parallel.kind fsdp: muon needs whole matrices",
        ),
        (
            dict(parallel="fsdp", stages=[dict(SMALL["stages"][0], train=["attention"])]),
            "stage 's': train must be more than attention with parallel.kind fsdp",
        ),
        (dict(guard=dict(policy="pray")), "guard: policy must be one of stop, skip, got 'pray'"),
        (dict(guard=dict(explode=0.5)), "guard: explode must be 0 or above 1, got 0.5"),
        (dict(guard=dict(max_skips=0)), "guard: max_skips must be at least 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe({**SMALL, **change})


@pytest.mark.parametrize(
    ("parallel", "processes", "message"),
    [
        ({}, 5, "paint must be a multiple of the 5 processes, got 12"),
        (dict(accumulate=4), 2, "paint must be a multiple of the 2 processes x 4 of accumulate, got 12"),
        (dict(kind="hsdp", shard=2), 3, "parallel: shard must divide the 3 processes, got 2"),
        (dict(kind="hsdp", shard=2, accumulate=3), 4, ""),
        (dict(kind="hsdp", shard=2), 1, ""),
    ],
)
def test_shares(parallel, processes, message):
    recipe = parse_recipe({**SMALL, "parallel": parallel})
    if message:
        with pytest.raises(ValueError, match=message):
            check_shares(recipe, processes)
    else:
        check_shares(recipe, processes)


# ---- parts of a batch ---------------------------------------------------------------------------


def test_parts_take_their_own_pictures():
    """Rows with one, none, two and one pictures of two folded tokens each."""
    config = SynerGenConfig.preset("tiny", image_grid=(4, 4))
    ids = torch.zeros(4, 6, dtype=torch.long)
    for row, pictures in enumerate((1, 0, 2, 1)):
        ids[row, : 2 * pictures] = config.image_id
    images = torch.arange(4)[:, None, None].expand(4, 4, 4)
    batch = Batch(ids, torch.full_like(ids, IGNORE), images, torch.ones(4, dtype=torch.bool), 24, 4)
    parts = split(batch, 3, config)
    assert [len(p.input_ids) for p in parts] == [2, 1, 1]
    assert [p.image_ids[:, 0, 0].tolist() for p in parts] == [[0], [1, 2], [3]]
    assert torch.equal(torch.cat([p.input_ids for p in parts]), ids)
    with pytest.raises(ValueError, match=r"parts must be in \[1, 4\], got 5"):
        split(batch, 5, config)
    assert [len(b.input_ids) for _, b in accumulate([("paint", batch)], 9, config, World())] == [1] * 4


# ---- checkpoints --------------------------------------------------------------------------------


def store_with(folder: Path, *steps: int) -> FolderStore:
    store = FolderStore(folder, World())
    for step in steps:
        store.save({"model.a": torch.full((2, 3), float(step))}, {"stage": "s", "step": step})
    return store


def loaded(store: FolderStore) -> float:
    return store.load(lambda name, dtype, shape: torch.zeros(shape, dtype=dtype))["model.a"].unique().item()


def test_the_last_checkpoint_is_kept(tmp_path):
    store = store_with(tmp_path, 2, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["000002-s-00000004"]
    assert store.meta() == {"stage": "s", "step": 4} and loaded(store) == 4
    assert FolderStore(tmp_path / "none", World()).meta() is None


def test_a_half_written_checkpoint_is_never_loaded(tmp_path):
    """All files may be there, but without its name a checkpoint does not count; the next one takes it away."""
    store_with(tmp_path / "a", 2)
    store_with(tmp_path / "b", 2, 4)
    (tmp_path / "b" / "000002-s-00000004").rename(tmp_path / "a" / "000002-s-00000004.partial")
    store = FolderStore(tmp_path / "a", World())
    assert store.meta() == {"stage": "s", "step": 2} and loaded(store) == 2
    store_with(tmp_path / "a", 6)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["000002-s-00000006"]


def test_of_two_whole_checkpoints_the_later_counts(tmp_path):
    """Killed between the new one's name and the old one's end."""
    store_with(tmp_path / "a", 2, 4)
    store_with(tmp_path / "b", 2)
    (tmp_path / "b" / "000001-s-00000002").rename(tmp_path / "a" / "000001-s-00000002")
    assert FolderStore(tmp_path / "a", World()).meta() == {"stage": "s", "step": 4}


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"step": "x"}'])
def test_a_broken_checkpoint_is_refused(tmp_path, content):
    store = store_with(tmp_path, 2)
    (tmp_path / "000001-s-00000002" / META_FILE).write_text(content)
    with pytest.raises(ValueError, match="training state: .*meta.json cannot be read"):
        store.meta()


@pytest.mark.parametrize("parallel", ["fsdp", dict(kind="fsdp", async_save=True)], ids=["at once", "beside"])
def test_when_one_of_two_cannot_write_both_say_so(runs, tmp_path, parallel):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_of(runs / "data", steps=5, parallel=parallel))
    train([dict(recipe=str(recipe), out=str(tmp_path / "out"), processes=2, limit=20_000)], tmp_path)
    for rank in (0, 1):
        last = (tmp_path / "out" / f"rank-{rank}.txt").read_text().splitlines()[-1]
        assert "LAST: NotSaved: checkpoint: " in last and "File too large" in last, last
        assert last.endswith("there is none before it")
    assert list((tmp_path / "out" / "state").iterdir()) == []


# ---- a lost process -----------------------------------------------------------------------------


def test_a_lost_process_is_one_line():
    said = "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2"
    line = r"process 1 of 2: another process was lost \(.*Connection closed.*\); go on"
    with pytest.raises(LostProcess, match=line), losing(World(1, 2), "go on"):
        raise RuntimeError(said)
    for world, error in ((World(0, 1), RuntimeError(said)), (World(1, 2), RuntimeError("shapes differ"))):
        with pytest.raises(RuntimeError) as caught, losing(world, "go on"):
            raise error
        assert caught.value is error


def test_the_page_shows_a_recipe_that_is_taken():
    page = (TOOLS.parent / "docs" / "training.md").read_text()
    part = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    recipe = parse_recipe({**SMALL, **part})
    assert recipe.parallel == ParallelRecipe("hsdp", 2, 2, True)
    assert recipe.guard == GuardRecipe("skip", 10.0, 20, 10)
    assert GuardRecipe(explode=0.0, after=20, max_skips=10) == GuardRecipe("stop")
