"""SynerGen-VL: one sequence, two modalities, next-token prediction for both (section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import ops
from ..weights import read_weights
from .cache import KVCache
from .config import SynerGenConfig
from .folding import FoldedEmbedding
from .layers import FFN, Block, RMSNorm
from .unfolding import UnfoldingHead

WEIGHTS_FILE = "model.safetensors"
IGNORE = -100  # label of a position without loss


@dataclass
class Losses:
    """Mean next-token losses in nats; ``total = text + lambda * image`` (eq. 4). A task without targets gives 0."""

    total: Tensor
    text: Tensor
    image: Tensor


class SynerGenVL(nn.Module):
    """The whole model: embeddings, backbone with vision experts, text head, unfolding head.

    Ids: ``[0, vocab_size)`` are text; the specials ``<boi>``, ``<eoi>``, ``<UNCOND>`` follow; ``config.image_id``
    marks a folded image token, whose embedding comes from the image ids. So a batch is ``input_ids [B, T]`` plus the
    image ids ``[N, h, w]`` of its N pictures, in reading order.
    """

    #: hf/ puts another one here.
    block_class: type[Block] = Block

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.tok_embeddings = nn.Embedding(config.vocab_size, d)
        # <boi>, <eoi>, <UNCOND>: apart from the vocabulary, so that a frozen LLM stays bit-identical.
        self.special_embeddings = nn.Embedding(config.num_special, d)
        self.image_embedding = FoldedEmbedding(config)
        self.layers = nn.ModuleList(self.block_class(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.output = nn.Linear(d, config.vocab_size, bias=False)
        self.special_output = nn.Linear(d, config.num_special, bias=False)
        self.unfolding_head = UnfoldingHead(config)
        self.init_weights()
        if config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every parameter that is not on the meta device, by ``init_parameter``."""
        for name, p in self.named_parameters():
            if not p.is_meta:
                init_parameter(self.config, name, p)

    @property
    def blocks(self) -> list[Block]:
        """The backbone's layers, typed."""
        return cast(list[Block], list(self.layers))

    @torch.no_grad()
    def copy_text_experts(self) -> None:
        """Initialise every vision expert from its layer's text FFN (section 3.2)."""
        for block in self.blocks:
            for name in ("gate", "up", "down"):
                getattr(block.feed_forward.vision, name).copy_(getattr(block.feed_forward.text, name))

    @torch.no_grad()
    def place_image_codes(self, codebook: Tensor) -> None:
        """Start the three tables over image ids from the tokenizer's code vectors ``[V, c]``.

        Half of each row is a random linear map of its code, half is noise as before, at the same scale. So codes
        that look alike begin alike, and what is learned of one serves its neighbours.
        """
        codes = (codebook.float() - codebook.float().mean(0)) / codebook.float().std(0).clamp_min(1e-6)
        for table in (self.image_embedding.tokens, self.unfolding_head.tokens, self.unfolding_head.classifier):
            size = table.weight.shape[1]
            image = codes @ torch.randn(codes.shape[1], size) * (0.02 / codes.shape[1] ** 0.5)
            table.weight.copy_((image + 0.02 * torch.randn_like(image)) / 2**0.5)

    # ---- forward ----------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Ids ``[B, T]`` and image ids ``[N, h, w]`` -> embeddings ``[B, T, D]``.

        Raises:
            ValueError: an id is unknown, or the placeholders in ``input_ids`` are not as many as the pictures' folded
                tokens.
        """
        c = self.config
        if not torch.compiler.is_compiling() and input_ids.numel():
            low, high = (int(v) for v in input_ids.aminmax())
            if low < 0 or high > c.image_id:
                bad = low if low < 0 else high
                raise ValueError(f"embed: input_ids must be in [0, {c.image_id + 1}), got {bad}")
        special = (input_ids >= c.vocab_size) & (input_ids < c.image_id)
        visual = input_ids == c.image_id
        text = torch.where(special | visual, 0, input_ids)
        x = self.tok_embeddings(text)
        specials = self.special_embeddings(torch.where(special, input_ids - c.vocab_size, 0))
        x = torch.where(special[..., None], specials, x)
        if image_ids is not None and image_ids.numel():
            folded = self.image_embedding(image_ids)  # [N, P, D]
            slots = int(visual.sum())
            if slots != folded.shape[0] * folded.shape[1]:
                raise ValueError(
                    f"embed: input_ids must hold {folded.shape[0]} x {folded.shape[1]} image positions for image_ids "
                    f"{list(image_ids.shape)}, got {slots}"
                )
            x = x.masked_scatter(visual[..., None], folded.to(x.dtype))
        elif bool(visual.any()):
            raise ValueError("embed: input_ids hold image positions, but no image_ids were given")
        return x

    def backbone(
        self, x: Tensor, is_image: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Embeddings ``[B, T, D]`` -> final states ``[B, T, D]`` (after the last norm).

        Args:
            is_image: bool or int64 ``[B, T]``, true where a folded image token stands.
            positions: int64 ``[B, T]``; default: counting on from the cache.
            mask: bool ``[B, 1, T, S]``, true where a query may look; default: causal.
        """
        b, t, _ = x.shape
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + t, device=x.device).expand(b, t)
        expert = is_image.long()
        # The same for all layers. On CUDA up to 64 rows take another way, and the CPU sorts for itself.
        routing = ops.route_tokens(expert.reshape(-1), 2) if x.is_cuda and b * t > 64 else None
        for layer, block in enumerate(self.layers):
            x = block(x, positions, expert, mask, cache, layer, routing)
        if cache is not None:
            cache.advance(t)
        return self.norm(x)

    def text_logits(self, states: Tensor) -> Tensor:
        """States ``[..., D]`` -> logits over text and specials ``[..., vocab_size + 3]``."""
        return torch.cat((self.output(states), self.special_output(states)), dim=-1)

    def states(self, input_ids: Tensor, image_ids: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Final states ``[B, T, D]`` of whole sequences, uncached; ``documents`` as in `forward`."""
        positions, mask = (None, None) if documents is None else packed(documents)
        return self.backbone(self.embed(input_ids, image_ids), input_ids == self.config.image_id, positions, mask)

    def forward(
        self, input_ids: Tensor, labels: Tensor, image_ids: Tensor | None = None, paint: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Losses:  # fmt: skip
        """Training losses of right-padded sequences, or of rows that hold several sequences.

        Args:
            input_ids: int64 ``[B, T]``.
            labels: int64 ``[B, T]``, the id to be predicted *at* each position (not shifted), or -100.
            image_ids: int64 ``[N, h, w]``, the pictures in reading order.
            paint: bool ``[N]``, which pictures carry the image loss (generation samples); default: none.
            documents: int64 ``[B, T]``, a number for each sequence of a row, one after another; a position looks at
                those of its own document alone, and counts from its beginning. Default: one document a row.
        """
        return self.losses(self.states(input_ids, image_ids, documents), input_ids, labels, image_ids, paint, documents)

    def losses(
        self, h: Tensor, input_ids: Tensor, labels: Tensor, image_ids: Tensor | None = None,
        paint: Tensor | None = None, documents: Tensor | None = None,
    ) -> Losses:  # fmt: skip
        """Of final states ``[B, T, D]``, what `forward` gives; its other arguments as there."""
        # The state before a position predicts it, for both modalities.
        before, wanted = h[:, :-1], labels[:, 1:]
        if documents is not None:  # but not across documents
            wanted = wanted.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORE)
        chosen = wanted != IGNORE
        text = image = h.sum() * 0
        if bool(chosen.any()):
            weight = torch.cat((self.output.weight, self.special_output.weight))
            text = ops.linear_cross_entropy(before[chosen], weight, wanted[chosen])
        if image_ids is not None and paint is not None and bool(paint.any()):
            n, p = len(image_ids), self.config.folded_length(*image_ids.shape[1:])
            visual = input_ids[:, 1:] == self.config.image_id
            patch_states = before[visual].view(n, p, -1)[paint].flatten(0, 1)  # [n'*P, D]
            targets = ops.fold_ids(image_ids[paint], *self.config.fold).flatten(0, 1)  # [n'*P, m*n]
            hidden = self.unfolding_head.hidden(patch_states, targets).flatten(0, 1)  # [n'*P*m*n, D]
            image = ops.linear_cross_entropy(hidden, self.unfolding_head.classifier.weight, targets.flatten())
        return Losses(text + self.config.image_loss_weight * image, text, image)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        c, w = self.config, self.tok_embeddings.weight
        return KVCache(c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim, w.dtype, w.device)

    # ---- counting ---------------------------------------------------------------------------------------------

    def num_parameters(self, active: bool = False) -> int:
        """Parameters in all, or those that work on any one token (one FFN of the two in each layer)."""
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for block in self.blocks for p in block.feed_forward.vision.parameters())
        return total - experts if active else total

    def step_parameters(self) -> tuple[int, int]:
        """Matrix parameters read by one backbone step and by one head step (the floor of decoding is their bytes)."""
        block = self.blocks[0]
        backbone = sum(p.numel() for p in block.attention.parameters()) + _size(block.feed_forward.vision)
        head = sum(p.numel() for b in self.unfolding_head.layers for p in b.parameters())
        return backbone * len(self.layers), head + self.unfolding_head.classifier.weight.numel()

    # ---- files ------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``, the weights cast to ``dtype`` if given."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder)
        state = {
            k: v.detach().to(dtype or v.dtype).clone(memory_format=torch.contiguous_format)
            for k, v in self.state_dict().items()
        }
        if self.config.tie_word_embeddings:
            del state["output.weight"]
        save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})

    @classmethod
    def on_meta(cls, folder: str | Path, what: str) -> tuple[SynerGenVL, Path, dict[str, Tensor]]:
        """The model of a checkpoint folder without memory, its weight file, and the weights that file must hold.

        Args:
            what: who asks, for messages.

        Raises:
            FileNotFoundError: no config or no weights.
            ValueError: a config that no model can have.
        """
        config, path = SynerGenConfig.load(folder), Path(folder, WEIGHTS_FILE)
        if not path.is_file():
            raise FileNotFoundError(f"{what}: no {WEIGHTS_FILE} in {folder}")
        try:
            with torch.device("meta"):
                model = cls(config)
        except RuntimeError as e:  # a size past 2^63 bytes
            raise ValueError(f"{what}: the config in {folder} cannot be built: {e}") from e
        wanted = model.state_dict()
        if config.tie_word_embeddings:
            del wanted["output.weight"]
        return model, path, wanted

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> SynerGenVL:
        """Load what ``save_pretrained`` wrote, in the stored dtype or in ``dtype``.

        Raises:
            FileNotFoundError: no config or no weights.
            ValueError: broken file, missing or surplus weights, or wrong shapes, by name.
        """
        model, path, wanted = cls.on_meta(folder, "model")
        config = model.config
        state = read_weights(path, wanted, "model")
        if dtype is not None:
            state = {k: v.to(dtype) for k, v in state.items()}
        if config.tie_word_embeddings:
            state["output.weight"] = state["tok_embeddings.weight"]
        model.load_state_dict(state, assign=True)
        if config.tie_word_embeddings:
            model.output.weight = model.tok_embeddings.weight
        return model.eval()


def packed(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ``[B, T]`` that begin again with each document, and the mask ``[B, 1, T, T]`` (True = may look)."""
    b, t = documents.shape
    begins = torch.ones(b, t, dtype=torch.bool, device=documents.device)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    place = torch.arange(t, device=documents.device)
    positions = place - (place * begins).cummax(1).values
    run = begins.cumsum(1)
    mask = (run[:, :, None] == run[:, None, :]).tril()
    return positions, mask[:, None]


@torch.no_grad()
def init_parameter(config: SynerGenConfig, name: str, p: Tensor) -> Tensor:
    """Normal(0, 0.02); matrices that write to the residual stream are divided by sqrt(2 * layers). Returns ``p``."""
    if p.ndim == 1:
        return nn.init.zeros_(p) if name.endswith("bias") else nn.init.ones_(p)
    depth = config.head_layers if name.startswith("unfolding_head") else config.num_layers
    residual = name.endswith(("wo.weight", "down"))
    return nn.init.normal_(p, std=0.02 / (2 * depth) ** 0.5 if residual else 0.02)


def _size(ffn: FFN) -> int:
    return sum(p.numel() for p in ffn.parameters())
