"""LoRA through ``peft`` (the extra ``lora``): the names that adapters go on, and a plain checkpoint of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: By part, as ``peft`` matches them against whole names. The experts' and the head's FFN weights are plain tensors for
#: the kernels and no linear layers, so no adapter goes on them.
TARGETS = {
    "attention": r"model\.layers\.\d+\.attention\.(wq|wk|wv|wo)",
    "head": r"model\.unfolding_head\.layers\.\d+\.attention\.(wq|wk|wv|wo)",
    "image": r"model\.image_embedding\.(proj_in|proj_out)",
}


def lora_targets(*parts: str) -> str:
    """``target_modules`` of `peft.LoraConfig` for ``attention`` (the backbone's projections), ``head`` (those of the
    unfolding head) and ``image`` (the MLP after folding); all three without arguments.

    Raises:
        ValueError: an unknown part.
    """
    for part in parts:
        if part not in TARGETS:
            raise ValueError(f"lora_targets: part must be one of {', '.join(TARGETS)}, got {part!r}")
    return "|".join(f"({TARGETS[part]})" for part in parts or TARGETS)


def save_merged(tuned: Any, folder: str | Path, processor: Any = None) -> Any:
    """Add the adapters into the weights and write a checkpoint folder as if there had been none.

    Args:
        tuned: what `peft.get_peft_model` returned; its adapters are gone afterwards.
        folder: loads with ``from_pretrained`` of this package's classes and of transformers' Auto classes.
        processor: saved beside the weights, so that the folder also paints and answers.

    Returns:
        The merged model, a ``SynerGenVLForConditionalGeneration``.
    """
    merged = tuned.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return merged
