"""The same ops on PyTorch's own kernels, in the dtype that autocast chooses: what the native kernels race against.

`reference` computes wide to be the truth; this backend computes as a good PyTorch program would. Signatures are
those of the public functions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import (
    dequantize_weight,
    fold_ids,
    fold_tokens,
    quantize_weight,
    rope,
    route_tokens,
    sample_tokens,
    unfold_ids,
    unfold_patch,
)

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "dequantize_weight",
    "expert_ffn",
    "expert_ffn_quantized",
    "fold_ids",
    "fold_tokens",
    "linear_cross_entropy",
    "quantize_weight",
    "rms_norm",
    "rope",
    "route_tokens",
    "sample_tokens",
    "unfold_head",
    "unfold_ids",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Here what lies outside a row's keys must be finite: PyTorch multiplies it by zero."""
    place = torch.arange(k_cache.shape[1], device=q.device)
    seen = place < lengths[:, None]
    if starts is not None:
        seen &= place >= starts[:, None]
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)  # [B, Hkv, S, Dh]
    y = F.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=seen[:, None, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y[:, :, 0].masked_fill(~seen.any(-1)[:, None, None], 0)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def expert_ffn(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, expert_index: Tensor, expert_weight: Tensor | None = None
) -> Tensor:
    experts, width = gate.shape[0], x.shape[-1]
    index = expert_index.reshape(len(x), -1)
    if expert_weight is None and index.shape[1] == 1:
        if experts == 1:
            return swiglu(x, gate[0], up[0], down[0])
        order = index[:, 0].argsort(stable=True)
        counts = index[:, 0].bincount(minlength=experts).tolist()
        rows = x.index_select(0, order).split(counts)
        y = torch.cat([swiglu(rows[e], gate[e], up[e], down[e]) for e in range(experts)])
        return y.index_select(0, torch.empty_like(order).scatter_(0, order, torch.arange(len(x), device=x.device)))
    weight = None if expert_weight is None else expert_weight.reshape(index.shape)
    y = torch.zeros(len(x), width, dtype=torch.float32 if x.dtype != torch.float64 else x.dtype, device=x.device)
    for e in range(experts):
        token, slot = (index == e).nonzero(as_tuple=True)
        out = swiglu(x[token], gate[e], up[e], down[e]).to(y.dtype)
        if weight is not None:
            out = out * weight[token, slot, None]
        y = y.index_add(0, token, out)
    return y.to(x.dtype)


def expert_ffn_quantized(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_scale: Tensor,
    up_scale: Tensor,
    down_scale: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None = None,
) -> Tensor:
    gate, up = dequantize_weight(gate, gate_scale), dequantize_weight(up, up_scale)
    return expert_ffn(x, gate, up, dequantize_weight(down, down_scale), expert_index, expert_weight)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    logits = F.linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype))
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, ignore_index=ignore_index, reduction=reduction)


def unfold_head(
    states: Tensor,
    tokens: Tensor,
    positions: Tensor,
    layers: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm: Tensor,
    classifier: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    guidance: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    eps: float = 1e-5,
    theta: float = 1e6,
    heads: int,
    kv_heads: int,
    persistent: bool = False,
) -> tuple[Tensor, Tensor]:
    return unfold_patch(
        states, tokens, positions, layers, biases, norm, classifier, seed, position, eps, theta, heads, kv_heads,
        guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
