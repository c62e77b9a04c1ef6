"""`generate` of transformers for our model: text its way, pictures by `synergen_ext.generation.oracle`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from ..generation.oracle import Sampling, generate_image_ids, generate_interleaved
from ..model import SynerGenVL


class TextAndImageGeneration(GenerationMixin):
    """What a model class needs to write and to paint; it has a `SynerGenVL` as `model`."""

    model: SynerGenVL
    generation_config: GenerationConfig

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        parent: Any = super()  # its types want classes that do not exist outside transformers
        inputs = parent.prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)
        pictures, left = inputs.pop("image_ids", None), inputs.get("input_ids")
        if pictures is not None and left is not None:
            # Those whose placeholders were cut off are in the cache.
            rows = zip(self._pictures(input_ids, pictures), self._counts(left, pictures), strict=True)
            inputs["image_ids"] = torch.cat([own[len(own) - count :] for own, count in rows])
        return {**inputs, "text_only": True}

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Rows ``[B]`` to ``[B * expand_size]``, each row's pictures with it."""
        pictures = kwargs.pop("image_ids", None)
        if pictures is not None and expand_size > 1 and input_ids is not None:
            pictures = torch.cat([own for own in self._pictures(input_ids, pictures) for _ in range(expand_size)])
        parent: Any = super()
        ids, kwargs = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, kwargs if pictures is None else {**kwargs, "image_ids": pictures}

    def _counts(self, input_ids: Tensor, image_ids: Tensor) -> list[int]:
        """Pictures in each row of ``input_ids``."""
        c = self.model.config
        return ((input_ids == c.image_id).sum(1) // c.folded_length(*image_ids.shape[1:])).tolist()

    def _pictures(self, input_ids: Tensor, image_ids: Tensor) -> tuple[Tensor, ...]:
        """``image_ids`` of each row.

        Raises:
            ValueError: the rows hold more pictures, or fewer.
        """
        counts = self._counts(input_ids, image_ids)
        if sum(counts) != len(image_ids):
            raise ValueError(f"generate: input_ids have places for {sum(counts)} pictures, got {len(image_ids)}")
        return image_ids.split(counts)

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
