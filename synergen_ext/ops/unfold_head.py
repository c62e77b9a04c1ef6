"""A whole folded patch: backbone states in, the ids of its window out, with the model's own weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._backend import reference_on_cuda, substitute
from .sample_tokens import as_tensor


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
    """Draw all W = m * n ids of one folded patch for each of N pictures (section 3.3, eq. 3).

    The head is a causal Transformer over [h, e(v_0), ..., e(v_(W-2))] plus its position table; position j predicts
    v_j. For j = 0 .. W - 1:

        x = (states if j == 0 else tokens[ids]) + positions[j]
        x = x + o attention(rms_norm(x));  x = x + down (silu(gate h) * up h), h = rms_norm(x)    in every layer
        ids = sample_tokens(classifier rms_norm(x), seed, position + j, ...)

    Attention is grouped, with rotary positions 0 .. W - 1, over this patch alone. On the GPU everything is queued
    on the current stream by this one call, without waiting for the GPU, so a CUDA graph may capture it.

    Args:
        states: [N, D], the backbone's outputs one position before the patch; or [2 N, D], guided: the N conditional
            ones, then the N unconditional ones, which share the sampled ids. float64, float32, bfloat16 or float16,
            any strides; all weights have the same dtype and are contiguous.
        tokens, classifier: [V, D].
        positions: [W, D]; on a GPU at most 32 ids.
        layers: nine tensors for each layer, in this order: attention_norm [D], wq [heads * Dh, D],
            wk and wv [kv_heads * Dh, D], wo [D, heads * Dh], ffn_norm [D], gate and up [F, D], down [D, F].
        biases: none, or three for each layer: of wq, wk and wv.
        norm: [D], before the classifier.
        seed: int64 [N].
        position: int64 [N] or []: the number of the patch's first draw; id j uses the number after j more.
        guidance, temperature, top_k, top_p: as in `sample_tokens`, for each picture or for all.
        eps, theta: of the norms and of the rotary positions.
        heads, kv_heads: of queries, and of keys and values.
        persistent: on a GPU, one launch of as many blocks as fit it at once in place of some 23 launches an id. The
            ids are the same.

    Returns:
        ids int64 [N, W] and valid bool [N], False where a logit that was to be drawn from was NaN or +inf, or none
        was finite: such a draw gives id 0. There is no gradient: ids are drawn.

    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        RuntimeError: gradients are wanted.
    """
    floats = (states, tokens, positions, *layers, *biases, norm, classifier)
    if torch.is_grad_enabled() and any(t.requires_grad for t in floats):
        raise RuntimeError("unfold_head: drawn ids have no gradients; call it under torch.no_grad()")
    if (other := substitute()) is not None:
        return other.unfold_head(
            states, tokens, positions, layers, biases, norm, classifier, seed, position, guidance=guidance,
            temperature=temperature, top_k=top_k, top_p=top_p, eps=eps, theta=theta, heads=heads, kv_heads=kv_heads,
            persistent=persistent,
        )  # fmt: skip
    return torch.ops.synergen.unfold_head(
        states,
        tokens,
        positions,
        list(layers),
        list(biases),
        norm,
        classifier,
        seed,
        position,
        as_tensor("unfold_head", "guidance", guidance, 1.0, torch.float64, states.device),
        as_tensor("unfold_head", "temperature", temperature, 1.0, torch.float64, states.device),
        as_tensor("unfold_head", "top_k", top_k, 0, torch.int64, states.device),
        as_tensor("unfold_head", "top_p", top_p, 1.0, torch.float64, states.device),
        eps,
        theta,
        heads,
        kv_heads,
        persistent,
    )


@torch.library.register_fake("synergen::unfold_head")
def _fake(
    states: Tensor, tokens: Tensor, positions: Tensor, layers: Sequence[Tensor], biases: Sequence[Tensor],
    norm: Tensor, classifier: Tensor, seed: Tensor, position: Tensor, guidance: Tensor | None = None,
    temperature: Tensor | None = None, top_k: Tensor | None = None, top_p: Tensor | None = None, eps: float = 1e-5,
    theta: float = 1e6, heads: int = 1, kv_heads: int = 1, persistent: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, window = seed.shape[0], positions.shape[0]
    return seed.new_empty((n, window)), seed.new_empty((n,), dtype=torch.bool)


def _on_cuda(
    states: Tensor, tokens: Tensor, positions: Tensor, layers: Sequence[Tensor], biases: Sequence[Tensor],
    norm: Tensor, classifier: Tensor, seed: Tensor, position: Tensor, guidance: Tensor | None = None,
    temperature: Tensor | None = None, top_k: Tensor | None = None, top_p: Tensor | None = None, eps: float = 1e-5,
    theta: float = 1e6, heads: int = 1, kv_heads: int = 1, persistent: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return reference.unfold_head(
        states, tokens, positions, layers, biases, norm, classifier, seed, position,
        guidance=1.0 if guidance is None else guidance, temperature=1.0 if temperature is None else temperature,
        top_k=0 if top_k is None else top_k, top_p=1.0 if top_p is None else top_p, eps=eps, theta=theta,
        heads=heads, kv_heads=kv_heads,
    )  # fmt: skip


reference_on_cuda("unfold_head", _on_cuda)
