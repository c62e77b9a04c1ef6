"""The least time of a launch, from bytes, operations and machine code. Static: nothing here is a measurement.

    time = launch + max(terms) + edges + barriers

The terms are DRAM (with the bytes that are under way together: Little's law), L2, tensor cores, the pipes of an SM
(issue slots, float32, whole numbers, float64, roots and conversions, shared memory and first-level cache), and the
chain: what one warp does in loops and waits for, one after another. Those of an SM are taken for the SM with the most
blocks, so that waves count whole. The edges are a block's code outside of loops and its first load: other blocks of the
SM hide them, so they count once, or for every wave where an SM holds one block.

A barrier of the grid stops the SMs and need not stop DRAM: a kernel that has asked for what it reads next before it
waits (`ahead`) loses what the barrier takes beyond those bytes' time. What that hides of the barrier is added to every
other term, which stands still meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from . import budgets
from .cards import Card

#: Cycles from one instruction of a warp to the next that wants its result: about 4; with two such chains in a thread,
#: 2 on average. Assumed.
CYCLES_A_WARP = 2.0
#: Cycles from the last warp's arrival at a block's barrier until all go on. Assumed.
CYCLES_A_BARRIER = 20.0
#: Bytes a cycle that the first-level cache takes from L2 (A100 and later).
L1_FILL = 64


@dataclass(frozen=True)
class Launch:
    """One kernel launch, or `times` of the same.

    Attributes:
        kernel: its name in tools/cuda_budgets.json.
        blocks, threads, shared: of the launch; dynamic shared memory in bytes.
        dram: bytes read and written that no cache can save.
        l2: bytes that pass between L2 and the SMs (at least dram).
        flops: on tensor cores.
        per_warp: how often a warp runs an instruction, on average, by the name of one that only the loop meant holds:
            {"HMMA": 2048}. The loop is the one with the most of them ("LDG:2": the second, in the order of the code,
            that has any), and it turns as often as that makes it.
        straight: share of the code outside of loops that runs; the whole, where unlikely code is little.
        alone: share of the code outside of loops, of what `straight` counts, that one warp of a block runs while the
            others wait: edges have it whole, the pipes of an SM once a block.
        others: turns of the loops not named, for each turn of the code around them.
        in_flight: bytes from DRAM that a block has asked for and not yet got; None: enough.
        waits: loads from (DRAM, L2) that one block waits for one after another.
        barriers: of the grid.
        edges: as per_warp, of loops around those that load: they run once before the first load comes or after the
            last, so their code is in the edges.
        stops: the same, of what runs between the last load's use before a barrier and the barrier.
        ahead: bytes from DRAM that a block has asked for when it comes to a barrier, of what it wants after that.
    """

    kernel: str
    blocks: int
    threads: int
    shared: int = 0
    dram: float = 0
    l2: float = 0
    flops: float = 0
    per_warp: Mapping[str, float] = field(default_factory=dict)
    straight: float = 1.0
    alone: float = 0.0
    others: float = 1.0
    in_flight: float | None = None
    waits: tuple[float, float] = (1, 0)
    barriers: int = 0
    edges: Mapping[str, float] = field(default_factory=dict)
    stops: Mapping[str, float] = field(default_factory=dict)
    ahead: float = 0
    times: int = 1


@dataclass(frozen=True)
class Entry:
    """What is bounded: launches on a card, one after another.

    Attributes:
        name: as in gpu_cases.py, where it is one of them.
        launches: of a card, since grids may depend on it.
        bar: least share of the time that DRAM or tensor cores take alone on an H100; None: `why`.
        at_most: most microseconds on an H100.
        at_most_ideal: most times of the bytes at full bandwidth on an H100.
        why: no bar, or less than 0.85, for this reason.
    """

    name: str
    launches: Callable[[Card], list[Launch]]
    bar: float | None = 0.85
    at_most: float | None = None
    at_most_ideal: float | None = None
    why: str = ""

    def kernels(self) -> set[str]:
        from .cards import CARDS

        return {launch.kernel for card in CARDS for launch in self.launches(card)}


@dataclass(frozen=True)
class Bound:
    """Seconds, by what takes them."""

    terms: dict[str, float]  # of max()
    ideal: dict[str, float]  # DRAM and tensor cores alone, no waves, nothing else
    launch: float
    edges: float
    barriers: float

    @property
    def total(self) -> float:
        return max(self.terms.values()) + self.launch + self.edges + self.barriers

    @property
    def limit(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])


def occupancy(card: Card, launch: Launch) -> int:
    """Blocks of the kernel that an SM holds."""
    made = budgets.kernel(launch.kernel, card.arch)
    warps = -(-launch.threads // 32)
    registers = -(-made["registers"] * 32 // 256) * 256 * warps
    shared = made["shared"] + launch.shared + 1024  # the driver's own
    fits = min(card.threads // (32 * warps), card.registers // registers, card.shared_bytes // shared, card.blocks)
    if fits < 1:
        raise ValueError(f"{launch.kernel}: no block of {launch.threads} threads, {shared} bytes fits a {card.name}")
    return fits


@dataclass(frozen=True)
class Code:
    """What a warp runs, by pipe."""

    straight: dict[str, float]  # outside of loops
    looped: dict[str, float]
    edges: dict[str, float]
    stops: dict[str, float]

    def all(self, what: str) -> float:
        return sum(part.get(what, 0.0) for part in (self.straight, self.looped, self.edges, self.stops))


def instructions(card: Card, launch: Launch) -> Code:
    loops = budgets.loops(launch.kernel, card.arch)

    def find(named: Mapping[str, float]) -> dict[int, float]:
        """Turns of the loops named."""
        found: dict[int, float] = {}
        for marker, count in named.items():
            name, _, number = marker.partition(":")
            holders = [i for i, (_, counts) in enumerate(loops) if i and name in counts]
            if not holders:
                raise ValueError(f"{launch.kernel}, sm_{card.arch}: no loop holds {name}")
            chosen = holders[int(number) - 1] if number else max(holders, key=lambda i: loops[i][1][name])
            found[chosen] = count / loops[chosen][1][name]
        return found

    groups = [find(named) for named in (launch.per_warp, launch.edges, launch.stops)]
    named = {i for group in groups for i in group}
    sums: list[dict[str, float]] = []
    for group, outside in zip(groups, (1.0, 0.0, 0.0), strict=True):
        turns: list[float] = []
        counts: dict[str, float] = {}
        for i, (parent, own) in enumerate(loops):
            turns.append(group.get(i, 0.0) if i in named else outside if parent < 0 else launch.others * turns[parent])
            for what, count in own.items() if i else ():
                counts[what] = counts.get(what, 0.0) + turns[i] * count
        sums.append(counts)
    return Code({what: launch.straight * count for what, count in loops[0][1].items()}, *sums)


def bound(card: Card, launch: Launch) -> Bound:
    held = occupancy(card, launch)
    resident = held * card.sms
    waves = math.ceil(launch.blocks / resident)
    busiest = math.ceil(launch.blocks / card.sms)  # blocks of the SM that has the most
    warps = -(-launch.threads // 32)
    code = instructions(card, launch)
    # Of the straight code, what all warps together run, in parts of what would be if all ran it.
    shared = (launch.straight - launch.alone * (1 - 1 / warps)) / launch.straight if launch.straight else 0.0
    cycle = 1 / card.clock

    def pipe(what: str, lanes: int) -> float:
        return busiest * warps * (code.all(what) - (1 - shared) * code.straight.get(what, 0.0)) * 32 / lanes * cycle

    def own(part: dict[str, float]) -> float:
        """Seconds of one warp."""
        return (part.get("issue", 0.0) * CYCLES_A_WARP + part.get("BAR", 0.0) * CYCLES_A_BARRIER) * cycle

    dram_waits, l2_waits = launch.waits
    waiting = dram_waits * card.dram_latency + l2_waits * card.l2_latency
    first = min(waiting, card.dram_latency if dram_waits else card.l2_latency)
    edges = (waves if held == 1 else 1) * (own(code.straight) + own(code.edges) + first)
    stops = launch.barriers * card.barrier + own(code.stops)
    hidden = min(stops, launch.barriers * launch.ahead * min(launch.blocks, resident) / card.dram)

    l2 = max(launch.l2, launch.dram)
    terms = {
        "DRAM": _dram(card, launch, resident),
        "L2": max(l2 / card.l2, busiest * l2 / launch.blocks / L1_FILL * cycle),
        "tensor": busiest * launch.flops / launch.blocks / card.mma * cycle,
        "issue": pipe("issue", 128),
        "float32": pipe("fma", card.fma_lanes),
        "integers": pipe("alu", card.alu_lanes),
        "float64": pipe("fp64", card.fp64_lanes),
        "conversions": pipe("xu", card.xu_lanes),
        "shared": pipe("wavefronts", 32),
        "chain": waves * (own(code.looped) + waiting - first),
    }
    terms = {name: t + (hidden if t and name != "DRAM" else 0.0) for name, t in terms.items()}
    return Bound(
        {name: launch.times * t for name, t in terms.items()},
        {"DRAM": launch.times * launch.dram / card.dram, "tensor": launch.times * launch.flops / card.tensor},
        launch.times * card.launch,
        launch.times * edges,
        launch.times * (stops - hidden),
    )


def _dram(card: Card, launch: Launch, resident: int) -> float:
    """Whole waves at full bandwidth or what is under way allows, then the rest with fewer blocks."""
    each = launch.dram / launch.blocks

    def seconds(blocks: int, together: int) -> float:
        if not blocks or not each:
            return 0.0
        bandwidth = card.dram
        if launch.in_flight is not None:
            bandwidth = min(bandwidth, together * launch.in_flight / card.dram_latency)
        return blocks * each / bandwidth

    rest = launch.blocks % resident
    return seconds(launch.blocks - rest, resident) + seconds(rest, rest)


@dataclass(frozen=True)
class Result:
    """An entry on a card."""

    entry: Entry
    card: Card
    parts: list[Bound]

    @property
    def total(self) -> float:
        return sum(part.total for part in self.parts)

    @property
    def share(self) -> float:
        """Of the time, what DRAM or tensor cores alone would take: the larger of the two for each launch."""
        return sum(max(part.ideal.values()) for part in self.parts) / self.total

    @property
    def ideal_dram(self) -> float:
        return sum(part.ideal["DRAM"] for part in self.parts)

    def shares(self) -> dict[str, float]:
        """Of every term in the whole, largest first; launches and barriers too."""
        sums: dict[str, float] = {}
        for part in self.parts:
            for name, t in {
                **part.terms,
                "launches": part.launch,
                "edges": part.edges,
                "barriers": part.barriers,
            }.items():
                sums[name] = sums.get(name, 0.0) + t
        return {n: t / self.total for n, t in sorted(sums.items(), key=lambda item: -item[1]) if t}

    def limits(self) -> str:
        """What limits the launch that takes longest."""
        return max(self.parts, key=lambda part: part.total).limit


def evaluate(entry: Entry, card: Card) -> Result:
    return Result(entry, card, [bound(card, launch) for launch in entry.launches(card)])
