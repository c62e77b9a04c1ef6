"""experts_implementation="synergen": every experts class and every MoE model that transformers ships against its own
eager forward, then the interface's contract, case by case."""

import copy
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from moe_models import experts_class, experts_classes, tiny_config, tiny_experts, tiny_models
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.integrations import finegrained_fp8, moe
from transformers.integrations.moe import use_experts_implementation

from synergen_ext import bench, ops
from synergen_ext.integrations import transformers as integration
from synergen_ext.testing import assert_as_accurate, normal

OWN_GATE = "a gate of the model's own (_apply_gate)"
#: Classes whose experts are not down(silu(gate x) * (up x)), and what why_not_fused says of them.
DELEGATED = {
    "BeamExperts": OWN_GATE,
    "DeepseekV4Experts": OWN_GATE,
    "DiffusionGemmaTextExperts": "activation GELUTanh",
    "Gemma4TextExperts": "activation GELUTanh",
    "Glm5NextTextExperts": OWN_GATE,
    "GptOssExperts": "experts with biases",
    "HYV4Experts": OWN_GATE,
    "Inkling2Experts": OWN_GATE,
    "MiniMaxM3VLExperts": OWN_GATE,
    "MuseSparkExperts": "a norm after each expert",
    "NemotronHExperts": "experts without a gate",
    "OpenAIPrivacyFilterExperts": "experts with biases",
}
#: Classes whose models are left out; the class by itself is tested all the same.
NO_MODEL = {
    "Qwen3OmniMoeTalkerTextExperts": "the talker has no embedding of ids: it goes on from the thinker's hidden states",
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known to transformers, nothing said yet."""
    integration.register()
    monkeypatch.setattr(integration, "_said", set())
    monkeypatch.delenv("SYNERGEN_STRICT", raising=False)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Our op, counting its calls."""
    counted = Mock(wraps=ops.expert_ffn)
    monkeypatch.setattr(ops, "expert_ffn", counted)
    return counted


def use(module: Any, implementation: str) -> None:
    module.config._experts_implementation = implementation


def fill(module: nn.Module, seed: int = 0) -> None:
    """Weights that keep values at size one; as models initialise them, experts would hardly show in their outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def routing(tokens: int, experts: int, top_k: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, index = scores.topk(top_k)
    return index, weights


def with_gradients(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> list[Tensor]:
    """Output, and gradients of tokens, routing weights and parameters."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = module(x, index, weights)
    leaves = [x, weights, *module.parameters()]
    upstream = normal(*y.shape, dtype=torch.float64, seed=9).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def assert_equal_to_eager(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> None:
    results = []
    for implementation in ("eager", "synergen"):
        use(module, implementation)
        results.append(with_gradients(module, x, index, weights))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert results[0][0].abs().max() > 0.1  # an output of zeros would not pass for an accurate one


# ---- Every class that transformers ships --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:synergen_ext")
@pytest.mark.parametrize("name", experts_classes())
def test_every_experts_class(name: str, fused: Mock) -> None:
    """float32 equal to eager; bfloat16 at most twice as far from float64 as eager; ours was called, or says why not."""
    experts, config = tiny_experts(experts_class(name))
    fill(experts)
    x = normal(11, experts.down_proj.shape[1 if not experts.is_transposed else 2], seed=1)
    index, weights = routing(11, experts.num_experts, 2)
    reason = DELEGATED.get(type(experts).__name__)
    assert integration.why_not_fused(experts, x) == reason
    assert_equal_to_eager(experts, x, index, weights)
    assert fused.call_count == (reason is None)
    if reason is not None:
        return
    results = {}
    for who, dtype in (("ours", torch.bfloat16), ("eager", torch.bfloat16), ("truth", torch.float64)):
        other = copy.deepcopy(experts).bfloat16().to(dtype)
        use(other, "synergen" if who == "ours" else "eager")
        short = x.bfloat16().to(dtype), index, weights.bfloat16().to(dtype)
        results[who] = with_gradients(other, *short)
    assert_as_accurate(results["ours"], results["eager"], results["truth"], name)


@pytest.mark.filterwarnings("ignore:synergen_ext")
@pytest.mark.parametrize("name", [n for n in experts_classes() if n.partition(":")[2] not in NO_MODEL])
def test_every_model(name: str, fused: Mock) -> None:
    """A tiny model around every class: outputs and all gradients equal to eager's."""
    kind = experts_class(name)
    _, config = tiny_experts(kind)
    for candidate in tiny_models(kind, config):
        model = candidate(config).eval()
        if any(type(module) is kind for module in model.modules()):
            break
    else:
        pytest.fail(f"no model with {kind.__name__}")
    fill(model)
    ids = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    results = []
    for implementation in ("eager", "synergen"):
        model.set_experts_implementation(implementation)
        out = model(input_ids=ids, use_cache=False)
        y = out.logits if "logits" in out else out.last_hidden_state
        model.zero_grad()
        (y * normal(*y.shape, seed=5) / y.numel() ** 0.5).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"output": y.detach(), **grads})
    eager, ours = results
    assert eager.keys() == ours.keys() and any("experts" in n for n in ours)
    for n in eager:
        torch.testing.assert_close(ours[n], eager[n], rtol=1e-4, atol=1e-4, msg=lambda text, n=n: f"{n}: {text}")
    assert bool(fused.call_count) == (kind.__name__ not in DELEGATED)


