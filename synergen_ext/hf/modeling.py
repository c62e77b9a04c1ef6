"""`SynerGenVL` under transformers: its arguments, caches, masks and `generate`, around this package's model."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..model import KVCache, SynerGenVL
from ..model.layers import Block
from ..model.modeling import IGNORE, init_parameter
from ..processing.text import TOKENIZER_FILE, TextTokenizer
from .attention import Attend, AttentionFunction, Mask
from .configuration import SynerGenVLConfig, checkpoint_file
from .generation import TextAndImageGeneration


class Layer(GradientCheckpointingLayer, Block):
    """A layer of ours that transformers can run a second time in place of keeping what is in it."""


class Backbone(SynerGenVL):
    """`SynerGenVL` of such layers."""

    block_class = Layer


class SynerGenVLForConditionalGeneration(PreTrainedModel, TextAndImageGeneration, GenerationMixin):
    """One causal Transformer that reads text and pictures and writes both.

    `model` is a `synergen_ext.model.SynerGenVL`. Ids are its ids: ``[0, vocab_size)`` text, then ``<boi>``,
    ``<eoi>``, ``<UNCOND>`` and the placeholder of a folded image token. The weight file is the same too: a folder that
    `synergen convert` or `synergen train` wrote loads here, and one saved here loads there.
    """

    config: SynerGenVLConfig
    config_class = SynerGenVLConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over this batch, whatever the trainer counts
    _no_split_modules = ["Layer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Block, "attentions": OutputRecorder(AttentionFunction, index=1)}
    _tied_weights_keys = {"model.output.weight": "model.tok_embeddings.weight"}

    def __init__(self, config: SynerGenVLConfig) -> None:
        super().__init__(config)
        # Weights are stored under SynerGenVL's own names, without "model." before them. Loading asks for the first of
        # the two, saving for the second.
        names: list[Any] = [PrefixChange(prefix_to_add="model")]
        register_checkpoint_conversion_mapping(config.model_type, names, overwrite=True)
        self._weight_conversions = names
        self.model = Backbone(config.synergen())
        for p in self.model.parameters():
            p._is_hf_initialized = not p.is_meta  # type: ignore[attr-defined]  # SynerGenVL has done it
        for block in self.model.blocks:
            block.attention.attend = Attend(config, block.attention.num_heads // block.attention.num_kv_heads)
        self.post_init()

    def initialize_weights(self) -> None:
        """Those that a checkpoint does not have, as `init_parameter` does it: by name."""
        self._names = {module: name for name, module in self.model.named_modules()}
        try:
            super().initialize_weights()
        finally:
            del self._names

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        name = getattr(self, "_names", {}).get(module, "")  # none: a larger table that is about to take its place
        for part, p in module.named_parameters(recurse=False):
            init_parameter(self.model.config, f"{name}.{part}", p)

    # ---- embeddings -------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.tok_embeddings = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.output = cast(nn.Linear, new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As of transformers. The special ids follow the vocabulary, so they move with its size."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.model.config = dataclasses.replace(self.model.config, vocab_size=self.config.vocab_size)
        return embeddings

    # ---- forward ----------------------------------------------------------------------------------------------

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, image_ids: Tensor | None = None,
        is_image: Tensor | None = None, labels: Tensor | None = None, paint: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, text_only: bool = False, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits of every position, and with ``labels`` the training loss.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, T + cached]``, 0 where padding stands, on either side; or ``[B, 1, T, S]``.
            position_ids: int64 ``[B, T]``; default: counted over ``attention_mask``.
            inputs_embeds: ``[B, T, D]`` in place of ``input_ids``, pictures in it; with ``is_image`` bool ``[B, T]``.
            image_ids: int64 ``[N, h, w]``, the pictures of all rows in reading order, from the processor.
            labels: int64 ``[B, T]``, the id to be predicted *at* each position (shifted here), or -100. Folded image
                tokens have no text loss, so their placeholder counts as -100.
            paint: bool ``[N]``, which pictures carry the image loss.
            logits_to_keep: of the last so many positions, or of these; 0 is all.
            text_only: leave out the logits of ``<boi>``, ``<eoi>``, ``<UNCOND>``, as `generate` does.

        Returns:
            logits ``[B, T, vocab_size + 3]``, or ``[B, T, vocab_size]`` with ``text_only``.

        Raises:
            TypeError: an argument that is none of the model's.
            ValueError: neither or both of ``input_ids`` and ``inputs_embeds``, or ids that do not fit the pictures.
        """
        if unknown := sorted(kwargs.keys() - {"output_attentions", "output_hidden_states", "return_dict", "is_causal"}):
            raise TypeError(f"forward: unknown argument {unknown[0]!r}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward: give either input_ids or inputs_embeds")
        if labels is not None and input_ids is None:
            raise ValueError("forward: labels need input_ids")
        # A checkpointed layer runs twice, and would fill a cache twice.
        again = self.training and any(getattr(block, "gradient_checkpointing", False) for block in self.model.layers)
        out = self._backbone(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, image_ids, is_image,
            bool(use_cache) and labels is None and not again, **kwargs,
        )  # fmt: skip
        h = out.last_hidden_state
        loss = None
        if labels is not None:
            wanted = labels.masked_fill(labels == self.model.config.image_id, IGNORE)
            loss = self.model.losses(h, cast(Tensor, input_ids), wanted, image_ids, paint).total
        kept = h[:, -logits_to_keep or None :] if isinstance(logits_to_keep, int) else h[:, logits_to_keep]
        logits = self.model.output(kept) if text_only else self.model.text_logits(kept)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    @capture_outputs
    def _backbone(
        self, input_ids: Tensor | None, attention_mask: Any, position_ids: Tensor | None, past: Cache | None,
        inputs_embeds: Tensor | None, image_ids: Tensor | None, is_image: Tensor | None, use_cache: bool,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        if inputs_embeds is None:
            input_ids = cast(Tensor, input_ids)
            inputs_embeds = self.model.embed(input_ids, image_ids)
            is_image = input_ids == self.model.config.image_id
        elif is_image is None:
            is_image = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        b, t, _ = inputs_embeds.shape
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        seen = past.get_seq_length() if past is not None else 0
        if position_ids is None:
            position_ids = _positions(attention_mask, b, t, seen, inputs_embeds.device)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past,
            position_ids=position_ids,
        )  # fmt: skip
        cache = None if past is None else cast(KVCache, _PastKeyValues(past))
        states = self.model.backbone(inputs_embeds, is_image, position_ids.expand(b, t), cast(Any, Mask(mask)), cache)
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past)

    # ---- files ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of transformers. A folder without ``generation_config.json`` takes the ids that end a text, and the
        padding, from its ``tokenizer.json``."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.generation_config.eos_token_id is None:
            path = checkpoint_file(pretrained_model_name_or_path, TOKENIZER_FILE, kwargs)
            if path is not None:
                text = TextTokenizer.load(path.parent)
                model.generation_config.bos_token_id = text.bos
                model.generation_config.eos_token_id = [text.im_end, text.eos]
                model.generation_config.pad_token_id = text.eos
        return loaded


class _PastKeyValues:
    """A cache of transformers, as a layer of ours fills it."""

    def __init__(self, past: Cache) -> None:
        self.past = past

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.past.update(key, value, layer)

    def advance(self, tokens: int) -> None:
        """The cache counts for itself."""


def _positions(mask: Any, rows: int, tokens: int, seen: int | Tensor, device: torch.device) -> Tensor:
    """Positions ``[B, T]`` of the last ``tokens`` tokens, padding not counted; ``seen`` before them."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(1) - 1).clamp_min(0)[:, mask.shape[1] - tokens :]
    return (torch.arange(tokens, device=device) + seen).expand(rows, tokens)
