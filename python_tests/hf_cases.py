"""A model of ours under transformers' interface, and batches padded on either side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from synergen_ext.hf import SynerGenVLConfig, SynerGenVLForConditionalGeneration
from synergen_ext.model import SynerGenConfig, SynerGenVL


def hf_config(config: SynerGenConfig) -> SynerGenVLConfig:
    return SynerGenVLConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})


def wrapped(inner: SynerGenVL) -> SynerGenVLForConditionalGeneration:
    """The same weights and dtype in transformers' class."""
    model = SynerGenVLForConditionalGeneration(hf_config(inner.config)).to(inner.tok_embeddings.weight.dtype).eval()
    model.model.load_state_dict(inner.state_dict())
    return model


def padded(rows: Sequence[Sequence[int]], side: str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``[B, T]`` of rows of different lengths."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), fill), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(list(row)), 1
    return ids, mask
