"""Token folding (paper eq. 1): every m x n window of embedded image tokens becomes one vector."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import no_second_derivative, reference_on_cuda, substitute


def fold_tokens(ids: Tensor, table: Tensor, pos: Tensor, m: int, n: int) -> Tensor:
    """TokenFold(table[ids] + pos), eq. 1 without its MLP.

    Windows follow each other in raster order; inside a window the tokens lie row-major, one
    embedding after another.

    Args:
        ids: int64 [N, h, w], image token ids in [0, V).
        table: [V, d] token embeddings, float64, float32, bfloat16 or float16.
        pos: [h, w, d] position embeddings, the dtype of table.
        m: rows of a window, divides h.
        n: columns of a window, divides w.

    Returns:
        [N, (h / m) * (w / n), m * n * d], the dtype of table. Gradients go to table and pos; both
        are summed in a fixed order, so they are the same from run to run and for any number of
        threads.

    Raises:
        ValueError: a shape or dtype does not fit, or (CPU) an id is outside [0, V). On a CUDA
            device the vectors of such an id are NaN.
    """
    if (other := substitute()) is not None:
        return other.fold_tokens(ids, table, pos, m, n)
    return torch.ops.synergen.fold_tokens(ids, table, pos, m, n)


def fold_ids(ids: Tensor, m: int, n: int) -> Tensor:
    """The ids themselves in folded order: int64 [N, h, w] -> [N, (h / m) * (w / n), m * n]."""
    if (other := substitute()) is not None:
        return other.fold_ids(ids, m, n)
    return torch.ops.synergen.fold_ids(ids, m, n)


def unfold_ids(ids: Tensor, h: int, w: int, m: int, n: int) -> Tensor:
    """The inverse of `fold_ids`: int64 [N, (h / m) * (w / n), m * n] -> the raster [N, h, w]."""
    if (other := substitute()) is not None:
        return other.unfold_ids(ids, h, w, m, n)
    return torch.ops.synergen.unfold_ids(ids, h, w, m, n)


@torch.library.register_fake("synergen::fold_tokens")
def _fake(ids: Tensor, table: Tensor, pos: Tensor, m: int, n: int) -> Tensor:
    batch, h, w = ids.shape
    return table.new_empty((batch, (h // m) * (w // n), m * n * table.shape[1]))


@torch.library.register_fake("synergen::fold_tokens_backward")
def _fake_backward(dy: Tensor, ids: Tensor, vocab: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    dim = dy.shape[2] // (m * n)
    return dy.new_empty((vocab, dim)), dy.new_empty((ids.shape[1], ids.shape[2], dim))


@torch.library.register_fake("synergen::fold_ids")
def _fake_fold_ids(ids: Tensor, m: int, n: int) -> Tensor:
    batch, h, w = ids.shape
    return ids.new_empty((batch, (h // m) * (w // n), m * n))


@torch.library.register_fake("synergen::unfold_ids")
def _fake_unfold_ids(ids: Tensor, h: int, w: int, m: int, n: int) -> Tensor:
    return ids.new_empty((ids.shape[0], h, w))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, table, _, ctx.m, ctx.n = inputs
    ctx.vocab = table.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
    (ids,) = ctx.saved_tensors
    dtable, dpos = torch.ops.synergen.fold_tokens_backward(dy, ids, ctx.vocab, ctx.m, ctx.n)
    return None, dtable, dpos, None, None


torch.library.register_autograd("synergen::fold_tokens", _backward, setup_context=_setup)
no_second_derivative("fold_tokens")
for _op in ("fold_tokens", "fold_tokens_backward", "fold_ids", "unfold_ids"):
    reference_on_cuda(_op, getattr(reference, _op))
