"""The backbone's block: attention, norms and residuals shared; one FFN for text, one for images (section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .cache import KVCache
from .config import SynerGenConfig


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.theta = config.rope_theta
        self.attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor] = attend  # hf/ may put another one here
        d, bias = config.hidden_size, config.attention_bias
        self.wq = nn.Linear(d, self.num_heads * self.head_dim, bias=bias)
        self.wk = nn.Linear(d, self.num_kv_heads * self.head_dim, bias=bias)
        self.wv = nn.Linear(d, self.num_kv_heads * self.head_dim, bias=bias)
        self.wo = nn.Linear(self.num_heads * self.head_dim, d, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """``x [B, T, D]``, ``positions [B, T]``, ``mask [B, 1, T, S]`` (True = may look) or None for plain causal."""
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.num_heads, self.head_dim)
        k = self.wk(x).view(b, t, self.num_kv_heads, self.head_dim)
        v = self.wv(x).view(b, t, self.num_kv_heads, self.head_dim)
        q, k = ops.rope(q, k, positions, self.theta)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # [B, H, T, Dh]
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = self.attend(q, k, v, mask)
        return self.wo(y.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


#: Longest sequence that ``attend`` multiplies out when gradients are wanted on a CPU. Forward and backward in
#: bfloat16 on 1 core, SDPA against multiplied out: 401 / 119 ms at [1728, 8, 8, 32], 194 / 29 ms at [96, 8, 56, 32].
_MULTIPLY_OUT = 128


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, causal unless ``mask`` says otherwise.

    ``q [B, H, T, Dh]``, ``k`` and ``v [B, Hkv, S, Dh]``, ``mask`` bool ``[B, 1, T, S]`` (True = may look).
    """
    t, s = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if mask is None and q.device.type == "cpu" and q.requires_grad and t == s <= _MULTIPLY_OUT:
        if grouped:
            k, v = (a.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for a in (k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.to(wide).masked_fill(future, float("-inf")).softmax(-1)
        return weights.to(v.dtype) @ v
    if mask is None and 1 < t < s:
        # A chunk after cached tokens: is_causal would line the two up at their first tokens.
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    # One new token may look at everything before it, so only a longer chunk needs the causal mask.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and t > 1, enable_gqa=grouped)


class FFN(nn.Module):
    """SwiGLU weights of one modality: ``down (silu(gate x) * up x)``, with gate and up [F, D], down [D, F]."""

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate = nn.Parameter(torch.empty(f, d))
        self.up = nn.Parameter(torch.empty(f, d))
        self.down = nn.Parameter(torch.empty(d, f))


class ExpertFFN(nn.Module):
    """FFN-MMoE (eq. 2): ``FFN_V(x_i)`` for image tokens, ``FFN_T(x_i)`` for all others.

    The two FFNs are separate parameters, so that stage 1 can freeze the text one, but the kernel wants them stacked
    ``[2, ...]``. For inference they are laid out side by side in one allocation, once; training stacks.
    """

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        self.text = FFN(config)
        self.vision = FFN(config)

    def forward(self, x: Tensor, is_image: Tensor, routing: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``x [..., D]``, ``is_image [...]`` int64, 0 for text and 1 for image positions; ``routing`` of
        `ops.route_tokens`, the same for all layers."""
        gate, up, down = (stack_pair(self.text, self.vision, name) for name in ("gate", "up", "down"))
        y = ops.expert_ffn(x.reshape(-1, x.shape[-1]), gate, up, down, is_image.reshape(-1), routing=routing)
        return y.view(x.shape)


def stack_pair(a: FFN, b: FFN, name: str) -> Tensor:
    """``torch.stack`` of one matrix of two FFNs; without gradients a view, after the first call."""
    p, q = getattr(a, name), getattr(b, name)
    if torch.is_grad_enabled() and (p.requires_grad or q.requires_grad):
        return torch.stack((p, q))
    bytes_apart = q.data_ptr() - p.data_ptr()
    if bytes_apart != p.numel() * p.element_size() or p.untyped_storage().data_ptr() != q.untyped_storage().data_ptr():
        # Inside torch.inference_mode the parameters would become inference tensors, which train no more, silently.
        with torch.inference_mode(False):
            pair = torch.stack((p.detach(), q.detach()))
            p.data, q.data = pair[0], pair[1]
    return p.detach().as_strided((2, *p.shape), (p.numel(), *p.stride()))


class Block(nn.Module):
    """One layer: x + attention(norm x), then x + FFN-MMoE(norm x)."""

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = ExpertFFN(config)

    def forward(
        self, x: Tensor, positions: Tensor, is_image: Tensor, mask: Tensor | None,
        cache: KVCache | None = None, layer: int = 0, routing: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        x = x + self.attention(self.attention_norm(x), positions, mask, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x), is_image, routing)


class HeadBlock(nn.Module):
    """A block of the unfolding head: the backbone's, with one FFN (everything there is an image token)."""

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FFN(config)

    def forward(self, x: Tensor, positions: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, None, cache, layer)
        h = self.ffn_norm(x).view(-1, x.shape[-1])
        ffn = self.feed_forward
        one_expert = torch.zeros(len(h), dtype=torch.long, device=h.device)
        y = ops.expert_ffn(h, ffn.gate[None], ffn.up[None], ffn.down[None], one_expert)
        return x + y.view(x.shape)
