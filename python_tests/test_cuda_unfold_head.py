"""unfold_head by the emulator, in both its forms: see test_cuda_emulated.py."""

import pytest
import torch
from head_cases import assert_drawn, head_args

from synergen_ext.testing import DTYPES, laid_out

FORMS = {"stages": False, "persistent": True}


def both(pictures, guided, dtype, **sizes):
    """Arguments of unfold_head in stages and persistent."""
    return [head_args(pictures, guided, dtype, persistent=p, **sizes) for p in FORMS.values()]


def small():
    return head_args(2, True, torch.bfloat16, guidance=2.0, top_k=60, top_p=0.9, window=2, biases=True, persistent=True)


#: A small call of each kernel, which test_cuda_emulated.py makes under every schedule and gate.
SMALL = {"unfold_head": small}


def sanitized():
    """Calls of odd sizes for test_cuda_emulated.py to make under the sanitizers."""
    for dtype in DTYPES:
        for persistent in FORMS.values():
            sizes = dict(dim=17, hidden=9, head_dim=6, vocab=37, window=2, layers=1, persistent=persistent)
            yield "unfold_head", head_args(3, False, dtype, **sizes)
            yield "unfold_head", head_args(1, True, dtype, layers=1, window=3, top_k=7, persistent=persistent)


def check(emulated, args):
    """The CPU kernel's ids in float32 and float64; ids near their draws in short dtypes."""
    ids, valid = emulated.unfold_head(*args)
    assert valid.all()
    if args[0].dtype in (torch.float64, torch.float32):
        assert torch.equal(ids, torch.ops.synergen.unfold_head(*args)[0])
    else:
        assert_drawn(ids, args)
    return ids


SIZES = {
    "plain": dict(),
    "odd": dict(dim=37, hidden=29, head_dim=6, vocab=61, heads=3, kv_heads=1),
    "tiny": dict(dim=1, heads=1, kv_heads=1, head_dim=2, hidden=1, vocab=3),
    "no layers": dict(layers=0),
    "split": dict(dim=272, hidden=520, head_dim=16, vocab=70, layers=1, window=2),
}


@pytest.mark.parametrize("name", SIZES)
def test_unfold_head_in_both_forms(emulated, name, dtype):
    a, b = both(2, True, dtype, guidance=2.0, biases=name != "plain", **SIZES[name])
    assert torch.equal(check(emulated, a), check(emulated, b))


@pytest.mark.parametrize("pictures,guided", [(1, False), (5, True), (13, False), (17, True), (33, True)])
def test_unfold_head_rows(emulated, pictures, guided):
    """One tile of 8 rows, several, and more rows than pass at once."""
    for args in both(pictures, guided, torch.bfloat16, layers=1, window=2, guidance=1.5):
        check(emulated, args)
    for args in both(min(pictures, 9), guided, torch.float32, layers=1, window=2, guidance=1.5):
        check(emulated, args)
