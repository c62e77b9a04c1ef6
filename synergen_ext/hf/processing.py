"""Conversations and pictures to the model's ids, and its ids back, under transformers' processor interface."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from ..processing import image_tokenizer
from ..processing.image_tokenizer import ImageTokenizer, to_uint8
from ..processing.sequences import SequenceBuilder
from ..processing.text import TOKENIZER_FILE, TextTokenizer
from .configuration import SynerGenVLConfig, checkpoint_file, where
from .image_processing import SynerGenVLImageProcessor, flat

IMAGE_MARK = "<image>"  # one picture, in text
_PARTS = {"image": ("image", "path", "url"), "text": ("text",)}  # keys of a part's content, by its type


class SynerGenVLProcessor(ProcessorMixin):
    """Text tokenizer, picture fitting and image tokenizer of one checkpoint.

    Args:
        image_processor: fits pictures to the model's size.
        tokenizer: a fast tokenizer with the control tokens of `TextTokenizer`.
        config: the model's.
        image_codec: pixels to image ids and back; None: the processor takes no pictures.
        chat_template: not used: conversations become ids without a template's text between. For transformers.
    """

    tokenizer: PreTrainedTokenizerFast
    image_processor: SynerGenVLImageProcessor

    def __init__(
        self, image_processor: SynerGenVLImageProcessor, tokenizer: PreTrainedTokenizerFast, config: SynerGenVLConfig,
        image_codec: ImageTokenizer | None = None, chat_template: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # A copy: ours reads control tokens in a user's text as plain characters, transformers' does not.
        self.text = TextTokenizer(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        self.config, self.image_codec = config, image_codec
        self.builder = SequenceBuilder(config.synergen(), self.text)
        self.image_token, self.image_token_id = IMAGE_MARK, config.image_token_id

    # ---- to ids -----------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Sequence[Any], chat_template: None = None, *, add_generation_prompt: bool = False,
        tokenize: bool = False, return_dict: bool = False, return_tensors: str | None = None,
        continue_final_message: bool = False, processor_kwargs: dict[str, Any] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """A conversation, or a list of them, in the form that the model was trained on.

        Each message is ``{"role": "system" | "user" | "assistant", "content": ...}``; the content is text, or a list of
        ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": picture}``, with ``path`` or ``url`` in place
        of ``image`` if you like. Control tokens written out in a message are plain characters when ``tokenize`` is on.

        Args:
            add_generation_prompt: end with the beginning of an assistant's turn.
            tokenize: give ids, else text with `IMAGE_MARK` for each picture, for people and for `__call__`.
            return_dict: all that the model takes: ``input_ids``, ``attention_mask``, ``image_ids [N, h, w]``. Else ids
                alone.
            return_tensors: "pt", "np" or None for lists. A list of conversations is padded on the left.
            continue_final_message: leave the last message, an assistant's, open.
            processor_kwargs, options: ``allow_urls`` (fetch pictures from the network; default: off) and ``padding``
                (of several conversations, to one length; tensors need it; default: on).

        Raises:
            TypeError: another option.
            ValueError: a role, part or picture that is none, or a message that cannot be continued.
        """
        if chat_template is not None:
            raise ValueError("apply_chat_template: the model's own format is the only one; leave chat_template out")
        single = not conversation or isinstance(conversation[0], dict)
        conversations = [conversation] if single else list(conversation)
        turns = [[_turn(message, i) for i, message in enumerate(c)] for c in conversations]
        open_end = all(c and c[-1][0] == "assistant" for c in turns) and not add_generation_prompt
        if continue_final_message and not open_end:
            raise ValueError("chat: continue_final_message wants an assistant's message last, and no new one")
        if not tokenize:
            texts = [self._written(c, add_generation_prompt, continue_final_message) for c in turns]
            return texts[0] if single else texts
        rows = [self._ids(c, add_generation_prompt, continue_final_message) for c in turns]
        if not return_dict and return_tensors is None:
            return rows[0] if single else rows
        pictures = [p for c in turns for _, parts in c for p in parts if not isinstance(p, str)]
        batch = self._batch(
            rows, [p.source for p in pictures], return_tensors, **{**(processor_kwargs or {}), **options}
        )
        return batch if return_dict else batch["input_ids"]

    def __call__(  # type: ignore[override]
        self, images: Any = None, text: str | Sequence[str] | None = None, return_tensors: str | None = None,
        allow_urls: bool = False, padding: bool = True,
    ) -> BatchFeature:  # fmt: skip
        """Text that is formatted already, with `IMAGE_MARK` where each of ``images`` stands.

        Control tokens in ``text`` are control tokens: text from strangers belongs into `apply_chat_template`.

        Raises:
            ValueError: no text, or other pictures than marks.
        """
        if text is None:
            raise ValueError("processor: text is missing; pictures alone go through encode_images()")
        rows = []
        for line in [text] if isinstance(text, str) else text:
            row: list[int] = []
            for i, part in enumerate(line.split(IMAGE_MARK)):
                row += self.builder.picture if i else []
                row += self.tokenizer.encode(part, add_special_tokens=False) if part else []
            rows.append(row)
        pictures = [] if images is None else list(flat(images))
        return self._batch(rows, pictures, return_tensors, allow_urls, padding)

    def paint(self, captions: str | Sequence[str], return_tensors: str | None = "pt") -> BatchFeature:
        """What `generate_image` takes to paint one picture a caption: ``input_ids`` and ``attention_mask``
        ``[B, T]``, and ``unconditional_ids`` ``[1, U]`` for guidance."""
        rows = [self.builder.paint_prompt(c) for c in ([captions] if isinstance(captions, str) else captions)]
        batch = self._batch(rows, [], None)
        return BatchFeature(
            {**batch, "unconditional_ids": [self.builder.paint_prompt(None)]}, tensor_type=return_tensors
        )

    def encode_images(self, images: Any, allow_urls: bool = False) -> Tensor:
        """Image ids int64 ``[N, h, w]`` of pictures in any form that the image processor takes.

        Raises:
            ValueError: not a picture, or the checkpoint has no image tokenizer.
        """
        pixels = self.image_processor.preprocess(images, return_tensors="pt", allow_urls=allow_urls)["pixel_values"]
        return self._codec().encode(pixels.to(self._codec().vq.device))

    def _batch(
        self, rows: list[list[int]], pictures: list[Any], return_tensors: str | None, allow_urls: bool = False,
        padding: bool = True,
    ) -> BatchFeature:  # fmt: skip
        marks = sum(row.count(self.image_token_id) for row in rows) // self.builder.picture.count(self.image_token_id)
        if marks != len(pictures):
            raise ValueError(f"processor: text has {marks} places for pictures, got {len(pictures)} pictures")
        longest = max(map(len, rows), default=0) if padding else 0
        fill = self.text.eos
        data: dict[str, Any] = {
            "input_ids": [[fill] * (longest - len(row)) + row for row in rows],
            "attention_mask": [[0] * (longest - len(row)) + [1] * len(row) for row in rows],
        }
        if pictures:
            ids = self.encode_images(pictures, allow_urls).cpu()
            data["image_ids"] = ids if return_tensors else ids.tolist()
        return BatchFeature(data, tensor_type=return_tensors)

    def _ids(self, turns: list[_Turn], reply: bool, unfinished: bool) -> list[int]:
        """As of `SequenceBuilder.ask_prompt`: pictures, a new line, text."""
        text, newline = self.text, self.text.encode("\n")
        ids = [text.bos]
        for role, parts in turns:
            ids += [text.im_start, *text.encode(f"{role}\n")]
            for before, part in zip([None, *parts], parts, strict=False):
                if isinstance(part, _Picture):
                    ids += self.builder.picture
                else:
                    ids += newline if isinstance(before, _Picture) else []
                    ids += text.encode(part)
            ids += [text.im_end, *newline]
        if unfinished:
            return ids[: -1 - len(newline)]
        return [*ids, text.im_start, *text.encode("assistant\n")] if reply else ids

    def _written(self, turns: list[_Turn], reply: bool, unfinished: bool) -> str:
        """`_ids`, for people."""
        end = "<|im_end|>\n"
        out = str(self.text.tokenizer.id_to_token(self.text.bos))
        for role, parts in turns:
            out += f"<|im_start|>{role}\n"
            for before, part in zip([None, *parts], parts, strict=False):
                out += IMAGE_MARK if isinstance(part, _Picture) else "\n" * isinstance(before, _Picture) + part
            out += end
        if unfinished:
            return out.removesuffix(end)
        return out + "<|im_start|>assistant\n" if reply else out

    # ---- from ids ---------------------------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Text of ids. Ids of pictures are left out; control tokens too unless ``skip_special_tokens`` is off."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        words = [i for i in ids if i < self.config.vocab_size]
        return str(self.tokenizer.decode(words, skip_special_tokens=skip_special_tokens, **kwargs))

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """`decode` of each."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)

    def decode_images(self, image_ids: Tensor) -> list[Image.Image]:
        """Image ids ``[N, h, w]``, such as `generate_image` gives, as pictures.

        Raises:
            ValueError: ids outside the codebook, or the checkpoint has no image tokenizer.
        """
        pixels = self._codec().decode(image_ids.to(self._codec().vq.device))
        return [Image.fromarray(p) for p in to_uint8(pixels).cpu().numpy()]

    def _codec(self) -> ImageTokenizer:
        if self.image_codec is None:
            raise ValueError("processor: pictures need an image tokenizer, and this checkpoint has none")
        return self.image_codec

    # ---- files ------------------------------------------------------------------------------------------------

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "image_ids"]

    def to_dict(self) -> dict[str, Any]:
        """For ``processor_config.json``: what the other files of a checkpoint do not say."""
        return {"processor_class": type(self).__name__, "image_processor": self.image_processor.to_dict()}

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write tokenizers and picture size, and the model's ``config.json`` if there is none yet."""
        folder = Path(save_directory)
        written = super().save_pretrained(folder)
        self.text.save(folder)
        if self.image_codec is not None:
            self.image_codec.save_pretrained(folder)
        if not (folder / "config.json").exists():
            self.config.save_pretrained(folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return written

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> SynerGenVLProcessor:  # type: ignore[override]
        """From a folder of `save_pretrained`, `synergen convert` or `synergen train`, or its copy on the hub.

        Raises:
            OSError: the config or the text tokenizer is missing.
            ValueError: a file does not fit.
        """
        config = SynerGenVLConfig.from_pretrained(pretrained_model_name_or_path, **where(kwargs))
        files = [
            checkpoint_file(pretrained_model_name_or_path, name, kwargs)
            for name in (TOKENIZER_FILE, image_tokenizer.CONFIG_FILE, image_tokenizer.WEIGHTS_FILE)
        ]
        if files[0] is None:
            raise OSError(f"processor: no {TOKENIZER_FILE} in {pretrained_model_name_or_path}")
        codec = None if files[1] is None or files[2] is None else ImageTokenizer.from_pretrained(files[1].parent).eval()
        stride = 8 if codec is None else codec.stride
        rows, columns = config.image_grid
        return cls(
            SynerGenVLImageProcessor(size={"height": rows * stride, "width": columns * stride}),
            fast_tokenizer(TextTokenizer.load(files[0].parent)),
            config,
            codec,
        )


def fast_tokenizer(text: TextTokenizer) -> PreTrainedTokenizerFast:
    """A text tokenizer under transformers' interface; its own padding is on the left, for generation."""
    name = text.tokenizer.id_to_token
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text.tokenizer.to_str()),
        bos_token=name(text.bos),
        eos_token=name(text.eos),
        pad_token=name(text.eos),
        padding_side="left",
    )


class _Picture:
    """A picture's place in a message."""

    def __init__(self, source: Any) -> None:
        self.source = source


_Turn = tuple[str, list[str | _Picture]]  # role, and its texts and pictures


def _turn(message: Any, number: int) -> _Turn:
    role, content = (message.get(k) for k in ("role", "content"))
    if role not in ("user", "assistant") and (role != "system" or number):
        raise ValueError(f"chat: role of message {number} must be system (first only), user or assistant, got {role!r}")
    if isinstance(content, str):
        return role, [content]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"chat: content of message {number} must be text or a list, got {type(content).__name__}")
    parts: list[str | _Picture] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        found = [part[key] for key in _PARTS.get(str(kind), ()) if key in part]
        if len(found) != 1 or (kind == "text" and not isinstance(found[0], str)):
            raise ValueError(
                f"chat: a part of message {number} must be a text with 'text' or an image with one of 'image', 'path' "
                f"and 'url', got {part!r:.80}"
            )
        parts.append(_Picture(found[0]) if kind == "image" else found[0])
    return role, parts
