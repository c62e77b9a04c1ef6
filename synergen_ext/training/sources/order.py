"""Shuffling by counting: the n-th draw is a function of (key, n), so a position is one number."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of whole numbers (splitmix64's finaliser over each)."""
    h = 0
    for v in values:
        h = (h + (v & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
        h ^= h >> 31
    return h


def uniform(*values: int) -> float:
    """A number in [0, 1) of whole numbers."""
    return (mix(*values) >> 11) / (1 << 53)


def shuffled(position: int, count: int, key: int) -> int:
    """Where ``position`` of ``count`` goes in the permutation that ``key`` names, without a table of it.

    Four Feistel rounds over the smallest even number of bits that hold ``count``; values past it are mapped again.

    Raises:
        ValueError: ``position`` is outside ``[0, count)``.
    """
    if not 0 <= position < count:
        raise ValueError(f"shuffled: position must be in [0, {count}), got {position}")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for turn in range(4):
            left, right = right, left ^ (mix(key, turn, right) & low)
        position = left << half | right
        if position < count:
            return position
