"""The front end: words to pictures and back, batches, defaults, odd pictures, and every wrong value refused."""

import time

import numpy as np
import pytest
import torch
from cases import random_image_tokenizer, random_model
from PIL import Image

from synergen_ext.generation.engine import Engine
from synergen_ext.generation.oracle import Sampling, generate_image_ids, generate_text
from synergen_ext.generation.pipeline import MAX_PROMPT_TOKENS, Pipeline
from synergen_ext.model import SynerGenConfig
from synergen_ext.processing.image_tokenizer import to_uint8
from synergen_ext.processing.text import TextTokenizer

PROMPTS = ["a red cat", "two blue dogs left of a tree", "a photo of an apple", "a house", "three green cars"]
QUESTIONS = ["What is in the picture?", "How many cats are there?", "Is there a dog?"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Random weights: 96 x 96 pixels, 6 x 6 tokens, 6 folded tokens."""
    text = TextTokenizer.train(PROMPTS + QUESTIONS + ["user\n", "assistant\n", "Generate an image of: "], 300)
    config = SynerGenConfig.preset("tiny", vocab_size=text.vocab_size, codebook_size=48, image_grid=(6, 6), fold=(2, 3))
    tokenizer = random_image_tokenizer(temporal=1, stride=16)
    with torch.no_grad():
        tokenizer.vq.decoder.conv_out.weight.mul_(0.3)  # pictures that are not clipped to black and white
    return Pipeline(random_model(config, torch.float32), tokenizer, text)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)) for _ in range(3)]


def arrays(painted: list[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(p) for p in painted]


def same(a: list[Image.Image], b: list[Image.Image]) -> list[bool]:
    return [np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True)]


# ---- painting -----------------------------------------------------------------------------------


def test_paint_gives_pictures(pipeline):
    painted = pipeline.paint(PROMPTS)
    assert len(painted) == 5
    assert all(isinstance(p, Image.Image) and p.mode == "RGB" and p.size == (96, 96) for p in painted)
    assert pipeline.picture_size == (96, 96)
    assert min(a.std() for a in arrays(painted)) > 5
    assert not any(np.array_equal(a, arrays(painted)[0]) for a in arrays(painted)[1:])


def test_one_prompt_may_stand_alone(pipeline):
    assert same(pipeline.paint(PROMPTS[0], seeds=4), pipeline.paint([PROMPTS[0]], seeds=[4])) == [True]


def test_paint_is_prompts_ids_and_pixels(pipeline):
    """The steps between, one by one."""
    rows = [pipeline.builder.paint_prompt(p) for p in PROMPTS[:2]]
    ids = generate_image_ids(
        pipeline.model, rows, pipeline.builder.paint_prompt(None), [3, 4], 2.5, Sampling(0.9, 20, 0.95)
    )
    wanted = to_uint8(pipeline.image_tokenizer.decode(ids)).numpy()
    got = pipeline.paint(PROMPTS[:2], seeds=[3, 4], guidance=2.5, temperature=0.9, top_k=20, top_p=0.95)
    assert np.array_equal(np.stack(arrays(got)), wanted)


def test_same_seed_same_picture(pipeline):
    first, again = (pipeline.paint(PROMPTS[:2] * 2, seeds=[1, 2, 1, 3]) for _ in range(2))
    assert same(first, again) == [True] * 4
    assert same(first[:2], first[2:]) == [True, False]


def test_one_seed_serves_all_prompts(pipeline):
    assert same(pipeline.paint(PROMPTS, seeds=9), pipeline.paint(PROMPTS, seeds=[9] * 5)) == [True] * 5


def test_a_picture_does_not_depend_on_its_batch(pipeline):
    """The same image tokens; the decoder's sums over another batch may round a pixel by 1/255."""
    seeds = list(range(5))
    rows = [pipeline.builder.paint_prompt(p) for p in PROMPTS]
    empty = pipeline.builder.paint_prompt(None)
    ids = generate_image_ids(pipeline.model, rows, empty, seeds)
    for row, seed, wanted in zip(rows, seeds, ids, strict=True):
        assert torch.equal(generate_image_ids(pipeline.model, [row], empty, [seed])[0], wanted)
    together = np.stack(arrays(pipeline.paint(PROMPTS, seeds))).astype(int)
    for batch in (1, 2, 4):
        parts = np.stack(arrays(pipeline.paint(PROMPTS, seeds, batch=batch))).astype(int)
        assert np.abs(parts - together).max() <= 1
        assert (parts != together).mean() < 1e-3


def test_defaults_are_the_checkpoints(pipeline):
    c = pipeline.config
    explicit = pipeline.paint(
        PROMPTS[:2], 3, c.guidance, temperature=c.image_temperature, top_k=c.image_top_k, top_p=c.image_top_p
    )
    assert same(pipeline.paint(PROMPTS[:2], 3), explicit) == [True, True]
    assert same(pipeline.paint(PROMPTS[:2], 3, guidance=1), explicit) == [False, False]
    assert same(pipeline.paint(PROMPTS[:2], 3, temperature=0.3), explicit) == [False, False]
    assert same(pipeline.paint(PROMPTS[:2], 3, top_k=2), explicit) == [False, False]
    assert same(pipeline.paint(PROMPTS[:2], 3, top_p=0.1), explicit) == [False, False]


def test_no_temperature_needs_no_seed(pipeline):
    assert same(pipeline.paint("a cat", 1, temperature=0), pipeline.paint("a cat", 2, temperature=0)) == [True]


def test_white_space_is_folded(pipeline):
    assert same(pipeline.paint("  a\n red \t cat "), pipeline.paint("a red cat")) == [True]


def test_numpy_numbers_are_numbers(pipeline):
    wanted = pipeline.paint(PROMPTS[:2], seeds=[3, 4], guidance=2.0, top_k=5)
    got = pipeline.paint(PROMPTS[:2], np.array([3, 4]), guidance=np.float32(2.0), top_k=np.int64(5))
    assert same(got, wanted) == [True, True]
    assert same(pipeline.paint("a cat", np.int64(3)), pipeline.paint("a cat", 3)) == [True]


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_progress_rises_to_the_total(pipeline, batch):
    seen = []
    pipeline.paint(PROMPTS, batch=batch, on_progress=lambda *args: seen.append(args))
    done, totals = zip(*seen, strict=True)
    assert set(totals) == {5 * 6} and done[-1] == 30
    assert all(a < b for a, b in zip(done, done[1:], strict=False))


def test_nothing_asked_nothing_painted(pipeline):
    assert pipeline.paint([]) == [] and pipeline.ask([], "What?") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=""), "prompt must not be empty"),
        (dict(prompts=[" \n\t"]), "prompt must not be empty"),
        (dict(prompts=["a cat", ""]), "prompt must not be empty"),
        (dict(prompts=[3]), "prompt must be text, got 3"),
        (dict(prompts="x " * 257), f"prompt must be at most {MAX_PROMPT_TOKENS} tokens, got "),
        (dict(prompts="a\ud800"), "lone surrogate at character 1"),
        (dict(guidance=-0.1), r"guidance must be in \[0, 50\], got -0.1"),
        (dict(guidance=50.1), r"guidance must be in \[0, 50\], got 50.1"),
        (dict(guidance=float("nan")), "guidance must be in .*got nan"),
        (dict(guidance=float("inf")), "guidance must be in .*got inf"),
        (dict(guidance="3"), "guidance must be a number, got '3'"),
        (dict(temperature=-1), r"temperature must be in \[0, 10\], got -1"),
        (dict(top_k=-1), r"top_k must be in \[0, 48\], got -1"),
        (dict(top_k=49), r"top_k must be in \[0, 48\], got 49"),
        (dict(top_k=2.5), "top_k must be a whole number, got 2.5"),
        (dict(top_p=0), "top_p must be in .*got 0"),
        (dict(top_p=1.1), "top_p must be in .*got 1.1"),
        (dict(seeds=-1), r"seed must be in \[0, 2\^63 - 1\], got -1"),
        (dict(seeds=2**63), r"seed must be in \[0, 2\^63 - 1\], got 9223372036854775808"),
        (dict(seeds=1.5), "seed must be a whole number, got 1.5"),
        (dict(seeds=["7"]), "seed must be a whole number, got '7'"),
        (dict(seeds=[1, 2]), "seeds must be one or 1, got 2"),
        (dict(seeds=[]), "seeds must be one or 1, got 0"),
        (dict(batch=0), "batch must be at least 1, got 0"),
    ],
    ids=ascii,
)
def test_wrong_painting_is_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.paint(**{"prompts": "a cat", **arguments})


