"""Sampling of the next token: guidance, temperature, top-k, top-p and the draw in one pass."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from ._backend import reference_on_cuda, substitute


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draw one id a row from softmax(l / temperature), cut to the top-k, then the top-p survivors.

    In this order:

    1. Guidance (section 3.4 of the paper): l = u + guidance * (c - u) with c = logits and
       u = uncond_logits, in float32 (float64 for float64). At guidance 1, or without uncond_logits,
       l = c exactly. A token at -inf in either stays at -inf and is never drawn.
    2. temperature: l / temperature. 0 means argmax, the lowest id among equals.
    3. top_k: exactly min(top_k, V) tokens stay. Equal logits at the boundary: the lowest ids stay.
       0: off.
    4. top_p: probabilities of those left, from the largest down (equal ones by rising id); the
       shortest prefix whose mass reaches top_p stays, at least one token. 1: off.
    5. The draw: u in (0, 1) is one 32-bit Philox4x32-10 word of (seed, position),
       (word + 1/2) / 2^32; the id is the first, in the order of the vocabulary, where the running
       mass of the survivors exceeds u times their total.

    Masses are integers, exp((l - max) / temperature) in steps of 2^-50 (2^-47 at V = 32,768), so
    their sums are exact: the id depends on the row's own numbers alone, not on the batch, the order
    of rows, the number of threads or the instruction set.

    Args:
        logits: [R, V], float64, float32, bfloat16 or float16, any strides.
        seed, position: int64 [R]; position may also be a scalar tensor. Rows with equal
            (seed, position) share u.
        uncond_logits: shape and dtype of logits.
        guidance, temperature, top_k, top_p: a number, or a tensor of shape [] or [R] on the device
            of logits.

    Returns:
        ids int64 [R] and valid bool [R]. A row that holds NaN or +inf, or nothing finite, gets id 0
        and False; so does, on a GPU, a row whose options (given as tensors) cannot be meant. Other
        rows do not notice. There is no gradient.

    Raises:
        ValueError: a shape, dtype, device or value does not fit.
    """
    if (other := substitute()) is not None:
        return other.sample_tokens(
            logits.detach(),
            seed,
            position,
            uncond_logits=None if uncond_logits is None else uncond_logits.detach(),
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
    return torch.ops.synergen.sample_tokens(
        logits.detach(),
        seed,
        position,
        None if uncond_logits is None else uncond_logits.detach(),
        as_tensor("sample_tokens", "guidance", guidance, 1.0, torch.float64, logits.device),
        as_tensor("sample_tokens", "temperature", temperature, 1.0, torch.float64, logits.device),
        as_tensor("sample_tokens", "top_k", top_k, 0, torch.int64, logits.device),
        as_tensor("sample_tokens", "top_p", top_p, 1.0, torch.float64, logits.device),
    )


# What a number must be, where no kernel can look: on the CPU the op itself refuses, with the row.
_MEANT: dict[str, tuple[str, Callable[[float], bool]]] = {
    "guidance": ("finite", math.isfinite),
    "temperature": ("finite and >= 0", lambda x: math.isfinite(x) and x >= 0),
    "top_k": (">= 0 (0: off)", lambda x: x >= 0),
    "top_p": ("in [0, 1]", lambda x: 0 <= x <= 1),
}


def as_tensor(
    op: str, name: str, value: float | Tensor, default: float, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """An option of sampling as an op takes it; None where it is the default."""
    if not isinstance(value, Tensor):
        wanted, meant = _MEANT[name]
        if device.type != "cpu" and not meant(value):
            raise ValueError(f"{op}: {name} must be {wanted}, got {value}")
        # Filled on the device: a copy from the host would make the host wait.
        return None if value == default else torch.full((), value, dtype=dtype, device=device)
    same_kind = value.is_floating_point() == dtype.is_floating_point
    return value.detach().to(dtype) if same_kind else value  # the op refuses the other kind


@torch.library.register_fake("synergen::sample_tokens")
def _fake(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    uncond_logits: Tensor | None = None,
    guidance: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return seed.new_empty((rows,)), seed.new_empty((rows,), dtype=torch.bool)


def _on_cuda(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    uncond_logits: Tensor | None = None,
    guidance: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return reference.sample_tokens(
        logits,
        seed,
        position,
        uncond_logits=uncond_logits,
        guidance=1.0 if guidance is None else guidance,
        temperature=1.0 if temperature is None else temperature,
        top_k=0 if top_k is None else top_k,
        top_p=1.0 if top_p is None else top_p,
    )


reference_on_cuda("sample_tokens", _on_cuda)
