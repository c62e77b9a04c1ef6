"""Text <-> ids: a `tokenizers` file, chat templates by name, and the paper's prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TOKENIZER_FILE = "tokenizer.json"

#: Section 3.4 and table 8: the paper's prompts.
GENERATION_PROMPT = "Generate an image of: {}"
UNCONDITIONAL_PROMPT = ("Here is a random image ", ":")  # <UNCOND> stands between
SPECIALS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
DOCUMENT_END = "<|endoftext|>"


@dataclass(frozen=True)
class ChatTemplate:
    """``<|im_start|>role\\n content <|im_end|>`` for each turn; templates differ in what stands around it."""

    start: str = ""  # before the first turn
    after: str = "\n"  # after each <|im_end|>
    system: str | None = None  # used if the messages have none


#: InternLM's own template starts with <s> and breaks the line after <|im_end|>. The one of the same name in InternVL's
#: code does not break it, and has a system line.
CHAT_TEMPLATES = {
    "internlm2-chat": ChatTemplate(start="<s>"),
    "internvl": ChatTemplate(
        start="<s>",
        after="",
        system="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。",
    ),
    "chatml": ChatTemplate(),
}


def chat_turns(messages: Sequence[tuple[str, str]], template: str) -> tuple[ChatTemplate, list[tuple[str, str]]]:
    """A template by name, and the turns with its system line if it has one and the messages do not.

    Args:
        messages: (role, content), roles ``system`` (first, if at all), ``user`` and ``assistant``.

    Raises:
        ValueError: no such template, or no such role.
    """
    if template not in CHAT_TEMPLATES:
        raise ValueError(f"chat template must be one of {', '.join(CHAT_TEMPLATES)}, got {template!r}")
    for i, (role, _) in enumerate(messages):
        if role not in ("user", "assistant") and (role != "system" or i):
            raise ValueError(f"chat: role of message {i} must be system (first only), user or assistant, got {role!r}")
    chat, turns = CHAT_TEMPLATES[template], list(messages)
    if chat.system is not None and (not turns or turns[0][0] != "system"):
        turns.insert(0, ("system", chat.system))
    return chat, turns


def chat_text(messages: Sequence[tuple[str, str]], template: str, reply: bool = True) -> str:
    """A conversation as one string, special tokens written out. For people to read: give models ``chat_ids``.

    Args:
        messages, template: as of ``chat_turns``.
        reply: end with the beginning of an assistant's turn.
    """
    chat, turns = chat_turns(messages, template)
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>{chat.after}" for role, content in turns)
    return chat.start + text + ("<|im_start|>assistant\n" if reply else "")


class TextTokenizer:
    """A fast tokenizer with the ids the model's sequences need.

    Args:
        tokenizer: must know ``<|im_start|>`` and ``<|im_end|>``, and ``<s>`` and ``</s>`` or, as Qwen2 and SmolLM2 have
            it, ``<|endoftext|>`` for both.

    Raises:
        ValueError: one of them is missing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Not stored in the file: without it, a user's "<|im_end|>" would become the control token.
        self.tokenizer.encode_special_tokens = True
        ends = SPECIALS[1:3] if tokenizer.token_to_id(DOCUMENT_END) is None else (DOCUMENT_END, DOCUMENT_END)
        ends = SPECIALS[1:3] if tokenizer.token_to_id("<s>") is not None else ends
        self.bos, self.eos, self.im_start, self.im_end = (self._id(t) for t in (*ends, *SPECIALS[3:]))

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"text tokenizer: no token {token!r} in the vocabulary")
        return int(found)

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Plain text to ids. Special tokens written out in ``text`` are ordinary characters, never control ids.

        Raises:
            ValueError: ``text`` holds half a surrogate pair, which no UTF-8 text does.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"text must be valid Unicode, got a lone surrogate at character {e.start}") from e
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out; ids past the vocabulary are refused."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"decode: ids must be in [0, {self.vocab_size}), got {i}")
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def turn(self, role: str, content: Iterable[int], close: bool = True) -> list[int]:
        """``<|im_start|>role\\n content <|im_end|>\\n`` (InternLM2's own template)."""
        ids = [self.im_start, *self.encode(role + "\n"), *content]
        return [*ids, self.im_end, *self.encode("\n")] if close else ids

    def chat_ids(self, messages: Sequence[tuple[str, str]], template: str, reply: bool = True) -> list[int]:
        """``chat_text`` as ids. Special tokens written out in a message are ordinary characters."""
        chat, turns = chat_turns(messages, template)
        ids = [self.bos] if chat.start else []
        for role, content in turns:
            ids += [self.im_start, *self.encode(f"{role}\n{content}"), self.im_end]
            ids += self.encode(chat.after) if chat.after else []
        return [*ids, self.im_start, *self.encode("assistant\n")] if reply else ids

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save(str(Path(folder, TOKENIZER_FILE)))

    @classmethod
    def load(cls, folder: str | Path) -> TextTokenizer:
        path = Path(folder, TOKENIZER_FILE)
        if not path.is_file():
            raise FileNotFoundError(f"text tokenizer: no {TOKENIZER_FILE} in {folder}")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except ValueError:
            raise
        except Exception as e:  # tokenizers raises bare Exception for a broken file
            raise ValueError(f"text tokenizer: {path} is not a tokenizer file: {e}") from e

    @classmethod
    def train(cls, sentences: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Byte-level BPE on ``sentences``: any text has ids, seen words have one each."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            sentences,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=list(SPECIALS),
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        return cls(tokenizer)
