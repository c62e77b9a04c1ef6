"""A picture of 512 x 512 with guidance (two rows): the sum of its kernels' bounds."""

from collections.abc import Iterator

from synergen_ext.bench import Row

from . import entries
from .cards import Card
from .model import evaluate

POSITIONS, TOKENS = 256, 16  # of the backbone; of the head for each
LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM = 24, 2048, 16, 8, 128
#: Bits of a stored weight, with its scales: 4 bits in groups of 64 with 16-bit scales.
BITS = {"bf16": 16.0, "int8": 8.0, "int4": 4.25}

#: Of one position: the projections of attention, which are not our kernels: their weights as streamed bytes.
PROJECTIONS = DIM * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM * DIM


def seconds(card: Card, bits: str) -> dict[str, float]:
    """By part. Without kernels of our own for a part: its weights at full bandwidth, and two launches a layer."""
    found = {entry.name: entry for entry in entries.ENTRIES}

    def ours(name: str) -> float | None:
        entry = found.get(name)
        return None if entry is None else evaluate(entry, card).total

    streamed = BITS[bits] / 8 / card.dram
    parts = {"attention projections": POSITIONS * LAYERS * (PROJECTIONS * streamed + 2 * card.launch)}
    ffn = ours(f"expert_ffn decode 2 rows, {bits}")
    parts["experts"] = POSITIONS * LAYERS * (ffn or 3 * DIM * 8192 * streamed + 2 * card.launch)
    attention = ours("decode_attention 2 rows, 400 keys") or 2 * 400 * 2 * KV_HEADS * HEAD_DIM * 2 / card.dram
    parts["attention"] = POSITIONS * LAYERS * (attention + 2 * card.launch)  # and its rope
    norm = ours("add_rms_norm 2 rows") or card.launch
    parts["norms"] = POSITIONS * (2 * LAYERS + 1) * norm
    head = [ours(f"unfold_head 16 steps, 2 rows, {bits}, {way}") for way in ("persistent", "graph")]
    known = [t for t in head if t is not None]
    weights = 4 * (PROJECTIONS + 3 * DIM * 8192) + DIM * 32768
    parts["head"] = POSITIONS * (min(known) if known else TOKENS * (weights * streamed + 40 * card.launch))
    return parts


def rows(card: Card) -> Iterator[Row]:
    for bits in BITS:
        parts = seconds(card, bits)
        note = ", ".join(f"{name} {t:.2f} s" for name, t in parts.items())
        yield Row(f"picture of 512 x 512, {bits}, {card.name}", sum(parts.values()), "s", note=f"{note}; no VQ decoder")
