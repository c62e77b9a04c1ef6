"""`generate` and `generate_image` of transformers' class against the slow oracle of generation."""

import pytest
import torch
from cases import image_batch, picture_ids, random_model, text_ids
from checkpoints import write_tiny_checkpoint
from hf_cases import padded, wrapped
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from synergen_ext.generation.oracle import Sampling, generate_image_ids, generate_interleaved, generate_text
from synergen_ext.generation.pipeline import Pipeline
from synergen_ext.hf import SynerGenVLForConditionalGeneration, SynerGenVLProcessor
from synergen_ext.model import SynerGenVL

NEW = 7


@pytest.fixture(scope="module")
def inner() -> SynerGenVL:
    return random_model("tiny")  # float64: no near ties


@pytest.fixture
def model(inner):
    return wrapped(inner)


@pytest.fixture(scope="module")
def asks(inner):
    """Prompts of different lengths with two, no and one picture; all pictures; which belong to each prompt."""
    c = inner.config
    rows = [
        [*text_ids(c, 3), *picture_ids(c), *picture_ids(c), *text_ids(c, 2, seed=1)],
        text_ids(c, 7, seed=2),
        [*picture_ids(c), *text_ids(c, 5, seed=3)],
    ]
    return rows, image_batch(c, 3), [slice(0, 2), slice(0, 0), slice(2, 3)]


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_greedy_batch_is_the_oracle_row_by_row(inner, model, asks, side, cache, attention):
    rows, pictures, own = asks
    ids, mask = padded(rows, side)
    model.set_attn_implementation(attention)
    how = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}
    out = model.generate(
        input_ids=ids, attention_mask=mask, image_ids=pictures, max_new_tokens=NEW, **how.get(cache, {})
    )
    for i, row in enumerate(rows):
        alone = generate_text(inner, [row], pictures[own[i]], NEW, ())[0]
        assert out[i, ids.shape[1] :].tolist() == alone
        assert out[i, ids.shape[1] - len(row) : ids.shape[1]].tolist() == row  # moved to the end if it was not there


def test_a_row_ends_at_a_stop_id_and_is_filled_up(inner, model, asks):
    rows, pictures, _ = asks
    want = generate_text(inner, rows, pictures, NEW, ())
    stop = want[0][2]
    ids, mask = padded(rows, "left")
    out = model.generate(
        ids, attention_mask=mask, image_ids=pictures, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=1
    )
    for got, full in zip(out[:, ids.shape[1] :].tolist(), want, strict=True):
        cut = full.index(stop) + 1 if stop in full else len(full)
        assert got == (full[:cut] + [1] * (NEW - cut))[: len(got)]


@torch.no_grad()
def test_one_beam_search_step_by_hand(inner, model, asks):
    """Two tokens with as many beams as ids: the exhaustive best pair. The pictures of a row go with its beams."""
    rows, pictures, own = asks
    c = inner.config
    ids, mask = padded(rows, "left")
    out = model.generate(
        ids, attention_mask=mask, image_ids=pictures, max_new_tokens=2, num_beams=c.vocab_size, length_penalty=0.0,
        eos_token_id=None,
    )  # fmt: skip
    for i, row in enumerate(rows):
        first = inner.output(inner.states(torch.tensor([row]), pictures[own[i]])[0, -1]).log_softmax(-1)
        longer = torch.tensor([[*row, token] for token in range(c.vocab_size)])
        repeated = pictures[own[i]].repeat(c.vocab_size, 1, 1)
        second = inner.output(inner.states(longer, repeated)[:, -1]).log_softmax(-1)
        best = int((first[:, None] + second).argmax())
        assert out[i, -2:].tolist() == list(divmod(best, c.vocab_size))


