"""InternLM2: q, k and v in one matrix grouped by key head, the FFN as w1 (gate), w3 (up), w2 (down)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...model.config import SynerGenConfig
from .base import Entry, Family, common_sizes, refuse

_FFN = {"w1": "gate", "w3": "up", "w2": "down"}


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    refuse(config, "bias", False)
    return common_sizes(config)


def split_wqkv(heads: int, kv_heads: int, dim: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """For each key head: its g query heads, the key, the value. ``[Hkv (g + 2) Dh, D]`` -> q, k, v."""
    g = heads // kv_heads

    def split(wqkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = wqkv.view(kv_heads, g + 2, dim, -1).split((g, 1, 1), dim=1)
        return q.reshape(heads * dim, -1), k.reshape(kv_heads * dim, -1), v.reshape(kv_heads * dim, -1)

    return split


def join_wqkv(heads: int, kv_heads: int, dim: int) -> Callable[..., Tensor]:
    """Inverse of ``split_wqkv``."""

    def join(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [m.view(kv_heads, -1, dim, m.shape[1]) for m in (q, k, v)]
        return torch.cat(parts, dim=1).reshape((heads + 2 * kv_heads) * dim, -1)

    return join


def entries(config: dict[str, Any], ours: SynerGenConfig) -> list[Entry]:
    return layout("", ours, experts=False)


def layout(prefix: str, ours: SynerGenConfig, experts: bool) -> list[Entry]:
    """Every tensor, under ``prefix``; with ``experts`` also Mono-InternVL's ``feed_forward_ve``."""
    heads = ours.num_heads, ours.num_kv_heads, ours.head_dim
    split, join = split_wqkv(*heads), join_wqkv(*heads)
    found = [Entry(f"{prefix}model.tok_embeddings.weight", ("tok_embeddings.weight",))]
    for i in range(ours.num_layers):
        a, b = f"{prefix}model.layers.{i}", f"layers.{i}"
        qkv = tuple(f"{b}.attention.{w}.weight" for w in ("wq", "wk", "wv"))
        found.append(Entry(f"{a}.attention.wqkv.weight", qkv, split, join))
        for name in ("attention.wo", "attention_norm", "ffn_norm"):
            found.append(Entry(f"{a}.{name}.weight", (f"{b}.{name}.weight",)))
        for w, name in _FFN.items():
            found.append(Entry(f"{a}.feed_forward.{w}.weight", (f"{b}.feed_forward.text.{name}",)))
            if experts:
                found.append(Entry(f"{a}.feed_forward_ve.{w}.weight", (f"{b}.feed_forward.vision.{name}",)))
    found.append(Entry(f"{prefix}model.norm.weight", ("norm.weight",)))
    if not ours.tie_word_embeddings:
        found.append(Entry(f"{prefix}output.weight", ("output.weight",)))
    return found


FAMILY = Family(sizes, entries, ignored=re.compile(r".*\.rotary_emb\.inv_freq"), output="output.weight")
