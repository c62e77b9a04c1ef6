"""Packing: several samples in one row give the losses and gradients that they give alone."""

import numpy as np
import pytest
import torch
from cases import random_model

from synergen_ext.model import SynerGenConfig
from synergen_ext.model.modeling import IGNORE, packed
from synergen_ext.processing.sequences import Example, SequenceBuilder
from synergen_ext.processing.text import TextTokenizer
from synergen_ext.training.data import SceneBatches, collate, collate_packed
from synergen_ext.training.loop import make_optimizers, train_step
from synergen_ext.training.packing import pack, plan_rows
from synergen_ext.training.recipe import StageRecipe

WORDS = ["What color is the car?", "two red apples", "user\n", "assistant\n", "blue", "yes", "a long answer"] * 9
CONFIG = SynerGenConfig.preset("tiny")


@pytest.fixture(scope="module")
def builder() -> SequenceBuilder:
    return SequenceBuilder(CONFIG, TextTokenizer.train(WORDS, 300))


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.codebook_size, (count, *CONFIG.image_grid)).astype(np.uint16)


def examples_of(task: str, builder: SequenceBuilder) -> list[Example]:
    """Five samples of different lengths."""
    words = ["yes", "two red apples", "a long answer a long answer", "blue", "What color is the car? two red apples"]
    if task == "paint":
        return [builder.paint(w) for w in [*words[:4], None]]
    return [builder.ask([("What color is the car?", w)], pictures=int(task == "describe")) for w in words]


def losses_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    losses = model(batch.input_ids, batch.labels, batch.image_ids, batch.paint, batch.documents)
    losses.total.backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("row", [128, 200, 1000])
@pytest.mark.parametrize("task", ["paint", "describe", "text"])
def test_packed_is_unpacked(builder, task, row):
    model = random_model(CONFIG, torch.float32)
    examples = examples_of(task, builder)
    ids = None if task == "text" else pictures(len(examples))
    plain = losses_and_gradients(model, collate(examples, ids, task == "paint"))
    together = collate_packed(examples, ids, task == "paint", row)
    assert len(together.input_ids) < len(examples)
    ours = losses_and_gradients(model, together)
    for name in ("total", "text", "image"):
        a, b = getattr(ours[0], name), getattr(plain[0], name)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert ours[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_document_sees_nothing_of_its_neighbours(builder):
    model = random_model(CONFIG)
    examples = examples_of("text", builder)[:3]
    input_ids, _, documents = pack(examples, [[0, 1, 2]], 200)
    before = model.states(input_ids, documents=documents)
    changed = input_ids.clone()
    middle = documents == 2
    changed[middle] = (changed[middle] + 1) % CONFIG.vocab_size
    after = model.states(changed, documents=documents)
    assert torch.equal(before[~middle], after[~middle]) and not torch.equal(before[middle], after[middle])


def test_positions_and_mask():
    positions, mask = packed(torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 3, 3, 3, 3]]))
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
    assert mask.shape == (2, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_a_number_that_comes_again_is_another_document():
    positions, mask = packed(torch.tensor([[1, 2, 1]]))
    assert positions.tolist() == [[0, 0, 0]] and torch.equal(mask[0, 0], torch.eye(3, dtype=torch.bool))


def test_nothing_is_learned_across_documents(builder):
    """The first id of a sample is a label nowhere, though its example says so, and though the caller's labels do."""
    model = random_model(CONFIG)
    example = examples_of("text", builder)[0]
    learned_first = Example(example.ids, [example.ids[0], *example.labels[1:]])
    input_ids, labels, documents = pack([learned_first] * 2, [[0, 1]], 100)
    assert (labels[documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0] == IGNORE).all()
    loss = model(input_ids, labels, documents=documents).text
    labels[0, len(example.ids)] = example.ids[0]
    assert torch.equal(model(input_ids, labels, documents=documents).text, loss)


@pytest.mark.parametrize(
    ("lengths", "row", "rows"),
    [
        ([], 10, []),
        ([10], 10, [[0]]),
        ([5, 5, 5, 5], 10, [[0, 1], [2, 3]]),
        ([3, 7, 4, 6], 10, [[0, 1], [2, 3]]),
        ([6, 6, 6, 2, 2, 2], 10, [[0, 3, 4], [1, 5], [2]]),
        ([1] * 25, 10, [[*range(10)], [*range(10, 20)], [*range(20, 25)]]),
    ],
)
def test_rows(lengths, row, rows):
    assert plan_rows(lengths, row) == rows


def test_rows_hold_everything_once_and_are_well_filled():
    lengths = np.random.default_rng(0).integers(20, 400, 500).tolist()
    rows = plan_rows(lengths, 1024)
    assert sorted(i for r in rows for i in r) == list(range(500))
    assert all(sum(lengths[i] for i in r) <= 1024 for r in rows)
    assert sum(lengths) / (1024 * len(rows)) > 0.98


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="pack: sample 1 must have at most 10 tokens, got 11"):
        plan_rows([10, 11], 10)


def test_packed_batches_of_scenes(builder):
    """The same samples as unpacked, and a training step with the same losses and the same gradient norm."""
    stage = StageRecipe("tuning", ["vision", "attention"], 1, 1e-3, paint=5, describe=4, pack=200)
    figures = []
    for row in (0, stage.pack):
        batches = SceneBatches(builder, pictures(9), 1, 7, pack=row)
        tasks = [("paint", batches.paint(0, 5)), ("describe", batches.describe(0, 4))]
        assert [b.samples for _, b in tasks] == [5, 4]
        assert all((b.documents is not None) == bool(row) for _, b in tasks)
        model = random_model(CONFIG, torch.float32)
        figures.append(train_step(model, make_optimizers(model, stage), tasks, 1e9, bfloat16=False))
    assert figures[0].keys() == figures[1].keys()
    for name, value in figures[0].items():
        assert figures[1][name] == pytest.approx(value, rel=1e-5), name
