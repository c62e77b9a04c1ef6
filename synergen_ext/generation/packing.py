"""What the native engine keeps of a model: which weights become which packed matrices, vectors and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import SynerGenConfig

FORMATS = ("float32", "bfloat16", "int8", "int4")
#: Columns that share a scale. 32 and 64 numbers a scale of 2 bytes are 0.56 and 1.03 bytes a weight.
GROUPS = {"int8": 64, "int4": 32}
PANEL = 16  # rows of a panel: kPanel in csrc/engine/matrix.h

#: Reads one of the model's weights by its name.
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Formats:
    """How matrices are kept, part by part: "float32", "bfloat16", "int8" or "int4".

    Attributes:
        backbone: the layers, and the projection of folded image tokens.
        head: the unfolding head; default: as the backbone.
        output: the text classifier; default: as the backbone.
        group: columns that share a scale, by format; a multiple of 8 in [32, 4096].
        activations: of prompts in the backbone, beside bfloat16 matrices: "float32", or "bfloat16", which rounds them
            as PyTorch does and is up to twice as fast where the CPU multiplies bfloat16. Single steps keep float32.

    Raises:
        ValueError: a format or a group that does not exist.
    """

    backbone: str = "bfloat16"
    head: str | None = None
    output: str | None = None
    group: Mapping[str, int] | None = None
    activations: str = "float32"

    def __post_init__(self) -> None:
        if self.activations not in ("float32", "bfloat16"):
            raise ValueError(f"engine: activations must be float32 or bfloat16, got {self.activations!r}")
        for part in ("backbone", "head", "output"):
            if self.of(part) not in FORMATS:
                raise ValueError(f"engine: {part} must be one of {', '.join(FORMATS)}, got {self.of(part)!r}")
        for name, group in (self.group or {}).items():
            if name not in GROUPS:
                raise ValueError(f"engine: group must be of int8 or int4, got {name!r}")
            if type(group) is not int or group % 8 or not 32 <= group <= 4096:
                raise ValueError(f"engine: group must be a multiple of 8 in [32, 4096], got {group!r}")

    def of(self, part: str) -> str:
        return getattr(self, part) or self.backbone

    def group_of(self, form: str) -> int:
        return {**GROUPS, **(self.group or {})}.get(form, 0)

    @property
    def floats(self) -> torch.dtype:
        """Of the tables of embeddings: float32 only where everything is."""
        parts = {self.of(p) for p in ("backbone", "head", "output")}
        return torch.float32 if parts == {"float32"} else torch.bfloat16


@dataclass(frozen=True)
class Matrix:
    """One packed matrix: its name, shape and format, and how to make it."""

    name: str
    rows: int
    columns: int
    form: str
    group: int
    make: Callable[[], Tensor]

    @property
    def data_bytes(self) -> int:
        per_unit = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}[self.form]
        columns = _whole(self.columns, self.group) if self.group else self.columns
        return _whole(self.rows, PANEL) * -(-columns // per_unit) * 4

    @property
    def scale_bytes(self) -> int:
        return 2 * _whole(self.rows, PANEL) * -(-self.columns // self.group) if self.group else 0


def _whole(n: int, step: int) -> int:
    return -(-n // step) * step


def sizes(c: SynerGenConfig, formats: Formats) -> dict[str, Any]:
    """The config as the engine wants it."""
    return {
        "dim": c.hidden_size, "hidden": c.intermediate_size, "layers": c.num_layers, "heads": c.num_heads,
        "kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "max_positions": c.max_positions, "vocab": c.vocab_size,
        "specials": c.num_special, "codebook": c.codebook_size, "fold_rows": c.fold[0], "fold_columns": c.fold[1],
        "grid_rows": c.image_grid[0], "grid_columns": c.image_grid[1], "token_dim": c.token_embed_size,
        "head_layers": c.head_layers, "eps": c.rms_norm_eps, "theta": c.rope_theta,
        "short_prompts": formats.activations == "bfloat16",
    }  # fmt: skip


def matrices(c: SynerGenConfig, read: Read, formats: Formats) -> Iterator[Matrix]:
    """Every packed matrix, in the order in which a step reads them."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    hidden = _whole(c.intermediate_size, PANEL)

    def matrix(name: str, part: str, rows: int, columns: int, make: Callable[[], Tensor]) -> Matrix:
        form = formats.of(part)
        return Matrix(name, rows, columns, form, formats.group_of(form), make)

    def layer(name: str, source: str, part: str, experts: dict[str, str]) -> Iterator[Matrix]:
        def qkv() -> Tensor:
            return torch.cat([read(f"{source}.attention.w{x}.weight") for x in "qkv"])

        yield matrix(f"{name}.qkv", part, queries + 2 * keys, c.hidden_size, qkv)
        yield matrix(f"{name}.out", part, c.hidden_size, queries, lambda: read(f"{source}.attention.wo.weight"))
        for suffix, expert in experts.items():
            place = f"{source}.feed_forward{expert}"

            def gate_up(place: str = place) -> Tensor:
                return interleave(read(f"{place}.gate"), read(f"{place}.up"))

            def down(place: str = place) -> Tensor:
                return F.pad(read(f"{place}.down"), (0, hidden - c.intermediate_size))

            yield matrix(f"{name}{suffix}.gate_up", part, 2 * hidden, c.hidden_size, gate_up)
            yield matrix(f"{name}{suffix}.down", part, c.hidden_size, hidden, down)

    for i in range(c.num_layers):
        yield from layer(f"layers.{i}", f"layers.{i}", "backbone", {".text": ".text", ".vision": ".vision"})
    for i in range(c.head_layers):
        yield from layer(f"head.layers.{i}", f"unfolding_head.layers.{i}", "head", {"": ""})

    def plain(name: str, part: str, rows: int, columns: int, source: str) -> Matrix:
        return matrix(name, part, rows, columns, lambda: read(source))

    d = c.hidden_size
    yield plain("head.classifier", "head", c.codebook_size, d, "unfolding_head.classifier.weight")
    yield plain("image.proj_in", "backbone", d, c.window * c.token_embed_size, "image_embedding.proj_in.weight")
    yield plain("image.proj_out", "backbone", d, d, "image_embedding.proj_out.weight")
    text = "tok_embeddings.weight" if c.tie_word_embeddings else "output.weight"
    yield plain("output", "output", c.vocab_size, d, text)
    yield plain("special_output", "output", c.num_special, d, "special_output.weight")


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up ``[F, D]`` -> ``[2 F', D]``: 16 rows of gate, the same of up, and so on; F' = F in whole panels."""
    f, d = gate.shape
    full = _whole(f, PANEL)
    both = (F.pad(w, (0, 0, 0, full - f)).view(full // PANEL, PANEL, d) for w in (gate, up))
    return torch.stack(tuple(both), dim=1).view(2 * full, d)


def vectors(c: SynerGenConfig, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Norms and biases, in float32."""

    def layer(name: str, source: str) -> Iterator[tuple[str, Tensor]]:
        for norm in ("attention_norm", "ffn_norm"):
            yield f"{name}.{norm}", read(f"{source}.{norm}.weight")
        if c.attention_bias:
            yield f"{name}.qkv_bias", torch.cat([read(f"{source}.attention.w{x}.bias") for x in "qkv"])

    def all_of_them() -> Iterator[tuple[str, Tensor]]:
        for i in range(c.num_layers):
            yield from layer(f"layers.{i}", f"layers.{i}")
        for i in range(c.head_layers):
            yield from layer(f"head.layers.{i}", f"unfolding_head.layers.{i}")
        yield "norm", read("norm.weight")
        yield "head.norm", read("unfolding_head.norm.weight")
        for name in ("proj_in", "proj_out"):
            yield f"image.{name}_bias", read(f"image_embedding.{name}.bias")

    for name, vector in all_of_them():
        yield name, vector.float()


def tables(c: SynerGenConfig, read: Read, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Embeddings ``[rows, columns]``, contiguous."""
    sources = {
        "tokens": "tok_embeddings.weight", "specials": "special_embeddings.weight",
        "image.tokens": "image_embedding.tokens.weight", "image.positions": "image_embedding.positions",
        "head.tokens": "unfolding_head.tokens.weight", "head.positions": "unfolding_head.positions",
    }  # fmt: skip
    for name, source in sources.items():
        yield name, read(source).to(dtype).flatten(0, -2).contiguous()
