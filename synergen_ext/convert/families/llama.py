"""Llama, and SmolLM2, which is one."""

from __future__ import annotations

from typing import Any

from ...model.config import SynerGenConfig
from .base import Entry, Family, common_sizes, refuse

_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
}
_REST = {
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.text.gate",
    "mlp.up_proj.weight": "feed_forward.text.up",
    "mlp.down_proj.weight": "feed_forward.text.down",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """A Llama's bias is on all four projections, and our output projection has none, so it is refused."""
    refuse(config, "attention_bias", False)
    refuse(config, "mlp_bias", False)
    return common_sizes(config)


def entries(config: dict[str, Any], ours: SynerGenConfig) -> list[Entry]:
    """Every tensor of a Llama-shaped checkpoint; biases of q, k and v where ours has them."""
    kinds = ("weight", "bias") if ours.attention_bias else ("weight",)
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in _LAYER.items() for kind in kinds} | _REST
    found = [Entry("model.embed_tokens.weight", ("tok_embeddings.weight",))]
    found += [
        Entry(f"model.layers.{i}.{a}", (f"layers.{i}.{b}",)) for i in range(ours.num_layers) for a, b in names.items()
    ]
    found.append(Entry("model.norm.weight", ("norm.weight",)))
    if not ours.tie_word_embeddings:
        found.append(Entry("lm_head.weight", ("output.weight",)))
    return found


FAMILY = Family(sizes, entries)
