"""One layer of experts under transformers: `experts_implementation="synergen"` beside transformers' own best.

Layers shaped like those of Mixtral, OLMoE and Qwen3-MoE, bfloat16, on the CPU, without gradients: 512 tokens (a
prompt) and one (decoding). All implementations compute the same inputs. Ours is checked first: at most twice as far
from float32's result as eager. Then they take turns, so that a busy machine is busy for all; the rival is whichever
has the least median. ``--quick``: fewer rounds.

Widths, experts and experts a token are the models' own; 3.5 GB of memory are needed, and 0.7 more for batched_mm.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from synergen_ext.bench import Progress, Row
from synergen_ext.integrations import transformers as integration
from synergen_ext.testing import normal, worst_error

RIVALS = ("eager", "grouped_mm", "batched_mm")
BARS = {512: ">= 1.5", 1: ">= 1.3"}
#: batched_mm copies the weights of every pair: 512 tokens would want 39 GB (Qwen3-MoE) to 361 GB (Mixtral).
MOST_COPIED = 4 << 30


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer: hidden and inner width, experts and experts a token."""

    hidden: int
    inner: int
    experts: int
    top_k: int

    def build(self) -> Any:
        """The experts module of Mixtral at these sizes: all three models have the same."""
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(hidden_size=self.hidden, intermediate_size=self.inner, num_local_experts=self.experts)
        with torch.device("meta"):
            module = MixtralExperts(config).to(torch.bfloat16)
        module = module.to_empty(device="cpu").requires_grad_(False)
        for parameter in module.parameters():  # rows of length one: outputs of size one
            torch.manual_seed(parameter.shape[2])
            for expert in parameter:
                expert.copy_(torch.randn(expert.shape).mul_(expert.shape[1] ** -0.5))
        return module

    def bytes_of(self, pairs: int) -> int:
        return pairs * 3 * self.hidden * self.inner * 2


LAYERS = {
    "Mixtral": Layer(4096, 14336, 8, 2),
    "OLMoE": Layer(2048, 1024, 64, 8),
    "Qwen3-MoE": Layer(2048, 768, 128, 8),
}


def rows(quick: bool, progress: Progress) -> Iterator[Row]:
    integration.register()
    ratios: dict[int, list[float]] = {tokens: [] for tokens in BARS}
    for number, (name, layer) in enumerate(LAYERS.items()):
        progress(f"build {name}", number, len(LAYERS))
        module = layer.build()
        for tokens in BARS:
            progress(f"{name}, {tokens} tokens", number, len(LAYERS))
            inputs = routed(layer, tokens)
            check(module, inputs)
            rounds = (3 if quick else 9) * (1 if tokens > 1 else 4)
            rivals = [r for r in RIVALS if r != "batched_mm" or layer.bytes_of(tokens * layer.top_k) <= MOST_COPIED]
            took = alternating(module, inputs, ["synergen", *rivals], rounds)
            ours = took.pop("synergen")
            what = f"{name}, {tokens} token{'s' * (tokens > 1)}"
            yield Row(what, median(ours) * 1e3, "ms", None, ends(ours, 1e3), note=f"median of {rounds}")
            best = min(took, key=lambda who: median(took[who]))
            for who in took:
                spread = [a / b for a, b in zip(took[who], ours, strict=True)]
                note = "transformers' best" if who == best else ""
                yield Row(f"{what}, {who} / ours", median(took[who]) / median(ours), "x", None, ends(spread), note=note)
            ratios[tokens].append(median(took[best]) / median(ours))
        del module
    for tokens, bar in BARS.items():
        mean = math.exp(sum(map(math.log, ratios[tokens])) / len(ratios[tokens]))
        what = f"{tokens} token{'s' * (tokens > 1)}, best of transformers / ours, geometric mean"
        yield Row(what, mean, "x", bar, (min(ratios[tokens]), max(ratios[tokens])))


def ends(values: list[float], scale: float = 1.0) -> tuple[float, float]:
    return min(values) * scale, max(values) * scale


def routed(layer: Layer, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of size one, each with different experts and weights that add up to one."""
    x = normal(tokens, layer.hidden, dtype=torch.bfloat16)
    weights, index = normal(tokens, layer.experts, seed=1).topk(layer.top_k)
    return x, index, weights.softmax(-1).bfloat16()


def call(module: Any, implementation: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    module.config._experts_implementation = implementation
    with torch.no_grad():
        y: Tensor = module(*inputs)
    return y


def check(module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Right before it is timed, or an AssertionError; the truth is float32's, over the experts in use."""
    ours, eager = call(module, "synergen", inputs), call(module, "eager", inputs)
    x, index, weights = inputs
    truth = torch.zeros(x.shape)
    for e in index.unique().tolist():
        t, j = torch.where(index == e)
        gate, up = (x[t].float() @ module.gate_up_proj[e].float().T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ module.down_proj[e].float().T
        truth.index_add_(0, t, y * weights[t, j, None].float())
    error, allowed = worst_error(ours, truth), 2 * worst_error(eager, truth)
    if not error <= allowed:
        raise AssertionError(f"suite experts: error must be <= {allowed:.3e}, got {error:.3e}")


def alternating(
    module: Any, inputs: tuple[Tensor, Tensor, Tensor], names: list[str], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each implementation, taking turns; a first turn of all is not counted."""
    took: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name in names:
            start = time.perf_counter()
            call(module, name, inputs)
            if round_:
                took[name].append(time.perf_counter() - start)
    return took