def test_endless_prompts_are_refused_at_once(pipeline):
    began = time.process_time()
    with pytest.raises(ValueError, match="prompt must be at most 256 tokens"):
        pipeline.paint("cat " * 5_000_000)
    assert time.process_time() - began < 2


def test_the_longest_prompt_fits(pipeline):
    words = "cat " * 400
    while len(pipeline.text.encode(words.strip())) > MAX_PROMPT_TOKENS:
        words = words[:-4]
    assert len(pipeline.text.encode(words.strip())) > MAX_PROMPT_TOKENS - 4
    assert pipeline.paint(words)[0].size == (96, 96)


# ---- asking -------------------------------------------------------------------------------------


def test_one_picture_one_question_one_string(pipeline, pictures):
    answer = pipeline.ask(pictures[0], QUESTIONS[0], max_new_tokens=6)
    assert isinstance(answer, str)
    rows = [pipeline.builder.ask_prompt(QUESTIONS[0])]
    ids = pipeline.image_ids(pictures[:1])
    (tokens,) = generate_text(pipeline.model, rows, ids, 6, (pipeline.text.im_end, pipeline.text.eos))
    assert answer == pipeline.text.decode(tokens).strip()


def test_many_questions_about_one_picture(pipeline, pictures):
    answers = pipeline.ask(pictures[0], QUESTIONS, max_new_tokens=6)
    assert answers == [pipeline.ask(pictures[0], q, max_new_tokens=6) for q in QUESTIONS]


