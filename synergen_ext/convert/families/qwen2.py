"""Qwen2: a Llama with a bias on q, k and v."""

from __future__ import annotations

from typing import Any

from . import llama
from .base import Family, common_sizes, refuse


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    refuse(config, "use_sliding_window", False)
    return {**common_sizes(config), "attention_bias": True}


FAMILY = Family(sizes, llama.entries)
