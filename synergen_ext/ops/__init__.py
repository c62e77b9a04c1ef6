"""The ops of the model as differentiable torch functions.

Each goes to the compiled kernel (``synergen::<op>``), or to its twin in the backend that is chosen:
`reference`, slow and wide, is what the kernels are tested against; `eager` is PyTorch's own kernels,
what they race against and what training on a CPU uses under autocast:

    >>> from synergen_ext import ops
    >>> with ops.backend("reference"):
    ...     y = ops.rms_norm(x, weight)
"""

from . import reference
from ._backend import backend, current_backend, set_backend
from .decode_attention import decode_attention
from .expert_ffn import expert_ffn
from .expert_ffn_quantized import expert_ffn_quantized
from .fold_tokens import fold_ids, fold_tokens, unfold_ids
from .linear_cross_entropy import linear_cross_entropy
from .reference import dequantize_weight, quantize_weight
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .route_tokens import route_tokens
from .sample_tokens import sample_tokens
from .unfold_head import unfold_head

__all__ = [
    "add_rms_norm",
    "backend",
    "current_backend",
    "decode_attention",
    "dequantize_weight",
    "expert_ffn",
    "expert_ffn_quantized",
    "fold_ids",
    "fold_tokens",
    "linear_cross_entropy",
    "quantize_weight",
    "reference",
    "rms_norm",
    "rope",
    "route_tokens",
    "sample_tokens",
    "set_backend",
    "unfold_head",
    "unfold_ids",
]
