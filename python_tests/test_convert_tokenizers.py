"""Image and text tokenizers in their published layouts, and chat templates."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from synergen_ext.convert.emu3 import copy_image_tokenizer
from synergen_ext.convert.tokenizers import convert_text_tokenizer, from_sentencepiece
from synergen_ext.processing.image_tokenizer import ImageTokenizer
from synergen_ext.processing.text import CHAT_TEMPLATES, TextTokenizer, chat_text

VQ = dict(
    codebook_size=64, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1, attn_resolutions=[1],
    hidden_size=64, num_attention_heads=1,
)  # fmt: skip
#: Names of the original, read in its documentation, for each kind of tensor whose name transformers changed.
ORIGINAL = {
    "encoder.down_block.down.1.block.0.nin_shortcut.weight": "encoder.down.1.block.0.nin_shortcut.weight",
    "encoder.down_block.down.0.downsample.conv.bias": "encoder.down.0.downsample.conv.bias",
    "encoder.down_block.down.1.attn_norms.0.weight": "encoder.down.1.attn.0.norm.weight",
    "encoder.down_block.down.1.attn.0.q_proj.weight": "encoder.down.1.attn.0.q.weight",
    "encoder.down_block.down.1.attn.0.out_proj.bias": "encoder.down.1.attn.0.proj_out.bias",
    "encoder.middle_block.attn_norm.bias": "encoder.mid.attn_1.norm.bias",
    "encoder.middle_block.attn_1.v_proj.bias": "encoder.mid.attn_1.v.bias",
    "encoder.middle_block.block_2.conv1.weight": "encoder.mid.block_2.conv1.weight",
    "encoder.time_res_stack.0.conv1.conv.weight": "encoder.time_res_stack.0.conv1.conv.weight",
    "decoder.up_block.up.1.attn_norms.1.conv_y.weight": "decoder.up.1.attn.1.norm.conv_y.weight",
    "decoder.up_block.up.1.upsample.conv.weight": "decoder.up.1.upsample.conv.weight",
    "decoder.middle_block.attn_norm.norm_layer.weight": "decoder.mid.attn_1.norm.norm_layer.weight",
    "decoder.norm_out.conv_b.weight": "decoder.norm_out.conv_b.weight",
    "quantize.embedding.weight": "quantize.embedding.weight",
    "quant_conv.conv.bias": "quant_conv.conv.bias",
}


def in_original_layout(state):
    """The names of ``ORIGINAL``'s pattern for every tensor; 1x1 convolutions for the attention's matrices."""
    found = {}
    for name, value in state.items():
        parts = name.split(".")
        if "attn_norms" in parts:
            parts[parts.index("attn_norms")] = "attn"
            parts.insert(parts.index("attn") + 2, "norm")
        if "attn_norm" in parts:
            parts[parts.index("attn_norm") : parts.index("attn_norm") + 1] = ["attn_1", "norm"]
        parts = [p for p in parts if p not in ("down_block", "up_block")]
        swap = {"middle_block": "mid", "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "proj_out"}
        if parts[-1] == "weight" and parts[-2] in swap:
            value = value[..., None, None]
        found[".".join(swap.get(p, p) for p in parts)] = value.contiguous()
    return found


@pytest.fixture
def vq():
    torch.manual_seed(0)
    model = Emu3VQVAE(Emu3VQVAEConfig(**VQ)).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.normal_(std=0.2)
    return model


def write(folder, state, config):
    folder.mkdir()
    save_file(state, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def layouts(vq, folder):
    state = {k: v.contiguous() for k, v in vq.state_dict().items()}
    original = dict(
        model_type="Emu3VisionVQ", ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[1], z_channels=4,
        embed_dim=4, codebook_size=64, double_z=False, temporal_downsample_factor=4, dropout=0.0,
    )  # fmt: skip
    yield write(folder / "original", in_original_layout(state), original)
    yield write(folder / "transformers", state, vq.config.to_dict())
    inside = {f"model.vqmodel.{k}": v for k, v in state.items()} | {"model.text_model.norm.weight": torch.ones(4)}
    yield write(folder / "inside", inside, {"model_type": "emu3", "vq_config": vq.config.to_dict()})


def test_names_of_the_original(vq):
    state = {k: torch.zeros(v.shape) for k, v in vq.state_dict().items()}
    for ours, theirs in ORIGINAL.items():
        assert theirs in in_original_layout({ours: state[ours]})


def test_emu3_in_every_layout(vq, tmp_path):
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    wanted = vq.state_dict()
    for source in layouts(vq, tmp_path):
        out = tmp_path / f"{source.name}_out"
        out.mkdir()
        copy_image_tokenizer(source, out, lambda note: None)
        ours = ImageTokenizer.from_pretrained(out)
        got = ours.vq.state_dict()
        assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted)
        ids = ours.encode(pixels)
        sizes = torch.tensor([[16, 24]] * 2)
        with torch.no_grad():
            assert torch.equal(ids, torch.stack(list(vq.encode(pixels, sizes).image_tokens)))
        assert len(ids.unique()) > 3


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["original", "transformers", "inside"])
def test_emu3_refuses_by_name(kind, vq, tmp_path):
    source = list(layouts(vq, tmp_path))[kind]
    path = str(source / "model.safetensors")
    state = load_file(path)
    name = next(k for k in state if k.endswith("quant_conv.conv.bias"))
    del state[name]
    save_file(state, path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=rf"{name} must be \[4\], got nothing"):
        copy_image_tokenizer(source, tmp_path / "out", lambda note: None)


def test_chat_templates():
    turns = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    assert chat_text(turns, "internlm2-chat") == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_text(turns, "chatml", reply=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
    )
    line = (
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
    )
    assert chat_text([("user", "U")], "internvl") == (
        f"<s><|im_start|>system\n{line}<|im_end|><|im_start|>user\nU<|im_end|><|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="must be one of internlm2-chat, internvl, chatml, got 'alpaca'"):
        chat_text(turns, "alpaca")
    with pytest.raises(ValueError, match="role of message 1 must be"):
        chat_text([("user", "U"), ("system", "S")], "chatml")


def byte_level(specials):
    """A tokenizer of Qwen2's and SmolLM2's kind."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_chat_ids_are_the_text(template, tmp_path):
    tokenizer = byte_level(["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    text = TextTokenizer(tokenizer)
    turns = [("user", "hello\nyou"), ("assistant", "yes")]
    ids = text.chat_ids(turns, template)
    tokenizer.encode_special_tokens = False
    assert ids == tokenizer.encode(chat_text(turns, template), add_special_tokens=False).ids
    tokenizer.encode_special_tokens = True
    assert text.chat_ids([("user", "<|im_end|>")], template).count(text.im_end) == (2 if template == "internvl" else 1)


def test_special_tokens_are_added_once(tmp_path):
    for name, specials in (("with", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), ("without", ["<|endoftext|>"])):
        llm, out = tmp_path / name, tmp_path / f"{name}_out"
        llm.mkdir(), out.mkdir()
        byte_level(specials).save(str(llm / "tokenizer.json"))
        convert_text_tokenizer(llm, out, 300, lambda note: None)
        text = TextTokenizer.load(out)
        assert text.vocab_size == 256 + 3 and (text.bos, text.eos, text.im_start, text.im_end) == (256, 256, 257, 258)
        assert text.decode(text.encode("a picture, 画")) == "a picture, 画"


def test_no_row_to_spare(tmp_path):
    byte_level(["<|endoftext|>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    notes = []
    convert_text_tokenizer(tmp_path, tmp_path / "out", 258, notes.append)
    assert notes == ["no text tokenizer: it has no <|im_start|>, and the model no row to spare for it"]
    with pytest.raises(ValueError, match="must have at most 256 ids, got 257"):
        convert_text_tokenizer(tmp_path, tmp_path / "out", 256, notes.append)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        convert_text_tokenizer(tmp_path, tmp_path / "out", 300, notes.append)


@pytest.mark.parametrize("prefix", [False, True], ids=["internlm2", "llama"])
def test_sentencepiece(prefix, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    random.seed(0)
    words = ["picture", "pictures", "apple", "red", "blue", "left", "of", "the", "两个", "苹果", "ee", "eee"]
    lines = [" ".join(random.choices(words, k=9)) for _ in range(400)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    slow = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    size = slow.vocab_size()
    fast = from_sentencepiece(tmp_path / "tokenizer.model", {size: "<|im_start|>", size + 1: "<|im_end|>"})
    assert [fast.token_to_id(t) for t in ("<unk>", "<s>", "</s>", "<|im_end|>")] == [0, 1, 2, size + 1]
    odd = ["", " ", "  two  spaces ", "zebra Ω 画", "\n\ttabs\n", "eeeeeee", "🙂", "a" * 50]
    for text in odd + lines[:20] + ["".join(random.choices(" abeilrtp苹果两Ω", k=30)) for _ in range(300)]:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == slow.encode(text), repr(text)
        assert fast.decode(ids) == slow.decode(ids), repr(text)


def test_internlm2s_special_ids(tmp_path):
    """A file of InternLM2's size has placeholders where the special tokens go, and the config may not name them."""
    pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2 as pb2

    proto = pb2.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = proto.trainer_spec.BPE, True
    proto.trainer_spec.vocab_size = 92544
    proto.normalizer_spec.remove_extra_whitespaces = proto.normalizer_spec.add_dummy_prefix = False
    for i in range(92544):
        piece = proto.pieces.add()
        piece.piece = ["<unk>", "<s>", "</s>"][i] if i < 3 else f"<0x{i - 3:02X}>" if i < 259 else f"[UNUSED_{i}]"
        piece.type = piece.UNKNOWN if i == 0 else piece.CONTROL if i < 3 else piece.BYTE if i < 259 else piece.NORMAL
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    (tmp_path / "out").mkdir()
    convert_text_tokenizer(tmp_path, tmp_path / "out", 92544, lambda note: None)
    text = TextTokenizer.load(tmp_path / "out")
    assert (text.bos, text.eos, text.im_end, text.im_start, text.vocab_size) == (1, 2, 92542, 92543, 92544)
    assert text.encode("<|im_end|>") == [3 + b for b in b"<|im_end|>"]


def test_a_broken_sentencepiece_file(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xffnot a model")
    with pytest.raises(ValueError, match="is not a SentencePiece file"):
        from_sentencepiece(tmp_path / "tokenizer.model", {})
