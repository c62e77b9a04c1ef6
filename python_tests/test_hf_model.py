"""transformers' class around our model: the same logits, losses and files, whatever the switches say."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from cases import image_batch, mixed_batch, picture_ids, random_model, scaled_down, text_ids
from checkpoints import write_tiny_checkpoint
from hf_cases import hf_config, padded, wrapped
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, StaticCache

from synergen_ext.hf import SynerGenVLConfig, SynerGenVLForConditionalGeneration
from synergen_ext.integrations.transformers import register
from synergen_ext.model import PRESETS, SynerGenConfig, SynerGenVL

ATTENTION = ["sdpa", "eager"]


@pytest.fixture(scope="module")
def inner() -> SynerGenVL:
    return random_model("tiny", torch.float32)


@pytest.fixture
def model(inner):
    return wrapped(inner)


@torch.no_grad()
def ours(inner, ids, pictures) -> torch.Tensor:
    return inner.text_logits(inner.states(ids, pictures))


# ---- config --------------------------------------------------------------------------------------


def test_config_has_the_fields_and_defaults_of_ours():
    ours = {f.name: f.default for f in dataclasses.fields(SynerGenConfig)}
    assert {name: getattr(SynerGenVLConfig(), name) for name in ours} == ours


@pytest.mark.parametrize("preset", PRESETS)
def test_config_round_trip_in_both_directions(preset, tmp_path):
    config = SynerGenConfig.preset(preset)
    theirs = hf_config(config)
    assert theirs.synergen() == config
    theirs.architectures, theirs.dtype = ["SynerGenVLForConditionalGeneration"], "float32"
    theirs.save_pretrained(tmp_path)
    assert SynerGenConfig.load(tmp_path) == config
    config.save(tmp_path)
    assert SynerGenVLConfig.from_pretrained(tmp_path).synergen() == config
    assert theirs.num_hidden_layers == config.num_layers and theirs.num_key_value_heads == config.num_kv_heads
    assert (theirs.boi_token_id, theirs.image_token_id) == (config.boi_id, config.image_id)


def test_config_refuses_what_ours_refuses():
    with pytest.raises(Exception, match="num_heads must be a multiple"):
        SynerGenVLConfig(num_heads=5, num_kv_heads=2)


def test_importing_the_package_loads_no_model_of_transformers():
    code = "import sys, synergen_ext.hf; print('transformers' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_logits_are_ours(preset, attention):
    inner = random_model(preset, torch.float32)
    model = wrapped(inner)
    model.set_attn_implementation(attention)
    ids, pictures = mixed_batch(inner.config)
    with torch.no_grad():
        got = model(input_ids=ids, image_ids=pictures).logits
        few = model(input_ids=ids, image_ids=pictures, logits_to_keep=2, text_only=True).logits
    part = 1e-6 if attention == "sdpa" else 5e-6  # eager sums in another order
    torch.testing.assert_close(got, ours(inner, ids, pictures), rtol=part, atol=part * float(got.abs().max()))
    assert torch.equal(few, got[:, -2:, : inner.config.vocab_size])


@torch.no_grad()
def test_flex_attention_gives_the_same_logits(inner, model):
    ids, pictures = mixed_batch(inner.config)
    model.set_attn_implementation("flex_attention")
    got = model(input_ids=ids, image_ids=pictures).logits
    torch.testing.assert_close(got, ours(inner, ids, pictures), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_has_the_logits_of_the_row_alone(inner, model, side, attention):
    c = inner.config
    rows = [[*picture_ids(c), *text_ids(c, 3)], text_ids(c, 4, seed=1), [5, *picture_ids(c), *picture_ids(c), 6]]
    pictures, own = image_batch(c, 3), [slice(0, 1), slice(0, 0), slice(1, 3)]
    model.set_attn_implementation(attention)
    ids, mask = padded(rows, side)
    got = model(input_ids=ids, attention_mask=mask, image_ids=pictures).logits
    assert bool(got.isfinite().all())
    for i, row in enumerate(rows):
        want = ours(inner, torch.tensor([row]), pictures[own[i]])[0]
        torch.testing.assert_close(got[i, mask[i].bool()], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_cached_in_chunks_is_uncached(inner, model, kind, attention):
    """The first chunk has a picture, the second several tokens, then one token at a time."""
    c = inner.config
    ids = torch.tensor(
        [[*picture_ids(c), *text_ids(c, 9)], [*text_ids(c, 4), *picture_ids(c), *text_ids(c, 5, seed=3)]]
    )
    pictures = image_batch(c, 2)
    model.set_attn_implementation(attention)
    length = ids.shape[1]
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=length + 3)
    cuts, parts = [0, length - 5, length - 2, length - 1, length], []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        out = model(
            input_ids=ids[:, begin:end], image_ids=None if begin else pictures, past_key_values=cache, use_cache=True
        )
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), ours(inner, ids, pictures), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_embeddings_in_place_of_ids(inner, model):
    ids, pictures = mixed_batch(inner.config)
    x = inner.embed(ids, pictures)
    got = model(inputs_embeds=x, is_image=ids == inner.config.image_id).logits
    assert torch.equal(got, model(input_ids=ids, image_ids=pictures).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=ids, inputs_embeds=x)


@torch.no_grad()
def test_states_and_attention_of_every_layer(inner, model):
    ids, pictures = mixed_batch(inner.config)
    model.set_attn_implementation("eager")
    out = model(input_ids=ids, image_ids=pictures, output_hidden_states=True, output_attentions=True)
    layers, t = inner.config.num_layers, ids.shape[1]
    assert len(out.hidden_states) == layers + 1 and len(out.attentions) == layers
    assert torch.equal(out.hidden_states[0], inner.embed(ids, pictures))
    torch.testing.assert_close(out.hidden_states[-1], inner.states(ids, pictures), rtol=1e-5, atol=1e-5)
    for weights in out.attentions:
        assert weights.shape == (2, inner.config.num_heads, t, t)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, inner.config.num_heads, t))
        assert not weights.triu(1).any()


# ---- training ------------------------------------------------------------------------------------


def test_loss_and_gradients_are_ours(inner, model):
    ids, pictures = mixed_batch(inner.config)
    labels = torch.where(ids == inner.config.image_id, -100, ids)
    paint = torch.tensor([True, False, True])
    wanted = inner(ids, labels, pictures, paint).total
    got = model.train()(input_ids=ids, image_ids=pictures, labels=labels, paint=paint).loss
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    assert torch.equal(model(input_ids=ids, image_ids=pictures, labels=ids, paint=paint).loss, got)
    got.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_checkpointed_layers_have_the_same_gradients_and_run_twice(model, inner):
    ids, pictures = mixed_batch(inner.config)
    runs = []
    model.model.blocks[1].attention.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        runs.clear()
        model(input_ids=ids, image_ids=pictures, labels=torch.where(ids < 300, ids, -100)).loss.backward()
        return [p.grad.clone() for n, p in model.named_parameters() if p.grad is not None]

    model.train()
    plain, once = gradients(), len(runs)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again, twice = gradients(), len(runs)
    model.gradient_checkpointing_disable()
    third, then = gradients(), len(runs)
    assert (once, twice, then) == (1, 2, 1)
    model.gradient_checkpointing_enable()
    assert model(input_ids=ids, image_ids=pictures).past_key_values is None  # a cache would be filled twice
    model.gradient_checkpointing_disable()
    for a, b, c in zip(plain, again, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_keeps_the_old_logits(tied, tmp_path):
    inner = random_model(scaled_down("tiny", tie_word_embeddings=tied), torch.float32)
    model, old = wrapped(inner), inner.config.vocab_size
    ids, pictures = mixed_batch(inner.config)
    new = old + 7
    model.resize_token_embeddings(new)
    assert model.model.config.boi_id == model.config.boi_token_id == new
    moved = torch.where(ids >= old, ids + 7, ids)
    with torch.no_grad():
        got = model(input_ids=moved, image_ids=pictures).logits
    assert got.shape[-1] == new + 3
    kept = torch.cat((got[..., :old], got[..., new:]), -1)
    torch.testing.assert_close(kept, ours(inner, ids, pictures), rtol=1e-6, atol=1e-5)
    model.save_pretrained(tmp_path)
    for other in (SynerGenVLForConditionalGeneration.from_pretrained(tmp_path), SynerGenVL.from_pretrained(tmp_path)):
        body = getattr(other, "model", other)
        assert (body.output.weight is body.tok_embeddings.weight) is tied
        with torch.no_grad():
            assert torch.equal(body.text_logits(body.states(moved, pictures)), got)


def test_new_rows_of_a_larger_vocabulary_start_small(model):
    table = model.resize_token_embeddings(1300, mean_resizing=False).weight.detach()
    assert float(table[300:].std()) == pytest.approx(0.02, rel=0.05)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_one_folder_serves_both_classes(tied, tmp_path):
    inner = random_model(scaled_down("tiny", tie_word_embeddings=tied), torch.float32)
    ids, pictures = mixed_batch(inner.config)
    want = ours(inner, ids, pictures)
    inner.save_pretrained(tmp_path / "a")
    first, info = SynerGenVLForConditionalGeneration.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values()), info
    first(input_ids=ids, image_ids=pictures)  # lays the experts side by side in memory
    first.save_pretrained(tmp_path / "b")
    names = [p.name for p in (tmp_path / "b").iterdir()]
    assert sorted(names) == ["config.json", "generation_config.json", "model.safetensors"]
    second = SynerGenVL.from_pretrained(tmp_path / "b")
    third = SynerGenVLForConditionalGeneration.from_pretrained(tmp_path / "b")
    for got in (first(input_ids=ids, image_ids=pictures).logits, ours(second, ids, pictures)):
        assert torch.equal(got, want)
    assert torch.equal(third(input_ids=ids, image_ids=pictures).logits, want)


@torch.no_grad()
def test_a_model_from_scratch_saves_our_names_in_shards_too(inner, model, tmp_path):
    """And loads from them; `SynerGenVL` itself reads one file."""
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(inner.state_dict())
    again = SynerGenVLForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_what_a_file_lacks_starts_as_ours_does(inner, tmp_path):
    """A missing norm is ones, a missing matrix has the spread of `init_parameter`; both are reported."""
    state = {k: v for k, v in inner.state_dict().items() if k not in ("norm.weight", "layers.0.attention.wo.weight")}
    save_file(state, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    inner.config.save(tmp_path)
    model, info = SynerGenVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.norm.weight", "model.layers.0.attention.wo.weight"}
    assert bool((model.model.norm.weight == 1).all())
    wo = model.model.blocks[0].attention.wo.weight.detach()
    assert float(wo.std()) == pytest.approx(0.02 / (2 * inner.config.num_layers) ** 0.5, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_classes_in_every_dtype(dtype, tmp_path):
    folder = write_tiny_checkpoint(tmp_path)
    register()
    register()  # changes nothing
    assert type(AutoConfig.from_pretrained(folder)) is SynerGenVLConfig
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    assert type(model) is SynerGenVLForConditionalGeneration and model.dtype == dtype
    assert model.config._attn_implementation == "eager"
    ids = torch.tensor([text_ids(model.model.config, 5)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        short = SynerGenVL.from_pretrained(folder, dtype)
        assert logits.dtype == dtype
        torch.testing.assert_close(logits, short.text_logits(short.states(ids)), rtol=0.05, atol=0.02)


def test_a_converted_folder_loads(tmp_path):
    """A language model of transformers, converted: its text logits come out of our class."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from synergen_ext.convert import convert

    register()
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    llm = LlamaForCausalLM(config).eval()
    llm.save_pretrained(tmp_path / "llm")
    convert(tmp_path / "llm", tmp_path / "ours", image_size=64, head_layers=1)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([text_ids(model.model.config, 12)])
    with torch.no_grad():
        got, want = model(input_ids=ids, text_only=True).logits, llm(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map_on_a_cpu(device_map, inner, tmp_path):
    pytest.importorskip("accelerate")
    inner.save_pretrained(tmp_path)
    model = SynerGenVLForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    ids, pictures = mixed_batch(inner.config)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, image_ids=pictures).logits.cpu(), ours(inner, ids, pictures))


def test_lora_trains_and_comes_back(inner, model, tmp_path):
    """Only adapters get gradients, the model's answer moves, and merging gives that answer without adapters."""
    peft = pytest.importorskip("peft")
    ids, pictures = mixed_batch(inner.config)
    batch = {"input_ids": ids, "image_ids": pictures, "labels": torch.where(ids < 300, ids, -100)}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["wq", "wv"]))
    tuned.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    first = float(tuned.train()(**batch).loss.detach())
    for _ in range(3):
        loss = tuned(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < first
    assert all("lora" in n for n, p in tuned.named_parameters() if p.requires_grad)
    tuned.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        want = tuned(input_ids=ids, image_ids=pictures).logits
        again = peft.PeftModel.from_pretrained(wrapped(inner), tmp_path).eval()
        assert torch.equal(again(input_ids=ids, image_ids=pictures).logits, want)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids, image_ids=pictures).logits, want, rtol=1e-4, atol=1e-4)
