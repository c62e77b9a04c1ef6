"""SynerGen-VL (arXiv 2412.09604): one causal Transformer over text tokens and folded image tokens."""

from .cache import KVCache
from .config import PRESETS, SynerGenConfig
from .folding import FoldedEmbedding
from .modeling import SynerGenVL
from .unfolding import UnfoldingHead

__all__ = ["PRESETS", "FoldedEmbedding", "KVCache", "SynerGenConfig", "SynerGenVL", "UnfoldingHead"]
