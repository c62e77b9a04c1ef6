"""The CUDA kernels on a GPU: checked, then timed beside what else computes the same, and beside their static bounds.

Needs a GPU. Each case is checked against the reference in float64 before any of it is timed (ids: against the CPU
kernel); a wrong result ends the run. Calls are captured in CUDA graphs where they can be, their arguments rotate
through copies larger than the L2 cache, and ours and rivals alternate. ``--quick``: fewer rounds.
"""

import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synergen_ext.bench import Progress, Row
from synergen_ext.testing import assert_as_accurate, normal, run_with_gradients, to_float64

sys.path.insert(0, str(Path(__file__).parent))
from cuda_bound import entries, model  # noqa: E402
from cuda_bound.cards import CARDS  # noqa: E402

_spec = importlib.util.spec_from_file_location("synergen_gpu_cases", Path(__file__).with_name("gpu_cases.py"))
assert _spec and _spec.loader
gpu_cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_cases)

#: No L2 cache of a card up to B200 (126 MB) holds the arguments of all copies.
ROTATED = 256 << 20


def rows(quick: bool, progress: Progress) -> Iterator[Row]:
    if not torch.cuda.is_available():
        raise RuntimeError("suite cuda: needs an NVIDIA GPU and a torch with CUDA; torch sees none")
    rounds = 5 if quick else 15
    card = torch.cuda.get_device_name()
    progress("measure the card", 0, len(gpu_cases.CASES) + 1)
    copied, multiplied = ceilings(rounds)
    yield Row("copy bandwidth", copied / 1e9, "GB/s", note=card)
    yield Row("cuBLAS, bfloat16, 8192^3", multiplied / 1e12, "TFLOP/s", note=card)
    for number, (name, make) in enumerate(gpu_cases.CASES.items(), 1):
        progress(name, number, len(gpu_cases.CASES) + 1)
        case = make("cuda", False)
        check(case)
        yield from timed(name, case, rounds, copied, multiplied)
        del case
        torch.cuda.empty_cache()


def check(case: Any) -> None:
    """Right before it is timed: at most twice as far from float64 as the first rival; ids equal the CPU kernel's."""
    if case.ids:
        for ours, wanted in zip(case.ours(*case.args), case.truth(*case.args), strict=True):
            if not torch.equal(ours.cpu(), wanted.cpu()):
                raise AssertionError("ids differ from the CPU kernel's")
        return
    run = run_with_gradients if case.train else lambda function, args: function(*args)
    with torch.set_grad_enabled(case.train):
        ours, rival = run(case.ours, case.args), run(next(iter(case.rivals.values())), case.args)
        assert_as_accurate(ours, rival, run(case.truth, to_float64(case.args)))


def call(function: Callable[..., Any], args: tuple[Any, ...], train: bool) -> Callable[[], Any]:
    """What is timed: the function, or it and its gradients."""
    if not train:
        return lambda: function(*args)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def run() -> Any:
        y = function(*args)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def copies(case: Any) -> list[tuple[Any, ...]]:
    """The arguments again and again, in memory of their own, until they are larger than any cache."""
    held = sum(a.numel() * a.element_size() for a in case.args if isinstance(a, Tensor))
    count = max(2, min(64, -(-ROTATED // max(held, 1))))
    again = [
        tuple(a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in case.args)
        for _ in range(count - 1)
    ]
    return [case.args, *again]


def captured(calls: list[Callable[[], Any]], train: bool) -> tuple[Callable[[], Any], bool]:
    """All calls as one CUDA graph, or one after another where they synchronise; and which."""

    def one_after_another() -> None:
        for each in calls:
            each()

    with torch.set_grad_enabled(train):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            one_after_another()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                one_after_another()
        except RuntimeError:  # the call waits for the GPU, as reading counts back does
            torch.cuda.synchronize()
            return one_after_another, False
    return graph.replay, True


def seconds(run: Callable[[], Any], train: bool) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.set_grad_enabled(train):
        start.record()
        run()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timed(name: str, case: Any, rounds: int, copied: float, multiplied: float) -> Iterator[Row]:
    """Ours and the rivals, in turn: ours in time and as a share of the card, each rival as a ratio."""
    args = copies(case)
    runs, samples, notes = {}, {}, {}
    for who, function in {"ours": case.ours, **case.rivals}.items():
        try:
            runs[who], graph = captured([call(function, a, case.train) for a in args], case.train)
        except (RuntimeError, TypeError, ImportError) as error:  # a rival that this machine cannot run
            if who == "ours":
                raise
            case.missing[who] = str(error).splitlines()[0][:60]
            continue
        samples[who], notes[who] = [], "" if graph else "no graph: it synchronises"
    for round_ in range(rounds + 2):
        for who, run in runs.items():
            took = seconds(run, case.train) / len(args)
            if round_ >= 2:  # the first two warm up
                samples[who].append(took)
    ours = samples.pop("ours")
    median = statistics.median(ours)
    floor = max(case.bytes / copied, case.flops / multiplied)
    yield Row(name, median * 1e6, "us", None, (min(ours) * 1e6, max(ours) * 1e6), note=f"median of {rounds}")
    yield Row(f"{name}, of the card's measured limit", floor / median, "")
    if (least := static_bound(name, torch.cuda.get_device_name())) is not None:
        yield Row(f"{name}, static bound / measured", least / median, "")
    for who, took in samples.items():
        ratios = [a / b for a, b in zip(took, ours, strict=True)]
        spread = (min(ratios), max(ratios))
        yield Row(f"{name}, {who} / ours", statistics.median(ratios), "x", None, spread, note=notes[who])
    for who, why in case.missing.items():
        yield Row(f"{name}, {who} / ours", float("nan"), "x", note=f"not here: {why}")


def static_bound(name: str, device: str) -> float | None:
    """Seconds of the case on that card by suite_cuda_bound.py, if both are known there."""
    cards = [card for card in CARDS if card.name in device]
    found = [entry for entry in entries.ENTRIES if entry.name == name]
    return model.evaluate(found[0], cards[0]).total if cards and found else None


def ceilings(rounds: int) -> tuple[float, float]:
    """Bytes a second of a copy of 1 GB (read and written), and floating-point operations a second of cuBLAS."""
    x = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    a, b = (normal(8192, 8192, dtype=torch.bfloat16, device="cuda", seed=s) for s in (0, 1))
    copy, multiply = (lambda: y.copy_(x)), (lambda: torch.mm(a, b))
    took: dict[Callable[[], Any], list[float]] = {copy: [], multiply: []}
    for round_ in range(rounds + 2):
        for run, samples in took.items():
            once = seconds(run, False)
            if round_ >= 2:
                samples.append(once)
    return 2 * x.numel() * 2 / statistics.median(took[copy]), 2 * 8192**3 / statistics.median(took[multiply])
