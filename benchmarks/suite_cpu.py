"""`expert_ffn` on the CPU in bfloat16 at the paper's shape: D = 2048, F = 8192, a text and a visual expert, mixed.

64, 512 and 4,096 tokens forward, 512 backward, beside transformers' own implementations and beside two chains of dense
`linear` layers over the same rows, sorted beforehand (a router's work for nothing). One, two and eight rows for each
expert, where reading the weights is what takes the time, beside a sum over as many bytes: that is as fast as PyTorch
reads. Each case is checked before it is timed: at most twice as far from float32's result as eager. Then all take
turns; a ratio is the median of the ratios of the rounds. ``--quick``: three rounds.

As many threads as PyTorch has (`OMP_NUM_THREADS`). 2 GB of memory are needed, and up to 4 more for batched_mm.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synergen_ext.bench import Progress, Row
from synergen_ext.integrations import transformers as integration
from synergen_ext.testing import normal, worst_error

sys.path.insert(0, str(Path(__file__).parent))
from suite_experts import MOST_COPIED, RIVALS, Layer, call, check, ends  # noqa: E402

PAPER = Layer(hidden=2048, inner=8192, experts=2, top_k=1)
FORWARD = (64, 512, 4096)
BACKWARD = 512
FORWARD_BARS = {"best": ">= 1.5", "dense": ">= 0.95"}  # of transformers' best; of the dense layers
BACKWARD_BARS = {"eager": ">= 1.2"}
FEW = (2, 4, 16)  # tokens: half of them for each expert

Inputs = tuple[Tensor, Tensor, Tensor]


def rows(quick: bool, progress: Progress) -> Iterator[Row]:
    integration.register()
    steps = len(FORWARD) + len(FEW) + 1
    progress("build", 0, steps)
    module = PAPER.build()
    rounds = 3 if quick else 9
    for number, tokens in enumerate(FORWARD):
        progress(f"forward, {tokens} tokens", number, steps)
        inputs = mixed(tokens)
        check(module, inputs)
        took = alternating(forward_runs(module, inputs), rounds)
        yield from compared(f"forward, {tokens} tokens", took, flops=tokens * PAPER.bytes_of(1), bars=FORWARD_BARS)
    progress(f"backward, {BACKWARD} tokens", len(FORWARD), steps)
    inputs = mixed(BACKWARD)
    runs = backward_runs(module, inputs)
    check_backward(module, inputs, runs)
    took = alternating(runs, rounds)
    yield from compared(
        f"backward, {BACKWARD} tokens", took, flops=2 * BACKWARD * PAPER.bytes_of(1), bars=BACKWARD_BARS
    )
    module.requires_grad_(False)
    for number, tokens in enumerate(FEW):
        progress(f"{tokens // 2} rows for each expert", len(FORWARD) + 1 + number, steps)
        yield from streamed(module, tokens, 4 * rounds)


def mixed(tokens: int) -> Inputs:
    """Half of the tokens visual, at random places; the router's weights are ones."""
    x = normal(tokens, PAPER.hidden, dtype=torch.bfloat16)
    index = normal(tokens, seed=1).argsort()[:, None] % PAPER.experts
    return x, index, torch.ones(tokens, 1, dtype=torch.bfloat16)


def forward_runs(module: Any, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    names = ["synergen", *(r for r in RIVALS if r != "batched_mm" or PAPER.bytes_of(len(inputs[0])) <= MOST_COPIED)]
    runs: dict[str, Callable[[], Any]] = {name: lambda name=name: call(module, name, inputs) for name in names}
    x, index, _ = inputs
    sorted_rows = [x[index[:, 0] == e] for e in range(PAPER.experts)]

    def dense() -> None:
        for e, own in enumerate(sorted_rows):
            gate, up = F.linear(own, module.gate_up_proj[e]).chunk(2, -1)
            F.linear(F.silu(gate) * up, module.down_proj[e])

    return {**runs, "dense": dense}


def backward_runs(module: Any, inputs: Inputs) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Only the backward pass: what it needs is kept from one forward pass."""
    module.requires_grad_(True)
    x, index, weights = inputs
    x = x.clone().requires_grad_(True)
    dy = normal(*x.shape, dtype=torch.bfloat16, seed=2)

    def run(name: str) -> Callable[[], tuple[Tensor, ...]]:
        module.config._experts_implementation = name
        y = module(x, index, weights)
        return lambda: torch.autograd.grad(y, (x, *module.parameters()), dy, retain_graph=True)

    return {name: run(name) for name in ("synergen", "eager", "grouped_mm")}


def check_backward(module: Any, inputs: Inputs, runs: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """The three gradients, or an AssertionError; the truth is float32's."""
    x, index, _ = inputs
    leaves = [t.detach().float().requires_grad_(True) for t in (x, *module.parameters())]
    dy, places = normal(*x.shape, dtype=torch.bfloat16, seed=2).float(), index[:, 0]
    total = torch.zeros(())
    for e in range(PAPER.experts):
        gate, up = (leaves[0][places == e] @ leaves[1][e].T).chunk(2, -1)
        total = total + ((F.silu(gate) * up) @ leaves[2][e].T * dy[places == e]).sum()
    truth = torch.autograd.grad(total, leaves)
    for ours, eager, true in zip(runs["synergen"](), runs["eager"](), truth, strict=True):
        error, allowed = worst_error(ours, true), 2 * worst_error(eager, true)
        if not error <= allowed:
            raise AssertionError(f"suite cpu: error of a gradient must be <= {allowed:.3e}, got {error:.3e}")


def alternating(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, taking turns; a first turn of all is not counted."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                took[name].append(time.perf_counter() - start)
    return took


def compared(what: str, took: dict[str, list[float]], flops: float, bars: dict[str, str]) -> Iterator[Row]:
    """Ours, then every rival over ours."""
    ours = took["synergen"]
    note = f"median of {len(ours)}, {flops / median(ours) / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads"
    yield Row(what, median(ours) * 1e3, "ms", None, ends(ours, 1e3), note=note)
    best = min((who for who in took if who in RIVALS), key=lambda who: median(took[who]))
    for who in took:
        if who == "synergen":
            continue
        ratios = [a / b for a, b in zip(took[who], ours, strict=True)]
        bar = bars.get("best") if who == best else None
        note = "transformers' best" if who == best else "the rows sorted beforehand" if who == "dense" else ""
        yield Row(f"{what}, {who} / ours", median(ratios), "x", bars.get(who, bar), ends(ratios), note=note)


def streamed(module: Any, tokens: int, rounds: int) -> Iterator[Row]:
    """GB/s of weights, beside eager and a sum over the same bytes, as float32."""
    inputs = mixed(tokens)
    check(module, inputs)
    parameters = [p.detach().view(torch.float32) for p in module.parameters()]
    runs = {
        "synergen": lambda: call(module, "synergen", inputs),
        "eager": lambda: call(module, "eager", inputs),
        "sum": lambda: [p.sum() for p in parameters],
    }
    took = alternating(runs, rounds)
    read = PAPER.bytes_of(PAPER.experts) / 1e9
    what = f"forward, {tokens // 2} rows for each expert"
    speeds = [read / t for t in took["synergen"]]
    yield Row(what, median(speeds), "GB/s", None, ends(speeds), note=f"median of {rounds}")
    for who, note in (("eager", ""), ("sum", "reading alone")):
        ratios = [a / b for a, b in zip(took[who], took["synergen"], strict=True)]
        yield Row(f"{what}, {who} / ours", median(ratios), "x", None, ends(ratios), note=note)
