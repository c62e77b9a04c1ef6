"""The config: presets, the sizes the paper prints, JSON, and every wrong value refused by name."""

import dataclasses
import json
import math

import pytest
import torch

from synergen_ext.model import PRESETS, SynerGenConfig, SynerGenVL

FIELDS = [f.name for f in dataclasses.fields(SynerGenConfig)]


def on_meta(preset: str) -> SynerGenVL:
    with torch.device("meta"):
        return SynerGenVL(SynerGenConfig.preset(preset))


def language_model_size(model: SynerGenVL) -> int:
    """Parameters without experts, image tables, special tokens and unfolding head."""
    ours = ("tok_embeddings.", "layers.", "norm.", "output.")
    return sum(p.numel() for k, p in model.named_parameters() if k.startswith(ours) and ".vision." not in k)


# ---- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name):
    config = SynerGenConfig.preset(name)
    assert config.image_tokens * config.window == math.prod(config.image_grid)
    assert set(PRESETS[name]) <= set(FIELDS)


def test_paper_counts_3_6_billion_of_which_2_4_active():
    model = on_meta("paper")
    assert model.num_parameters() == pytest.approx(3.6e9, rel=0.01)
    assert model.num_parameters(active=True) == pytest.approx(2.4e9, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "published"),
    [("paper", 1_889_110_016), ("qwen2-0.5b", 494_032_768), ("smollm2-135m", 134_515_008)],
)
def test_language_model_has_the_published_size(preset, published):
    """InternLM2-1.8B, Qwen2-0.5B and SmolLM2-135M, counted in their checkpoints."""
    assert language_model_size(on_meta(preset)) == published


def test_paper_reads_256_folded_tokens_of_16():
    config = SynerGenConfig.preset("paper")
    assert (config.image_tokens, config.window) == (256, 16)
    assert config.guidance == 7.5 and config.image_loss_weight == 2.0 and config.head_layers == 4


def test_bytes_of_a_decoding_step():
    """3.02 GB a backbone step and 0.638 GB a head step in bfloat16 (arithmetic on the sizes)."""
    backbone, head = on_meta("paper").step_parameters()
    assert 2 * backbone == pytest.approx(3.02e9, rel=0.01)
    assert 2 * head == pytest.approx(0.638e9, rel=0.01)


def test_step_parameters_count_matrices_by_name():
    model = SynerGenVL(SynerGenConfig.preset("tiny"))
    sizes = {k: p.numel() for k, p in model.named_parameters() if p.ndim > 1}
    backbone = sum(v for k, v in sizes.items() if k.startswith("layers.") and ".text." not in k)
    head = sum(
        v
        for k, v in sizes.items()
        if k.startswith("unfolding_head.") and not k.endswith(("tokens.weight", "positions"))
    )
    assert model.step_parameters()[0] == pytest.approx(backbone, rel=0.01)
    assert model.step_parameters()[1] == pytest.approx(head, rel=0.01)


def test_preset_takes_changes():
    config = SynerGenConfig.preset("tiny", num_layers=5)
    assert config.num_layers == 5
    assert dataclasses.replace(config, num_layers=2) == SynerGenConfig.preset("tiny")


@pytest.mark.parametrize("name", ["", "Tiny", "paper "])
def test_unknown_preset(name):
    with pytest.raises(ValueError, match="preset must be one of tiny, .*paper.*got"):
        SynerGenConfig.preset(name)


# ---- derived sizes ------------------------------------------------------------------------------


def test_special_ids_follow_the_vocabulary():
    config = SynerGenConfig.preset("tiny")
    ids = [config.boi_id, config.eoi_id, config.uncond_id, config.image_id]
    assert ids == list(range(config.vocab_size, config.vocab_size + 4))
    assert config.num_special == 3


def test_folded_length():
    config = SynerGenConfig.preset("demo")  # 12 x 12 tokens, windows of 2 x 4
    assert config.folded_length(12, 12) == config.image_tokens == 18
    assert config.folded_length(2, 4) == 1
    assert config.folded_length(4, 12) == 6


@pytest.mark.parametrize("grid", [(3, 4), (2, 3), (14, 12), (12, 16), (0, 4), (2, 0), (-2, 4)])
def test_wrong_pictures_are_refused(grid):
    with pytest.raises(ValueError, match=r"multiples of 2 x 4 up to 12 x 12, got -?\d+ x \d+"):
        SynerGenConfig.preset("demo").folded_length(*grid)


