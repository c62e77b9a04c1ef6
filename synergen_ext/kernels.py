"""The kernels as plain functions over arrays: no torch in the call, no gradients.

Inputs are NumPy arrays or anything else with the buffer protocol or ``__dlpack__`` (torch, JAX,
CuPy). Results are fresh NumPy arrays, or are written to ``out=`` (an array, or a tuple where there
are several results). bfloat16, which NumPy lacks, and CUDA arrays need ``out=``; ``stream=`` is a
CUDA stream handle (0: the default stream). The interpreter lock is released while a kernel runs.

    >>> import numpy as np
    >>> from synergen_ext import kernels
    >>> kernels.rms_norm(np.ones((2, 4), np.float32), np.ones(4, np.float32)).shape
    (2, 4)
"""

from ._build import load

_kernels = load().kernels

add_rms_norm = _kernels.add_rms_norm
add_rms_norm_backward = _kernels.add_rms_norm_backward
decode_attention = _kernels.decode_attention
expert_ffn = _kernels.expert_ffn
expert_ffn_backward = _kernels.expert_ffn_backward
expert_ffn_quantized = _kernels.expert_ffn_quantized
expert_ffn_train = _kernels.expert_ffn_train
fold_ids = _kernels.fold_ids
fold_tokens = _kernels.fold_tokens
fold_tokens_backward = _kernels.fold_tokens_backward
linear_cross_entropy = _kernels.linear_cross_entropy
linear_cross_entropy_backward = _kernels.linear_cross_entropy_backward
rms_norm = _kernels.rms_norm
rms_norm_backward = _kernels.rms_norm_backward
rope = _kernels.rope
route_tokens = _kernels.route_tokens
sample_tokens = _kernels.sample_tokens
unfold_head = _kernels.unfold_head
unfold_ids = _kernels.unfold_ids

__all__ = [
    "add_rms_norm",
    "add_rms_norm_backward",
    "decode_attention",
    "expert_ffn",
    "expert_ffn_backward",
    "expert_ffn_quantized",
    "expert_ffn_train",
    "fold_ids",
    "fold_tokens",
    "fold_tokens_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "route_tokens",
    "sample_tokens",
    "unfold_head",
    "unfold_ids",
]
