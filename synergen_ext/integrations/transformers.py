"""`expert_ffn` behind the experts interface of transformers: `register()`, then `experts_implementation="synergen"`.

    synergen_ext.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="synergen")

The interface calls one function for every experts module of every model: with the module, the tokens, and the
router's ids and weights. Modules whose experts are down(silu(gate x) * (up x)) run in our kernel, the gradients too.
Others (biases, another activation, a gate of their own, ...) run in transformers' own implementation, which is said
once for each reason, or refused with `SYNERGEN_STRICT=1`.

Shapes: T tokens, k experts for each, E experts, H hidden and F inner width.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import hf, ops
from .._build import load

NAME = "synergen"

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_CUDA_KERNEL = "expert_ffn" in load().cuda_kernels()
_said: set[str] = set()


def register(name: str = NAME) -> None:
    """Make `experts_implementation=name` known to transformers, for every model of the process, and the classes of
    `synergen_ext.hf` to its Auto classes.

    Models that already exist switch with `model.set_experts_implementation(name)`, and back with any other name.
    Calling it again changes nothing.

    Raises:
        ImportError: transformers is missing, or older than 5.7 (which refuses names registered at run time), or its
            experts interface is another one than this module knows.
    """
    global _known
    known = _look_at_transformers()
    known.functions[name] = experts_forward
    try:
        known.check(name)
    except ValueError:
        del known.functions[name]
        from transformers import __version__

        raise ImportError(
            f"synergen_ext: transformers {__version__} refuses experts implementations that are registered at run time;"
            " run `pip install -U 'transformers>=5.7'`"
        ) from None
    if known.scaled_functions is not None:
        known.scaled_functions[name] = _scaled_forward
    _known = known
    hf.register()


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's forward.

    Under autocast, tokens are rounded to its dtype and so are the products' results; on the CPU the weights are read
    as they are, elsewhere they are rounded too, as autocast does it for a linear layer.

    Args:
        self: the experts module.
        hidden_states: [T, H].
        top_k_index: [T, k], ids of experts. One >= num_experts (another rank's) adds zero and gets no gradient.
        top_k_weights: [T, k], or [T, E] as early 5.x had it (where k = E, it is taken for [T, k]).

    Returns:
        [T, H], the dtype of hidden_states.
    """
    if top_k_weights.shape != top_k_index.shape:
        top_k_weights = top_k_weights.gather(1, top_k_index.clamp(max=top_k_weights.shape[1] - 1))
    reason = why_not_fused(self, hidden_states)
    if reason is not None:
        return _delegated(self, reason, hidden_states, top_k_index, top_k_weights)

    gate, up, down = _experts(self)
    device = hidden_states.device.type
    x = hidden_states
    if device != "meta" and torch.is_autocast_enabled(device):
        short = torch.get_autocast_dtype(device)
        x = x.to(short)
        if device != "cpu":  # a GPU's tensor cores take both operands in one dtype
            gate, up, down = gate.to(short), up.to(short), down.to(short)
    if gate.dtype not in (torch.float32, x.dtype):
        x = x.to(gate.dtype)
    if top_k_weights.dtype not in (torch.float32, x.dtype):
        top_k_weights = top_k_weights.float()
    y = ops.expert_ffn(x, gate, up, down, top_k_index.long(), top_k_weights)
    return y.to(hidden_states.dtype)


def why_not_fused(experts: Any, hidden_states: Tensor) -> str | None:
    """Why an experts module does not run in our kernel on these tokens; None where it does."""
    device = hidden_states.device.type
    if device not in ("cpu", "cuda", "meta"):
        return f"there are no kernels for {device}"
    if device == "cuda" and not _HAS_CUDA_KERNEL:
        return "this build has no CUDA kernel of expert_ffn"
    if not getattr(experts, "has_gate", True):
        return "experts without a gate"
    if getattr(experts, "has_bias", False):
        return "experts with biases"
    if getattr(experts, "has_post_expert_norm", False):
        return "a norm after each expert"
    if _has_own_gate(experts):
        return "a gate of the model's own (_apply_gate)"
    activation = getattr(experts, "act_fn", None)
    if not _is_silu(activation):
        return f"activation {getattr(activation, '__name__', type(activation).__name__)}"
    weights = experts.gate_up_proj
    if weights.dtype not in _FLOATS or experts.down_proj.dtype != weights.dtype:
        return f"weights of {weights.dtype} and {experts.down_proj.dtype}"
    if weights.shape[0] != experts.num_experts:
        return f"weights of {weights.shape[0]} experts where num_experts is {experts.num_experts}"
    return None


