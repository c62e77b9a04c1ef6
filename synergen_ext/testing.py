"""What tests and benchmarks share: the tolerance table, the accuracy rule and inputs in awkward
shapes and layouts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Error that is never held against us, for outputs of size one. Below float64 it is one unit in the
# last place: the rule is relative to PyTorch's own error, and PyTorch is sometimes exact by luck.
# float64 is its own truth, so there the floor is all there is: room for sums in another order.
FLOOR = {dtype: torch.finfo(dtype).eps for dtype in DTYPES} | {torch.float64: 1e-13}

# How the same values may lie in memory: whole; inside a larger buffer; every second element;
# dimensions reversed.
LAYOUTS = ("contiguous", "sliced", "stepped", "transposed")

# Sizes of a vector dimension: one, odd, a vector register more or less, and not a multiple of
# anything.
ODD_SIZES = (1, 2, 7, 13, 16, 31, 64, 77, 269)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    """Standard normal numbers, the same for a seed whatever the dtype (they are drawn in float64
    and rounded)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x, laid out in memory in one of `LAYOUTS`."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        order = list(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    step = 2 if layout == "stepped" else 1
    room = x.new_zeros([size * step + 3 for size in x.shape])
    view = room[tuple(slice(1, 1 + size * step, step) for size in x.shape)]
    return view.copy_(x)


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def worst_error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, 0 for empty tensors."""
    return (x.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def assert_as_accurate(ours: Any, rival: Any, truth: Any, name: str = "result", factor: float = 2.0) -> None:
    """The rule for every op: |ours - truth| <= factor * |rival - truth|, in the largest difference.

    Args:
        ours: our result, a tensor or a tuple of them.
        rival: PyTorch's result at the same dtype.
        truth: the result in float64.
        name: what to call it in the message.
        factor: 2 unless a test says why not.
    """
    for i, (a, b, t) in enumerate(zip(_flat(ours), _flat(rival), _flat(truth), strict=True)):
        assert a.shape == t.shape, f"{name}[{i}]: shape must be {list(t.shape)}, got {list(a.shape)}"
        assert a.dtype == b.dtype, f"{name}[{i}]: dtype must be {b.dtype}, got {a.dtype}"
        size = max(1.0, t.abs().max().item()) if t.numel() else 1.0
        error, allowed = worst_error(a, t), factor * worst_error(b, t) + FLOOR[a.dtype] * size
        assert error <= allowed, f"{name}[{i}] ({a.dtype}): error must be <= {allowed:.3e}, got {error:.3e}"


def to_float64(args: Sequence[Any]) -> list[Any]:
    """The same arguments with every floating-point tensor in float64, keeping what needs a
    gradient."""
    return [
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]


def run_with_gradients(function: Callable[..., Any], args: Sequence[Any], seed: int = 1) -> list[Tensor]:
    """Outputs, then the gradient of every argument that needs one, under random output gradients of
    size one."""
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    outputs = _flat(function(*args))
    if not leaves:
        return outputs
    upstream = [normal(*y.shape, dtype=y.dtype, seed=seed + i).to(y.device) for i, y in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [y.detach() for y in outputs] + list(gradients)


def assert_op_accurate(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    args: Sequence[Any],
    rival: Callable[..., Any] | None = None,
) -> None:
    """Values and gradients of `op` against float64, at most twice as far off as `rival` at the same
    dtype.

    Args:
        op: the public function.
        reference: its slow twin, run in float64 for the truth.
        args: its arguments; those with requires_grad have their gradients compared too.
        rival: PyTorch's way to the same result; the reference at the dtype of args if not given.
    """
    ours = run_with_gradients(op, args)
    # How far off PyTorch is depends on its threads, and with few numbers is a matter of luck: one, as everywhere.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other = run_with_gradients(rival or reference, args)
    finally:
        torch.set_num_threads(threads)
    truth = run_with_gradients(reference, to_float64(args))
    assert_as_accurate(ours, other, truth, getattr(op, "__name__", "op"))
