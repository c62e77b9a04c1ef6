"""Every op again in plain, differentiable PyTorch: same names, same signatures, slow and clear. The truth in tests."""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """float64 stays, everything shorter becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    wide = _wide(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y * _wide(weight)).to(x.dtype)
