"""One frozen dataclass describes a model; presets name the sizes people use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
#: A config may come from anywhere, and building a model takes time for each layer, even without memory.
MAX_LAYERS = 1024

#: What transformers adds to a config.json of ours when it saves one. Not ours to know, and without effect here.
TRANSFORMERS_FIELDS = frozenset(
    ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path")
    + ("bos_token_id", "eos_token_id", "pad_token_id")
)

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "rope_theta": ("a positive number", lambda v: v > 0),
    "rms_norm_eps": ("a positive number", lambda v: v > 0),
    "image_loss_weight": ("a number >= 0", lambda v: v >= 0),
    "guidance": ("a number in [0, 50]", lambda v: 0 <= v <= 50),
    "image_temperature": ("a number >= 0", lambda v: v >= 0),
    "image_top_p": ("a number in (0, 1]", lambda v: 0 < v <= 1),
}


@dataclass(frozen=True)
class SynerGenConfig:
    """Sizes of one SynerGen-VL. The defaults are the paper's (InternLM2-1.8B, Emu3 tokenizer, 512 x 512 pixels).

    Raises:
        ValueError: sizes that do not fit together (heads, folding windows, ranges).
    """

    # Language model (any Llama-shaped decoder)
    vocab_size: int = 92_544
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_positions: int = 32_768
    attention_bias: bool = False  # Qwen2 adds a bias to q, k and v
    tie_word_embeddings: bool = False

    # Image tokens
    codebook_size: int = 32_768
    image_grid: tuple[int, int] = (64, 64)  # largest picture (or tile), in tokens: rows, columns
    fold: tuple[int, int] = (2, 8)  # m rows x n columns of image tokens make one folded token
    # Width of an image token before folding. The paper does not print it; the LLM's width gives
    # its 3.6 B total and 2.4 B active parameters.
    token_embed_size: int = 2048
    head_layers: int = 4
    image_loss_weight: float = 2.0  # lambda of eq. 4

    # Sampling defaults of this checkpoint
    guidance: float = 7.5
    image_temperature: float = 1.0
    image_top_k: int = 2000
    image_top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("image_grid", "fold"):
            pair = getattr(self, name)
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(v) is int and v > 0 for v in pair)):
                raise ValueError(f"config: {name} must be two positive integers, got {pair!r}")
            object.__setattr__(self, name, tuple(pair))
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "max_positions", "codebook_size", "token_embed_size", "head_layers",
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        for name in ("num_layers", "head_layers"):
            if getattr(self, name) > MAX_LAYERS:
                raise ValueError(f"config: {name} must be at most {MAX_LAYERS}, got {getattr(self, name)!r}")
        for name, (wanted, fits) in _RANGES.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not abs(value) < 1e300 or not fits(value):  # so NaN fails too
                raise ValueError(f"config: {name} must be {wanted}, got {value!r}")
        if type(self.image_top_k) is not int or self.image_top_k < 0:
            raise ValueError(f"config: image_top_k must be an integer >= 0 (0 = off), got {self.image_top_k!r}")
        for name in ("attention_bias", "tie_word_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"config: {name} must be true or false, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config: num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim must be even for rotary positions, got {self.head_dim}")
        for axis, side, step in zip(("rows", "columns"), self.image_grid, self.fold, strict=True):
            if side % step:
                raise ValueError(f"config: image_grid {axis} must be a multiple of fold's {step}, got {side}")

    # Special tokens: ids follow the text vocabulary, so a pretrained vocabulary is never touched.
    @property
    def boi_id(self) -> int:
        """``<boi>``: an image begins."""
        return self.vocab_size

    @property
    def eoi_id(self) -> int:
        """``<eoi>``: the image ends."""
        return self.vocab_size + 1

    @property
    def uncond_id(self) -> int:
        """``<UNCOND>``: stands for the caption in the unconditional prompt of guidance."""
        return self.vocab_size + 2

    @property
    def image_id(self) -> int:
        """Placeholder of one folded image token in ``input_ids``; it has no embedding of its own."""
        return self.vocab_size + 3

    @property
    def num_special(self) -> int:
        """Special tokens with a learnable embedding: ``<boi>``, ``<eoi>``, ``<UNCOND>``."""
        return 3

    @property
    def window(self) -> int:
        """Image tokens in one folded token, m * n."""
        return self.fold[0] * self.fold[1]

    def folded_length(self, rows: int, columns: int) -> int:
        """Folded tokens of a picture of ``rows x columns`` image tokens.

        Raises:
            ValueError: the picture does not divide into windows, or exceeds ``image_grid``.
        """
        (m, n), (h, w) = self.fold, self.image_grid
        if rows % m or columns % n or not 0 < rows <= h or not 0 < columns <= w:
            raise ValueError(f"image tokens must be multiples of {m} x {n} up to {h} x {w}, got {rows} x {columns}")
        return (rows // m) * (columns // n)

    @property
    def image_tokens(self) -> int:
        """Folded tokens of a picture of the full grid."""
        return self.folded_length(*self.image_grid)

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "synergen_vl", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SynerGenConfig:
        """Inverse of ``to_dict``; fields that transformers adds are left out.

        Raises:
            ValueError: unknown fields, wrong model type or wrong values.
        """
        data = dict(data)
        kind = data.pop("model_type", "synergen_vl")
        if kind != "synergen_vl":
            raise ValueError(f"config: model_type must be 'synergen_vl', got {kind!r}")
        data = {k: v for k, v in data.items() if k not in TRANSFORMERS_FIELDS}
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"config: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**data)

    def save(self, folder: str | Path) -> None:
        Path(folder, CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> SynerGenConfig:
        path = Path(folder, CONFIG_FILE)
        if not path.is_file():
            raise FileNotFoundError(f"config: no {CONFIG_FILE} in {folder}")
        try:
            data = json.loads(path.read_text())
        except ValueError as e:  # broken JSON or broken UTF-8
            raise ValueError(f"config: {path} is not JSON: {e}") from e
        if not isinstance(data, dict):
            raise ValueError(f"config: {path} must hold a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SynerGenConfig:
        """A named size, with changes: ``SynerGenConfig.preset("tiny", num_layers=4)``."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **changes})


PRESETS: dict[str, dict[str, Any]] = {
    # For tests: every mechanism, no size.
    "tiny": dict(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        rope_theta=1e4, max_positions=512, codebook_size=64, image_grid=(4, 8), fold=(2, 4), token_embed_size=16,
        head_layers=2, guidance=3.0, image_top_k=0,
    ),
    # The shipped checkpoint: 96 x 96 pixels, 12 x 12 tokens, 18 folded tokens.
    "demo": dict(
        vocab_size=512, hidden_size=256, intermediate_size=576, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=64,
        rope_theta=1e4, max_positions=1024, codebook_size=1024, image_grid=(12, 12), fold=(2, 4), token_embed_size=64,
        head_layers=2, guidance=3.0, image_top_k=0,
    ),
    "paper": dict(),
    # The paper's ablations: Qwen2-0.5B at 256 x 256 pixels, fold 2 x 4.
    "qwen2-0.5b": dict(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2,
        head_dim=64, rope_theta=1e6, rms_norm_eps=1e-6, attention_bias=True, tie_word_embeddings=True,
        image_grid=(32, 32), fold=(2, 4), token_embed_size=896,
    ),
    "smollm2-135m": dict(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
        head_dim=64, rope_theta=1e5, max_positions=8192, tie_word_embeddings=True,
        image_grid=(32, 32), fold=(2, 4), token_embed_size=576,
    ),
}  # fmt: skip
