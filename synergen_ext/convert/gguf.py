"""Llama-shaped GGUF files (llama.cpp's), dequantised one tensor at a time. Needs the package ``gguf``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}


class GGUFWeights:
    """A GGUF file as the Llama checkpoint it was made of: ``config``, ``shapes`` and ``read`` under Llama's names.

    Values are what the quantised blocks stand for, in float32.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: not a GGUF file, or not of a Llama.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as e:
            raise ImportError("GGUF files need the package gguf: pip install 'synergen_ext[convert]'") from e
        self.path = path
        try:
            reader = GGUFReader(path)
            self._tensors = {
                _llama_name(t.name): (
                    t.tensor_type, int(t.data_offset), int(t.n_bytes), tuple(int(n) for n in reversed(t.shape))
                )
                for t in reader.tensors
            }  # fmt: skip
            fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer.")}
        except Exception as e:  # the reader trusts its file, and numpy raises whatever it meets
            raise ValueError(f"convert: {path} is not a GGUF file: {e}") from e
        self.shapes = {name: t[3] for name, t in self._tensors.items()}
        self.config = self._config(fields)

    def _config(self, fields: dict[str, Any]) -> dict[str, Any]:
        kind = fields.get("general.architecture")
        if kind != "llama":
            raise ValueError(f"convert: general.architecture of a GGUF file must be 'llama', got {kind!r}")
        config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
        for theirs, name in _SIZES.items():
            config[theirs] = fields.get(f"llama.{name}")
        config["rope_theta"] = fields.get("llama.rope.freq_base", 1e4)
        if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
            config["rope_scaling"] = {"type": scaling}
        embeddings = self.shapes.get("model.embed_tokens.weight")
        config["vocab_size"] = embeddings[0] if embeddings else None
        config["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        return config

    def read(self, name: str) -> Tensor:
        """One tensor in float32, its rotary halves in the order of Llama's own checkpoints."""
        from gguf import quants

        kind, offset, size, shape = self._tensors[name]
        raw = np.fromfile(self.path, np.uint8, count=size, offset=offset)
        if raw.size != size:
            raise ValueError(f"convert: {name} must have {size} bytes in {self.path}, got {raw.size}")
        try:
            values = quants.dequantize(raw.reshape(shape[0], -1) if len(shape) > 1 else raw, kind)
            tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(shape)
        except (ValueError, RuntimeError, NotImplementedError) as e:
            raise ValueError(f"convert: {name} in {self.path} cannot be dequantised: {e}") from e
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                return _halves(tensor, int(self.config[heads]))
        return tensor


def _llama_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        layer = _LAYER.get(match[2])
        return f"model.layers.{match[1]}.{layer}.{kind}" if layer else name
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name


def _halves(weight: Tensor, heads: int) -> Tensor:
    """GGUF rotates neighbours (2 i, 2 i + 1), we rotate (i, i + Dh / 2): rows of each head, evens first, then odds."""
    rows, columns = weight.shape
    if heads <= 0 or rows % (2 * heads):
        raise ValueError(f"convert: q and k must have a multiple of {2 * heads} rows, got {rows}")
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
