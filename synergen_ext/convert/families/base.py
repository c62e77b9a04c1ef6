"""What a family of language models has to say: its config in our terms, and its tensors under our names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...model.config import SynerGenConfig


def _one(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _same(*tensors: Tensor) -> Tensor:
    return tensors[0]


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs and the tensors of ours that it becomes; ``join`` undoes ``split``."""

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = _one
    join: Callable[..., Tensor] = _same


@dataclass(frozen=True)
class Family:
    """A layout of language models.

    Attributes:
        sizes: their config as fields of ``SynerGenConfig``; raises ValueError for what our backbone does not compute.
        entries: every tensor of a checkpoint, given their config and ours.
        ignored: names of tensors that are not weights of the backbone, such as stored rotary frequencies.
        output: their name of the text classifier, which a tied checkpoint may hold a second time.
    """

    sizes: Callable[[dict[str, Any]], dict[str, Any]]
    entries: Callable[[dict[str, Any], SynerGenConfig], list[Entry]]
    ignored: re.Pattern[str] = re.compile(r".*\.rotary_emb\.inv_freq")
    output: str = "lm_head.weight"


def field(config: dict[str, Any], name: str) -> Any:
    """A field that must be there."""
    if config.get(name) is None:
        raise ValueError(f"convert: config.json has no {name}")
    return config[name]


def refuse(config: dict[str, Any], name: str, *allowed: Any) -> None:
    """Raise if a field that changes the computation has a value our backbone does not compute."""
    value = config.get(name, allowed[0])
    if value not in allowed:
        raise ValueError(f"convert: {name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def common_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that Llama, Qwen2 and InternLM2 name alike.

    Raises:
        ValueError: one is missing, or asks for another activation or other rotary positions than ours.
    """
    refuse(config, "hidden_act", "silu", "swish")
    # Newer files keep both in one dict; "dynamic" changes nothing within max_position_embeddings.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"convert: rope_scaling must be null or an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "dynamic"):
        raise ValueError(f"convert: rope_scaling must be null, 'default' or 'dynamic', got {kind!r}")
    theta = rope.get("rope_theta", config.get("rope_theta", 1e4))
    heads, hidden = field(config, "num_attention_heads"), field(config, "hidden_size")
    if type(heads) is not int or heads <= 0 or type(hidden) is not int:
        raise ValueError(
            f"convert: num_attention_heads and hidden_size must be positive integers, got {heads!r}, {hidden!r}"
        )
    return dict(
        vocab_size=field(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=field(config, "intermediate_size"),
        num_layers=field(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        rope_theta=theta,
        rms_norm_eps=field(config, "rms_norm_eps"),
        max_positions=field(config, "max_position_embeddings"),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )
