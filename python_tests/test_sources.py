"""Training data from files: formats, mixtures, bad samples, and a position that resumes exactly."""

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cases import SMALL_TOKENIZER, random_image_tokenizer
from PIL import Image
from test_world import torchrun

from synergen_ext.cli import main
from synergen_ext.model import SynerGenConfig
from synergen_ext.model.modeling import IGNORE
from synergen_ext.processing.image_tokenizer import ImageTokenizer
from synergen_ext.processing.pictures import fit_on_white
from synergen_ext.processing.sequences import SequenceBuilder
from synergen_ext.training import loop
from synergen_ext.training.checkpoints import load_state
from synergen_ext.training.data import train_text_tokenizer
from synergen_ext.training.packing import plan_rows
from synergen_ext.training.recipe import parse_recipe
from synergen_ext.training.run import run_recipe
from synergen_ext.training.sources import files
from synergen_ext.training.sources import tar as tar_module
from synergen_ext.training.sources.batches import Rules, SourceBatches
from synergen_ext.training.sources.build import Wanted, build_mixture
from synergen_ext.training.sources.conversations import Captions, Conversations, turns_of
from synergen_ext.training.sources.files import Lines, inside
from synergen_ext.training.sources.mixture import Mixture, Part
from synergen_ext.training.sources.order import shuffled, uniform
from synergen_ext.training.sources.pictures import fit
from synergen_ext.training.sources.recipe import FORMATS, SourceRecipe
from synergen_ext.training.sources.sample import BadSample, Sample
from synergen_ext.training.sources.tar import Tar
from synergen_ext.training.sources.tokens import Tokens, write_tokens
from synergen_ext.training.world import World

