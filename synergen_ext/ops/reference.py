"""Every op again in plain, differentiable PyTorch: same names and signatures, slow and clear; the truth in tests."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """float64 stays, everything shorter becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    wide = _wide(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y * _wide(weight)).to(x.dtype)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` to x and weight, written out."""
    wide, g = _wide(x), _wide(dy)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    dweight = (g * wide * r).flatten(0, -2).sum(0) if x.dim() > 1 else g * wide * r
    g = g * _wide(weight)
    dx = r * (g - wide * r.square() * (g * wide).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight.to(weight.dtype)


def rope(
    q: Tensor, k: Tensor, positions: Tensor, theta: float = 1e6, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    dim = q.shape[-1]
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=q.device) / dim
    angle = positions[..., None, None].double() * theta**-exponent  # [..., T, 1, Dh / 2]
    cos, sin = (f(-angle if inverse else angle) for f in (torch.cos, torch.sin))

    def rotate(x: Tensor) -> Tensor:
        a, b = _wide(x).chunk(2, -1)
        c, s = cos.to(a.dtype), sin.to(a.dtype)
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    return rotate(q), rotate(k)


def fold_tokens(ids: Tensor, table: Tensor, pos: Tensor, m: int, n: int) -> Tensor:
    tokens = (_wide(F.embedding(ids, table)) + _wide(pos)).to(table.dtype)  # [N, h, w, d]
    batch, h, w, dim = tokens.shape
    windows = tokens.reshape(batch, h // m, m, w // n, n, dim).transpose(2, 3)
    return windows.reshape(batch, (h // m) * (w // n), m * n * dim)


def fold_tokens_backward(
    dy: Tensor, ids: Tensor, vocab: int, m: int, n: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `fold_tokens` to table and pos, written out."""
    batch, h, w = ids.shape
    dim = dy.shape[-1] // (m * n)
    tokens = _wide(dy).reshape(batch, h // m, w // n, m, n, dim).transpose(2, 3)
    tokens = tokens.reshape(batch, h, w, dim)
    dtable = tokens.new_zeros(vocab, dim).index_add_(0, ids.flatten(), tokens.flatten(0, 2))
    return dtable.to(dy.dtype), tokens.sum(0).to(dy.dtype)


def fold_ids(ids: Tensor, m: int, n: int) -> Tensor:
    batch, h, w = ids.shape
    windows = ids.reshape(batch, h // m, m, w // n, n).transpose(2, 3)
    return windows.reshape(batch, (h // m) * (w // n), m * n)


def unfold_ids(ids: Tensor, h: int, w: int, m: int, n: int) -> Tensor:
    windows = ids.reshape(-1, h // m, w // n, m, n).transpose(2, 3)
    return windows.reshape(-1, h, w)