def test_the_lists_name_classes_that_exist() -> None:
    names = {name.partition(":")[2] for name in experts_classes()}
    assert len(names) >= 40 and set(DELEGATED) | set(NO_MODEL) <= names


# ---- The contract, with a plain module ----------------------------------------------------------------------------


class PlainExperts(nn.Module):
    """Every form that the interface knows, token by token."""

    def __init__(self, config: Any, act_fn: Any = None, experts: int = 4, dim: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.num_experts, self.act_fn = experts, act_fn or nn.SiLU()
        name, rows = ("gate_up_proj", 2 * inner) if self.gated else ("up_proj", inner)
        shapes = {name: (experts, rows, dim), "down_proj": (experts, dim, inner)}
        for name, shape in shapes.items():
            if self.transposed:
                shape = shape[0], shape[2], shape[1]
            setattr(self, name, nn.Parameter(normal(*shape, seed=len(name)) * 0.25))
            if self.biased:
                setattr(self, f"{name}_bias", nn.Parameter(normal(experts, shape[-1 if self.transposed else 1])))

    def linear(self, x: Tensor, name: str, e: int) -> Tensor:
        w = getattr(self, name)[e]
        y = x @ (w if self.transposed else w.T)
        return y + getattr(self, f"{name}_bias")[e] if self.biased else y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = []
        for x, ids, weights in zip(hidden_states, top_k_index.tolist(), top_k_weights, strict=True):
            y = torch.zeros_like(x)
            for e, w in zip(ids, weights, strict=False):
                if e >= self.num_experts:
                    continue
                h = self.linear(x, "gate_up_proj" if self.gated else "up_proj", e)
                if self.own_gate:
                    h = self._apply_gate(h)
                elif self.gated:
                    gate, up = h.chunk(2, -1) if self.concatenated else (h[..., ::2], h[..., 1::2])
                    h = self.act_fn(gate) * up
                else:
                    h = self.act_fn(h)
                y = y + self.linear(h, "down_proj", e) * w
            rows.append(y)
        return torch.stack(rows).to(hidden_states.dtype)


def plain(
    transposed: bool = False,
    concatenated: bool = True,
    biased: bool = False,
    gated: bool = True,
    own_gate: bool = False,
    **sizes: Any,
) -> Any:
    """A module of a class of its own, through the decorator that models use."""
    flags = {
        "transposed": transposed, "concatenated": concatenated, "biased": biased, "gated": gated, "own_gate": own_gate,
    }  # fmt: skip
    kind = type("Plain", (PlainExperts,), {**flags, "forward": PlainExperts.forward})
    if own_gate:
        kind._apply_gate = lambda self, h: h[..., ::2].clamp(max=1) * (h[..., 1::2] + 1)
    use_experts_implementation(
        kind, is_transposed=transposed, is_concatenated=concatenated, has_bias=biased, has_gate=gated
    )
    return kind(SimpleNamespace(_experts_implementation="synergen"), **sizes)


def tokens(n: int = 9, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return normal(n, dim, seed=1), *routing(n, 4, 2)


FORMS = [
    {"transposed": t, "concatenated": c, "inner": inner}
    for t in (False, True)
    for c in (True, False)
    for inner in (24, 7)
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layouts_are_read_where_they_lie(form: dict, fused: Mock) -> None:
    experts = plain(**form)
    assert_equal_to_eager(experts, *tokens())
    (_, gate, up, down, *_), _ = fused.call_args
    for view, parameter in ((gate, experts.gate_up_proj), (up, experts.gate_up_proj), (down, experts.down_proj)):
        assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert down.data_ptr() == experts.down_proj.data_ptr() and gate.shape == up.shape


@pytest.mark.filterwarnings("ignore:synergen_ext")
@pytest.mark.parametrize("inner", [24, 7])
@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"biased": True}, "biases"),
        ({"biased": True, "transposed": True, "concatenated": False}, "biases"),
        ({"gated": False, "act_fn": nn.ReLU()}, "without a gate"),
        ({"gated": False}, "without a gate"),
        ({"own_gate": True, "concatenated": False}, "_apply_gate"),
        ({"own_gate": True, "biased": True, "transposed": True}, "biases"),
        ({"act_fn": nn.GELU()}, "activation GELU"),
        ({"act_fn": F.relu, "concatenated": False}, "activation relu"),
        ({"act_fn": type("Capped", (nn.SiLU,), {"forward": lambda self, x: F.silu(x).clamp(max=0.3)})()}, "Capped"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_is_not_fused_is_right_all_the_same(form: dict, reason: str, inner: int, fused: Mock) -> None:
    experts = plain(**form, inner=inner)
    assert reason in str(integration.why_not_fused(experts, tokens()[0]))
    assert_equal_to_eager(experts, *tokens())
    assert not fused.called


@pytest.mark.parametrize(
    "activation", [nn.SiLU(), F.silu, "silu", "swish"], ids=["module", "function", "silu", "swish"]
)
def test_silu_by_all_its_names(activation: Any, fused: Mock) -> None:
    from transformers.activations import ACT2FN

    experts = plain(act_fn=ACT2FN[activation] if isinstance(activation, str) else activation)
    assert_equal_to_eager(experts, *tokens())
    assert fused.call_count == 1


@pytest.mark.filterwarnings("ignore:synergen_ext")
def test_a_gate_put_on_the_module_itself_is_seen(fused: Mock) -> None:
    experts = plain()
    experts._apply_gate = lambda h: h[..., :24] * 0 + 1
    x, index, weights = tokens()
    y = experts(x, index, weights)
    assert not fused.called
    one_each = torch.stack([experts.down_proj[ids].sum((0, 2)) for ids in index])
    torch.testing.assert_close(plain()(x, index, weights).shape, y.shape)
    torch.testing.assert_close(experts(x, index, torch.ones_like(weights)), one_each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parallel", [False, True])
def test_experts_of_other_ranks_add_zero_and_get_no_gradient(parallel: bool, fused: Mock) -> None:
    experts = plain()
    experts._is_expert_parallel = parallel
    x, index, weights = tokens()
    index[0], index[1, 0], index[2, 1] = 4, 4, 77  # token 0 has no expert here
    assert_equal_to_eager(experts, x, index, weights)
    y, dx, dweights, *_ = with_gradients(experts, x, index, weights)
    assert fused.call_count == 2
    assert not y[0].any() and not dx[0].any() and not dweights[index >= 4].any() and dweights[index < 4].all()


def test_no_token_and_one_token() -> None:
    experts = plain()
    x, index, weights = tokens()
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, 16)
    torch.testing.assert_close(experts(x[:1], index[:1], weights[:1]), experts(x, index, weights)[:1])


def test_routing_weights_of_all_experts_as_early_versions_had_them() -> None:
    experts = plain()
    x, index, weights = tokens()
    index[3, 0] = 4
    full = torch.zeros(9, 4).scatter(1, index.clamp(max=3), weights)
    full[3] = 0.7
    weights[3] = 0.7
    torch.testing.assert_close(experts(x, index, full), experts(x, index, weights))


@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routed", [torch.float32, None])
def test_dtypes(short: torch.dtype, routed: torch.dtype | None) -> None:
    """All in one; router in float32; tokens in float32 before weights that are not; ids in int32."""
    experts = plain().to(short)
    x, index, weights = tokens()
    y = experts(x.to(short), index, weights.to(routed or short))
    assert y.dtype is short
    wide = experts(x, index.int(), weights.double() if routed else weights)
    assert wide.dtype is torch.float32
    torch.testing.assert_close(wide, y.float(), rtol=2e-2, atol=2e-2)


def test_autocast() -> None:
    """float32 weights, tokens rounded by autocast: at most twice eager's error under the same autocast."""
    x, index, weights = tokens(40)
    results = {}
    for who in ("ours", "eager", "truth"):
        experts = plain()
        use(experts, "synergen" if who == "ours" else "eager")
        if who == "truth":
            results[who] = with_gradients(experts.double(), x.double(), index, weights.double())
            continue
        with torch.autocast("cpu", torch.bfloat16):
            results[who] = with_gradients(experts, x, index, weights)
    assert [t.dtype for t in results["ours"]] == [t.dtype for t in results["eager"]] == [torch.float32] * 5
    assert_as_accurate(results["ours"], results["eager"], results["truth"])
    assert (results["ours"][0] - results["truth"][0]).abs().max() > 1e-4  # autocast did round


def test_meta_tensors() -> None:
    y = plain().to("meta")(*(t.to("meta") for t in tokens(5)))
    assert y.is_meta and y.shape == (5, 16)


def test_dtensor_parameters(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        experts, x = plain(), tokens()
        wanted = with_gradients(experts, *x)
        mesh = init_device_mesh("cpu", (1,))
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Replicate()])))
        got = with_gradients(experts, *x)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(getattr(a, "to_local", lambda a=a: a)(), b)
    finally:
        dist.destroy_process_group()


