"""Text tokenizers of published models as one fast ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ..processing.text import SPECIALS, TOKENIZER_FILE, TextTokenizer
from .sources import MAX_JSON, read_json

#: InternLM2's special ids (chat_format.md of InternLM); its SentencePiece file has placeholders there.
INTERNLM2_SPECIALS = {
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}
_SPACE = "\u2581"  # SentencePiece's mark of a space


def convert_text_tokenizer(llm: Path, out: Path, vocab_size: int, on_note: Callable[[str], None]) -> None:
    """Write the tokenizer of a language model into ``out``, its special tokens added once.

    A model without one, or without a place for ``<|im_start|>`` and ``<|im_end|>``, leaves ``out`` without one, and
    ``on_note`` says so.

    Raises:
        ImportError: a SentencePiece or GGUF file, and its package is not installed.
        ValueError: the file is broken, or has more ids than the model has embeddings.
    """
    tokenizer = read_tokenizer(llm)
    if tokenizer is None:
        return on_note(f"no text tokenizer: {llm} has neither {TOKENIZER_FILE} nor tokenizer.model")
    if (size := tokenizer.get_vocab_size()) > vocab_size:
        raise ValueError(f"convert: the text tokenizer must have at most {vocab_size} ids, got {size}")
    absent = [t for t in SPECIALS[3:] if tokenizer.token_to_id(t) is None]
    if size + len(absent) > vocab_size:
        return on_note(f"no text tokenizer: it has no {absent[0]}, and the model no row to spare for it")
    # Known tokens keep their ids; added once, they are never made of pieces.
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS[3:]])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    TextTokenizer(tokenizer).save(out)


def read_tokenizer(llm: Path) -> Tokenizer | None:
    """The tokenizer of a folder (``tokenizer.json`` first, then ``tokenizer.model``) or GGUF file, or None."""
    files = [llm] if llm.is_file() else sorted(llm.glob("*.gguf"))
    fast, slow = llm / TOKENIZER_FILE, llm / "tokenizer.model"
    for path in (fast, slow):
        if path.is_file() and path.stat().st_size > MAX_JSON:
            raise ValueError(f"convert: {path} must be at most {MAX_JSON} bytes, got {path.stat().st_size}")
    if fast.is_file():
        try:
            return Tokenizer.from_file(str(fast))
        except Exception as e:  # tokenizers raises bare Exception for a broken file
            raise ValueError(f"convert: {fast} is not a tokenizer file: {e}") from e
    if slow.is_file():
        config = read_json(llm / "tokenizer_config.json") if (llm / "tokenizer_config.json").is_file() else {}
        return from_sentencepiece(slow, _added(config))
    if len(files) == 1 and not (llm / "config.json").is_file():
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(files[0].parent), gguf_file=files[0].name, local_files_only=True)
        return Tokenizer.from_str(found.backend_tokenizer.to_str())
    return None


def _added(config: dict[str, Any]) -> dict[int, str]:
    """Special tokens by id, as ``tokenizer_config.json`` has them."""
    added = config.get("added_tokens_decoder", {})
    try:
        return {int(i): str(token["content"]) for i, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"convert: added_tokens_decoder must map ids to tokens: {e}") from e


def from_sentencepiece(path: Path, added: dict[int, str]) -> Tokenizer:
    """SentencePiece's BPE with byte fallback as a fast tokenizer that gives the same ids.

    Args:
        path: ``tokenizer.model``.
        added: special tokens by id; ids of the file are renamed, ids that follow it are appended. InternLM2's are
            known.

    Raises:
        ImportError: ``sentencepiece`` is not installed.
        ValueError: not such a file, or of a kind that is not InternLM2's or Llama's.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as pb2
    except ImportError as e:
        raise ImportError("tokenizer.model needs the package sentencepiece: pip install 'synergen_ext[convert]'") from e
    module: Any = pb2  # generated: its classes are not in its text
    proto = module.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as e:  # protobuf's own exception, whose class depends on its backend
        raise ValueError(f"convert: {path} is not a SentencePiece file: {e}") from e
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback:
        raise ValueError(f"convert: {path} must be a BPE with byte fallback")
    if rules.remove_extra_whitespaces or rules.precompiled_charsmap:
        raise ValueError(f"convert: {path} must keep text as it is (normalizer 'identity', spaces kept)")

    names = [p.piece for p in proto.pieces]
    if len(names) == 92_544 and trainer.vocab_size <= 92_544:
        added = {**INTERNLM2_SPECIALS, **added}
    control = {i for i, p in enumerate(proto.pieces) if p.type in (p.CONTROL, p.UNKNOWN)}
    control |= {i for i in added if 0 <= i < len(names)}
    for i, token in sorted(added.items()):
        if 0 <= i < len(names):
            names[i] = token
        elif i == len(names):
            names.append(token)
            control.add(i)
        else:
            raise ValueError(f"convert: added token {token!r} must have an id up to {len(names)}, got {i}")
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) != len(names):
        raise ValueError(f"convert: {path} has two pieces of the same name")

    scores = {p.piece: p.score for i, p in enumerate(proto.pieces) if p.type == p.NORMAL and i not in control}
    tokenizer = Tokenizer(
        models.BPE(vocab, _merges(scores, vocab), unk_token=names[trainer.unk_id], fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend(_SPACE)] if rules.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    user = [p.piece for i, p in enumerate(proto.pieces) if p.type == p.USER_DEFINED and i not in control]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in user])
    tokenizer.add_special_tokens([AddedToken(names[i], special=True, normalized=False) for i in sorted(control)])
    return tokenizer


def _merges(scores: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose joined piece scores highest: every split of every piece, best first."""
    pairs = [
        (-score, vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]
