"""Every experts class that transformers ships, and tiny models around them. Found by their decorator, so that a later
release brings its own."""

import importlib
import inspect
import re
from os.path import commonprefix
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

#: What a size is set to, by the names that configs have for it.
SIZES: dict[int, str] = {
    1: "n_group topk_group num_expert_group first_k_dense_replace num_nextn_predict_layers n_shared_experts",
    2: "num_hidden_layers num_key_value_heads num_experts_per_tok top_k num_experts_per_token moe_topk moe_top_k"
    " top_k_experts num_selected_experts moe_k linear_num_key_heads",
    4: "num_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts"
    " linear_num_value_heads linear_num_heads index_n_heads",
    8: "head_dim qk_rope_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim index_head_dim index_topk"
    " linear_head_dim linear_key_head_dim linear_value_head_dim global_head_dim swa_head_dim swa_v_head_dim"
    " mamba_d_state o_lora_rank hidden_size_per_layer_input",
    16: "moe_intermediate_size expert_ffn_hidden_size moe_hidden_size shared_expert_intermediate_size"
    " shared_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    32: "hidden_size",
    48: "intermediate_size ffn_hidden_size dense_intermediate_size",
    64: "vocab_size vocab_size_per_layer_input max_position_embeddings",
}

#: What else a config needs to be valid at such sizes, or to have experts in its last layer.
CHANGES: dict[str, dict[str, Any]] = {
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Dots3NoteTextConfig": {"layer_types": ["indexed_attention", "indexed_attention"]},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "FlintConfig": {"mlp_only_layers": []},
    "Gemma4TextConfig": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    },
    "Glm4vMoeTextConfig": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0, "index_kpool": 2},
    "GraniteMoeHybridConfig": {"mamba_n_heads": 4, "mamba_d_head": 16, "num_local_experts": 4},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "HYV4Config": {"indexer_types": ["full", "full"]},
    "Lfm2MoeConfig": {"layer_types": ["full_attention", "full_attention"], "num_dense_layers": 0},
    "MistralLarge4TextConfig": {"kv_source_layers": [0, 1]},
    "Mistral4Config": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "NemotronHConfig": {"layers_block_type": ["attention", "moe"]},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 16},
    "Qwen4ExpTextConfig": {"layer_types": ["linear_attention", "linear_attention"]},
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
TINY = {name: size for size, names in SIZES.items() for name in names.split()}


def experts_classes() -> list[str]:
    """`module:class` of every decorated class, read from the sources: importing them all takes a minute."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE):
            found.append(f"{path.parent.name}.{path.stem}:{name}")
    return found


def experts_class(name: str) -> type[nn.Module]:
    module, _, experts = name.partition(":")
    found: type[nn.Module] = getattr(importlib.import_module(f"transformers.models.{module}"), experts)
    return found


def tiny_config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config of that class with every known size reduced, lists of one entry for each layer too."""
    default = kind()
    layers = getattr(default, "num_hidden_layers", None)
    sizes: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name in TINY and isinstance(value, int):
            sizes[name] = TINY[name]
        elif isinstance(value, list) and layers is not None and len(value) == layers:
            sizes[name] = value[-2:]
    if "kv_lora_rank" in sizes:  # keys and values of every head come from one latent vector
        sizes["num_key_value_heads"] = TINY["num_attention_heads"]
    return kind(**{**sizes, "pad_token_id": None, **CHANGES.get(kind.__name__, {}), **changes})


def config_classes(experts: type[nn.Module]) -> list[type[PreTrainedConfig]]:
    """Those that the module or one of its models knows, the likeliest first: named by the class, or named like it."""
    module = importlib.import_module(experts.__module__)
    named = inspect.signature(experts.__init__).parameters["config"].annotation
    named = getattr(module, named, None) if isinstance(named, str) else named
    known = {c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, PreTrainedConfig)}
    known |= {m.config_class for m in _models(module) if inspect.isclass(m.config_class)}

    def unlikely(config: type[PreTrainedConfig]) -> tuple[bool, int, int]:
        return config is not named, -len(commonprefix([config.__name__, experts.__name__])), len(config.__name__)

    return sorted(known, key=unlikely)


def tiny_experts(experts: type[nn.Module]) -> tuple[nn.Module, PreTrainedConfig]:
    """An experts module by itself, with the first config that fits.

    Raises:
        RuntimeError: none does.
    """
    sizes = {"intermediate_size": 16} if "intermediate_size" in inspect.signature(experts.__init__).parameters else {}
    why = {}
    for kind in config_classes(experts):
        try:
            config = tiny_config(kind)
            return experts(config, **sizes), config
        except (AttributeError, TypeError, ValueError, StrictDataclassError) as error:
            why[kind.__name__] = str(error)
    raise RuntimeError(f"{experts.__name__}: no config fits: {why}")


def tiny_models(experts: type[nn.Module], config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Models of the module that take that config, language models first."""
    module = importlib.import_module(experts.__module__)
    models = [m for m in _models(module) if m.config_class is type(config) and "forward" in vars(m)]
    return sorted(models, key=lambda m: ("ForCausalLM" not in m.__name__, len(m.__name__)))


def _models(module: ModuleType) -> list[type[PreTrainedModel]]:
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return [c for c in classes if issubclass(c, PreTrainedModel)]
