"""Published checkpoints to ours and back: language models by family, Emu3's image tokenizer, text tokenizers."""

from .run import convert, export_llm

__all__ = ["convert", "export_llm"]
