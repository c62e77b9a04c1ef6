"""The model's files: saved = loaded to the bit, casts, tied weights, and every wrong file refused by name."""

import json

import pytest
import torch
from cases import mixed_batch, random_model
from safetensors.torch import load_file, save_file

from synergen_ext.model import SynerGenConfig, SynerGenVL

VARIANTS = {
    "plain": {},
    "biased": dict(attention_bias=True),
    "tied": dict(tie_word_embeddings=True),
}


def variant(name: str = "plain", dtype: torch.dtype = torch.float32) -> SynerGenVL:
    return random_model(SynerGenConfig.preset("tiny", **VARIANTS[name]), dtype)


def assert_same(a: SynerGenVL, b: SynerGenVL) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert a.config == b.config and ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_saved_is_loaded_to_the_bit(tmp_path, name, dtype):
    model = variant(name, dtype)
    model.save_pretrained(tmp_path)
    loaded = SynerGenVL.from_pretrained(tmp_path)
    assert_same(model, loaded)
    input_ids, image_ids = mixed_batch(model.config)
    with torch.no_grad():
        assert torch.equal(loaded.states(input_ids, image_ids), model.states(input_ids, image_ids))
    assert not loaded.training and not any(p.is_meta for p in loaded.parameters())


def test_saving_after_inference(tmp_path):
    """Inference lays the two experts side by side in one allocation; files must not notice."""
    model = variant()
    model.save_pretrained(tmp_path / "before")
    input_ids, image_ids = mixed_batch(model.config)
    with torch.no_grad():
        model.states(input_ids, image_ids)
    model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("before", "after"))
    assert before == after


def test_the_file_is_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        variant().save_pretrained(tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_cast_on_saving_and_on_loading(tmp_path):
    model = variant()
    model.save_pretrained(tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())  # the model itself is left alone
    rounded = {k: v.bfloat16() for k, v in model.state_dict().items()}
    for dtype in (None, torch.float32, torch.float64):
        loaded = SynerGenVL.from_pretrained(tmp_path, dtype)
        for k, v in loaded.state_dict().items():
            assert v.dtype == (dtype or torch.bfloat16) and torch.equal(v, rounded[k].to(v.dtype))


def test_saving_over_the_folder_it_came_from(tmp_path):
    model = variant()
    model.save_pretrained(tmp_path)
    loaded = SynerGenVL.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path, torch.bfloat16)  # half the length, while the old file is in use
    assert_same(loaded, model)


def test_a_loaded_model_trains(tmp_path):
    variant("tied").save_pretrained(tmp_path)
    model = SynerGenVL.from_pretrained(tmp_path)
    input_ids, image_ids = mixed_batch(model.config)
    paint = torch.ones(3, dtype=torch.bool)
    model(input_ids, input_ids.clamp_max(model.config.uncond_id), image_ids, paint).total.backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


# ---- tied weights -------------------------------------------------------------------------------


def test_tied_weights_are_one_tensor_and_stored_once(tmp_path):
    model = variant("tied")
    assert model.output.weight is model.tok_embeddings.weight
    assert model.num_parameters() == variant().num_parameters() - model.tok_embeddings.weight.numel()
    model.save_pretrained(tmp_path)
    assert "output.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = SynerGenVL.from_pretrained(tmp_path, torch.float64)
    assert loaded.output.weight is loaded.tok_embeddings.weight
    with torch.no_grad():
        loaded.tok_embeddings.weight[3] += 1
    assert torch.equal(loaded.output.weight[3], loaded.tok_embeddings.weight[3])
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_untied_weights_are_two(tmp_path):
    variant().save_pretrained(tmp_path)
    loaded = SynerGenVL.from_pretrained(tmp_path)
    assert not torch.equal(loaded.output.weight, loaded.tok_embeddings.weight)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "change", "message"),
    [
        ("norm.weight", "drop", r"norm.weight must be \[32\], got nothing"),
        ("layers.1.feed_forward.vision.down", "drop", r"vision.down must be \[32, 48\], got nothing"),
        ("layers.2.attention.wq.weight", torch.zeros(32, 32), r"layers.2.* must be nothing, got \[32, 32\]"),
        ("layers.0.attention.wq.bias", torch.zeros(32), r"wq.bias must be nothing, got \[32\]"),
        ("layers.0.attention.wk.weight", torch.zeros(32, 32), r"must be \[16, 32\], got \[32, 32\]"),
        ("layers.0.attention.wk.weight", torch.zeros(32, 16), r"must be \[16, 32\], got \[32, 16\]"),
        ("tok_embeddings.weight", torch.zeros(299, 32), r"must be \[300, 32\], got \[299, 32\]"),
        ("norm.weight", torch.zeros(32, dtype=torch.int64), "must be torch.float32, got torch.int64"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, weight, change, message):
    variant().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    if isinstance(change, str):
        del state[weight]
    else:
        state[weight] = change
    save_file(state, path)
    with pytest.raises(ValueError, match=f"model: .*{message} in .*model.safetensors"):
        SynerGenVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 2000, -1])
def test_torn_files_are_refused(tmp_path, keep):
    variant().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model: .*is not a safetensors file"):
        SynerGenVL.from_pretrained(tmp_path)


def test_a_pickle_is_refused(tmp_path):
    """Weights of another format could run code when read."""
    model = variant()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model: .*is not a safetensors file"):
        SynerGenVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(tmp_path, name):
    variant().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in"):
        SynerGenVL.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_experts=2), "unknown field 'num_experts'"),
        (dict(model_type="llama"), "model_type must be 'synergen_vl'"),
        (dict(hidden_size=-1), "hidden_size must be a positive integer, got -1"),
        (dict(hidden_size=64), r"must be \[.*64.*\], got \["),
        (dict(num_layers=10**9), "num_layers must be at most 1024"),
        (dict(codebook_size=10**12), r"must be \[1000000000000, 16\]"),  # terabytes, if it were built
        (dict(codebook_size=10**18), "cannot be built"),
        (dict(tie_word_embeddings=True), r"output.weight must be nothing, got \[300, 32\]"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit_are_named(tmp_path, change, message):
    variant().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        SynerGenVL.from_pretrained(tmp_path)
