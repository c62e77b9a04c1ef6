"""Input side: image token ids -> folded embeddings in the language model's space (section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .config import SynerGenConfig


class FoldedEmbedding(nn.Module):
    """``x_V = MLP(TokenFold(TokenEmbed(I) + PE))`` (eq. 1).

    The position table covers ``image_grid``; smaller pictures use its top-left corner, so a model can be asked for
    pictures up to the size it was trained at.
    """

    def __init__(self, config: SynerGenConfig) -> None:
        super().__init__()
        self.fold = config.fold
        self.tokens = nn.Embedding(config.codebook_size, config.token_embed_size)
        self.positions = nn.Parameter(torch.empty(*config.image_grid, config.token_embed_size))
        self.proj_in = nn.Linear(config.window * config.token_embed_size, config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[N, h, w]`` -> ``[N, (h/m) * (w/n), D]``, windows in raster order."""
        m, n = self.fold
        h, w = ids.shape[1:]
        x = ops.fold_tokens(ids, self.tokens.weight, self.positions[:h, :w], m, n)  # [N, P, m*n*d]
        return self.mlp(x)

    def one_window(self, ids: Tensor, index: int, columns: int) -> Tensor:
        """Embed window ``index`` alone: ids ``[B, m*n]`` -> ``[B, 1, D]``.

        Args:
            columns: width of the whole picture in image tokens.
        """
        m, n = self.fold
        row, column = divmod(index, columns // n)
        positions = self.positions[row * m : (row + 1) * m, column * n : (column + 1) * n]
        x = ops.fold_tokens(ids.view(-1, m, n), self.tokens.weight, positions, m, n)
        return self.mlp(x)

    def mlp(self, x: Tensor) -> Tensor:
        return self.proj_out(nn.functional.gelu(self.proj_in(x)))
