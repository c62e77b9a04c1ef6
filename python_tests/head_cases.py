"""Arguments of unfold_head, and how near its ids are to those that exact arithmetic would draw."""

import torch
from torch import Tensor

from synergen_ext.model import UnfoldingHead
from synergen_ext.ops import reference
from synergen_ext.testing import normal


def weights_of(head: UnfoldingHead) -> dict:
    """A head's own tensors as unfold_head takes them."""
    layers, biases = [], []
    for block in head.layers:
        a, f = block.attention, block.feed_forward
        layers += [block.attention_norm.weight, a.wq.weight, a.wk.weight, a.wv.weight, a.wo.weight]
        layers += [block.ffn_norm.weight, f.gate, f.up, f.down]
        biases += [w.bias for w in (a.wq, a.wk, a.wv) if w.bias is not None]
    c = head.config
    return dict(
        tokens=head.tokens.weight, positions=head.positions, layers=layers, biases=biases, norm=head.norm.weight,
        classifier=head.classifier.weight, eps=c.rms_norm_eps, theta=c.rope_theta, heads=c.num_heads,
        kv_heads=c.num_kv_heads,
    )  # fmt: skip


def head_args(
    pictures: int, guided: bool, dtype: torch.dtype = torch.float32, seed: int = 0, dim: int = 32, layers: int = 2,
    heads: int = 4, kv_heads: int = 2, head_dim: int = 8, hidden: int = 48, window: int = 4, vocab: int = 100,
    biases: bool = False, eps: float = 1e-5, persistent: bool = False, **sampling: float,
) -> tuple:  # fmt: skip
    """All arguments of torch.ops.synergen.unfold_head, with weights that make every part of the head matter."""
    count = [seed * 1000]

    def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        count[0] += 1
        return (mean + std * normal(*shape, dtype=torch.float64, seed=count[0])).to(dtype)

    def matrix(rows: int, columns: int) -> Tensor:
        return draw(rows, columns, std=1.5 * columns**-0.5)

    kinds = dict(guidance=torch.float64, temperature=torch.float64, top_k=torch.int64, top_p=torch.float64)
    options = [
        None if name not in sampling else torch.as_tensor(sampling[name], dtype=kind) for name, kind in kinds.items()
    ]
    q, kv = heads * head_dim, kv_heads * head_dim
    stack, bias = [], []
    for _ in range(layers):
        stack += [draw(dim, std=0.3, mean=1), matrix(q, dim), matrix(kv, dim), matrix(kv, dim), matrix(dim, q)]
        stack += [draw(dim, std=0.3, mean=1), matrix(hidden, dim), matrix(hidden, dim), matrix(dim, hidden)]
        bias += [draw(q), draw(kv), draw(kv)] if biases else []
    return (
        draw((2 if guided else 1) * pictures, dim), draw(vocab, dim), draw(window, dim), stack, bias,
        draw(dim, std=0.3, mean=1), 1.5 * matrix(vocab, dim), torch.arange(pictures) + 7 * seed,
        window * (torch.arange(pictures) + 3), *options, eps, 1e4, heads, kv_heads, persistent,
    )  # fmt: skip


def as_keywords(args: tuple) -> tuple[tuple, dict]:
    """Arguments of the op as those of the public function and its twins."""
    names = ("guidance", "temperature", "top_k", "top_p", "eps", "theta", "heads", "kv_heads", "persistent")
    return args[:9], {name: v for name, v in zip(names, args[9:], strict=True) if v is not None}


def masses_along(ids: Tensor, args: tuple, dtype: torch.dtype) -> Tensor:
    """Probabilities [N, W, V] of each id before its draw, given the ids before it, by PyTorch in `dtype`. Without
    top_k and top_p."""
    probabilities = []
    position_args, keywords = as_keywords(args)
    cast = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in position_args]
    cast[3], cast[4] = ([t.to(dtype) for t in cast[i]] for i in (3, 4))
    options = {k: keywords.pop(k, default) for k, default in (("guidance", 1.0), ("temperature", 1.0))}
    keywords.pop("persistent")

    def forced(logits, seed, position, *, uncond_logits=None, **_):
        c = logits.double()
        u = c if uncond_logits is None else uncond_logits.double()
        guided = u + options["guidance"] * (c - u)
        probabilities.append((guided / options["temperature"]).softmax(-1))
        return ids[:, len(probabilities) - 1], torch.ones(len(seed), dtype=torch.bool)

    original, reference.sample_tokens = reference.sample_tokens, forced
    try:
        reference.unfold_patch(*cast, **keywords)
    finally:
        reference.sample_tokens = original
    return torch.stack(probabilities, 1)


def assert_drawn(ids: Tensor, args: tuple, factor: float = 2.0) -> None:
    """Every id is the one that its random number meets in exact probabilities (float64, given the ids before it), but
    for at most twice what PyTorch at the dtype of args is off by."""
    truth, rival = masses_along(ids, args, torch.float64).cumsum(-1), masses_along(ids, args, args[0].dtype).cumsum(-1)
    allowed = factor * (truth - rival).abs().amax() + 1e-6
    position = args[8][:, None] + torch.arange(ids.shape[1])
    u = (reference.philox_word(args[7][:, None], position).double() + 0.5) * 2.0**-32
    above = truth.gather(-1, ids[..., None])[..., 0]
    below = torch.where(ids > 0, truth.gather(-1, (ids - 1).clamp_min(0)[..., None])[..., 0], 0.0)
    outside = torch.maximum(below - u, u - above).amax()
    assert outside <= allowed, f"ids are {outside:.3e} from their draw, allowed {allowed:.3e}"