def test_one_question_about_many_pictures(pipeline, pictures):
    answers = pipeline.ask(pictures, QUESTIONS[0], max_new_tokens=6)
    assert answers == [pipeline.ask(p, QUESTIONS[0], max_new_tokens=6) for p in pictures]
    assert len(set(answers)) > 1  # the picture matters


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_question_for_each_picture(pipeline, pictures, batch):
    answers = pipeline.ask(pictures, QUESTIONS, max_new_tokens=6, batch=batch)
    wanted = [pipeline.ask(p, q, max_new_tokens=6) for p, q in zip(pictures, QUESTIONS, strict=True)]
    assert answers == wanted


def test_lists_of_one_give_lists(pipeline, pictures):
    one = pipeline.ask(pictures[0], QUESTIONS[0], max_new_tokens=4)
    assert pipeline.ask(pictures[:1], QUESTIONS[0], max_new_tokens=4) == [one]
    assert pipeline.ask(pictures[0], QUESTIONS[:1], max_new_tokens=4) == [one]


def test_history_is_part_of_the_question(pipeline, pictures):
    history = [(QUESTIONS[0], "a cat"), (QUESTIONS[1], "two")]
    answer = pipeline.ask(pictures[0], QUESTIONS[2], history=history, max_new_tokens=6)
    rows = [pipeline.builder.ask_prompt(QUESTIONS[2], history=history)]
    ids = pipeline.image_ids(pictures[:1])
    (tokens,) = generate_text(pipeline.model, rows, ids, 6, (pipeline.text.im_end, pipeline.text.eos))
    assert answer == pipeline.text.decode(tokens).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(questions=""), "question must not be empty"),
        (dict(questions=["ok", " "]), "question must not be empty"),
        (dict(questions="x " * 257), "question must be at most 256 tokens"),
        (dict(questions=None), "question must be text, got None"),
        (dict(history=[("", "yes")]), "question must not be empty"),
        (dict(history=[("What?", " ")]), "answer must not be empty"),
        (dict(history=[("How many cats are there?", "two")] * 100), "the conversation must fit 512 tokens, got"),
        (dict(max_new_tokens=500), "the conversation must fit 512 tokens, got"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(batch=0), "batch must be at least 1, got 0"),
        (dict(pictures=[Image.new("RGB", (8, 8))] * 2, questions=["a", "b", "c"]), "questions must be one or 2, got 3"),
        (dict(pictures="cat.png"), "pictures must be PIL images, got 'cat.png'"),
        (dict(pictures=[np.zeros((96, 96, 3), np.uint8)]), "pictures must be PIL images, got array"),
        (dict(pictures=Image.new("RGB", (0, 5))), "a picture must have pixels, got 0 x 5"),
    ],
    ids=lambda v: ascii(v)[:60],
)
def test_wrong_asking_is_refused(pipeline, pictures, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.ask(**{"pictures": pictures[0], "questions": "What?", **arguments})


# ---- pictures of any kind -----------------------------------------------------------------------


def fitted(pipeline, picture: Image.Image) -> np.ndarray:
    return np.asarray(pipeline.fit(picture)).astype(int)


def test_a_picture_of_the_right_size_is_untouched(pipeline, pictures):
    assert np.array_equal(fitted(pipeline, pictures[0]), np.asarray(pictures[0]))


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((192, 96), (0, 24, 96, 72)),
        ((48, 96), (24, 0, 72, 96)),
        ((24, 12), (0, 24, 96, 72)),
        ((3000, 3000), (0, 0, 96, 96)),
        ((1, 1), (0, 0, 96, 96)),
    ],
)
def test_other_sizes_are_fitted_on_white(pipeline, size, box):
    got = fitted(pipeline, Image.new("RGB", size, (10, 60, 200)))
    left, top, right, bottom = box
    assert got.shape == (96, 96, 3)
    assert np.abs(got[top:bottom, left:right] - [10, 60, 200]).max() <= 1
    outside = np.ones((96, 96), bool)
    outside[top:bottom, left:right] = False
    assert (got[outside] == 255).all()


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (999, 3)])
def test_threads_of_pictures_keep_a_pixel(pipeline, size):
    got = fitted(pipeline, Image.new("RGB", size, (0, 0, 0)))
    assert got.shape == (96, 96, 3) and (got < 255).any()


