"""Output side: one backbone state -> the m*n image token ids of its patch, one after another (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache import KVCache
from .config import SynerGenConfig
from .layers import HeadBlock, RMSNorm


class UnfoldingHead(nn.Module):
    """``p(v_ij | v_i,<j, h_i) = softmax(f_theta(v_i,<j, h_i))`` (eq. 3).

    A small causal Transformer of the backbone's own block. Its sequence for patch i is
    ``[h_i, e(v_i0), ..., e(v_i,mn-2)]``, with its own token and position tables; position j predicts ``v_ij``.
    It exists in two forms that give the same logits: ``forward`` (teacher forcing, all positions at once) and
    ``step`` (one position, with a cache). A loss wants no logits: it takes ``hidden`` and the classifier's weight.
    """

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.codebook_size, config.hidden_size)
        self.positions = nn.Parameter(torch.empty(config.window, config.hidden_size))
        self.layers = nn.ModuleList(HeadBlock(config) for _ in range(config.head_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.codebook_size, bias=False)

    def forward(self, states: Tensor, ids: Tensor) -> Tensor:
        """States ``[N, D]`` and true ids ``[N, m*n]`` -> logits ``[N, m*n, V]``; the last id is not read.

        Raises:
            ValueError: ids of another shape.
        """
        return self.classifier(self.hidden(states, ids))

    def hidden(self, states: Tensor, ids: Tensor) -> Tensor:
        """What the classifier reads in ``forward``: ``[N, m*n, D]``."""
        wanted = [len(states), self.config.window]
        if list(ids.shape) != wanted:
            raise ValueError(f"UnfoldingHead.forward: ids must be {wanted}, got {list(ids.shape)}")
        x = torch.cat((states[:, None].to(self.positions.dtype), self.tokens(ids[:, :-1])), dim=1) + self.positions
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        for block in self.layers:
            x = block(x, positions)
        return self.norm(x)

    def new_cache(self, batch: int) -> KVCache:
        c, w = self.config, self.classifier.weight
        return KVCache(c.head_layers, batch, c.num_kv_heads, c.window, c.head_dim, w.dtype, w.device)

    def step(self, previous: Tensor, cache: KVCache) -> Tensor:
        """Logits ``[N, V]`` of the next id of every patch.

        Args:
            previous: backbone states ``[N, D]`` at the first step, then the ids ``[N]`` chosen last.
            cache: from ``new_cache(N)``; it knows which step this is.

        Raises:
            ValueError: the patch is complete.
        """
        j = cache.length
        if j == self.config.window:
            raise ValueError(f"UnfoldingHead.step: a patch has {j} ids, and all are chosen")
        x = previous if j == 0 else self.tokens(previous)
        x = (x.to(self.positions.dtype) + self.positions[j])[:, None]  # [N, 1, D]
        positions = torch.full((len(x), 1), j, dtype=torch.long, device=x.device)
        for layer, block in enumerate(self.layers):
            x = block(x, positions, cache, layer)
        cache.advance(1)
        return self.classifier(self.norm(x[:, 0]))
