"""The unfolding head (eq. 3): its two forms agree, it is causal, and a patch sees nothing of the others."""

import pytest
import torch
import torch.nn.functional as F
from cases import random_model, scaled_down

from synergen_ext import ops
from synergen_ext.model import PRESETS, UnfoldingHead

CLOSE = {
    torch.float64: dict(rtol=0, atol=1e-10),
    torch.float32: dict(rtol=1e-4, atol=1e-4),
}


def head_and_inputs(
    preset: str = "tiny", patches: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[UnfoldingHead, torch.Tensor, torch.Tensor]:
    """A head, states [N, D] and ids [N, m*n]."""
    config = scaled_down(preset)
    head = random_model(config, dtype).unfolding_head
    states = torch.randn(patches, config.hidden_size, dtype=torch.float64).to(dtype)
    return head, states, torch.randint(config.codebook_size, (patches, config.window))


def step_by_step(head: UnfoldingHead, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    cache = head.new_cache(len(states))
    logits = []
    for j in range(ids.shape[1]):
        assert cache.length == j
        logits.append(head.step(states if j == 0 else ids[:, j - 1], cache))
    return torch.stack(logits, dim=1)


def by_hand(head: UnfoldingHead, state: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Eq. 3 for one patch in loops: [h, e(v_0), ..., e(v_mn-2)] plus positions, then causal blocks."""
    c = head.config
    x = torch.stack([state, *head.tokens.weight[ids[:-1]]]) + head.positions
    group = c.num_heads // c.num_kv_heads
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)

    def norm(v, weight):
        return v / (v.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def rotate(v, position):
        z = torch.complex(*v.chunk(2)) * torch.polar(torch.ones_like(frequency), position * frequency)
        return torch.cat((z.real, z.imag))

    for block in head.layers:
        a, h = block.attention, norm(x, block.attention_norm.weight)
        q = a.wq(h).view(len(x), c.num_heads, c.head_dim)
        k, v = (w(h).view(len(x), c.num_kv_heads, c.head_dim) for w in (a.wk, a.wv))
        mixed = torch.zeros_like(q)
        for i in range(len(x)):
            for head_index in range(c.num_heads):
                query = rotate(q[i, head_index], i)
                kv = head_index // group
                scores = torch.stack([query @ rotate(k[j, kv], j) for j in range(i + 1)])
                mixed[i, head_index] = (scores / c.head_dim**0.5).softmax(0) @ v[: i + 1, kv]
        x = x + a.wo(mixed.flatten(1))
        h, ffn = norm(x, block.ffn_norm.weight), block.feed_forward
        x = x + (F.silu(h @ ffn.gate.T) * (h @ ffn.up.T)) @ ffn.down.T
    return norm(x, head.norm.weight) @ head.classifier.weight.T


@pytest.mark.parametrize("preset", PRESETS)
def test_head_is_equation_3(preset):
    head, states, ids = head_and_inputs(preset, patches=2)
    wanted = torch.stack([by_hand(head, s, v) for s, v in zip(states, ids, strict=True)])
    torch.testing.assert_close(head(states, ids), wanted, **CLOSE[torch.float64])
    assert 0.1 < wanted.std() < 10  # the comparison is about numbers of size one


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("preset", PRESETS)
def test_both_forms_agree_token_by_token(preset, grad, dtype):
    head, states, ids = head_and_inputs(preset, dtype=dtype)
    with torch.set_grad_enabled(grad):
        parallel = head(states, ids)
    with torch.no_grad():
        stepped = step_by_step(head, states, ids)
    for j in range(ids.shape[1]):
        torch.testing.assert_close(stepped[:, j], parallel[:, j], **CLOSE[dtype])


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_both_forms_agree_on_every_backend(backend):
    head, states, ids = head_and_inputs("tiny")
    with torch.no_grad():
        wanted = head(states, ids)
        with ops.backend(backend):
            torch.testing.assert_close(head(states, ids), wanted, **CLOSE[torch.float64])
            stepped = step_by_step(head, states, ids)
    torch.testing.assert_close(stepped, wanted, **CLOSE[torch.float64])


def test_a_position_sees_earlier_ids_only():
    """Changing id j changes the logits after position j, all of them, and none up to it."""
    head, states, ids = head_and_inputs("paper", patches=1)
    before = head(states, ids)
    for j in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, j] = (ids[0, j] + 1) % head.config.codebook_size
        moved = (head(states, changed) - before).abs().amax(-1)[0]
        assert moved[: j + 1].max() == 0, f"id {j} is seen too early"
        assert (moved[j + 1 :] > 1e-6).all(), f"id {j} is not seen later"


def test_every_position_sees_the_state():
    head, states, ids = head_and_inputs(patches=1)
    moved = (head(states + 0.1, ids) - head(states, ids)).abs().amax(-1)[0]
    assert (moved > 1e-6).all()


def test_patches_do_not_see_each_other():
    head, states, ids = head_and_inputs(patches=4)
    before = head(states, ids)
    states[2] += 1
    ids[2] = 0
    after = head(states, ids)
    others = [0, 1, 3]
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)
    assert (after[2] - before[2]).abs().max() > 1e-3
    for row in range(4):
        alone = head(states[row : row + 1], ids[row : row + 1])
        torch.testing.assert_close(alone[0], after[row], **CLOSE[torch.float64])


def test_rope_and_positions_are_both_there():
    """Equal ids at every place still give different logits: the order of a patch is known to the head."""
    head, states, _ = head_and_inputs(patches=1)
    with torch.no_grad():
        head.positions.zero_()
        rotary = head(states, torch.ones(1, head.config.window, dtype=torch.long))
        head.positions.normal_()
        both = head(states, torch.ones(1, head.config.window, dtype=torch.long))
    assert (rotary[0, 2] - rotary[0, 5]).abs().max() > 1e-6
    assert (both - rotary).abs().max() > 1e-3


def test_no_patches():
    head, states, ids = head_and_inputs()
    assert head(states[:0], ids[:0]).shape == (0, head.config.window, head.config.codebook_size)


def test_gradients_against_finite_differences():
    """Along one random direction of all weights and states at once."""
    head, states, ids = head_and_inputs(patches=2)
    states.requires_grad_()
    weights = [states, *head.parameters()]
    upstream = torch.randn(2, head.config.window, head.config.codebook_size, dtype=torch.float64)
    parallel = torch.autograd.grad(head(states, ids), weights, upstream)
    for name, g in zip(["states", *dict(head.named_parameters())], parallel, strict=True):
        assert g.abs().max() > 0, name

    def function(*changed):
        parameters = dict(zip(dict(head.named_parameters()), changed[1:], strict=True))
        return torch.func.functional_call(head, parameters, (changed[0], ids))

    direction = [torch.randn_like(w) for w in weights]
    eps = 1e-6
    moved = ([w + sign * eps * d for w, d in zip(weights, direction, strict=True)] for sign in (1, -1))
    ahead, behind = ((function(*w) * upstream).sum() for w in moved)
    numeric = (ahead - behind) / (2 * eps)
    analytic = sum((g * d).sum() for g, d in zip(parallel, direction, strict=True))
    torch.testing.assert_close(analytic, numeric, rtol=1e-6, atol=0)


def test_a_window_too_long_is_refused():
    head, states, ids = head_and_inputs()
    cache = head.new_cache(len(states))
    with torch.no_grad():
        for j in range(head.config.window):
            head.step(states if j == 0 else ids[:, j - 1], cache)
        with pytest.raises(ValueError, match=f"step: a patch has {head.config.window} ids, and all"):
            head.step(ids[:, -1], cache)
        cache.reset()
        again = head.step(states, cache)
    torch.testing.assert_close(again, head(states, ids)[:, 0], **CLOSE[torch.float64])


@pytest.mark.parametrize("shape", [(3, 7), (3, 9), (2, 8), (24,)])
def test_ids_of_another_shape_are_refused(shape):
    head, states, _ = head_and_inputs()  # 3 patches of 2 x 4 ids
    with pytest.raises(ValueError, match=r"forward: ids must be \[3, 8\], got \["):
        head(states, torch.zeros(shape, dtype=torch.long))
