"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer, ``[layers, B, Hkv, capacity, Dh]`` each.

    ``length`` tokens are filled. A forward pass appends to every layer and then calls ``advance`` once.
    """

    def __init__(
        self, layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.keys = torch.zeros(layers, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, Hkv, T, Dh]`` after the filled part; returns all keys and values up to there.

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"KVCache: capacity is {self.capacity} tokens, got {end}")
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def reset(self) -> None:
        self.length = 0