# ---- Said once, or refused ----------------------------------------------------------------------------------------


def test_a_delegation_is_said_once_for_each_reason() -> None:
    x = tokens()
    with pytest.warns(UserWarning, match="Plain runs in transformers' own grouped_mm, .*: experts with biases"):
        plain(biased=True)(*x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(biased=True)(*x)
        plain()(*x)
    with pytest.warns(UserWarning, match="own eager, .*: activation GELU"):
        plain(act_fn=nn.GELU(), inner=7)(*x)


def test_strict_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNERGEN_STRICT", "1")
    plain()(*tokens())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="experts with biases; SYNERGEN_STRICT=1 refuses that"):
            plain(biased=True)(*tokens())
    monkeypatch.setenv("SYNERGEN_STRICT", "0")
    with pytest.warns(UserWarning, match="biases"):
        plain(biased=True)(*tokens())


def test_weights_that_are_no_floats_are_not_fused() -> None:
    experts, x = plain(), tokens()[0]
    experts.num_experts = 3
    assert "4 experts where num_experts is 3" in str(integration.why_not_fused(experts, x))
    experts.gate_up_proj = nn.Parameter(torch.zeros(4, 48, 16, dtype=torch.int8), requires_grad=False)
    assert "torch.int8" in str(integration.why_not_fused(experts, x))
    assert "no kernels for mps" in str(integration.why_not_fused(experts, SimpleNamespace(device=torch.device("mps"))))