def test_beams_and_several_answers_with_scores(model, asks):
    rows, pictures, _ = asks
    ids, mask = padded(rows, "left")
    settings = dict(attention_mask=mask, image_ids=pictures, max_new_tokens=4, eos_token_id=None)
    out = model.generate(
        ids, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True, **settings
    )
    assert out.sequences.shape == (2 * len(rows), ids.shape[1] + 4)
    steps = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    torch.testing.assert_close(steps.sum(1) / 4, out.sequences_scores)
    first = {**settings, "attention_mask": mask[:1], "image_ids": pictures[:2]}
    alone = model.generate(ids[:1], num_beams=3, num_return_sequences=2, **first)
    assert torch.equal(alone, out.sequences[:2])


def test_sampling_follows_the_distribution_and_never_draws_a_special_id(inner, model, asks):
    """4,000 draws of the next id against its probabilities; top-k keeps to the k likeliest."""
    row = asks[0][1]
    torch.manual_seed(0)
    draws = model.generate(
        torch.tensor([row]), max_new_tokens=1, do_sample=True, top_k=0, temperature=0.5, num_return_sequences=4000,
        eos_token_id=None,
    )[:, -1]  # fmt: skip
    with torch.no_grad():
        p = (inner.output(inner.states(torch.tensor([row]))[0, -1]) / 0.5).softmax(-1)
    share = draws.bincount(minlength=inner.config.vocab_size).double() / len(draws)
    assert len(share) == inner.config.vocab_size
    assert bool(((share - p).abs() < 5 * (p * (1 - p) / len(draws)).sqrt() + 1e-3).all())
    few = model.generate(
        torch.tensor([row]), max_new_tokens=1, do_sample=True, top_k=3, num_return_sequences=200, eos_token_id=None
    )[:, -1]
    assert set(few.tolist()) <= set(p.topk(3).indices.tolist())


def test_a_conversation_goes_on_in_its_cache(inner, model):
    """The second turn brings another picture; the first one's is in the cache."""
    c = inner.config
    first = [*picture_ids(c), *text_ids(c, 4)]
    pictures = image_batch(c, 2)
    told = model.generate(
        torch.tensor([first]), image_ids=pictures[:1], max_new_tokens=4, return_dict_in_generate=True,
    )  # fmt: skip
    second = torch.tensor([[*told.sequences[0].tolist(), *picture_ids(c), *text_ids(c, 3, seed=9)]])
    length = told.past_key_values.get_seq_length()
    assert length == told.sequences.shape[1] - 1
    got = model.generate(second, image_ids=pictures, max_new_tokens=NEW, past_key_values=told.past_key_values)
    assert got[0, second.shape[1] :].tolist() == generate_text(inner, second.tolist(), pictures, NEW, ())[0]
    with pytest.raises(ValueError, match="have places for 2 pictures, got 1"):
        model.generate(second, image_ids=pictures[:1], max_new_tokens=NEW)


def test_streamer_and_stopping_criteria(inner, model, asks):
    row = asks[0][1]
    want = generate_text(inner, [row], None, NEW, ())[0]

    class Ids(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= len(row) + 4)

    streamer = Ids()
    out = model.generate(torch.tensor([row]), max_new_tokens=NEW, streamer=streamer, stopping_criteria=[AfterFour()])
    assert out[0].tolist() == streamer.seen == [*row, *want[:4]] and streamer.ended


