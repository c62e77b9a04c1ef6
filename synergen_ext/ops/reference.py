"""Every op again in plain, differentiable PyTorch: same names and signatures, slow and clear; the
truth in tests."""

from collections.abc import Sequence

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


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` to x and weight, written out."""
    wide, g = _wide(x), _wide(dy)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    dweight = (g * wide * r).flatten(0, -2).sum(0) if x.dim() > 1 else g * wide * r
    g = g * _wide(weight)
    dx = r * (g - wide * r.square() * (g * wide).mean(-1, keepdim=True))
    return dx.to(x.dtype), dweight.to(weight.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_rms_norm_backward(
    dy: Tensor, dsum: Tensor, sum: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Gradients of `add_rms_norm` to x (and residual alike) and weight, written out."""
    dx, dweight = rms_norm_backward(_wide(dy), _wide(sum), weight, eps)
    return (dx + _wide(dsum)).to(sum.dtype), dweight


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


def fold_tokens_backward(dy: Tensor, ids: Tensor, vocab: int, m: int, n: int) -> tuple[Tensor, Tensor]:
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


def route_tokens(expert_index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    index = expert_index.flatten()
    index = index.where(index >= 0, experts)
    order = index.argsort(stable=True)  # pairs without an expert come last
    named = index[order] < experts
    starts = torch.searchsorted(index[order], torch.arange(experts + 1, device=index.device))
    return torch.where(named, order, -1).int(), starts.int()


def expert_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None = None,
    *,
    recompute: bool = False,
    routing: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`recompute` and `routing` change nothing here: autograd keeps what it wants, and every expert looks for its
    own."""
    return expert_ffn_train(x, gate, up, down, expert_index, expert_weight)[0]


def expert_ffn_train(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`expert_ffn`, and what its backward pass keeps: gate[e] x and up[e] x of each pair (t, j)."""
    index = expert_index if expert_index.dim() == 2 else expert_index[:, None]  # [T, k]
    wide, hidden = _wide(x), gate.shape[1]
    y = torch.zeros_like(wide)
    gate_pre = wide.new_zeros(index.numel(), hidden)
    up_pre = wide.new_zeros(index.numel(), hidden)
    for e in range(gate.shape[0]):
        t, j = torch.where(index == e)
        pair = t * index.shape[1] + j
        g, u = F.linear(wide[t], _wide(gate[e])), F.linear(wide[t], _wide(up[e]))
        out = F.linear(F.silu(g) * u, _wide(down[e]))
        if expert_weight is not None:
            out = out * _wide(expert_weight.reshape(index.shape)[t, j])[:, None]
        y = y.index_add(0, t, out)
        gate_pre[pair], up_pre[pair] = g.detach(), u.detach()
    return y.to(x.dtype), gate_pre.to(x.dtype), up_pre.to(x.dtype)


def expert_ffn_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None,
    gate_pre: Tensor | None,
    up_pre: Tensor | None,
    need_x: bool,
    need_experts: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `expert_ffn`, written out; what is not needed is empty. `gate_pre` and `up_pre` are not used."""
    index = expert_index if expert_index.dim() == 2 else expert_index[:, None]  # [T, k]
    wide, wide_dy = _wide(x), _wide(dy)
    weight = None if expert_weight is None else _wide(expert_weight.reshape(index.shape))
    dx = torch.zeros_like(wide)
    dgate, dup, ddown = (torch.zeros_like(_wide(t)) for t in (gate, up, down))
    dweight = None if weight is None else torch.zeros_like(weight)
    for e in range(gate.shape[0]):
        t, j = torch.where(index == e)
        g, u = F.linear(wide[t], _wide(gate[e])), F.linear(wide[t], _wide(up[e]))
        sigmoid = g.sigmoid()
        hidden = g * sigmoid * u
        dout = wide_dy[t]
        if weight is not None and dweight is not None:
            dweight[t, j] = (dout * F.linear(hidden, _wide(down[e]))).sum(-1)
            dout = dout * weight[t, j][:, None]
        dhidden = dout @ _wide(down[e])
        dg = dhidden * u * sigmoid * (1 + g * (1 - sigmoid))
        du = dhidden * g * sigmoid
        ddown[e], dgate[e], dup[e] = dout.T @ hidden, dg.T @ wide[t], du.T @ wide[t]
        dx = dx.index_add(0, t, dg @ _wide(gate[e]) + du @ _wide(up[e]))

    def given(needed: bool, gradient: Tensor | None, like: Tensor) -> Tensor:
        return gradient.reshape(like.shape).to(like.dtype) if needed and gradient is not None else like.new_empty(0)

    return (
        given(need_x, dx, x),
        given(need_experts, dgate, gate),
        given(need_experts, dup, up),
        given(need_experts, ddown, down),
        given(need_weight, dweight, x if expert_weight is None else expert_weight),
    )


def quantize_weight(w: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Integers and scales with w ~ integer * scale, symmetric: the largest of a group is 127, or 7, scales.

    Args:
        w: [..., K], float64, float32, bfloat16 or float16, finite.
        bits: 8 or 4. With 4, K must be a multiple of 8.
        group: neighbours along K that share a scale, a power of two that divides K, at least 64 (8 bits) or 32
            (4 bits); or None: the row.

    Returns:
        int8 [..., K] or, with 4 bits, uint8 [..., K / 2]; and scales [..., K / group], the dtype of w. A byte holds two
        integers plus 8, the first in its low half; of each 8 columns they are 0, 2, 4, 6, 1, 3, 5, 7.

    Raises:
        ValueError: bits, group, K or a value does not fit.
    """
    columns = w.shape[-1]
    if bits not in (4, 8):
        raise ValueError(f"quantize_weight: bits must be 8 or 4, got {bits}")
    if bits == 4 and columns % 8:
        raise ValueError(f"quantize_weight: w must have a multiple of 8 columns for 4 bits, got {columns}")
    least = 64 if bits == 8 else 32
    if group is not None and group != columns and (group < least or group & (group - 1) or columns % group):
        raise ValueError(
            f"quantize_weight: group must be a power of two that divides {columns}, at least {least}, or None, "
            f"got {group}"
        )
    if not w.isfinite().all():
        raise ValueError("quantize_weight: w must be finite")
    most = 2 ** (bits - 1) - 1
    groups = columns // (group or columns) if columns else 1
    wide = _wide(w).unflatten(-1, (groups, columns // groups))
    scale = (wide.abs().amax(-1) / most if columns else wide.new_ones(*w.shape[:-1], 1)).to(w.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a group of zeros
    integers = (wide / _wide(scale)[..., None]).round().clamp(-most, most).to(torch.int8).flatten(-2)
    if bits == 8:
        return integers, scale
    pairs = (integers + 8).unflatten(-1, (columns // 8, 4, 2)).transpose(-1, -2).reshape(*w.shape[:-1], columns // 2, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), scale


def dequantize_weight(values: Tensor, scale: Tensor) -> Tensor:
    """integer * scale, of what `quantize_weight` makes: int8, or uint8 with two of 4 bits; the dtype of scale."""
    if values.dtype == torch.uint8:
        columns = values.shape[-1] * 2
        pairs = torch.stack((values & 15, values >> 4), -1).to(torch.int8) - 8
        values = (
            pairs.reshape(*values.shape[:-1], columns // 8, 2, 4).transpose(-1, -2).reshape(*values.shape[:-1], columns)
        )
    groups = scale.shape[-1]
    wide = values.unflatten(-1, (groups, values.shape[-1] // groups)).to(_wide(scale).dtype)
    return (wide * _wide(scale)[..., None]).flatten(-2).to(scale.dtype)


def packed_linear(x: Tensor, w: Tensor, form: str, group: int = 0) -> Tensor:
    """``x [R, K] w [N, K]^T`` in float64, as the native engine means it (csrc/engine/params.h).

    Args:
        form: "float32" or "bfloat16": w is rounded to it. "int8" or "int4": the magnitudes of w in each ``group``
            columns are at most 127, or 7, times their scale, which is rounded to bfloat16; x is rounded to 8 bits in
            the same groups.
    """
    if form in ("float32", "bfloat16"):
        return x.double() @ w.to(getattr(torch, form)).double().T
    most = 127.0 if form == "int8" else 7.0
    fill = -w.shape[1] % group
    w, x = (torch.nn.functional.pad(v.float(), (0, fill)).unflatten(1, (-1, group)) for v in (w, x))
    scale = (w.abs().amax(-1, keepdim=True) / most).bfloat16().float()
    scale = torch.where(scale == 0, 1.0, scale)
    integers = (w / scale).round().clamp(-most, most)
    largest = x.abs().amax(-1, keepdim=True)
    rounded = torch.where(largest > 0, (x * (127 / largest)).round(), 0.0)
    wide, narrow = (rounded.double() * (largest / 127).double()), integers.double() * scale.double()
    return wide.flatten(1) @ narrow.flatten(1).T


def expert_ffn_quantized(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_scale: Tensor,
    up_scale: Tensor,
    down_scale: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor | None = None,
) -> Tensor:
    gate, up = (dequantize_weight(v, _wide(scale)) for v, scale in ((gate, gate_scale), (up, up_scale)))
    return expert_ffn(x, gate, up, dequantize_weight(down, _wide(down_scale)), expert_index, expert_weight)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    batch, heads, dim = q.shape
    keys, kv_heads = k_cache.shape[1:3]
    place = torch.arange(keys, device=q.device)
    seen = place < lengths[:, None]  # [B, S]
    if starts is not None:
        seen &= place >= starts[:, None]
    k, v = (_wide(t).masked_fill(~seen[:, :, None, None], 0) for t in (k_cache, v_cache))
    grouped = _wide(q).reshape(batch, kv_heads, heads // kv_heads, dim)
    logits = torch.einsum("bhgd,bshd->bhgs", grouped, k) * (dim**-0.5 if scale is None else scale)
    weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(~seen[:, None, None], 0)  # a row that sees nothing had 0 / 0
    return torch.einsum("bhgs,bshd->bhgd", weights, v).reshape(q.shape).to(q.dtype)


def reduce_loss(loss: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Losses [N] of rows, 0 where a row is not counted (bool [N]), as `reduction` wants them."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / counted.sum()
    raise ValueError(f"linear_cross_entropy: reduction must be mean, sum or none, got {reduction!r}")


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    loss, _ = linear_cross_entropy_rows(x, weight, targets, ignore_index)
    return reduce_loss(loss, targets != ignore_index, reduction)


def linear_cross_entropy_rows(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The loss [N] of each row, and the logarithm float64 [N] of the sum of exp(logits); 0 where the target is ignored.
    A target outside the vocabulary, which a kernel cannot refuse on CUDA, makes NaN."""
    counted = targets != ignore_index
    known = (targets >= 0) & (targets < len(weight))
    logits = F.linear(_wide(x), _wide(weight))
    lse = logits.logsumexp(-1)
    wanted = logits.gather(-1, torch.where(known & counted, targets, 0)[:, None])[:, 0]
    loss = (lse - wanted).masked_fill(~known, torch.nan)
    return loss.masked_fill(~counted, 0), lse.double().masked_fill(~counted, 0)


def linear_cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `linear_cross_entropy_rows`, written out; what is not needed is empty."""
    counted = targets != ignore_index
    known = (targets >= 0) & (targets < len(weight))
    wide_x, wide_weight = _wide(x), _wide(weight)
    p = (F.linear(wide_x, wide_weight) - lse[:, None]).exp().to(wide_x.dtype)
    p = p - F.one_hot(torch.where(known & counted, targets, 0), len(weight))
    p = (p * dloss[:, None]).masked_fill(~known[:, None], torch.nan).masked_fill(~counted[:, None], 0)
    dx = (p @ wide_weight).to(x.dtype) if need_x else x.new_empty(0)
    return dx, (p.T @ wide_x).to(weight.dtype) if need_weight else weight.new_empty(0)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): counter [..., 4] and key [..., 2] -> [..., 4]."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap modulo 2^64: both halves are right
        c0, c1 = ((b >> 32) & low) ^ c1 ^ k0, b & low
        c2, c3 = ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), -1)


def philox_word(seed: Tensor, position: Tensor) -> Tensor:
    """One 32-bit word for each (seed, position): key = seed, counter = (position, 0)."""
    seed, position = torch.broadcast_tensors(seed, position)
    low, zero = 0xFFFFFFFF, torch.zeros_like(seed)
    counter = torch.stack((position & low, (position >> 32) & low, zero, zero), -1)
    return philox4x32(counter, torch.stack((seed & low, (seed >> 32) & low), -1))[..., 0]


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
    rows, vocab = logits.shape

    def per_row(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, device=logits.device).expand(rows)[:, None]

    # 1. Guidance.
    c = _wide(logits)
    mixed, valid = c, ~c.isnan().any(-1)
    if uncond_logits is not None:
        u, s = _wide(uncond_logits), per_row(guidance).to(c.dtype)
        valid &= ~u.isnan().any(-1)
        mixed = torch.where(s == 1, c, u + s * (c - u))
        mixed = mixed.masked_fill((c == -torch.inf) | (u == -torch.inf), -torch.inf)
    most = mixed.amax(-1, keepdim=True)
    valid &= most[:, 0].isfinite()

    # 2. Temperature. The mass of a token is an integer, so that sums are exact: V * 2^bits <= 2^62.
    t = per_row(temperature).double()
    bits = min(50, 62 - (vocab - 1).bit_length())
    z = (mixed.double() - most.double()) / torch.where(t == 0, 1.0, t)
    mass = (z.clamp(min=-64.0).exp() * 2.0**bits).round().nan_to_num(0.0).to(torch.int64)
    mass = mass.masked_fill(mixed == -torch.inf, 0)

    # 3. Top-k, by rank. A stable sort keeps rising ids among equals.
    order = mixed.sort(dim=-1, descending=True, stable=True).indices
    mass = mass.gather(-1, order)
    k, rank = per_row(top_k), torch.arange(vocab, device=logits.device)
    mass = mass.masked_fill((k > 0) & (rank >= k), 0)

    # 4. Top-p: the shortest prefix that reaches p of the mass left.
    p = per_row(top_p).double()
    target = (p * mass.sum(-1, keepdim=True).double()).ceil().clamp(min=1).to(torch.int64)
    mass = mass.masked_fill((p < 1) & (mass.cumsum(-1) - mass >= target), 0)

    # 5. The draw, in the order of the vocabulary: the first id where the running mass exceeds
    # (2 word + 1) / 2^33 of the total. Products of 95 bits: Python's integers.
    cdf = torch.zeros_like(mass).scatter(-1, order, mass).cumsum(-1)
    words, totals = philox_word(seed, position.expand(rows)).tolist(), cdf[:, -1].tolist()
    threshold = [(2 * w + 1) * total >> 33 for w, total in zip(words, totals, strict=True)]
    drawn = (cdf > torch.tensor(threshold, device=logits.device)[:, None]).byte().argmax(-1)
    ids = torch.where(t[:, 0] == 0, (mixed == most).byte().argmax(-1), drawn)
    return torch.where(valid, ids, 0), valid


def unfold_patch(
    states: Tensor,
    tokens: Tensor,
    positions: Tensor,
    layers: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm: Tensor,
    classifier: Tensor,
    seed: Tensor,
    position: Tensor,
    eps: float,
    theta: float,
    heads: int,
    kv_heads: int,
    **sampling: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """`unfold_head` in the precision of its arguments."""
    n, window = len(seed), len(positions)
    caches: list[list[Tensor]] = [[] for _ in range(len(layers) // 9 * 2)]  # keys and values of each layer
    ids, valid = seed.new_empty(n, window), torch.ones(n, dtype=torch.bool, device=seed.device)
    x = states
    for j in range(window):
        x = x + positions[j]
        at = torch.full((1,), j, device=seed.device)
        for layer in range(len(layers) // 9):
            attention_norm, wq, wk, wv, wo, ffn_norm, gate, up, down = layers[9 * layer : 9 * layer + 9]
            bq, bk, bv = biases[3 * layer : 3 * layer + 3] or (None, None, None)
            h = rms_norm(x, attention_norm, eps)
            q, k, v = (
                F.linear(h, w, b).view(len(x), 1, count, -1)
                for w, b, count in ((wq, bq, heads), (wk, bk, kv_heads), (wv, bv, kv_heads))
            )
            q, k = rope(q, k, at, theta)
            keys, values = caches[2 * layer : 2 * layer + 2]
            keys.append(k)
            values.append(v)
            q, k, v = (a.transpose(1, 2) for a in (q, torch.cat(keys, 1), torch.cat(values, 1)))  # [R, H, T, Dh]
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            x = x + F.linear(mixed.flatten(1), wo)
            h = rms_norm(x, ffn_norm, eps)
            x = x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
        logits = F.linear(rms_norm(x, norm, eps), classifier)
        ids[:, j], good = sample_tokens(
            logits[:n],
            seed,
            position + j,
            uncond_logits=logits[n:] if len(logits) > n else None,
            **sampling,  # type: ignore[arg-type]
        )
        valid &= good
        x = tokens[ids[:, j].repeat(len(logits) // max(n, 1))]
    return ids, valid


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
    """`persistent` changes nothing here."""
    states, tokens, positions, norm, classifier = map(_wide, (states, tokens, positions, norm, classifier))
    return unfold_patch(
        states, tokens, positions, [_wide(t) for t in layers], [_wide(t) for t in biases], norm, classifier, seed,
        position, eps, theta, heads, kv_heads, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