def test_a_build_without_the_cuda_kernel_delegates(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(integration, "_HAS_CUDA_KERNEL", False)
    assert "no CUDA kernel" in str(integration.why_not_fused(plain(), on_gpu))
    monkeypatch.setattr(integration, "_HAS_CUDA_KERNEL", True)
    assert integration.why_not_fused(plain(), on_gpu) is None


def test_float8_experts_run_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Mock(return_value="y")
    monkeypatch.setitem(finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", theirs)
    with pytest.warns(UserWarning, match="float8 weights"):
        y = finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS["synergen"](plain(), *tokens())
    assert y == "y" and theirs.call_count == 1


# ---- Under torch.compile ------------------------------------------------------------------------------------------


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def compiled(module: Any, graphs: list) -> Any:
    """One graph or an error; what dynamo made is kept in `graphs`."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return torch.compile(module, fullgraph=True, backend=backend)


def count_calls(graph: torch.fx.GraphModule) -> int:
    return sum("expert_ffn" in str(node.target) for node in graph.graph.nodes)


def test_compiled_into_one_graph_with_our_op_in_it(graphs: list) -> None:
    experts, (x, index, weights) = plain(), tokens()
    wanted = with_gradients(experts, x, index, weights)
    fast = compiled(experts, graphs)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    y = fast(x, index, weights)
    y.backward(normal(*y.shape, dtype=torch.float64, seed=9).float())
    got = [y.detach(), x.grad, weights.grad, *(p.grad for p in experts.parameters())]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert [count_calls(g) for g in graphs] == [1]
    for n in (5, 6, 7):  # other numbers of tokens: one graph more, for all of them
        with torch.no_grad():
            fast(*tokens(n))
    assert len(graphs) <= 3


def test_a_compiled_moe_block_has_no_break(graphs: list) -> None:
    config = tiny_config(MixtralConfig)
    config._experts_implementation = "synergen"
    model = MixtralForCausalLM(config).eval()
    block = model.model.layers[0].mlp
    x = normal(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(block, graphs)(x), block(x))
    assert [count_calls(g) for g in graphs] == [1]


def test_a_compiled_delegation_warns_and_strict_refuses(graphs: list, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, x = plain(biased=True), tokens()
    with pytest.warns(UserWarning, match="experts with biases"):
        torch.testing.assert_close(compiled(experts, graphs)(*x), experts(*x))
    assert [count_calls(g) for g in graphs] == [0]
    torch._dynamo.reset()
    monkeypatch.setenv("SYNERGEN_STRICT", "1")
    with pytest.raises(Exception, match="SYNERGEN_STRICT=1 refuses that"):
        compiled(experts, graphs)(*x)


# ---- In models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral() -> MixtralForCausalLM:
    model = MixtralForCausalLM(tiny_config(MixtralConfig)).eval()
    fill(model)
    return model


IDS = torch.arange(1, 15).view(2, 7)


def test_loaded_switched_and_back(mixtral: MixtralForCausalLM, tmp_path: Path, fused: Mock) -> None:
    mixtral.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="synergen")
    wanted = mixtral(IDS).logits
    for implementation, calls in (("synergen", 2), ("eager", 0), ("synergen", 2), ("batched_mm", 0)):
        model.set_experts_implementation(implementation)
        fused.reset_mock()
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        assert fused.call_count == calls
    for value in ({"": "synergen"}, "synergen"):
        assert AutoModelForCausalLM.from_pretrained(
            tmp_path, experts_implementation=value
        ).get_experts_implementation() == {"": "synergen"}


def test_generate(mixtral: MixtralForCausalLM, fused: Mock) -> None:
    """Prefill, then one row at a time."""
    sequences = []
    for implementation in ("eager", "synergen"):
        mixtral.set_experts_implementation(implementation)
        sequences.append(mixtral.generate(IDS, max_new_tokens=5, do_sample=False))
    assert torch.equal(*sequences) and fused.call_count == 2 * 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(mixtral: MixtralForCausalLM, reentrant: bool, fused: Mock) -> None:
    results = []
    for checkpointing in (False, True):
        model = copy.deepcopy(mixtral).train()
        model.set_experts_implementation("synergen")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        results.append([p.grad for p in model.parameters()])
    assert fused.call_count == 2 + 4
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_sub_configs() -> None:
    """Experts of one part of a composite model."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeModel
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig, Qwen3VLMoeVisionConfig

    config = Qwen3VLMoeConfig(
        text_config=tiny_config(Qwen3VLMoeTextConfig).to_dict(),
        vision_config=tiny_config(Qwen3VLMoeVisionConfig, depth=1, num_heads=2).to_dict(),
    )
    with torch.device("meta"):
        model = Qwen3VLMoeModel(config)
    model.set_experts_implementation({"text_config": "synergen"})
    found = model.get_experts_implementation()
    assert found["text_config"] == "synergen" and model.language_model.config._experts_implementation == "synergen"
    assert found[""] != "synergen"


# ---- Registering --------------------------------------------------------------------------------------------------


def test_registering_again_or_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    integration.register()
    monkeypatch.setattr(moe.ALL_EXPERTS_FUNCTIONS, "_global_mapping", dict(moe.ALL_EXPERTS_FUNCTIONS._global_mapping))
    integration.register("other")
    assert moe.ALL_EXPERTS_FUNCTIONS["other"] is moe.ALL_EXPERTS_FUNCTIONS["synergen"] is integration.experts_forward


def test_nothing_is_imported_before_registering() -> None:
    code = "import sys, synergen_ext; synergen_ext.integrations.transformers; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_known", None)
    with pytest.raises(RuntimeError, match=r"call synergen_ext.integrations.transformers.register\(\) first"):
        plain()(*tokens())


def test_transformers_without_the_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match="pip install 'transformers>=5.7'"):
            integration.register()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.integrations.moe", None)
        patch.delattr("transformers.integrations.moe", raising=False)
        with pytest.raises(ImportError, match="needs the experts interface of transformers 5.7 or later, got"):
            integration.register()
    monkeypatch.delattr(moe, "_default_apply_gate")
    with pytest.raises(ImportError, match="needs the experts interface .*_default_apply_gate"):
        integration.register()


def test_transformers_that_refuses_names_registered_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def hard_coded(self: Any, name: str) -> str:
        raise ValueError(f"{name} is not supported")

    monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", hard_coded)
    with pytest.raises(ImportError, match="refuses experts implementations that are registered at run time"):
        integration.register("later")
    assert "later" not in moe.ALL_EXPERTS_FUNCTIONS


def test_the_benchmark_checks_then_times(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = bench.load_suite("experts")
    monkeypatch.setattr(suite, "LAYERS", {"Tiny": suite.Layer(32, 24, 4, 2)})
    rows = list(suite.rows(True, lambda *_: None))
    assert [r.bar for r in rows if r.bar] == [">= 1.5", ">= 1.3"] and len(rows) == 2 * (1 + 3) + 2
    assert all(r.value > 0 for r in rows) and sum(r.note == "transformers' best" for r in rows) == 2
    monkeypatch.setattr(ops, "expert_ffn", lambda *args, right=ops.expert_ffn: right(*args) * 1.1)
    with pytest.raises(AssertionError, match="error must be <="):
        list(suite.rows(True, lambda *_: None))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "use-as-a-backend.md"
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
