"""Emu3's image tokenizer: its own layout, transformers', or the part of an Emu3 checkpoint of transformers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..processing.image_tokenizer import CONFIG_FIELDS, CONFIG_FILE, WEIGHTS_FILE, ImageTokenizer
from .sources import Weights, read_json
from .writer import write_safetensors

#: Fields of the original config under transformers' names.
_FIELDS = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
}
_PREFIXES = ("", "model.vqmodel.", "vqmodel.")
#: transformers' names in the original's, in this order. The original's attention is of 1x1 convolutions.
_RENAMES = (
    (re.compile(r"\.down_block\.down\."), ".down."),
    (re.compile(r"\.up_block\.up\."), ".up."),
    (re.compile(r"\.attn_norms\.(\d+)\."), r".attn.\1.norm."),
    (re.compile(r"\.middle_block\.attn_norm\."), ".mid.attn_1.norm."),
    (re.compile(r"\.middle_block\."), ".mid."),
    (re.compile(r"\.([qkv])_proj\."), r".\1."),
    (re.compile(r"\.out_proj\."), ".proj_out."),
)
_PROJECTION = re.compile(r".*\.(q_proj|k_proj|v_proj|out_proj)\.weight")


def original_name(name: str) -> str:
    """A tensor of transformers' ``Emu3VQVAE`` as the original calls it."""
    for pattern, new in _RENAMES:
        name = pattern.sub(new, name)
    return name


def copy_image_tokenizer(source: Path, out: Path, on_note: Callable[[str], None]) -> ImageTokenizer:
    """Write an image tokenizer into ``out`` in our layout, one tensor at a time; returns it on the meta device.

    Raises:
        FileNotFoundError: no config or no weights in ``source``.
        ValueError: a weight is missing, surplus or of another shape, by name.
    """
    if (source / CONFIG_FILE).is_file():  # ours already
        model = ImageTokenizer.from_pretrained(source)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(source / name, out / name)
        return model
    data, weights = read_json(source / "config.json"), Weights(source, on_note)
    model = _build(data, source)
    state = model.vq.state_dict()
    prefix = _prefix(weights)
    original = prefix == "" and any(name.startswith("encoder.mid.") for name in weights.shapes)
    theirs = {name: prefix + (original_name(name) if original else name) for name in state}
    wanted = {
        theirs[name]: (*t.shape, 1, 1) if original and _PROJECTION.fullmatch(name) else tuple(t.shape)
        for name, t in state.items()
    }
    # Inside an Emu3 checkpoint everything else is its language model.
    found = {k: v for k, v in weights.shapes.items() if k.startswith(prefix)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            ours, other = (list(s[name]) if name in s else "nothing" for s in (wanted, found))
            raise ValueError(f"convert: {name} must be {ours}, got {other} in {source}")

    dtype = weights.read(theirs["quantize.embedding.weight"]).dtype
    if not dtype.is_floating_point:
        raise ValueError(f"convert: {theirs['quantize.embedding.weight']} must be floating point, got {dtype}")
    plan = {k: (tuple(v.shape), dtype if v.is_floating_point() else v.dtype) for k, v in state.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in state:
            tensor = weights.read(theirs[name])
            if tensor.is_floating_point() != state[name].is_floating_point():
                raise ValueError(f"convert: {theirs[name]} must be {state[name].dtype}, got {tensor.dtype}")
            yield name, tensor.reshape(plan[name][0]).to(plan[name][1])

    write_safetensors(out / WEIGHTS_FILE, plan, tensors())
    model.save_config(out)
    return model


def _build(data: dict[str, Any], source: Path) -> ImageTokenizer:
    data = dict(data.get("vq_config") or data)
    if data.get("model_type") not in ("Emu3VisionVQ", "emu3_vqgan"):
        raise ValueError(
            f"convert: model_type of an image tokenizer must be 'Emu3VisionVQ', 'emu3_vqgan' or 'emu3', "
            f"got {data.get('model_type')!r} in {source}"
        )
    data = {_FIELDS.get(k, k): v for k, v in data.items()}
    try:
        if "hidden_size" not in data:  # the width of the attention, which the original does not write down
            data["hidden_size"] = data.get("base_channels", 256) * data.get("channel_multiplier", [4])[-1]
        fields = {k: v for k, v in data.items() if k in CONFIG_FIELDS}
        return ImageTokenizer.on_meta(fields, str(source / "config.json"))
    except (TypeError, IndexError, KeyError) as e:
        raise ValueError(f"convert: {source / 'config.json'} is not an image tokenizer's config: {e}") from e


def _prefix(weights: Weights) -> str:
    for prefix in _PREFIXES:
        if prefix + "quantize.embedding.weight" in weights.shapes:
            return prefix
    raise ValueError(f"convert: quantize.embedding.weight must be in {weights.folder}, got nothing")
