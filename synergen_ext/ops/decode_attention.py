"""Attention of one new token a row to the keys and values of the tokens before it."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import reference_on_cuda, substitute


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """out[b, h] = sum_j w_j v_cache[b, j, h // g], w = softmax_j(scale * q[b, h] . k_cache[b, j, h // g]).

    j runs over starts[b] <= j < lengths[b], g = Hq / Hkv. Every key and value is read once for the g
    query heads that share it; what lies outside is not read and may hold anything, NaN as well. The
    new token's own key and value are in the cache already.

    Args:
        q: [B, Hq, Dh], float64, float32, bfloat16 or float16, any strides. Sums are in float32
            (float64 for float64).
        k_cache, v_cache: [B, S, Hkv, Dh], the dtype of q, any strides. A `KVCache` keeps
            [B, Hkv, S, Dh]: ``cache.keys[layer].transpose(1, 2)`` is what is wanted, without a copy.
        lengths: int64 [B], from 0 to S: the end of each row's keys. They are on the device of q and
            nothing waits for them. A row without keys gets zeros.
        starts: int64 [B], from 0 to S: where each row's keys begin, for rows padded on the left; 0 if
            not given.
        scale: Dh^-0.5 if not given.

    Returns:
        [B, Hq, Dh], the dtype of q, contiguous. There is no gradient.

    Raises:
        ValueError: a shape, dtype or device does not fit; on a CPU also a length or start outside
            [0, S] (a GPU takes the nearest inside).
        RuntimeError: a gradient is asked for.
    """
    if (other := substitute()) is not None:
        return other.decode_attention(q, k_cache, v_cache, lengths, starts, scale)
    return torch.ops.synergen.decode_attention(q, k_cache, v_cache, lengths, starts, scale)


@torch.library.register_fake("synergen::decode_attention")
def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


def _refuse(ctx: Any, dout: Tensor) -> None:
    raise RuntimeError(
        "decode_attention: there is no gradient; use torch.nn.functional.scaled_dot_product_attention to train"
    )


torch.library.register_autograd("synergen::decode_attention", _refuse)
reference_on_cuda("decode_attention", reference.decode_attention)
