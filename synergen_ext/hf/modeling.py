"""`SynerGenVL` under transformers: its arguments, caches, masks and `generate`, around this package's model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..generation.oracle import Sampling, generate_image_ids, generate_interleaved
from ..model import KVCache, SynerGenVL
from ..model.layers import Block, attend
from ..model.modeling import IGNORE, init_parameter
from ..processing.text import TOKENIZER_FILE, TextTokenizer
from .configuration import SynerGenVLConfig, checkpoint_file


class Layer(GradientCheckpointingLayer, Block):
    """A layer of ours that transformers can run a second time in place of keeping what is in it."""


class Backbone(SynerGenVL):
    """`SynerGenVL` of such layers."""

    block_class = Layer


class SynerGenVLForConditionalGeneration(PreTrainedModel, GenerationMixin):
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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Those that a checkpoint does not have."""
        name = next((n for n, m in self.model.named_modules() if m is module), None)
        if name is not None:
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
        states = self.model.backbone(inputs_embeds, is_image, position_ids.expand(b, t), mask, cache)
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past)

    # ---- generation -------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        parent: Any = super()  # its types want classes that do not exist outside transformers
        inputs = parent.prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("image_ids", None)  # they are in the cache
        return {**inputs, "text_only": True}

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Rows ``[B]`` to ``[B * expand_size]``, each row's pictures with it."""
        pictures = kwargs.pop("image_ids", None)
        if pictures is not None and expand_size > 1 and input_ids is not None:
            c = self.model.config
            counts = (input_ids == c.image_id).sum(1) // c.folded_length(*pictures.shape[1:])
            rows = pictures.split(counts.tolist())
            pictures = torch.cat([row for row in rows for _ in range(expand_size)])
        parent: Any = super()
        ids, kwargs = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, kwargs if pictures is None else {**kwargs, "image_ids": pictures}

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, modality: str = "text", **kwargs: Any) -> Any:
        """Continue prompts with text, as of transformers; ``modality="image"`` is `generate_image`, and
        ``modality="interleaved"`` `generate_interleaved`.

        Prompts padded on the right are moved to the right end first, so the returned rows are padded on the left.

        Raises:
            ValueError: another modality.
        """
        if modality in ("image", "interleaved"):
            other: Any = self.generate_image if modality == "image" else self.generate_interleaved
            return other(kwargs.pop("input_ids", inputs), *args, **kwargs)
        if modality != "text":
            raise ValueError(f"generate: modality must be text, image or interleaved, got {modality!r}")
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", inputs)
        if mask is not None and mask.ndim == 2 and ids is not None and kwargs.get("past_key_values") is None:
            # Stable: tokens keep their order. Rows that are padded on the left, or not at all, stay as they are.
            order = mask.bool().long().argsort(dim=1, stable=True)
            ids, kwargs["attention_mask"] = ids.gather(1, order), mask.gather(1, order)
            inputs = ids if kwargs.pop("input_ids", None) is None else None
            kwargs.update({} if inputs is not None else {"input_ids": ids})
        parent: Any = super()
        return parent.generate(inputs, *args, **kwargs)

    @torch.no_grad()
    def generate_image(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, unconditional_ids: Tensor | None = None,
        seeds: int | Sequence[int] = 0, guidance_scale: float | None = None, temperature: float | None = None,
        top_k: int | None = None, top_p: float | None = None, size: tuple[int, int] | None = None,
        on_patch: Callable[[int, int], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Paint one picture a row; ids as of `synergen_ext.generation.oracle.generate_image_ids`.

        Args:
            input_ids: int64 ``[B, T]``, prompts up to and with ``<boi>``: the processor's `paint`.
            attention_mask: ``[B, T]``, 0 where padding stands, on either side.
            unconditional_ids: int64 ``[1, U]`` or ``[U]``, the prompt with ``<UNCOND>``. Needed unless guidance is 1.
            seeds: one a row; one number is for all. Same prompt, seed and settings: same ids, whatever the batch.
            guidance_scale: s of ``l_u + s (l_c - l_u)``; 1 is off; default: the config's.
            temperature, top_k, top_p: sampling of image tokens; default: the config's.
            size: rows and columns in image tokens; default: the config's grid.
            on_patch: called with (patches done, patches in all).

        Returns:
            int64 ``[B, h, w]``, for the processor's `decode_images`.

        Raises:
            ValueError: seeds or rows that do not match, or guidance without ``unconditional_ids``.
        """
        s, unconditional = self._guidance("generate_image", guidance_scale, unconditional_ids)
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[own.bool()].tolist() for row, own in zip(input_ids, keep, strict=True)]
        each = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
        sampling = self._image_sampling(temperature, top_k, top_p)
        return generate_image_ids(self.model, prompts, unconditional, each, s, sampling, size, on_patch)

    @torch.no_grad()
    def generate_interleaved(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, unconditional_ids: Tensor | None = None,
        image_ids: Tensor | None = None, max_new_tokens: int = 256, seed: int = 0, guidance_scale: float | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
    ) -> list[list[int] | Tensor]:  # fmt: skip
        """Continue one prompt ``[1, T]`` with text, the likeliest, and a picture wherever the model writes ``<boi>``.

        Args:
            image_ids: int64 ``[N, h, w]``, the prompt's own pictures.
            max_new_tokens: text ids plus folded image tokens; a picture that would not fit ends the output.

        The other arguments are `generate_image`'s, for the pictures.

        Returns:
            Segments in order: text ids (a list), or a picture's ids ``[h, w]``.

        Raises:
            ValueError: more than one prompt, or guidance without ``unconditional_ids``.
        """
        if len(input_ids) != 1:
            raise ValueError(f"generate_interleaved: input_ids must be [1, T], got {list(input_ids.shape)}")
        s, unconditional = self._guidance("generate_interleaved", guidance_scale, unconditional_ids)
        prompt = input_ids[0] if attention_mask is None else input_ids[attention_mask.bool()]
        ends = self.generation_config.eos_token_id
        return generate_interleaved(
            self.model, prompt.tolist(), unconditional, max_new_tokens,
            [] if ends is None else [ends] if isinstance(ends, int) else ends,
            seed, s, None, self._image_sampling(temperature, top_k, top_p), image_ids,
        )  # fmt: skip

    def _guidance(self, who: str, scale: float | None, unconditional: Tensor | None) -> tuple[float, list[int]]:
        s = self.model.config.guidance if scale is None else scale
        if s != 1 and unconditional is None:
            raise ValueError(f"{who}: guidance_scale {s:g} needs unconditional_ids, got none")
        return s, [] if unconditional is None else unconditional.flatten().tolist()

    def _image_sampling(self, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling:
        c = self.model.config
        return Sampling(
            c.image_temperature if temperature is None else temperature,
            c.image_top_k if top_k is None else top_k,
            c.image_top_p if top_p is None else top_p,
        )

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


class Attend(nn.Module):
    """`attend` by the config's ``attn_implementation``; ``sdpa`` is this package's own call of it."""

    def __init__(self, config: SynerGenVLConfig, groups: int) -> None:
        super().__init__()
        self.scores = AttentionFunction(config, groups)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """``q [B, H, T, Dh]``, ``k`` and ``v [B, Hkv, S, Dh]``, a mask of ``create_causal_mask`` -> as ``q``."""
        return self.scores(q, k, v, mask)[0]


class AttentionFunction(nn.Module):
    """What transformers' attention functions want to be called with, and (result, weights or None) as they give it."""

    is_causal = True

    def __init__(self, config: SynerGenVLConfig, groups: int) -> None:
        super().__init__()
        self.config, self.num_key_value_groups = config, groups

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        name = self.config._attn_implementation
        if name == "sdpa":
            if mask is None and q.shape[2] > 1:  # the first tokens of a cache, which may be longer already
                k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
            return attend(q, k, v, mask), None
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        y, weights = function(self, q, k, v, mask, scaling=q.shape[-1] ** -0.5, dropout=0.0)
        return y.transpose(1, 2), weights


def eager(
    module: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Multiplied out, weights kept: ``[B, T, H, Dh]`` and ``[B, H, T, S]``. ``mask`` is added, as eager masks are."""
    k, v = (a.repeat_interleave(module.num_key_value_groups, dim=1) for a in (k, v))
    scores = (q * scaling) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2), weights


SynerGenVLForConditionalGeneration._can_record_outputs = {
    "hidden_states": Block,
    "attentions": OutputRecorder(AttentionFunction, index=1),
}


class _PastKeyValues:
    """A cache of transformers, as a layer of ours fills it."""

    def __init__(self, past: Cache) -> None:
        self.past = past

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.past.update(key, value, layer)

    def advance(self, tokens: int) -> None:
        """The cache counts for itself."""


def _positions(mask: Any, rows: int, tokens: int, seen: int, device: torch.device) -> Tensor:
    """Positions ``[B, T]`` of the last ``tokens`` tokens, padding not counted."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(1) - 1).clamp_min(0)[:, seen : seen + tokens]
    return torch.arange(seen, seen + tokens, device=device).expand(rows, tokens)