def test_text_of_a_streamer_is_the_pipelines(tmp_path):
    folder = write_tiny_checkpoint(tmp_path)
    model = SynerGenVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor, pipeline = SynerGenVLProcessor.from_pretrained(folder), Pipeline.from_pretrained(folder)
    text = pipeline.text
    assert model.generation_config.eos_token_id == [text.im_end, text.eos]
    pictures = [Image.new("RGB", size, color) for size, color in (((96, 96), "red"), ((50, 80), "blue"))]
    questions = ["a red cat", "an image of a cat"]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": q}]}]
        for p, q in zip(pictures, questions, strict=True)
    ]
    batch = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    out = model.generate(**batch, max_new_tokens=12)
    got = [t.strip() for t in processor.batch_decode(out[:, batch["input_ids"].shape[1] :])]
    assert got == pipeline.ask(pictures, questions, max_new_tokens=12)

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    one = processor.apply_chat_template(
        chats[0], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    model.generate(**one, max_new_tokens=12, streamer=streamer)
    assert "".join(streamer).strip() == got[0]


# ---- pictures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paints(inner):
    c = inner.config
    return [[*text_ids(c, n, seed=n), c.boi_id] for n in (9, 4, 6)], [*text_ids(c, 3, seed=77), c.uncond_id, c.boi_id]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"guidance_scale": 1.0}, {"guidance_scale": 2.5, "temperature": 0.7, "top_k": 9, "top_p": 0.9}],
    ids=str,
)
def test_painted_ids_are_the_oracles(inner, model, paints, settings, side, attention):
    """Whatever attention is chosen for transformers' own calls: painting is this package's."""
    prompts, unconditional = paints
    model.set_attn_implementation(attention)
    ids, mask = padded(prompts, side)
    got = model.generate_image(
        ids, attention_mask=mask, unconditional_ids=torch.tensor([unconditional]), seeds=[3, 4, 2**40], **settings
    )
    c = inner.config
    sampling = Sampling(
        settings.get("temperature", c.image_temperature), settings.get("top_k", c.image_top_k),
        settings.get("top_p", c.image_top_p),
    )  # fmt: skip
    guidance = settings.get("guidance_scale")
    assert torch.equal(got, generate_image_ids(inner, prompts, unconditional, [3, 4, 2**40], guidance, sampling))
    alone = model.generate(
        input_ids=ids[1:2], attention_mask=mask[1:2], unconditional_ids=torch.tensor(unconditional), seeds=4,
        modality="image", **settings,
    )  # fmt: skip
    assert torch.equal(alone, got[1:2])


def test_painting_a_smaller_picture_with_progress(inner, model, paints):
    prompts, unconditional = paints
    m, n = inner.config.fold
    done = []
    got = model.generate_image(
        torch.tensor(prompts[:1]), unconditional_ids=torch.tensor(unconditional), size=(m, 2 * n),
        on_patch=lambda *a: done.append(a),
    )  # fmt: skip
    want = generate_image_ids(inner, prompts[:1], unconditional, [0], size=(m, 2 * n))
    assert torch.equal(got, want) and done == [(1, 2), (2, 2)]


def test_text_and_pictures_by_turns_are_the_oracles(inner, paints):
    """A model that is pushed towards ``<boi>`` writes, paints and goes on."""
    c = inner.config
    painter = random_model("tiny")
    prompt, pictures = [*picture_ids(c), *text_ids(c, 6)], image_batch(c, 1)
    word = generate_text(painter, [prompt], pictures, 1, ())[0]
    with torch.no_grad():  # after one word, <boi> is the likeliest
        state = painter.states(torch.tensor([[*prompt, *word]]), pictures)[0, -1]
        before = painter.states(torch.tensor([prompt]), pictures)[0, -1]
        across = state - before * (state @ before) / (before @ before)
        painter.special_output.weight[0] = across * (2 * painter.output(state).max() / (across @ state))
    room = 3 * c.image_tokens
    got = wrapped(painter).generate(
        torch.tensor([prompt]), modality="interleaved", image_ids=pictures, max_new_tokens=room, seed=5,
        unconditional_ids=torch.tensor([paints[1]]),
    )  # fmt: skip
    want = generate_interleaved(painter, prompt, paints[1], room, (), 5, image_ids=pictures)
    assert len(got) == len(want) and any(isinstance(part, torch.Tensor) for part in want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_what_cannot_be_painted_is_refused(model, paints):
    ids = torch.tensor(paints[0][:1])
    with pytest.raises(ValueError, match=r"guidance_scale 3 needs unconditional_ids, got none"):
        model.generate_image(ids)
    with pytest.raises(ValueError, match="seeds must be 1, one a prompt, got 2"):
        model.generate_image(ids, guidance_scale=1, seeds=[1, 2])
    with pytest.raises(ValueError, match="modality must be text, image or interleaved, got 'sound'"):
        model.generate(ids, modality="sound")
