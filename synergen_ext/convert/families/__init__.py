"""Language models that can be the backbone, by the ``model_type`` of their config.

To add one: a file beside this one that builds a ``Family``, a line in ``FAMILIES``, and a test that its text logits
are the source's.
"""

from __future__ import annotations

from . import internlm2, llama, mono_internvl, qwen2
from .base import Entry, Family

FAMILIES: dict[str, Family] = {
    "internlm2": internlm2.FAMILY,
    "internvl_chat": mono_internvl.FAMILY,
    "llama": llama.FAMILY,
    "qwen2": qwen2.FAMILY,
}


def find_family(model_type: object) -> Family:
    """The family of a config's ``model_type``.

    Raises:
        ValueError: we have none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"convert: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Entry", "Family", "find_family"]
