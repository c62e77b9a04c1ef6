"""unfold_head: the ids of the oracle's loop, ids near their draws in short dtypes, layouts, errors, torch.compile."""

import pytest
import torch
from cases import random_model
from head_cases import as_keywords, assert_drawn, head_args, weights_of

from synergen_ext import kernels, ops
from synergen_ext.generation.oracle import Sampling, sample
from synergen_ext.ops import eager, reference
from synergen_ext.testing import LAYOUTS, laid_out


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def run(args, function=None):
    position_args, keywords = as_keywords(args)
    return (function or ops.unfold_head)(*position_args, **keywords)


def oracle_ids(head, states, seed, first, guidance, sampling, pictures):
    """The inner loop of generation/oracle.py's painting."""
    cache, previous, ids = head.new_cache(len(states)), states, []
    for j in range(head.config.window):
        logits = head.step(previous, cache)
        uncond = logits[pictures:] if len(states) > pictures else None
        ids.append(sample(logits[:pictures], seed, first + j, sampling, uncond, guidance))
        previous = ids[-1].repeat(len(states) // pictures)
    return torch.stack(ids, 1)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 20, 0.9), Sampling(0.0)], ids=["plain", "cut", "most"])
@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
@pytest.mark.parametrize("preset", ["tiny", "paper", "qwen2-0.5b"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_ids_are_the_oracles(preset, guided, sampling, dtype):
    head = random_model(preset, dtype).unfolding_head
    n = 3
    states = torch.randn(2 * n if guided else n, head.config.hidden_size, dtype=torch.float64).to(dtype)
    seed, first = torch.tensor([5, 6, 1 << 40]), 48
    options = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    ids, valid = ops.unfold_head(
        states, seed=seed, position=torch.tensor(first), guidance=2.5, **options, **weights_of(head)
    )
    assert valid.all()
    assert torch.equal(ids, oracle_ids(head, states, seed, first, 2.5, sampling, n))


@pytest.mark.parametrize("sizes", [
    dict(), dict(dim=37, hidden=29, head_dim=6, vocab=61), dict(layers=0),
    dict(dim=1, heads=1, kv_heads=1, head_dim=2, hidden=1, vocab=3),
    dict(window=1), dict(dim=100, hidden=300, head_dim=34, window=7, vocab=130),
], ids=str)  # fmt: skip
def test_odd_sizes(sizes, dtype, device):
    for pictures, guided in ((1, True), (5, False), (9, True)):
        args = head_args(pictures, guided, dtype, seed=pictures, guidance=2.0, biases=guided, **sizes)
        args = [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]
        args[3:5] = ([t.to(device) for t in args[i]] for i in (3, 4))
        ids, valid = run(tuple(args))
        assert valid.all() and ids.dtype == torch.int64
        assert_drawn(ids, tuple(args))


def test_the_check_of_draws_finds_wrong_ids():
    """A control: of ids that belong to other seeds, hardly one would pass."""
    args = head_args(3, True, torch.bfloat16, guidance=2.0)
    ids, _ = run(args)
    assert_drawn(ids, args)
    for other in (ids.roll(1, 0), (ids + 1) % 100):
        with pytest.raises(AssertionError, match="from their draw"):
            assert_drawn(other, args)


@pytest.mark.parametrize("function", [reference.unfold_head, eager.unfold_head], ids=["reference", "eager"])
def test_backends_agree(function):
    for options in (dict(), dict(top_k=9, top_p=0.8, temperature=1.3)):
        args = head_args(4, True, torch.float64, guidance=3.0, biases=True, eps=0.5, **options)
        assert torch.equal(run(args)[0], run(args, function)[0])
    with ops.backend(function.__module__.rsplit(".", 1)[1]):
        assert torch.equal(run(args)[0], run(args, function)[0])


def test_a_picture_does_not_notice_the_others():
    args = head_args(5, True, torch.float32, guidance=2.0)
    ids, _ = run(args)
    for n in (0, 3):
        alone = (args[0][[n, n + 5]], *args[1:7], args[7][n : n + 1], args[8][n : n + 1], *args[9:])
        assert torch.equal(run(alone)[0], ids[n : n + 1])


def test_same_ids_for_any_number_of_threads():
    args = head_args(3, True, torch.float32, guidance=2.0, dim=200, hidden=300, vocab=400)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(args)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_what_changes(layout):
    args = head_args(4, True, torch.float32, guidance=2.0)
    wanted, _ = run(args)
    moved = (laid_out(args[0], layout), *args[1:7], laid_out(args[7], layout), laid_out(args[8], layout), *args[9:])
    assert torch.equal(run(moved)[0], wanted)


def test_options_by_picture():
    args = head_args(3, True, torch.float32)
    each = dict(
        guidance=torch.tensor([1.0, 0.0, 3.0]).double(), temperature=torch.tensor([0.0, 1.0, 0.5]).double(),
        top_k=torch.tensor([0, 5, 1]), top_p=torch.tensor([1.0, 0.9, 0.5]).double(),
    )  # fmt: skip
    position_args, keywords = as_keywords(args)
    ids, _ = ops.unfold_head(*position_args, **{**keywords, **each})
    for n in range(3):
        one = {name: value[n] for name, value in each.items()}
        assert torch.equal(ops.unfold_head(*position_args, **{**keywords, **one})[0][n], ids[n])


def test_rows_without_an_answer():
    args = head_args(3, False, torch.float32)
    args[0][1, 3] = torch.nan
    ids, valid = run(args)
    clean, _ = run(head_args(3, False, torch.float32))
    assert valid.tolist() == [True, False, True]
    assert torch.equal(ids[[0, 2]], clean[[0, 2]]) and not ids[1].any()


def test_empty():
    args = head_args(2, True, torch.float32)
    ids, valid = run((args[0][:0], *args[1:7], args[7][:0], args[8][:0], *args[9:]))
    assert ids.shape == (0, 4) and valid.shape == (0,)
    ids, valid = run((args[0], args[1], args[2][:0], *args[3:]))
    assert ids.shape == (2, 0) and valid.all()


def test_plain_arrays():
    args = head_args(2, True, torch.float32, guidance=2.0, biases=True)
    ids, valid = kernels.unfold_head(
        *(a if a is None or isinstance(a, list | int | float) else a.numpy() for a in args)
    )
    assert ids.tolist() == run(args)[0].tolist() and valid.all()


def test_gradients_are_refused():
    args = head_args(1, False)
    with torch.enable_grad():
        run(args)
        args[3][4].requires_grad_()
        with pytest.raises(
            RuntimeError, match=r"unfold_head: drawn ids have no gradients; call it under torch.no_grad"
        ):
            run(args)


def test_opcheck(dtype):
    args = head_args(2, True, dtype, guidance=2.0, biases=True)
    torch.library.opcheck(torch.ops.synergen.unfold_head.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    args = head_args(2, True, guidance=2.0)
    position_args, keywords = as_keywords(args)

    def patch(states):
        return ops.unfold_head(states * 1, *position_args[1:], **keywords)[0] + 0

    wanted = run(args)[0]
    assert torch.equal(torch.compile(patch, fullgraph=True, dynamic=dynamic)(args[0]), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {0: a[0][0]}, r"states must be \[R, D\], got \[32\]"),
        (lambda a: {0: a[0].long()}, "states must be float64, float32, bfloat16 or float16, got int64"),
        (lambda a: {0: a[0][:3]}, r"states must be \[N, D\] or \[2 N, D\] with N = 2 as in seed, got \[3, 32\]"),
        (lambda a: {0: a[0][:, :0]}, r"states must have D >= 1, got \[4, 0\]"),
        (lambda a: {1: a[1][:, 1:]}, r"tokens must be \[V, D\] = \[100, 32\], got \[100, 31\]"),
        (lambda a: {1: a[1][:0]}, r"tokens must have V >= 1, got \[0, 32\]"),
        (lambda a: {1: a[1].double()}, "tokens must be float32 like states, got float64"),
        (lambda a: {1: a[1].T.contiguous().T}, r"tokens must be contiguous, got strides \[1, 100\]"),
        (lambda a: {2: a[2][0]}, r"positions must be \[W, D\], got \[32\]"),
        (lambda a: {3: a[3][1:]}, "layers must be 9 tensors a layer, got 17"),
        (lambda a: {3: [*a[3][:4], a[3][4][:8], *a[3][5:]]},
         r"layers\[4\] must be \[D, heads \* Dh\] = \[32, 32\], got \[8, 32\]"),
        (lambda a: {3: [a[3][0], a[3][1][:7], *a[3][2:]]},
         r"layers\[1\] must be \[heads \* Dh, D\] with Dh even, got \[7, 32\] for 4 heads"),
        (lambda a: {4: a[4][:2]}, "biases must be none, or 3 tensors a layer = 6, got 2"),
        (lambda a: {4: [*a[4][:5], a[4][0]]}, r"biases\[5\] must be \[kv_heads \* Dh\] = \[16\], got \[32\]"),
        (lambda a: {5: a[5][:8]}, r"norm must be \[D\] = \[32\], got \[8\]"),
        (lambda a: {6: a[6][:8]}, r"classifier must be \[V, D\] = \[100, 32\], got \[8, 32\]"),
        (lambda a: {7: a[7].int()}, "seed must be int64, got int32"),
        (lambda a: {8: a[8][:1]}, r"position must be \[\] or \[R\] = \[2\], got \[1\]"),
        (lambda a: {10: torch.tensor(-1.0).double()}, "temperature must be finite and >= 0, got -1 in row 0"),
        (lambda a: {13: -1.0}, "eps must be >= 0, got -1"),
        (lambda a: {14: 0.0}, "theta must be > 0, got 0"),
        (lambda a: {15: 3}, "heads must be a multiple of kv_heads and both positive, got 3 and 2"),
    ],
)  # fmt: skip
def test_errors(change, message):
    args = list(head_args(2, True, biases=True))
    for place, value in change(args).items():
        args[place] = value
    with pytest.raises(ValueError, match=f"unfold_head: {message}"):
        torch.ops.synergen.unfold_head(*args)
