"""Text <-> ids: a `tokenizers` file, chat templates by name, and the paper's prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TOKENIZER_FILE = "tokenizer.json"

#: Section 3.4 and table 8: the paper's prompts.
GENERATION_PROMPT = "Generate an image of: {}"
UNCONDITIONAL_PROMPT = ("Here is a random image ", ":")  # <UNCOND> stands between
SPECIALS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


class TextTokenizer:
    """A fast tokenizer with the ids the model's sequences need.

    Args:
        tokenizer: must know ``<s>``, ``</s>``, ``<|im_start|>`` and ``<|im_end|>``.

    Raises:
        ValueError: one of them is missing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Not stored in the file: without it, a user's "<|im_end|>" would become the control token.
        self.tokenizer.encode_special_tokens = True
        self.bos, self.eos, self.im_start, self.im_end = (self._id(t) for t in SPECIALS[1:])

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
