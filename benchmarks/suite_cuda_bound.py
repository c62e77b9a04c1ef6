"""The CUDA kernels on cards that are not here: static bound, not measured.

How it is computed: cuda_bound/model.py; the kernels: cuda_bound/entries.py. ``--quick``: H100 alone.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from synergen_ext.bench import Progress, Row

sys.path.insert(0, str(Path(__file__).parent))
from cuda_bound import picture  # noqa: E402
from cuda_bound.cards import CARDS, H100  # noqa: E402
from cuda_bound.entries import ENTRIES  # noqa: E402
from cuda_bound.model import Result, evaluate  # noqa: E402

TITLE = "static bound, not measured"


def rows(quick: bool, progress: Progress) -> Iterator[Row]:
    cards = (H100,) if quick else CARDS
    for number, entry in enumerate(ENTRIES):
        progress("bound the kernels", number, len(ENTRIES))
        results = {card.name: evaluate(entry, card) for card in cards}
        for name, result in results.items():
            yield Row(f"{entry.name}, {name}", result.total * 1e6, "us", note=terms(result))
        yield from _bars(results[H100.name])
    for card in cards:
        yield from picture.rows(card)


def terms(result: Result, most: int = 6) -> str:
    """`DRAM 94 %, L2 61 %, ...`: what each would take alone, in parts of the whole."""
    return ", ".join(f"{name} {share:.0%}" for name, share in list(result.shares().items())[:most])


def _bars(result: Result) -> Iterator[Row]:
    entry, name = result.entry, f"{result.entry.name}, {result.card.name}"
    bar = None if entry.bar is None else f">= {entry.bar}"
    yield Row(f"{name}: limited by DRAM or tensor cores", result.share, "", bar, note=entry.why)
    if entry.at_most is not None:
        yield Row(f"{name}: time", result.total * 1e6, "us", f"<= {entry.at_most}")
    if entry.at_most_ideal is not None:
        ratio = result.total / result.ideal_dram
        yield Row(f"{name}: time / bytes at full bandwidth", ratio, "x", f"<= {entry.at_most_ideal}")