def _experts(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """gate and up [E, F, H] and down [E, H, F] as views: nothing is copied.

    Cut by unbind, whose gradient is one stack of both halves. Two slices would each fill a whole gate_up_proj with
    zeros and then add them up.
    """
    gate_up, down = _local(module.gate_up_proj), _local(module.down_proj)
    transposed = getattr(module, "is_transposed", False)
    columns = 2 if transposed else 1
    inner = gate_up.shape[columns] // 2
    if getattr(module, "is_concatenated", True):
        gate, up = gate_up.unflatten(columns, (2, inner)).unbind(columns)
    else:
        gate, up = gate_up.unflatten(columns, (inner, 2)).unbind(columns + 1)
    if transposed:
        return gate.transpose(1, 2), up.transpose(1, 2), down.transpose(1, 2)
    return gate, up, down


def _local(parameter: Any) -> Tensor:
    """This rank's part of a DTensor; anything else as it is."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _has_own_gate(module: Any) -> bool:
    return type(module)._apply_gate is not _transformers().default_gate or "_apply_gate" in module.__dict__


def _is_silu(activation: Any) -> bool:
    """Whether it is silu itself: a subclass may compute something else."""
    return activation is F.silu or type(activation) is nn.SiLU or type(activation) is _transformers().silu


# ---- What transformers runs instead ---------------------------------------------------------------------------------


def _delegated(module: Any, reason: str, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    name, function = _best(module, hidden_states)
    _say(f"{type(module).__name__} runs in transformers' own {name}, not in the fused kernel: {reason}", reason)
    return function(module, hidden_states, index, weights)


def _best(module: Any, hidden_states: Tensor) -> tuple[str, Callable[..., Tensor]]:
    """transformers' own implementation for a module: grouped_mm, its default, where that is right and can run.

    On a GPU, one token takes batched_mm, as in transformers' own generate: it needs no sort. On the CPU, grouped_mm
    wants rows of whole 16 bytes. And all but the module's own forward take gate and up for halves, unless the module
    has a gate of its own.
    """
    functions = _transformers().functions
    gated = getattr(module, "has_gate", True)
    up = module.gate_up_proj if gated else module.up_proj
    names = ["grouped_mm"]
    if up.device.type == "cuda" and hidden_states.shape[0] == 1:
        names.insert(0, "batched_mm")
    sizes = [*up.shape[1:], *module.down_proj.shape[1:]]
    ragged = up.device.type == "cpu" and any(size * up.element_size() % 16 for size in sizes)
    interleaved = gated and not getattr(module, "is_concatenated", True) and not _has_own_gate(module)
    for name in names:
        if name in functions and not ragged and not interleaved:
            return name, functions[name]
    return "eager", type(module).forward.__wrapped__


def _scaled_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts whose weights are float8 with scales beside them: all of them run in transformers."""
    functions = _transformers().scaled_functions
    assert functions is not None
    _say(
        f"{type(self).__name__} runs in transformers' own grouped_mm, not in the fused kernel: float8 weights", "float8"
    )
    return functions["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)


@torch.compiler.assume_constant_result
def _say(what: str, reason: str) -> None:
    """Warn once for each reason, or refuse with SYNERGEN_STRICT=1. Under torch.compile it runs while tracing."""
    if os.environ.get("SYNERGEN_STRICT", "") not in ("", "0"):
        raise RuntimeError(f"synergen_ext: {what}; SYNERGEN_STRICT=1 refuses that")
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"synergen_ext: {what}", stacklevel=2)


# ---- What is asked of transformers, imported by register() ----------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What is used of transformers."""

    functions: MutableMapping[str, Callable[..., Tensor]]  # by name of an experts implementation
    scaled_functions: MutableMapping[str, Callable[..., Tensor]] | None  # the same for experts in float8
    default_gate: Callable[..., Tensor]
    silu: type[nn.Module]
    check: Callable[[str], str]  # of a name; raises ValueError


_known: _Known | None = None


def _transformers() -> _Known:
    if _known is None:
        raise RuntimeError("synergen_ext: call synergen_ext.integrations.transformers.register() first")
    return _known


def _look_at_transformers() -> _Known:
    try:
        from transformers import PreTrainedModel, __version__
    except ModuleNotFoundError as error:
        if error.name != "transformers":  # one of its own requirements
            raise
        raise ImportError("synergen_ext: needs transformers; run `pip install 'transformers>=5.7'`") from None
    try:
        from transformers.activations import SiLUActivation
        from transformers.integrations import finegrained_fp8, moe

        return _Known(
            moe.ALL_EXPERTS_FUNCTIONS,
            getattr(finegrained_fp8, "ALL_FP8_EXPERTS_FUNCTIONS", None),
            moe._default_apply_gate,
            SiLUActivation,
            partial(PreTrainedModel.get_correct_experts_implementation, cast(Any, None)),
        )
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"synergen_ext: needs the experts interface of transformers 5.7 or later, got transformers {__version__}"
            f" ({error}); run `pip install -U 'transformers>=5.7'`"
        ) from None