# ---- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name, tmp_path):
    config = SynerGenConfig.preset(name)
    config.save(tmp_path)
    loaded = SynerGenConfig.load(tmp_path)
    assert loaded == config and hash(loaded) == hash(config)
    assert SynerGenConfig.from_dict(config.to_dict()) == config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "synergen_vl"


def test_every_field_is_saved(tmp_path):
    """A field that is not written comes back as its default: so change them all."""
    changed = dict(
        vocab_size=77,
        hidden_size=20,
        intermediate_size=21,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        rope_theta=5e3,
        rms_norm_eps=1e-3,
        max_positions=99,
        attention_bias=True,
        tie_word_embeddings=True,
        codebook_size=33,
        image_grid=(9, 10),
        fold=(3, 5),
        token_embed_size=7,
        head_layers=1,
        image_loss_weight=0.5,
        guidance=1.25,
        image_temperature=0.9,
        image_top_k=17,
        image_top_p=0.95,
    )
    assert set(changed) == set(FIELDS)
    assert all(changed[f] != getattr(SynerGenConfig(), f) for f in FIELDS)
    config = SynerGenConfig(**changed)
    config.save(tmp_path)
    assert dataclasses.asdict(SynerGenConfig.load(tmp_path)) == changed


def test_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SynerGenConfig.preset("tiny").num_layers = 3


# ---- wrong values -------------------------------------------------------------------------------

POSITIVE_INTEGERS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_positions",
    "codebook_size",
    "token_embed_size",
    "head_layers",
]
NAN, INF = float("nan"), float("inf")
BAD = [(name, value) for name in POSITIVE_INTEGERS for value in (0, -1, 2.0, "8", None, True)]
BAD += [(name, v) for name in ("image_grid", "fold") for v in ((), (2,), (2, 4, 8), (0, 4), (2, -4), (2.0, 4), 8, "24")]
BAD += [(name, v) for name in ("rope_theta", "rms_norm_eps") for v in (0.0, -1.0, NAN, INF, 10**400, "1", None, True)]
BAD += [("image_loss_weight", v) for v in (-0.1, NAN, INF, "2", None)]
BAD += [("guidance", v) for v in (NAN, INF, -1.0, "3", None)]
BAD += [("image_temperature", v) for v in (-0.5, NAN, INF, "1", None)]
BAD += [("image_top_k", v) for v in (-1, 1.5, "3", None, True)]
BAD += [("image_top_p", v) for v in (0.0, -0.1, 1.1, NAN, "1", None)]
BAD += [(name, v) for name in ("attention_bias", "tie_word_embeddings") for v in (0, 1, "yes", None)]
BAD += [
    ("num_heads", 3),
    ("head_dim", 7),
    ("image_grid", (5, 8)),
    ("image_grid", (4, 6)),
    ("num_layers", 10**9),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: repr(v).strip("'")[:20])
def test_wrong_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"config: {name} ") as error:
        SynerGenConfig.preset("tiny", **{name: value})
    shown = value[0] if value == (5, 8) else value[1] if value == (4, 6) else value
    assert repr(shown) in str(error.value)


def test_every_field_has_a_wrong_value():
    assert {name for name, _ in BAD} == set(FIELDS)


def test_floats_may_be_written_as_integers():
    """JSON writers drop the point of 10000.0."""
    config = SynerGenConfig.preset("tiny", rope_theta=10000, guidance=3, image_top_p=1)
    assert config.rope_theta == 1e4


def test_unknown_fields_are_refused():
    data = SynerGenConfig.preset("tiny").to_dict()
    with pytest.raises(ValueError, match="unknown field 'num_experts'; known: .*num_layers"):
        SynerGenConfig.from_dict({**data, "num_experts": 2})


def test_wrong_model_type_is_refused():
    with pytest.raises(ValueError, match="model_type must be 'synergen_vl', got 'llama'"):
        SynerGenConfig.from_dict({"model_type": "llama"})


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        SynerGenConfig.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "vocab_size: 3", b"\xff\xfe\x00"])
def test_broken_file(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="config: .*is not JSON"):
        SynerGenConfig.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_json_of_another_kind(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="must hold a JSON object"):
        SynerGenConfig.load(tmp_path)
