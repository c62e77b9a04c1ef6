"""Mono-InternVL: an InternLM2 with trained vision experts, a warm start for ours.

Its patch embedding and projector (``vision_model``, ``mlp1``) read pixels. Ours reads image tokens, so they are left
behind.
"""

from __future__ import annotations

import re
from typing import Any

from ...model.config import SynerGenConfig
from . import internlm2
from .base import Entry, Family, field


def _llm(config: dict[str, Any]) -> dict[str, Any]:
    llm = field(config, "llm_config")
    architectures = llm.get("architectures") if isinstance(llm, dict) else None
    if architectures != ["InternLM2VEForCausalLM"]:
        raise ValueError(f"convert: llm_config.architectures must be ['InternLM2VEForCausalLM'], got {architectures!r}")
    return dict(llm)


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    return internlm2.sizes(_llm(config))


def entries(config: dict[str, Any], ours: SynerGenConfig) -> list[Entry]:
    return internlm2.layout("language_model.", ours, experts=True)


FAMILY = Family(
    sizes,
    entries,
    ignored=re.compile(r"vision_model\..*|mlp1\..*|.*\.rotary_emb\.inv_freq"),
    output="language_model.output.weight",
)
