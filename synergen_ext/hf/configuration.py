"""`SynerGenConfig` as a config of transformers: the same fields in the same `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from ..model.config import SynerGenConfig


@strict
class SynerGenVLConfig(PreTrainedConfig):
    """Sizes of one SynerGen-VL under transformers. Fields, defaults and checks are `SynerGenConfig`'s.

    Transformers' usual names (`num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`,
    `max_position_embeddings`) read and write the same values.

    Raises:
        ValueError: sizes that do not fit together, as `SynerGenConfig` says it.
    """

    model_type = "synergen_vl"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "max_positions",
    }

    vocab_size: int = SynerGenConfig.vocab_size
    hidden_size: int = SynerGenConfig.hidden_size
    intermediate_size: int = SynerGenConfig.intermediate_size
    num_layers: int = SynerGenConfig.num_layers
    num_heads: int = SynerGenConfig.num_heads
    num_kv_heads: int = SynerGenConfig.num_kv_heads
    head_dim: int = SynerGenConfig.head_dim
    rope_theta: float | int = SynerGenConfig.rope_theta
    rms_norm_eps: float = SynerGenConfig.rms_norm_eps
    max_positions: int = SynerGenConfig.max_positions
    attention_bias: bool = SynerGenConfig.attention_bias
    tie_word_embeddings: bool = SynerGenConfig.tie_word_embeddings
    codebook_size: int = SynerGenConfig.codebook_size
    image_grid: list[int] | tuple[int, ...] = SynerGenConfig.image_grid
    fold: list[int] | tuple[int, ...] = SynerGenConfig.fold
    token_embed_size: int = SynerGenConfig.token_embed_size
    head_layers: int = SynerGenConfig.head_layers
    image_loss_weight: float | int = SynerGenConfig.image_loss_weight
    guidance: float | int = SynerGenConfig.guidance
    image_temperature: float | int = SynerGenConfig.image_temperature
    image_top_k: int = SynerGenConfig.image_top_k
    image_top_p: float | int = SynerGenConfig.image_top_p
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.image_grid, self.fold = tuple(self.image_grid), tuple(self.fold)
        self.synergen()
        super().__post_init__(**kwargs)

    def synergen(self) -> SynerGenConfig:
        """The sizes alone, as the rest of this package wants them."""
        return SynerGenConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SynerGenConfig)})

    @property
    def boi_token_id(self) -> int:
        """``<boi>``: an image begins. The special ids follow the text vocabulary."""
        return self.synergen().boi_id

    @property
    def image_token_id(self) -> int:
        """Placeholder of one folded image token in ``input_ids``."""
        return self.synergen().image_id


def where(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of `from_pretrained`'s arguments, those that say where a file is."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: arguments[name] for name in names if name in arguments}


def checkpoint_file(checkpoint: Any, name: str, arguments: Mapping[str, Any]) -> Path | None:
    """One file of a checkpoint folder or of the hub's; None if the checkpoint has none of that name."""
    found = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **where(arguments))
    return None if found is None else Path(found)
