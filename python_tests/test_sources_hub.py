"""Parquet and JSON files through Hugging Face datasets: the same samples as from our own readers, and the cards."""

import json
from pathlib import Path

import numpy as np
import pytest
import test_sources
import yaml
from test_sources import WANTED, assert_same, batches_of, steps_of, write_rows

from synergen_ext.training.sources.build import build_mixture, missing_paths
from synergen_ext.training.sources.conversations import Captions, Conversations
from synergen_ext.training.sources.files import Lines
from synergen_ext.training.sources.hub import Rows
from synergen_ext.training.sources.recipe import SourceRecipe, SourcesRecipe
from synergen_ext.training.sources.sample import BadSample

builder, folder = test_sources.builder, test_sources.folder  # its fixtures

CARDS = Path(__file__).resolve().parents[1] / "docs" / "datasets.yaml"


@pytest.fixture(scope="module")
def hub(folder, tmp_path_factory):
    """The captions and conversations of ``folder`` as parquet with pictures inside, and as JSON beside them."""
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("cache")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()
    out = tmp_path_factory.mktemp("hub")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    held = [
        {**row, "image": {"bytes": (folder / "pictures" / row["image"]).read_bytes(), "path": None}} for row in rows
    ]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for i in range(2):
        part = datasets.Dataset.from_list(held[5 * i : 5 * i + 5], features=features)
        part.to_parquet(str(out / f"captions-{i}.parquet"))
    talks = [json.loads(line) for line in (folder / "talks.jsonl").read_text().splitlines()]
    talks = [t for t in talks if isinstance(t.get("image"), str)]  # one type a column
    write_rows(out / "talks.jsonl", talks)
    yield out
    patch.undo()


def test_parquet_holds_what_our_captions_do(hub, folder):
    ours = Captions(Lines(str(folder / "captions.jsonl")), str(folder / "pictures"), WANTED.size)
    theirs = Rows(str(hub / "captions-*.parquet"), "generate", "", WANTED.size)
    assert len(theirs) == len(ours) == 10
    for i in range(10):
        a, b = ours.read(i, 0), theirs.read(i, 0)
        assert a.text == b.text and np.array_equal(a.pictures[0], b.pictures[0])
    assert theirs.where(3) == f"{hub / 'captions-*.parquet'}#3"


@pytest.mark.parametrize("augment", [False, True])
def test_json_holds_what_our_conversations_do(hub, folder, augment):
    args = (str(folder / "pictures"), WANTED.size, augment)
    ours = Conversations(Lines(str(hub / "talks.jsonl")), *args)
    theirs = Rows(str(hub / "talks.jsonl"), "understand", *args)
    assert len(theirs) == len(ours) > 3
    for i in range(len(ours)):
        a, b = ours.read(i, 17 + i), theirs.read(i, 17 + i)
        assert a.text == b.text and all(np.array_equal(x, y) for x, y in zip(a.pictures, b.pictures, strict=True))


@pytest.mark.parametrize("workers", [0, 3])
def test_resumed_batches_are_the_unbroken_ones(hub, folder, builder, tmp_path, workers):
    def open_batches(name, workers):
        generate = [dict(name="a", format="datasets", path=str(hub / "captions-*.parquet"))]
        root = str(folder / "pictures")
        understand = [dict(name="b", format="datasets", path=str(hub / "talks.jsonl"), root=root, data_augment=True)]
        return batches_of(builder, folder, tmp_path / name, understand, generate, workers=workers)

    unbroken = steps_of(open_batches("a", 0), 0, 6)
    first = open_batches("b", 0)
    begun = steps_of(first, 0, 3)
    resumed = open_batches("b", workers)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert_same(unbroken, begun + steps_of(resumed, 3, 3))


def test_bad_rows_say_so(hub, folder, tmp_path):
    rows = [
        {"image": "../x.png", "caption": "a"}, {"image": "none.png", "caption": "a"}, {"image": "0.png", "caption": ""},
        {"image": None, "caption": "a"},
    ]  # fmt: skip
    source = Rows(str(write_rows(tmp_path / "rows.jsonl", rows)), "generate", str(folder / "pictures"), WANTED.size)
    for i, cause in enumerate(("path outside root", "missing file", "wrong row", "wrong row")):
        with pytest.raises(BadSample) as caught:
            source.read(i, 0)
        assert caught.value.cause == cause


def test_wrong_files_are_refused(hub, tmp_path):
    recipe = SourceRecipe(name="a", format="datasets", path=str(tmp_path / "x.csv"))
    with pytest.raises(ValueError, match=r"must end in .parquet, .json, .jsonl, got 'csv'"):
        build_mixture([recipe], "generate", WANTED, 0)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    for name in ("x.parquet", "none-*.parquet"):
        with pytest.raises(ValueError, match="cannot be read"):
            Rows(str(tmp_path / name), "generate", "", WANTED.size)


def test_patterns_are_not_looked_for_as_files(tmp_path):
    sources = SourcesRecipe(
        generate=[
            SourceRecipe(name=str(i), format="datasets", path=p) for i, p in enumerate(("a-*.parquet", "b.parquet"))
        ]
    )
    assert missing_paths(sources) == ["source '1': no file b.parquet"]


def test_the_cards_are_ten_and_whole():
    cards = yaml.safe_load(CARDS.read_text())
    assert len(cards) == 10 == len({c["name"] for c in cards})
    for card in cards:
        assert sorted(card) == ["kind", "name", "stages", "task", "weight"]
        assert card["task"] in ("understand", "generate") and card["weight"] > 0
        assert card["stages"] and set(card["stages"]) <= {"stage1", "stage2", "tuning"}
    for stage in ("stage1", "stage2"):
        assert {c["task"] for c in cards if stage in c["stages"]} == {"understand", "generate"}