GRID, CODES, SIZE = (4, 8), 48, (32, 64)
WANTED = Wanted(GRID, CODES, SIZE)


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def talk(question="What is it?", answer="A thing.", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten pictures, conversations over one, two and no pictures, captions, and InternVL's meta file."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (20 + 4 * i, 70 - 3 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    talks = [talk(f"What is number {i}?", f"Picture {i}.", id=i, image=f"{i}.png") for i in range(6)]
    talks += [talk("First <image> or second <image>?", "The second.", image=["6.png", "7.png"]), talk("One and one?")]
    write_rows(folder / "talks.jsonl", talks)
    write_rows(folder / "words.jsonl", [talk(f"{i} and {i}?", str(2 * i)) for i in range(4)])
    write_rows(folder / "captions.jsonl", [{"image": f"{i}.png", "caption": f"picture {i}"} for i in range(10)])
    meta = {
        "talks": {"root": str(folder / "pictures"), "annotation": str(folder / "talks.jsonl"), "length": 8},
        "words": {"root": "", "annotation": str(folder / "words.jsonl"), "repeat_time": 2, "data_augment": True},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    tokenizer = random_image_tokenizer(**{**SMALL_TOKENIZER, "codebook_size": CODES})
    assert tokenizer.stride == 8
    tokenizer.save_pretrained(folder / "tokenizer")
    text = train_text_tokenizer(1, 300, scenes=40)
    (folder / "text").mkdir()
    text.save(folder / "text")
    return folder


@pytest.fixture(scope="module")
def builder(folder) -> SequenceBuilder:
    text = train_text_tokenizer(1, 300, scenes=40)
    return SequenceBuilder(SynerGenConfig.preset("tiny", image_grid=GRID, codebook_size=CODES), text)


def entry(folder: Path, name: str, kind: str, path: str, **more) -> dict:
    root = {} if kind in ("internvl", "tokens") else {"root": str(folder / "pictures")}
    return dict(name=name, format=kind, path=str(folder / path), **root, **more)


def fake_encode(pixels):
    """Ids that say which picture they are of."""
    assert pixels.shape == (*SIZE, 3)
    return pixels.reshape(4, 8, 8, 8, 3).astype(np.int64).sum((1, 3, 4)) % CODES


def batches_of(builder, folder, out, understand=None, generate=None, world=None, **rules) -> SourceBatches:
    out.mkdir(exist_ok=True)
    understand = understand or [entry(folder, "talks", "internvl", "meta.json")]
    generate = generate or [entry(folder, "captions", "captions", "captions.jsonl")]
    mixtures = {
        task: build_mixture([SourceRecipe(**s) for s in entries], task, WANTED, seed)
        for seed, (task, entries) in enumerate((("understand", understand), ("generate", generate)))
    }
    values = dict(
        template="internlm2-chat", max_tokens=512, max_bad=0.5, bad_after=200, workers=0, unconditional=0.3, pack=0
    )
    rules = Rules(**{**values, **rules})
    return SourceBatches(builder, mixtures, rules, fake_encode, out, world or World(), "tuning")


def steps_of(batches: SourceBatches, first: int, count: int, share=slice(None)):
    out = []
    for step in range(first, first + count):
        out += [batches.paint(step, 4, share), batches.describe(step, 6, share=share)]
    return out


def assert_same(a, b) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in ("input_ids", "labels", "image_ids", "paint", "documents"):
            left, right = getattr(x, name), getattr(y, name)
            assert (left is None and right is None) or torch.equal(left, right), name


# ---- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000])
def test_shuffling_is_a_permutation(count):
    for key in (0, 7, 2**63):
        assert sorted(shuffled(i, count, key) for i in range(count)) == list(range(count))


def test_orders_differ_and_are_not_the_files():
    orders = {tuple(shuffled(i, 50, key) for i in range(50)) for key in range(20)}
    assert len(orders) == 20 and tuple(range(50)) not in orders
    assert 0.47 < np.mean([uniform(3, i) for i in range(4000)]) < 0.53


class Numbers:
    """A source whose samples are their own numbers."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def where(self, index):
        return str(index)

    def read(self, index, salt):
        return Sample(str(index))


def test_mixtures_keep_their_weights_and_see_every_row_once_a_pass():
    mixture = Mixture([Part("a", Numbers(10), 3, 10), Part("b", Numbers(7), 1, 5)], seed=1)
    drawn = [mixture.draw() for _ in range(4000)]
    shares = Counter(d.part.name for d in drawn)
    assert 0.72 < shares["a"] / 4000 < 0.78
    for name, count in (("a", 10), ("b", 5)):
        rows = [d.index for d in drawn if d.part.name == name]
        passes = [tuple(rows[i : i + count]) for i in range(0, len(rows) - count + 1, count)]
        assert all(sorted(p) == list(range(count)) for p in passes)
        assert len(set(passes)) > 20  # another order each time
    assert mixture.parts[0].epoch == shares["a"] / 10


def test_a_mixtures_state_is_of_its_sources():
    state = Mixture([Part("a", Numbers(10), 1, 10)], seed=1).state_dict()
    with pytest.raises(ValueError, match=r"must be of \['b'\], got \['a'\]"):
        Mixture([Part("b", Numbers(10), 1, 10)], seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="'a' must have 10 rows to resume, got 9"):
        Mixture([Part("a", Numbers(9), 1, 9)], seed=1).load_state_dict(state)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
def test_lines_by_number(tmp_path, monkeypatch, end):
    monkeypatch.setattr(files, "_CHUNK", 7)  # lines and gaps cross chunks
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n   \n{"a": "\xc3\xa4 long one"}\n{"a": 3}' + end.encode())
    lines = Lines(str(path))
    assert [lines.row(i)["a"] for i in range(len(lines))] == [1, "ä long one", 3]


def test_fsspec_urls(folder, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/set/rows.jsonl", (folder / "captions.jsonl").read_bytes())
    memory.pipe("/set/3.png", (folder / "pictures" / "3.png").read_bytes())
    source = Captions(Lines("memory://set/rows.jsonl"), "memory://set", SIZE)
    local = Captions(Lines(str(folder / "captions.jsonl")), str(folder / "pictures"), SIZE)
    assert np.array_equal(source.read(3, 0).pictures[0], local.read(3, 0).pictures[0])
    with pytest.raises(BadSample) as caught:
        source.read(4, 0)
    assert caught.value.cause == "missing file"


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "file:///x.png", "C:\\x.png", "", 3, "a\0"]
)
def test_pictures_stay_below_their_root(name):
    with pytest.raises(BadSample):
        inside("root", name)


# ---- rows ---------------------------------------------------------------------------------------


def test_a_conversation_is_the_builders_own_question(builder):
    turns = turns_of(talk("What is it?", "A cat."), 1)
    ours, theirs = builder.conversation(turns, "internlm2-chat"), builder.ask([("What is it?", "A cat.")])
    assert (ours.ids, ours.labels) == (theirs.ids, theirs.labels)


@pytest.mark.parametrize("template", ["internlm2-chat", "internvl", "chatml"])
def test_only_answers_are_learned(builder, template):
    turns = [("user", "<image> or <image>?"), ("assistant", "The first."), ("user", "Why?"), ("assistant", "So.")]
    example = builder.conversation(turns, template)
    assert example.ids.count(builder.config.boi_id) == 2
    learned = [i for i in example.labels if i != IGNORE]
    text = builder.text
    assert learned == [*text.encode("The first."), text.im_end, *text.encode("So."), text.im_end, text.eos]
    plain = [(r, t.replace("<image>", "")) for r, t in turns]
    visual = {builder.config.boi_id, builder.config.eoi_id, builder.config.image_id}
    without = [i for i in example.ids if i not in visual][:-1]
    assert text.decode(without) == text.decode(text.chat_ids(plain, template, reply=False))


def test_turns_of_internvl():
    row = talk("Look.", "Yes.")
    assert turns_of(row, 1)[0] == ("user", "<image>\nLook.")
    row["conversations"].insert(0, {"from": "system", "value": "Be good."})
    assert turns_of(row, 0) == [("user", "Look."), ("assistant", "Yes.")]
    row["conversations"].append({"from": "human", "value": "And?"})
    assert len(turns_of(row, 0)) == 2


@pytest.mark.parametrize(
    ("row", "pictures"),
    [
        ({}, 0),
        ({"conversations": "hello"}, 0),
        ({"conversations": []}, 0),
        ({"conversations": [{"from": "human", "value": "x"}]}, 0),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "human", "value": "x"}]}, 0),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}, 0),
        (talk("<image>"), 0),
        (talk("<image>"), 2),
        (talk("x", "<image>"), 0),
    ],
)
def test_wrong_rows_are_bad(row, pictures):
    with pytest.raises(BadSample) as caught:
        turns_of(row, pictures)
    assert caught.value.cause == "wrong row"


# ---- the meta file ------------------------------------------------------------------------------


def test_every_key_of_the_meta_file(folder, tmp_path):
    def parts(changes, **more):
        meta = json.loads((folder / "meta.json").read_text())
        meta["words"].update(changes)
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        recipe = SourceRecipe("set", "internvl", str(tmp_path / "meta.json"), **more)
        return {p.name: p for p in build_mixture([recipe], "understand", WANTED, 0).parts}

    held = parts({})
    assert {n: (p.count, p.weight) for n, p in held.items()} == {"set/talks": (8, 8), "set/words": (4, 8)}
    assert [held[n].source.augment for n in held] == [False, True]
    assert held["set/talks"].source.root == str(folder / "pictures")
    half = parts({"repeat_time": 0.5})
    assert (half["set/words"].count, half["set/words"].weight) == (2, 2)
    assert sum(p.weight for p in parts({}, weight=3.0).values()) == pytest.approx(3)
    assert parts({}, use_data_resampling=True)["set/talks"].weight == pytest.approx(8**0.5)
    for change, message in (
        ({"annotation": "rows.json"}, "'words': annotation must be a path that ends in .jsonl, got 'rows.json'"),
        ({"length": 9}, "length must be the 4 rows of .*, got 9"),
        ({"repeat_time": 1.5}, "repeat_time must be in \\(0, 1\\] or a whole number, got 1.5"),
        ({"data_augment": "yes"}, "data_augment must be true or false, got 'yes'"),
        ({"max_dynamic_patch": 6}, "max_dynamic_patch must be 1 .*, got 6"),
        ({"root": 3}, "root must be a path, got 3"),
        ({"colour": 1}, "has no key 'colour'"),
        ({"annotation": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            parts(change)


def test_pictures_to_be_understood_lie_as_those_that_are_asked_about():
    """A wide picture is not stretched: above and below it is white, as `Pipeline.fit` and the processor lay it."""
    stored = io.BytesIO()
    wide = Image.new("RGB", (64, 32), "red")
    wide.save(stored, "PNG")
    pixels = fit(stored.getvalue(), "wide.png", (48, 48), crop=False)
    np.testing.assert_array_equal(pixels, np.asarray(fit_on_white(wide, 48, 48)))
    assert (pixels[0] == 255).all() and (pixels[24, :, 0] == 255).all() and not pixels[24, :, 1:].any()
    assert not fit(stored.getvalue(), "wide.png", (48, 48), crop=True)[..., 1:].any()


def test_augmented_pictures_are_another_and_the_same_again(folder):
    meta = SourceRecipe(**entry(folder, "t", "conversations", "talks.jsonl", data_augment=True))
    source = build_mixture([meta], "understand", WANTED, 0).parts[0].source
    plain = (
        build_mixture([SourceRecipe(**entry(folder, "t", "conversations", "talks.jsonl"))], "understand", WANTED, 0)
        .parts[0]
        .source
    )
    a, b, c = (s.read(0, salt).pictures[0] for s, salt in ((source, 1), (source, 1), (plain, 1)))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert len({source.read(0, salt).pictures[0].tobytes() for salt in range(8)}) > 1


# ---- batches ------------------------------------------------------------------------------------


def test_resumed_batches_are_the_unbroken_ones_with_any_number_of_threads(builder, folder, tmp_path):
    whole = steps_of(batches_of(builder, folder, tmp_path / "a"), 0, 6)
    for workers, at in ((0, 1), (1, 3), (2, 4), (3, 5)):
        first = batches_of(builder, folder, tmp_path / f"b{workers}", workers=workers)
        begun = steps_of(first, 0, at)
        state = json.loads(json.dumps(first.state_dict()))
        rest = batches_of(builder, folder, tmp_path / f"b{workers}", workers=3 - workers)
        rest.load_state_dict(state)
        assert_same([*begun, *steps_of(rest, at, 6 - at)], whole)


def test_batches_hold_both_tasks_and_their_pictures(builder, folder, tmp_path):
    for batch in steps_of(batches_of(builder, folder, tmp_path / "a"), 0, 3):
        slots = int((batch.input_ids == builder.config.image_id).sum())
        pictures = 0 if batch.image_ids is None else len(batch.image_ids)
        assert slots == pictures * builder.config.image_tokens
        assert batch.paint is None or bool(batch.paint.all()) == bool(batch.paint.any())


def test_packed_rows_hold_what_padded_ones_do(builder, folder, tmp_path):
    padded = batches_of(builder, folder, tmp_path / "a").describe(0, 12)
    packed = batches_of(builder, folder, tmp_path / "b", pack=160).describe(0, 12)
    assert packed.tokens == padded.tokens and packed.samples == 12
    assert len(packed.input_ids) < 12
    # The padded batch has a sample a row: pack those rows by hand, pictures with them.
    samples = []
    at = 0
    for ids in padded.input_ids:
        length = len(ids) - int((ids.flip(0) == 0).long().cumprod(0).sum())
        n = int((ids == builder.config.boi_id).sum())
        samples.append((ids[:length], padded.image_ids[at : at + n]))
        at += n
    rows = plan_rows([len(ids) for ids, _ in samples], 160)
    for row, found in zip(rows, packed.input_ids, strict=True):
        wanted = torch.cat([samples[i][0] for i in row])
        assert torch.equal(found[: len(wanted)], wanted)
    assert torch.equal(packed.image_ids, torch.cat([samples[i][1] for r in rows for i in r]))
    assert max(len(p) for _, p in samples) == 2 and min(len(p) for _, p in samples) == 0


def test_shares_of_processes_make_up_the_batch(builder, folder, tmp_path):
    whole = batches_of(builder, folder, tmp_path / "a").paint(0, 6)
    shares = [batches_of(builder, folder, tmp_path / "a").paint(0, 6, slice(r, None, 3)) for r in range(3)]
    for rank, part in enumerate(shares):
        assert torch.equal(part.image_ids, whole.image_ids[rank::3])
        length = part.input_ids.shape[1]
        assert torch.equal(part.input_ids, whole.input_ids[rank::3, :length])


# ---- bad samples --------------------------------------------------------------------------------


@pytest.fixture
def spoiled(folder, tmp_path) -> Path:
    (folder / "pictures" / "broken.png").write_bytes((folder / "pictures" / "1.png").read_bytes()[:60])
    good = [{"image": f"{i % 10}.png", "caption": f"picture {i}"} for i in range(24)]
    bad = [
        {"image": "broken.png", "caption": "x"},
        {"image": "gone.png", "caption": "x"},
        {"image": "0.png", "caption": "long " * 400},
        "{half",
        {"image": "../meta.json", "caption": "x"},
        {"image": "0.png"},
        {"image": "0.png", "caption": "\ud800"},
    ]
    return write_rows(tmp_path / "spoiled.jsonl", good + bad)


def test_bad_samples_are_skipped_counted_and_listed(builder, folder, spoiled, tmp_path):
    generate = [dict(name="c", format="captions", path=str(spoiled), root=str(folder / "pictures"))]
    batches = batches_of(builder, folder, tmp_path / "a", generate=generate)
    for step in range(8):
        assert batches.paint(step, 4).samples == 4
    part = batches.mixtures["generate"].parts[0]
    listed = [json.loads(line) for line in (tmp_path / "a" / "bad_samples.jsonl").read_text().splitlines()]
    assert Counter(r["cause"] for r in listed) == part.bad
    assert part.bad.keys() == {
        "broken picture", "missing file", "over-long", "wrong JSON", "path outside root", "wrong row",
    }  # fmt: skip
    assert part.draws == 32 + part.bad.total()
    # Resumed from the middle, the same are met again, and listed once.
    again = batches_of(builder, folder, tmp_path / "b", generate=generate, workers=2)
    for step in range(3):
        again.paint(step, 4)
    state = again.state_dict()
    again.paint(3, 4)
    again = batches_of(builder, folder, tmp_path / "b", generate=generate)
    again.load_state_dict(state)
    for step in range(3, 8):
        again.paint(step, 4)
    assert again.state_dict() == batches.state_dict()
    assert (tmp_path / "b" / "bad_samples.jsonl").read_text() == (tmp_path / "a" / "bad_samples.jsonl").read_text()


def test_too_many_bad_samples_stop_the_run(builder, folder, spoiled, tmp_path):
    generate = [dict(name="c", format="captions", path=str(spoiled), root=str(folder / "pictures"))]
    batches = batches_of(builder, folder, tmp_path / "a", generate=generate, max_bad=0.1, bad_after=20)
    batches.paint(0, 8)  # too few to say
    with pytest.raises(
        ValueError, match=r"'c': at most 10.00% of the samples may be bad, got \d+ of \d+ \(.*listed in"
    ):
        for step in range(1, 10):
            batches.paint(step, 8)


def test_a_source_with_nothing_good_ends(builder, folder, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"image": "gone.png", "caption": "x"}])
    generate = [dict(name="c", format="captions", path=str(path), root=str(folder))]
    with pytest.raises(ValueError, match="missing file 200"):
        batches_of(builder, folder, tmp_path / "a", generate=generate).paint(0, 2)


# ---- recipes and runs ---------------------------------------------------------------------------


def recipe_of(folder: Path, **sources) -> dict:
    held = dict(
        understand=[entry(folder, "talks", "internvl", "meta.json")],
        generate=[entry(folder, "captions", "captions", "captions.jsonl")],
        text_tokenizer=str(folder / "text"), image_tokenizer=str(folder / "tokenizer"),
    )  # fmt: skip
    held.update(sources)
    stage = dict(train=["vision", "attention", "language_model"], learning_rate=1e-3, paint=2, describe=2)
    return dict(
        name="files",
        model=dict(preset="tiny", image_grid=list(GRID)),
        stages=[dict(name="one", steps=3, pack=160, **stage), dict(name="two", steps=5, **stage)],
        sources={k: v for k, v in held.items() if v is not None},
        save_every=2,
        sample_every=0,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["sources"].update(colour=1), "sources has no field 'colour'"),
        (lambda r: r["sources"].update(template="x"), "template must be one of .*, got 'x'"),
        (lambda r: r["sources"].update(max_bad=1.0), "max_bad must be in \\[0, 1\\), got 1.0"),
        (lambda r: r["sources"].update(workers=-1), "workers must be in \\[0, 64\\], got -1"),
        (lambda r: r["sources"].update(generate={}), "sources.generate must be a list, got {}"),
        (lambda r: r["sources"].pop("generate"), "stage 'one': paint must be 0 without sources.generate, got 2"),
        (lambda r: r["sources"]["generate"][0].update(format="x"), "source 'captions': format must be one of"),
        (
            lambda r: r["sources"]["generate"][0].update(format="conversations"),
            "format must be one that serves generate",
        ),
        (lambda r: r["sources"]["generate"][0].update(name="talks"), "names must be different"),
        (lambda r: r["sources"]["generate"][0].update(repeat_time=1.5), "repeat_time must be in"),
        (lambda r: r["sources"]["generate"][0].update(weight=-1), "weight must be at least 0, got -1.0"),
        (lambda r: r["sources"]["generate"][0].pop("path"), "sources.generate\\[0\\] lacks 'path'"),
        (
            lambda r: r["sources"]["generate"].append({**r["sources"]["generate"][0], "name": "b", "weight": 1}),
            "weight in generate must be in all sources or in none, got 1",
        ),
        (lambda r: r["stages"][0].update(text=1), "stage 'one': text must be 0 with sources"),
    ],
)
def test_wrong_sources_are_refused_by_name(folder, change, message):
    recipe = recipe_of(folder)
    parse_recipe(recipe)
    change(recipe)
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe)


def run(folder: Path, out: Path, recipe: dict) -> list[dict]:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    run_recipe(path, out)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if line]
    names = ("stage", "step", "paint/text", "paint/image", "describe/text", "gradient_norm", "filled")
    latest = {(r["stage"], r["step"]): {k: r[k] for k in names} for r in rows}
    return list(latest.values())


def test_a_missing_file_is_said_before_anything_is_written(folder, tmp_path):
    recipe = recipe_of(folder)
    recipe["sources"]["generate"][0]["path"] = "nowhere.jsonl"
    with pytest.raises(FileNotFoundError, match="source 'captions': no file nowhere.jsonl"):
        run(folder, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_sample_has_a_bounded_number_of_pictures(folder, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [talk("<image>" * 257, "Many.", image=["0.png"] * 257)])
    source = Conversations(Lines(str(path)), str(folder / "pictures"), SIZE)
    with pytest.raises(BadSample, match="at most 256 pictures, got 257"):
        source.read(0, 0)


def test_a_run_from_files_resumes_bit_for_bit(folder, tmp_path, monkeypatch, capsys):
    whole = run(folder, tmp_path / "whole", recipe_of(folder, workers=0))
    assert "generate captions: 10 draws, 1.00 passes, 0 bad" in capsys.readouterr().out
    assert [(r["stage"], r["step"]) for r in whole] == [
        *(("one", i) for i in range(3)),
        *(("two", i) for i in range(5)),
    ]
    threads = run(folder, tmp_path / "threads", recipe_of(folder, workers=2))
    assert threads == whole
    # Killed in the middle of each stage, some steps behind the last checkpoint.
    real, calls = loop.train_step, []

    def dying(*args, **more):
        calls.append(1)
        if len(calls) in (3, 8):
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(loop, "train_step", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "broken", recipe_of(folder, workers=3))
    assert load_state(tmp_path / "broken" / "state.safetensors")[1]["data"]["generate"]["draws"] > 0
    assert run(folder, tmp_path / "broken", recipe_of(folder, workers=3)) == whole
    for stage in ("one", "two"):
        a, b = (load_state(tmp_path / n / "stages" / f"{stage}.safetensors")[0] for n in ("whole", "broken"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "whole" / "checkpoint" / "image_tokenizer.safetensors").is_file()


# ---- pictures tokenised once --------------------------------------------------------------------


def tokenize(folder: Path, out: Path, *more: str) -> int:
    arguments = ["--image-tokenizer", str(folder / "tokenizer"), "--grid", "4x8", "--out", str(out), *more]
    return main(["tokenize", *arguments])


def test_training_from_ids_is_training_from_pictures(folder, tmp_path, monkeypatch, capsys):
    """The same draws, the same losses; and no image tokenizer is opened, made or left behind."""
    pictures, captions = str(folder / "pictures"), str(folder / "captions.jsonl")
    assert tokenize(folder, tmp_path / "paint", captions, "--root", pictures) == 0
    talks = str(folder / "talks.jsonl")
    assert tokenize(folder, tmp_path / "ask", talks, "--format", "conversations", "--root", pictures) == 0
    from_pictures = run(
        folder, tmp_path / "a", recipe_of(folder, understand=[entry(folder, "talks", "conversations", "talks.jsonl")])
    )
    monkeypatch.setattr(ImageTokenizer, "encode", None)
    monkeypatch.setattr(ImageTokenizer, "from_pretrained", None)
    recipe = recipe_of(
        folder,
        understand=[dict(name="talks", format="tokens", path=str(tmp_path / "ask"))],
        generate=[dict(name="captions", format="tokens", path=str(tmp_path / "paint"))],
        image_tokenizer=None,
    )
    recipe["tokenizer"] = dict(model=dict(codebook_size=CODES))
    recipe["sample_every"] = 2
    assert run(folder, tmp_path / "b", recipe) == from_pictures
    names = {p.name for p in (tmp_path / "b" / "checkpoint").iterdir()}
    assert "model.safetensors" in names and not any("image_tokenizer" in n for n in names)


def test_shards(folder, tmp_path):
    source = Captions(Lines(str(folder / "captions.jsonl")), str(folder / "pictures"), SIZE)
    assert not write_tokens(source, "generate", fake_encode, CODES, tmp_path / "t", shard=4)
    assert len(list((tmp_path / "t").glob("ids-*.safetensors"))) == 3
    held = Tokens(str(tmp_path / "t"), "generate", GRID, CODES)
    for i in range(len(source)):
        ours, theirs = held.read(i, 0), source.read(i, 0)
        assert ours.text == theirs.text
        assert np.array_equal(ours.pictures[0], fake_encode(theirs.pictures[0])) and ours.pictures[0].dtype == np.int64
    for wanted, message in (
        (("understand", GRID, CODES), "task must be understand, got generate"),
        (("generate", (8, 8), CODES), r"grid must be \[8, 8\], got \[4, 8\]"),
        (("generate", GRID, 64), "codebook_size must be 64, got 48"),
    ):
        with pytest.raises(ValueError, match=message):
            Tokens(str(tmp_path / "t"), *wanted)
    with pytest.raises(ValueError, match="must be empty or absent"):
        write_tokens(source, "generate", fake_encode, CODES, tmp_path / "t")
    (tmp_path / "t" / "ids-00000.safetensors").write_bytes(b"broken")
    with pytest.raises(BadSample) as caught:
        held.read(0, 0)
    assert caught.value.cause == "broken shard"
    write_rows(tmp_path / "t" / "rows.jsonl", [{"ids": [10], "caption": "x"}])
    with pytest.raises(BadSample, match=r"ids must be numbers in \[0, 10\), got \[10\]"):
        Tokens(str(tmp_path / "t"), "generate", GRID, CODES).read(0, 0)


def test_tokenize_says_what_it_left_out(folder, spoiled, tmp_path, capsys):
    root = ("--root", str(folder / "pictures"))
    assert tokenize(folder, tmp_path / "t", str(spoiled), *root, "--max-bad", "0.5") == 0
    assert "left out 5 (" in capsys.readouterr().err  # what is over-long or no Unicode is for the text tokenizer to say
    assert len((tmp_path / "t" / "bad_samples.jsonl").read_text().splitlines()) == 5
    assert tokenize(folder, tmp_path / "u", str(folder / "nowhere.jsonl"), *root) == 2
    assert "nowhere.jsonl cannot be read" in capsys.readouterr().err
    assert tokenize(folder, tmp_path / "u", str(spoiled), "--format", "tar") == 2
    assert "task of tar must be one of understand, generate, got None" in capsys.readouterr().err


# ---- tars ---------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_hold_what_files_do(folder, tmp_path, monkeypatch):
    pixels = [(folder / "pictures" / f"{i}.png").read_bytes() for i in range(4)]
    write_tar(tmp_path / "p-00.tar", {"a/0.png": pixels[0], "a/0.txt": b"picture 0\n", "a/0.cls": b"7"})
    write_tar(tmp_path / "p-01.tar", {"../1.JPG": pixels[1], "../1.json": b'{"caption": "picture 1"}'})
    source = Tar(str(tmp_path / "p-{00..01}.tar"), "generate", SIZE)
    files_ = Captions(Lines(str(folder / "captions.jsonl")), str(folder / "pictures"), SIZE)
    assert len(source) == 2
    for i in range(2):
        ours, theirs = source.read(i, 0), files_.read(i, 0)
        assert ours.text == theirs.text and np.array_equal(ours.pictures[0], theirs.pictures[0])
    two = talk("<image> or <image>?", "This.")
    path = write_tar(
        tmp_path / "q.tar",
        {"x.0.png": pixels[2], "x.json": json.dumps(two).encode(), "x.1.png": pixels[3], "y.json": b"{", "z.png": b"x"},
    )
    source = Tar(str(path), "understand", SIZE)
    assert len(source.read(0, 0).pictures) == 2
    for index, cause in ((1, "wrong JSON"), (2, "wrong row")):
        with pytest.raises(BadSample) as caught:
            source.read(index, 0)
        assert caught.value.cause == cause
    monkeypatch.setattr(tar_module, "MAX_FILE_BYTES", 10)
    with pytest.raises(BadSample) as caught:
        source.read(0, 0)
    assert caught.value.cause == "large file"
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    for name, message in (("bad.tar", "cannot be read as a tar"), ("gone.tar", "cannot be read"), ("{2..1}", "1 to")):
        with pytest.raises(ValueError, match=message):
            Tar(str(tmp_path / name), "generate", SIZE)


def test_links_in_tars_lead_nowhere(folder, tmp_path):
    with tarfile.open(tmp_path / "l.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / "pictures" / "0.png")
        tar.addfile(link)
    with pytest.raises(ValueError, match="must hold pictures or texts, got none"):
        Tar(str(tmp_path / "l.tar"), "generate", SIZE)


# ---- several processes --------------------------------------------------------------------------


def test_two_processes_skip_the_same_samples(folder, spoiled, tmp_path):
    """One process goes on where two stopped, and all stand at the same draws with the same bad samples."""
    generate = [dict(name="c", format="captions", path=str(spoiled), root=str(folder / "pictures"))]
    recipe = recipe_of(folder, generate=generate, max_bad=0.5)
    recipe["bfloat16"] = False
    for stage in recipe["stages"]:
        stage["paint"] = 8
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run_recipe(path, tmp_path / "one")
    done = torchrun(path, tmp_path / "two", 2)
    assert done.returncode == 0, done.stderr
    one, two = (load_state(tmp_path / n / "state.safetensors")[1] for n in ("one", "two"))
    assert one == two and sum(one["data"]["generate"]["sources"]["c"]["bad"].values()) > 0
    a, b = ((tmp_path / n / "bad_samples.jsonl").read_text() for n in ("one", "two"))
    assert a == b and a
    for stage in ("one", "two"):
        a, b = (load_state(tmp_path / n / "stages" / f"{stage}.safetensors")[0] for n in ("one", "two"))
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=1e-3, atol=3e-5)
    (tmp_path / "two" / "stages" / "two.safetensors").unlink()
    run_recipe(path, tmp_path / "two")
    assert (tmp_path / "two" / "bad_samples.jsonl").read_text() == (tmp_path / "one" / "bad_samples.jsonl").read_text()


# ---- the page about it --------------------------------------------------------------------------


def test_the_pages_example_trains(folder, tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text()
    written = re.findall(r"File `([\w.]+)`:\n\n```\w+\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in written] == ["captions.jsonl", "talks.jsonl", "meta.json", "recipe.yaml"]
    monkeypatch.chdir(tmp_path)
    for name, text in written:
        Path(name).write_text(text)
    for name in ("pictures", "text", "tokenizer"):
        Path(name).symlink_to(folder / name)
    [command] = re.findall(r"^    (synergen train .*)$", page, re.MULTILINE)
    assert main(command.split()[1:]) == 0
    assert (tmp_path / "runs" / "squares" / "checkpoint" / "model.safetensors").is_file()
    assert not Path("runs/squares/bad_samples.jsonl").exists()
    for form in FORMATS:
        assert f"| `{form}` |" in page
    [command] = re.findall(r"^    (synergen tokenize .*)$", page, re.MULTILINE)
    assert main(command.split()[1:]) == 0


def test_words_alone_train_nothing_of_a_frozen_language_model(folder, tmp_path):
    """A batch of understanding without a picture, where only the vision parts train: the other task's step is taken."""
    words = dict(name="words", format="conversations", path=str(folder / "words.jsonl"))
    recipe = recipe_of(folder, understand=[words])
    for stage in recipe["stages"]:
        stage["train"] = ["vision"]
    rows = run(folder, tmp_path / "out", recipe)
    assert len(rows) == 8 and all(r["gradient_norm"] > 0 for r in rows)