RED = (255, 0, 0)


@pytest.mark.parametrize(
    ("picture", "color"),
    [
        (Image.new("RGBA", (96, 96), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (96, 96), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (96, 96), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("LA", (96, 96), (0, 0)), (255, 255, 255)),
        (Image.new("L", (96, 96), 77), (77, 77, 77)),
        (Image.new("1", (96, 96), 1), (255, 255, 255)),
        (Image.new("RGB", (96, 96), RED).convert("P"), RED),
        (Image.new("CMYK", (96, 96), (0, 255, 255, 0)), RED),
        (Image.new("HSV", (96, 96), (0, 255, 255)), RED),
        (Image.new("I;16", (96, 96), 0x8080), (128, 128, 128)),
    ],
    ids=lambda v: f"{v.mode} {v.getpixel((0, 0))}" if isinstance(v, Image.Image) else "",
)
def test_modes_of_pictures(pipeline, picture, color):
    assert np.abs(fitted(pipeline, picture) - color).max() <= 1


def test_a_transparent_palette_colour_is_white(pipeline):
    picture = Image.new("RGB", (96, 96), RED).convert("P")
    picture.info["transparency"] = picture.getpixel((0, 0))
    assert (fitted(pipeline, picture) == 255).all()


def test_image_ids_are_the_tokenizers(pipeline, pictures):
    ids = pipeline.image_ids([pictures[0], pictures[1].resize((200, 100))])
    assert ids.shape == (2, 6, 6) and ids.dtype == torch.int64
    assert torch.equal(pipeline.image_ids(pictures[:1])[0], ids[0])


# ---- checkpoint folders -------------------------------------------------------------------------


def save(pipeline: Pipeline, folder) -> None:
    pipeline.model.save_pretrained(folder)
    pipeline.image_tokenizer.save_pretrained(folder)
    pipeline.text.save(folder)


def test_saved_is_loaded(pipeline, tmp_path, pictures):
    save(pipeline, tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert same(loaded.paint(PROMPTS[:2], [1, 2]), pipeline.paint(PROMPTS[:2], [1, 2])) == [True, True]
    asked = [p.ask(pictures, QUESTIONS, max_new_tokens=6) for p in (pipeline, loaded)]
    assert asked[0] == asked[1]
    assert loaded.config == pipeline.config
    half = Pipeline.from_pretrained(str(tmp_path), torch.bfloat16)
    assert half.paint("a cat")[0].size == (96, 96)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


# ---- the engine in the model's place ------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save(pipeline, folder)
    return folder


def test_an_engine_paints_and_answers_alike(pipeline, folder, pictures):
    engine = Pipeline.from_pretrained(folder, weights="float32")
    assert isinstance(engine.model, Engine) and engine.config == pipeline.config
    told: list[list[tuple[int, int]]] = [[], []]
    painted = [
        p.paint(PROMPTS, [1, 2, 3, 4, 5], batch=3, on_progress=lambda *now, to=to: to.append(now))
        for p, to in zip((pipeline, engine), told, strict=True)
    ]
    assert all(same(*painted)) and told[0] == told[1] and told[0][-1] == (30, 30)
    asked = [p.ask(pictures, QUESTIONS, max_new_tokens=6) for p in (pipeline, engine)]
    assert asked[0] == asked[1]


def test_previews_are_the_picture_so_far(pipeline, folder):
    engine = Pipeline.from_pretrained(folder, weights="int8", packed=folder / "packed.safetensors")
    seen: list[tuple[int, list[Image.Image]]] = []
    painted = engine.paint(PROMPTS, batch=3, on_preview=lambda *now: seen.append(now), preview_every=2)
    assert [(first, len(pictures)) for first, pictures in seen] == [(0, 3), (0, 3), (3, 2), (3, 2)]
    for first, now in seen[::2]:  # 2 of 6 windows of 2 x 3 tokens: the upper third is painted
        for picture, whole in zip(arrays(now), arrays(painted[first:]), strict=False):
            assert (picture[32:] == 255).all() and picture.shape == whole.shape
            assert picture[:32].std() > 5
    with pytest.raises(ValueError, match="preview_every must be at least 1, got 0"):
        engine.paint("a cat", on_preview=print, preview_every=0)
    with pytest.raises(ValueError, match="previews need an engine"):
        pipeline.paint("a cat", on_preview=print)
    with pytest.raises(ValueError, match="packed is a file of the engine, so weights must be given too"):
        Pipeline.from_pretrained(folder, packed=folder / "packed.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "image_tokenizer.json"])
def test_missing_files_are_named(pipeline, tmp_path, name):
    save(pipeline, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in"):
        Pipeline.from_pretrained(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint: no folder .*nowhere"):
        Pipeline.from_pretrained(tmp_path / "nowhere")


def test_parts_that_do_not_fit_are_refused(pipeline):
    other = random_image_tokenizer(temporal=1, stride=16, codebook_size=40)
    with pytest.raises(ValueError, match="image tokenizer has 40 codes, the model 48"):
        Pipeline(pipeline.model, other, pipeline.text)
