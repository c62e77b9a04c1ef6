"""The native engine against the oracle: the same ids, whatever the batch, the cut of a prompt and the file."""

import dataclasses
import re
import threading
from pathlib import Path

import pytest
import torch
from cases import image_batch, picture_ids, random_model, scaled_down, text_ids

from synergen_ext.generation import oracle
from synergen_ext.generation.engine import Engine, Formats, cancelled
from synergen_ext.generation.oracle import Sampling
from synergen_ext.generation.pipeline import Pipeline, shipped_checkpoint
from synergen_ext.model import SynerGenVL

PRESETS = ["tiny", "paper", "qwen2-0.5b", "smollm2-135m"]
FREE = Sampling(temperature=1.0)
FILTERED = Sampling(temperature=0.9, top_k=20, top_p=0.9)


def float_model(preset: str, dtype: torch.dtype = torch.float32) -> SynerGenVL:
    """A random model in float32; bfloat16: with its matrices and embeddings rounded, norms and biases not."""
    model = random_model(preset, torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(p.to(dtype))
    return model


def prompts_with_pictures(c) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts of three lengths; the first and the last hold a picture, the first two of them."""
    picture = picture_ids(c)
    first = [*text_ids(c, 4, 1), *picture, *text_ids(c, 2, 2), *picture, 3]
    return [first, text_ids(c, 3, 4), [*text_ids(c, 7, 5), *picture]], image_batch(c, 3)


def paint_prompts(c) -> tuple[list[list[int]], list[int]]:
    return [[*text_ids(c, n, seed=n), c.boi_id] for n in (9, 4, 6)], [*text_ids(c, 3, 77), c.uncond_id, c.boi_id]


# ---- engine = oracle ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_accurate_text_is_the_oracles(preset, form):
    model = float_model(preset, getattr(torch, form))
    engine = Engine.from_model(model, form)
    prompts, pictures = prompts_with_pictures(model.config)
    for sampling, seeds in ((None, None), (FREE, [3, 1, 2]), (FILTERED, [0, 0, 2**62])):
        expected = oracle.generate_text(model, prompts, pictures, 9, (7, 8), sampling, seeds)
        assert engine.generate_text(prompts, pictures, 9, (7, 8), sampling, seeds) == expected
    states = engine.states(prompts[0], pictures[:2])
    with torch.no_grad():
        truth = model.double().states(torch.tensor([prompts[0]]), pictures[:2])[0]
        torch.testing.assert_close(states.double(), truth, rtol=1e-4, atol=1e-4)
        logits = model.text_logits(truth)
    torch.testing.assert_close(engine.text_logits(states).double(), logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_accurate_pictures_are_the_oracles(preset, form):
    model = float_model(preset, getattr(torch, form))
    c, engine = model.config, Engine.from_model(model, form)
    prompts, unconditional = paint_prompts(c)
    for guidance, sampling in ((1.0, FREE), (2.5, FREE), (None, None), (3.0, FILTERED)):
        expected = oracle.generate_image_ids(model, prompts, unconditional, [5, 6, 7], guidance, sampling)
        ids = engine.generate_image_ids(prompts, unconditional, [5, 6, 7], guidance, sampling)
        assert ids.dtype == torch.int64 and torch.equal(ids, expected)
    m, n = c.fold
    size = (m, 2 * n)
    expected = oracle.generate_image_ids(model, prompts[:1], unconditional, [9], 2.0, size=size)
    assert torch.equal(engine.generate_image_ids(prompts[:1], unconditional, [9], 2.0, size=size), expected)


def test_head_logits_are_the_heads():
    model = float_model("paper")
    c, engine = model.config, Engine.from_model(model)
    states = torch.randn(700, c.hidden_size)  # more than one pass
    ids = torch.randint(c.codebook_size, (700, c.window))
    with torch.no_grad():
        truth = model.unfolding_head.double()(states.double(), ids)
    torch.testing.assert_close(engine.head_logits(states, ids).double(), truth, rtol=1e-4, atol=1e-3)


def eager_to_paint(preset: str) -> SynerGenVL:
    """A model that often writes <boi>."""
    model = float_model(preset)
    with torch.no_grad():
        model.special_output.weight[0] *= 3
    return model


def test_interleaved_is_the_oracles():
    model = eager_to_paint("tiny")
    c, engine = model.config, Engine.from_model(model)
    unconditional = [*text_ids(c, 2, 9), c.uncond_id, c.boi_id]
    prompt = [*text_ids(c, 5, 3), *picture_ids(c), 4]
    painted = 0
    for seed in range(12):
        how = dict(seed=seed, guidance=1.0 + seed % 2, text=FREE, image_ids=image_batch(c, 1))
        expected = oracle.generate_interleaved(model, prompt, unconditional, 40, (5,), **how)
        parts = engine.generate_interleaved(prompt, unconditional, 40, (5,), **how)
        assert len(parts) == len(expected)
        for part, wanted in zip(parts, expected, strict=True):
            assert torch.equal(torch.as_tensor(part), torch.as_tensor(wanted))
        painted += sum(isinstance(part, torch.Tensor) for part in parts)
    assert painted >= 6


# ---- two forms of one computation -----------------------------------------------------------------


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_does_not_depend_on_its_batch(form):
    """To the bit: pictures, words and states alone and beside others."""
    model = float_model("tiny")
    c, engine = model.config, Engine.from_model(model, form)
    prompts, unconditional = paint_prompts(c)
    together = engine.generate_image_ids(prompts, unconditional, [5, 6, 7], 2.0)
    for i, prompt in enumerate(prompts):
        alone = engine.generate_image_ids([prompt], unconditional, [5 + i], 2.0)
        assert torch.equal(alone[0], together[i])
    prompts, pictures = prompts_with_pictures(c)
    words = engine.generate_text(prompts, pictures, 9, (7,), FREE, [1, 2, 3])
    for i, (begin, end) in enumerate(((0, 2), (2, 2), (2, 3))):
        assert engine.generate_text([prompts[i]], pictures[begin:end], 9, (7,), FREE, [1 + i]) == [words[i]]
    states = engine.states(prompts[0], pictures[:2])
    assert torch.equal(engine.states(prompts[0][:5]), states[:5])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(engine.states(prompts[0], pictures[:2]), states)
    finally:
        torch.set_num_threads(before)


def test_a_long_prompt_is_cut_without_a_trace():
    """512 rows go through the layers at a time."""
    model = float_model("tiny")
    c = dataclasses.replace(model.config, max_positions=2000)
    model = random_model(c, torch.float32)
    engine = Engine.from_model(model)
    picture = picture_ids(c)
    prompts = [text_ids(c, 500, 1) + picture + text_ids(c, 700, 2), text_ids(c, 300, 3)]
    pictures = image_batch(c, 1)
    long = engine.states(prompts[0], pictures)
    assert torch.equal(engine.states(prompts[0][:520], pictures), long[:520])
    with torch.no_grad():
        truth = model.double().states(torch.tensor([prompts[0]]), pictures)[0]
    torch.testing.assert_close(long.double(), truth, rtol=1e-3, atol=1e-3)
    expected = oracle.generate_text(model.float(), prompts, pictures, 5, ())
    assert engine.generate_text(prompts, pictures, 5, ()) == expected


def test_calls_from_several_threads_do_not_meet():
    model = float_model("tiny")
    engine = Engine.from_model(model)
    prompts, unconditional = paint_prompts(model.config)
    alone = [engine.generate_image_ids([p], unconditional, [1], 2.0) for p in prompts]
    made: dict[int, torch.Tensor] = {}

    def paint(i: int) -> None:
        made[i] = engine.generate_image_ids([prompts[i]], unconditional, [1], 2.0)

    threads = [threading.Thread(target=paint, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(made[i], alone[i]) for i in range(3))


# ---- integers -------------------------------------------------------------------------------------


def test_a_picture_costs_what_the_head_says():
    model = float_model("tiny")
    c, engine = model.config, Engine.from_model(model)
    prompt, picture = [*text_ids(c, 5), c.boi_id], image_batch(c, 1)
    ids = torch.tensor([[*prompt, *[c.image_id] * c.image_tokens]])
    with torch.no_grad():
        losses = model.double()(ids, torch.full_like(ids, -100), picture, torch.tensor([True]))
    assert engine.image_nats(prompt, picture[0]) == pytest.approx(float(losses.image) * picture.numel(), rel=1e-5)


def test_integers_cost_little_on_the_shipped_model():
    """Nats of pictures that the float32 model painted, and its states, with fewer bits."""
    pipeline = Pipeline.from_pretrained()
    engines = {form: Engine.from_model(pipeline.model, form) for form in ("float32", "bfloat16", "int8", "int4")}
    prompts = ["two red apples left of a blue car", "a green cat", "three yellow dogs"]
    rows = [pipeline.builder.paint_prompt(p) for p in prompts]
    pictures = engines["float32"].generate_image_ids(rows, pipeline.builder.paint_prompt(None), [1, 2, 3])
    nats = {
        form: sum(e.image_nats(row, picture) for row, picture in zip(rows, pictures, strict=True)) / 3
        for form, e in engines.items()
    }
    truth = engines["float32"].states(rows[0])
    error = {form: float((e.states(rows[0]) - truth).norm() / truth.norm()) for form, e in engines.items()}
    # Its weights are bfloat16 in the file, so nothing is rounded there.
    for form, most, more in (("bfloat16", 1e-6, 1e-4), ("int8", 0.02, 0.1), ("int4", 0.15, 0.5)):
        assert error[form] < most, (error, nats)
        assert abs(nats[form] - nats["float32"]) < more, (error, nats)
    assert 0 < error["int8"] < error["int4"]
    sizes = {form: e.nbytes for form, e in engines.items()}
    assert sizes["bfloat16"] < 0.51 * sizes["float32"] and sizes["int8"] < 0.30 * sizes["float32"]
    assert sizes["int4"] < 0.17 * sizes["float32"]


def test_prompts_may_be_short():
    """Of bfloat16: states move by its rounding; steps of one token are as before."""
    model = float_model("tiny", torch.bfloat16)
    c = model.config
    long, short = (Engine.from_model(model, Formats("bfloat16", activations=a)) for a in ("float32", "bfloat16"))
    ids = text_ids(c, 40)
    a, b = long.states(ids), short.states(ids)
    assert 1e-4 < float((a - b).norm() / a.norm()) < 0.03
    states, windows = torch.randn(3, c.hidden_size), torch.randint(c.codebook_size, (3, c.window))
    assert torch.equal(long.head_logits(states, windows), short.head_logits(states, windows))


def test_parts_may_have_formats_of_their_own():
    model = float_model("tiny")
    engine = Engine.from_model(model, Formats("float32", head="int8", output="bfloat16", group={"int8": 32}))
    forms = {name: m.format for name, m in engine._native.matrices.items()}
    assert forms["layers.0.qkv"] == "float32" and forms["image.proj_in"] == "float32"
    assert forms["head.layers.1.down"] == forms["head.classifier"] == "int8" and forms["output"] == "bfloat16"
    assert engine._native.matrices["head.classifier"].group == 32
    backbone, head = engine.step_bytes()
    c = model.config
    matrices, _ = model.step_parameters()
    assert backbone == 4 * matrices  # every row and column fills its panel
    assert head < sum(p.numel() for p in model.unfolding_head.parameters()) * 1.3 and c.head_layers == 2


# ---- progress, and its end ------------------------------------------------------------------------


def test_patches_are_told_as_they_are_painted():
    model = float_model("tiny")
    c, engine = model.config, Engine.from_model(model)
    prompts, unconditional = paint_prompts(c)
    seen: list[tuple[int, int, int]] = []

    def tell(done: int, total: int, ids: torch.Tensor) -> None:
        seen.append((done, total, int((ids >= 0).sum())))

    ids = engine.generate_image_ids(prompts, unconditional, [1, 2, 3], on_patch=tell)
    assert seen == [(i + 1, c.image_tokens, 3 * c.window * (i + 1)) for i in range(c.image_tokens)]
    assert ids.min() >= 0


def test_words_are_told_as_they_are_written():
    model = float_model("tiny")
    engine = Engine.from_model(model)
    told: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def tell(row: int, token: int) -> None:
        told[row].append(token)

    prompts, pictures = prompts_with_pictures(model.config)
    assert engine.generate_text(prompts, pictures, 6, (7,), FREE, [1, 2, 3], on_token=tell) == list(told.values())


def test_a_callback_ends_a_call():
    model = eager_to_paint("tiny")
    c, engine = model.config, Engine.from_model(model)
    prompts, unconditional = paint_prompts(c)
    with pytest.raises(cancelled()):
        engine.generate_image_ids(prompts, unconditional, [1, 2, 3], on_patch=lambda done, *_: done < 2)
    with pytest.raises(cancelled()):
        engine.generate_text(prompts, None, 6, (), on_token=lambda *_: False)
    with pytest.raises(cancelled()):
        engine.generate_interleaved([1], unconditional, 60, (), text=FREE, on_progress=lambda done, _: done < 4)

    def fail(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine.generate_image_ids(prompts, unconditional, [1, 2, 3], on_patch=fail)
    assert engine.generate_image_ids(prompts, unconditional, [1, 2, 3]).min() >= 0  # as if nothing had been


# ---- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_a_packed_file_holds_the_same_engine(form, tmp_path):
    model = float_model("qwen2-0.5b")
    model.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(tmp_path, form)
    file = tmp_path / f"engine-{form}.safetensors"
    first = Engine.from_pretrained(tmp_path, form, packed=file)
    again = Engine.from_pretrained(tmp_path, form, packed=file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", file.name, "model.safetensors"]
    ids = text_ids(model.config, 9)
    states = engine.states(ids)
    assert torch.equal(first.states(ids), states) and torch.equal(again.states(ids), states)
    assert engine.nbytes == again.nbytes
    with open(file, "rb") as f:
        assert (8 + int.from_bytes(f.read(8), "little")) % 64 == 0


def test_a_packed_file_of_something_else_is_refused(tmp_path):
    model = float_model("tiny")
    model.save_pretrained(tmp_path)
    file = tmp_path / "packed.safetensors"
    Engine.from_pretrained(tmp_path, "int8", packed=file)
    with pytest.raises(ValueError, match="engine: formats must be .*int4.* got .*int8"):
        Engine.from_pretrained(tmp_path, "int4", packed=file)
    model.save_pretrained(tmp_path)  # the same weights, but who knows
    with pytest.raises(ValueError, match="engine: source must be .* bytes, modified"):
        Engine.from_pretrained(tmp_path, "int8", packed=file)
    with pytest.raises(ValueError, match="engine: format must be synergen engine in .*, got pt"):
        Engine.from_pretrained(tmp_path, "int8", packed=tmp_path / "model.safetensors")
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Engine.from_pretrained(tmp_path, "int8", packed=file)


def test_a_packed_file_is_whole_or_not_there(tmp_path, monkeypatch):
    from synergen_ext.generation import engine as module

    model = float_model("tiny")
    model.save_pretrained(tmp_path)

    def full(path, plan, tensors, *rest, **how):
        next(iter(tensors))
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        Engine.from_pretrained(tmp_path, "int8", packed=tmp_path / "packed.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    model = float_model("tiny")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        Engine.from_pretrained(tmp_path)
    model.config.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="engine: no model.safetensors"):
        Engine.from_pretrained(tmp_path)
    dataclasses.replace(model.config, num_layers=3).save(tmp_path)
    SynerGenVL(model.config).save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"engine: layers.2.\S+ must be \[\d+.*\], got nothing"):
        Engine.from_pretrained(tmp_path)


def test_the_shipped_checkpoint_loads():
    engine = Engine.from_pretrained(shipped_checkpoint(), "int4")
    assert engine.config.codebook_size == 192 and engine.nbytes < 12e6


# ---- the page ---------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[1] / "docs" / "engine.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert capsys.readouterr().out == "two\n"
    assert names["engine"].formats.of("head") == "int8"


# ---- refusals ---------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused():
    model = float_model("tiny")
    c, engine = model.config, Engine.from_model(model)
    prompts, unconditional = paint_prompts(c)
    picture = picture_ids(c)
    text, paint = engine.generate_text, engine.generate_image_ids
    one = image_batch(c, 1)
    for expected, call in {
        r"prompts must hold at least one id each, got an empty one": lambda: text([[1], []], None, 2, ()),
        rf"ids must be in \[0, {c.image_id + 1}\), got -1": lambda: text([[-1]], None, 2, ()),
        rf"got {c.image_id + 1}": lambda: text([[c.image_id + 1]], None, 2, ()),
        r"prompts must hold 4 image positions for 1 pictures, got 0": lambda: text([[1]], one, 2, ()),
        r"prompts must hold 0 image positions for 0 pictures, got 4": lambda: text([picture], None, 2, ()),
        r"image ids must be in \[0, 64\), got 64": lambda: text([picture], one * 0 + 64, 2, ()),
        r"image tokens must be multiples of 2 x 4 up to 4 x 8, got 3 x 8": lambda: text([picture], one[:, :3], 2, ()),
        r"image tokens must be multiples of 2 x 4 up to 4 x 8, got 6 x 8": lambda: paint(
            prompts, unconditional, [1, 2, 3], size=(6, 8)
        ),
        r"seeds must be 3, one a prompt, got 2": lambda: paint(prompts, unconditional, [1, 2]),
        r"temperature must be >= 0, got -1": lambda: text([[1]], None, 2, (), Sampling(-1.0)),
        r"top_p must be in \(0, 1\], got 0": lambda: text([[1]], None, 2, (), Sampling(top_p=0.0)),
        r"top_k must be >= 0, got -2": lambda: text([[1]], None, 2, (), Sampling(top_k=-2)),
        r"prompt and new tokens must fit 512 positions, got 1 and 512": lambda: text([[1]], None, 512, ()),
        r"must fit 512 positions, got 1 and 9223372036854775807": lambda: text([[1]], None, 2**63 - 1, ()),
        r"must fit 512 positions, got 2 and 9223372036854775807": lambda: engine.generate_interleaved(
            [1, 2], unconditional, 2**63 - 1, ()
        ),
        r"image ids must be in \[0, 64\), got -1": lambda: engine.head_logits(
            torch.zeros(1, c.hidden_size), torch.full((1, c.window), -1)
        ),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=expected):
            call()
    with pytest.raises(ValueError, match="activations must be float32 or bfloat16, got 'int8'"):
        Formats("int8", activations="int8")
    for formats, expected in {
        ("int3",): "backbone must be one of float32, bfloat16, int8, int4, got 'int3'",
        ("int8", "float8"): "head must be one of .* got 'float8'",
        ("int8", None, None, (("int8", 20),)): "group must be a multiple of 8",
        ("int8", None, None, (("bfloat16", 32),)): "group must be of int8 or int4, got 'bfloat16'",
    }.items():
        *parts, group = (*formats, *[None] * (4 - len(formats)))
        with pytest.raises(ValueError, match=expected):
            Formats(*parts, group=dict(group) if group else None)


def test_logits_that_are_not_finite_are_an_error():
    model = float_model("tiny")
    with torch.no_grad():
        model.norm.weight[1] = float("nan")
    with pytest.raises(FloatingPointError, match="engine: the model's logits are not finite in row 0"):
        Engine.from_model(model).generate_text([[1]], None, 2, ())


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_empty_calls(form):
    model = random_model(scaled_down("paper"), torch.float32)
    engine = Engine.from_model(model, form)
    c = model.config
    assert engine.generate_text([], None, 5, ()) == [] and engine.generate_text([[1], [2]], None, 0, ()) == [[], []]
    assert engine.generate_interleaved([1], [c.uncond_id, c.boi_id], 0, ()) == []
    assert engine.generate_image_ids([], [c.uncond_id, c.boi_id], []).shape == (0, *c.image_grid)
    assert engine.text_logits(torch.empty(0, c.hidden_size)).shape == (0, c.vocab_size + 3)
