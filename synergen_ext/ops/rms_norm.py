"""Root-mean-square normalisation."""

import torch
from torch import Tensor

from . import reference
from ._backend import use_native


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        x: [..., D], float64, float32, bfloat16 or float16, any strides. Sums are in float32 (float64 for float64).
        weight: [D], the dtype of x or float32.
        eps: added to the mean square.

    Returns:
        [..., D], the dtype of x, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if not use_native():
        return reference.rms_norm(x, weight, eps)
    return torch.ops.synergen.rms_norm(x, weight, eps)


@torch.library.register_fake("synergen::rms_norm")
def _fake(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x.new_empty(x.shape)
