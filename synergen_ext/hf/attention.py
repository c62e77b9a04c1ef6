"""Attention by the config's ``attn_implementation``, in the layers of `synergen_ext.model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..model.layers import attend
from .configuration import SynerGenVLConfig


@dataclass
class Mask:
    """What ``create_causal_mask`` gave: None, bool, to be added, or blocks, as ``attn_implementation`` wants it."""

    value: Any


class Attend(nn.Module):
    """`attend` by the config's ``attn_implementation``; ``sdpa`` is this package's own call of it.

    Where the mask is not a `Mask`, the call comes from this package, such as from its loop that paints, and means
    what it means there.
    """

    def __init__(self, config: SynerGenVLConfig, groups: int) -> None:
        super().__init__()
        self.scores = AttentionFunction(config, groups)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None) -> Tensor:
        """``q [B, H, T, Dh]``, ``k`` and ``v [B, Hkv, S, Dh]`` -> as ``q``."""
        return self.scores(q, k, v, mask.value)[0] if isinstance(mask, Mask) else attend(q, k, v, mask)


class AttentionFunction(nn.Module):
    """What transformers' attention functions want to be called with, and (result, weights or None) as they give it."""

    is_causal = True

    def __init__(self, config: SynerGenVLConfig, groups: int) -> None:
        super().__init__()
        self.config, self.num_key_value_groups = config, groups

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        name = self.config._attn_implementation
        if name == "sdpa":
            if mask is None and q.shape[2] > 1:  # the first tokens of a cache, which may be longer already
                k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
            return attend(q, k, v, mask), None
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        y, weights = function(self, q, k, v, mask, scaling=q.shape[-1] ** -0.5, dropout=0.0)
        return y.transpose(1, 2), weights


def eager(
    module: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Multiplied out, weights kept: ``[B, T, H, Dh]`` and ``[B, H, T, S]``. ``mask`` is added, as eager masks are."""
    k, v = (a.repeat_interleave(module.num_key_value_groups, dim=1) for a in (k, v))
    scores = (q * scaling) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2), weights
