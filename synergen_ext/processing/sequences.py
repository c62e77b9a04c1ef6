"""Builds the model's token sequences: what is asked, what is answered, where the pictures stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..model.config import SynerGenConfig
from ..model.modeling import IGNORE
from .text import GENERATION_PROMPT, UNCONDITIONAL_PROMPT, TextTokenizer, chat_turns


@dataclass
class Example:
    """One sequence: ids, and at each position the id to be learned there (-100: none)."""

    ids: list[int]
    labels: list[int]


class SequenceBuilder:
    """Chat sequences in InternLM2's format, with pictures between ``<boi>`` and ``<eoi>``.

    Args:
        folded: folded tokens of one picture; default: the config's full grid.

    Raises:
        ValueError: the vocabulary or a picture is larger than the model's.
    """

    def __init__(self, config: SynerGenConfig, text: TextTokenizer, folded: int | None = None) -> None:
        if text.vocab_size > config.vocab_size:
            raise ValueError(f"text tokenizer has {text.vocab_size} tokens, the model's vocabulary {config.vocab_size}")
        self.config, self.text = config, text
        folded = config.image_tokens if folded is None else folded
        if not 1 <= folded <= config.image_tokens:
            raise ValueError(f"SequenceBuilder: folded must be in [1, {config.image_tokens}], got {folded}")
        self.picture = [config.boi_id, *[config.image_id] * folded, config.eoi_id]
        self._newline = text.encode("\n")
        self._answer = [text.im_start, *text.encode("assistant\n")]

    # ---- prompts ----------------------------------------------------------------------------------------------

    def paint_prompt(self, caption: str | None) -> list[int]:
        """Everything before ``<boi>``'s image tokens, ``<boi>`` included; None gives the unconditional prompt."""
        if caption is None:
            before, after = UNCONDITIONAL_PROMPT
            content = [*self.text.encode(before), self.config.uncond_id, *self.text.encode(after)]
        else:
            content = self.text.encode(GENERATION_PROMPT.format(caption))
        return [self.text.bos, *self.text.turn("user", content), *self._answer, self.config.boi_id]

    def ask_prompt(self, question: str, pictures: int = 1, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """A question about ``pictures`` pictures, after earlier question-answer pairs, up to the answer."""
        ids = [self.text.bos]
        for i, (q, a) in enumerate([*history, (question, None)]):
            content = self.text.encode(q)
            if i == 0:
                content = [*(self.picture * pictures), *(self._newline if pictures else []), *content]
            ids += [*self.text.turn("user", content), *self._answer]
            if a is not None:
                ids += [*self.text.encode(a), self.text.im_end, *self._newline]
        return ids

    # ---- training sequences -----------------------------------------------------------------------------------

    def paint(self, caption: str | None) -> Example:
        """Generation: loss on the image tokens (through the unfolding head) and on ``<boi>``, ``<eoi>``, the end."""
        prompt = self.paint_prompt(caption)
        ids = [*prompt, *self.picture[1:], self.text.im_end, *self._newline, self.text.eos]
        labels = [IGNORE] * len(ids)
        end = len(prompt) + len(self.picture) - 2  # position of <eoi>
        for i in (len(prompt) - 1, end, end + 1, len(ids) - 1):
            labels[i] = ids[i]
        return Example(ids, labels)

    def ask(self, pairs: Sequence[tuple[str, str]], pictures: int = 1, learn_questions: bool = False) -> Example:
        """Understanding (or text only, with ``pictures=0``): loss on the answers, or on all text."""
        ids, labels = [self.text.bos], [IGNORE]
        for i, (q, a) in enumerate(pairs):
            content = self.text.encode(q)
            if i == 0 and pictures:
                content = [*(self.picture * pictures), *self._newline, *content]
            asked = [*self.text.turn("user", content), *self._answer]
            answer = [*self.text.encode(a), self.text.im_end]
            ids += [*asked, *answer, *self._newline]
            # The unfolding head learns pictures; their placeholder is no word and cannot be a label.
            words = [i if i != self.config.image_id else IGNORE for i in asked]
            labels += words if learn_questions else [IGNORE] * len(asked)
            labels += [*answer, *[IGNORE] * len(self._newline)]
        ids.append(self.text.eos)
        labels.append(self.text.eos)
        return Example(ids, labels)

    def conversation(self, turns: Sequence[tuple[str, str]], template: str) -> Example:
        """Understanding: a whole conversation, a picture at every ``<image>`` of a user's turn; loss on the answers.

        Args:
            turns, template: as of `chat_turns`.

        Raises:
            ValueError: no such template or role.
        """
        chat, turns = chat_turns(turns, template)
        ids = [self.text.bos] if chat.start else []
        labels = [IGNORE] * len(ids)
        after = self.text.encode(chat.after) if chat.after else []
        for role, content in turns:
            head = [self.text.im_start, *self.text.encode(f"{role}\n")]
            said: list[int] = []
            for i, part in enumerate(content.split("<image>") if role == "user" else [content]):
                said += [*(self.picture if i else []), *(self.text.encode(part) if part else [])]
            said.append(self.text.im_end)
            ids += [*head, *said, *after]
            learned = said if role == "assistant" else [IGNORE] * len(said)
            labels += [*[IGNORE] * len(head), *learned, *[IGNORE] * len(after)]
        return Example([*ids, self.text.eos], [*labels, self.text.eos])
