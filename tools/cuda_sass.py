"""What nvcc makes of a kernel source: registers and memory as ptxas says, instructions and loops as nvdisasm shows.

nvdisasm comes with a CUDA toolkit or with the package nvidia-cuda-nvdisasm; without it `instructions` of a kernel is
None. What is compiled stays in build/cuda/ and is made again when a source, a header or this file changes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda"
ARCHS = ("80", "90", "100", "120")
OPTIONS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-I", str(CSRC))

_FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\w+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # LDG.E.128, HMMA.16816.F32.BF16, ...
    operands: str
    guarded: bool  # by a predicate

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Kernel:
    name: str  # rms_norm_kernel<bf16, bf16, 8>
    registers: int
    shared: int  # static bytes
    local: int  # bytes of stack frame and spills
    instructions: tuple[Instruction, ...] | None


@cache
def nvcc() -> str | None:
    return shutil.which("nvcc")


@cache
def nvcc_version() -> str:
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", said)
    return found[1] if found else "unknown"


@cache
def known_archs() -> tuple[str, ...]:
    """Those of ARCHS that this nvcc compiles for."""
    said = subprocess.run([str(nvcc()), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(arch for arch in ARCHS if f"compute_{arch}" in said)


@cache
def nvdisasm() -> str | None:
    """On PATH, or from its package."""
    try:
        for file in metadata.files("nvidia-cuda-nvdisasm") or ():
            if file.name == "nvdisasm":
                return str(file.locate())
    except metadata.PackageNotFoundError:
        pass
    return shutil.which("nvdisasm")


def sources() -> list[Path]:
    """All that hold kernels: device.cu only asks the driver for GPUs."""
    return [s for s in sorted((CSRC / "cuda").glob("*.cu")) if s.name != "device.cu"]


def emulator_sources() -> list[Path]:
    """Kernels of the emulator's own tests, which use every wrapper of PTX."""
    return sorted((CSRC / "simt").glob("*.cu"))


def kernels(source: Path, arch: str, disassemble: bool = True) -> list[Kernel]:
    """The kernels of one source for one architecture.

    Raises:
        RuntimeError: nvcc refuses it or warns, or there is no kernel in it.
    """
    cubin = _compiled(source, arch)
    report = cubin.with_suffix(".log").read_text()
    listing = dict(_disassembled(cubin)) if disassemble and nvdisasm() else {}
    found = list(_FUNCTION.finditer(report))
    if not found:
        raise RuntimeError(f"{source.name} for sm_{arch}: no kernel in what ptxas says")
    names = _readable(f["name"] for f in found)
    result = []
    for f in found:
        shared = re.search(r"(\d+) bytes smem", f["rest"])
        local = sum(int(f[part]) for part in ("stack", "stores", "loads"))
        result.append(
            Kernel(
                names[f["name"]],
                int(f["registers"]),
                int(shared[1]) if shared else 0,
                local,
                listing.get(f["name"]),
            )
        )
    return sorted(result, key=lambda k: k.name)


def _compiled(source: Path, arch: str) -> Path:
    """The cubin; what ptxas said lies beside it."""
    folder = BUILD / nvcc_version() / f"sm_{arch}"
    folder.mkdir(parents=True, exist_ok=True)
    cubin = folder / f"{source.stem}.cubin"
    needs = cubin.with_suffix(".d")
    if _is_newer(cubin, needs):
        return cubin
    made = folder / f"{source.stem}.new.cubin"
    command = [
        nvcc(),
        *OPTIONS,
        f"-arch=sm_{arch}",
        "-Xptxas",
        "-v",
        "-cubin",
        "-MMD",
        "-MF",
        needs,
        source,
        "-o",
        made,
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stderr[-3000:]}")
    cubin.with_suffix(".log").write_text(done.stderr)
    made.rename(cubin)
    return cubin


def _is_newer(made: Path, needs: Path) -> bool:
    if not (made.is_file() and needs.is_file()):
        return False
    files = needs.read_text().replace("\\\n", " ").partition(":")[2].split()
    changed = (Path(f).stat().st_mtime if Path(f).is_file() else float("inf") for f in (*files, __file__))
    return made.stat().st_mtime > max(changed)


def _readable(mangled: Iterable[str]) -> dict[str, str]:
    """Mangled names to names without namespaces and parameters."""
    mangled = list(mangled)
    plain = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    return {m: _short(p) for m, p in zip(mangled, plain, strict=True)}


def _short(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b[a-z]\w*::", "", name).replace("> >", ">>")
    depth = 0
    for i, c in enumerate(name):  # the parameters begin at the first bracket outside of template arguments
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name)


def _disassembled(cubin: Path) -> Iterator[tuple[str, tuple[Instruction, ...]]]:
    done = subprocess.run([str(nvdisasm()), "-json", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm {cubin.name}:\n{done.stderr[-2000:]}")
    for function in json.loads(done.stdout)[1]:
        listing = function["sass-instructions"]
        yield (
            function["function-name"],
            tuple(
                Instruction(16 * i, one["opcode"], one.get("operands", ""), one.get("predicate", "@PT") != "@PT")
                for i, one in enumerate(listing)
            ),
        )


# ---- Loops

#: Where an instruction spends its time besides its issue slot. Wavefronts of the shared memory and first-level cache
#: are 128 bytes; "alu" is whole numbers and comparisons, "xu" roots, exponentials and conversions of width.
PIPES = ("issue", "fma", "alu", "fp64", "xu", "wavefronts")
#: Counted by name: a loop is known by how often one of them is in it.
MARKERS = ("HMMA", "IMMA", "LDSM", "LDGSTS", "LDG", "STG", "LDS", "STS", "ATOMS", "RED", "MUFU", "DFMA", "FFMA", "BAR")
_FMA = ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "IMAD", "FFMA2", "FMUL2", "FADD2")
_FP64 = ("DFMA", "DMUL", "DADD", "DSETP")
_XU = ("MUFU", "F2F", "F2I", "I2F", "POPC", "FLO", "BREV", "FRND", "I2FP")
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "LDGSTS", "ATOMS", "SHFL", "LD", "ST")
_ELSEWHERE = ("BRA", "BAR", "EXIT", "NOP", "HMMA", "IMMA", "LDC", "ULDC", "LDCU", "BSSY", "BSYNC", "WARPSYNC", "RET",
              "CALL", "DEPBAR", "LDGDEPBAR", "S2R", "S2UR", "CS2R", "MEMBAR", "ERRBAR", "CCTL", "BMOV", "ATOMG",
              "RED")  # fmt: skip


@dataclass
class Loop:
    """A loop, or the code outside of all (parent -1), without the loops inside it."""

    parent: int
    counts: dict[str, int]


def profile(code: Iterable[Instruction]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for one in code:
        counts["issue"] += 1
        base = one.base
        if base in MARKERS:
            counts[base] += 1
        if base in _MEMORY:
            counts["wavefronts"] += _wavefronts(one)
        elif base in _FMA:
            counts["fma"] += 1
        elif base in _FP64:
            counts["fp64"] += 1
        elif base in _XU:
            counts["xu"] += 1
        elif base not in _ELSEWHERE and not base.startswith("U"):  # the uniform path is its own
            counts["alu"] += 1
    return {name: counts[name] for name in (*PIPES, *MARKERS) if counts[name]}


def _wavefronts(one: Instruction) -> int:
    """Of 128 bytes, for 32 lanes without conflicts."""
    parts = one.opcode.split(".")
    if one.base == "LDSM":
        return int(parts[-1]) if parts[-1].isdigit() else 1
    return 4 if "128" in parts else 2 if "64" in parts else 1


def loops(code: tuple[Instruction, ...]) -> list[Loop]:
    """The code outside of loops first, then every loop in the order of its first instruction.

    A loop is a branch back to a place that every way to the branch passes (a natural loop). Calls are left out, with
    the code that leads to each: ptxas makes them for slow paths, as of a 64-bit division whose numbers need more than
    32 bits.
    """
    blocks = _blocks(code)
    slow = [any(one.base == "CALL" for one in code[begin:end]) for begin, end in blocks]
    follow = [_followers(code, block, blocks) for block in blocks]
    reached, order = _reached(follow)
    above = _dominators(follow, reached, order)
    bodies: dict[int, set[int]] = {}
    for tail in reached:
        for head in follow[tail]:
            if head in above[tail]:
                bodies.setdefault(head, {head}).update(_loop_body(follow, reached, head, tail))
    heads = sorted(bodies)
    holders = {b: [h for h in heads if b in bodies[h]] for b in reached}
    place = {h: i + 1 for i, h in enumerate(heads)}
    result = [Loop(-1, profile(_code(code, (blocks[b] for b in reached if not holders[b] and not slow[b]))))]
    for head in heads:
        outer = [h for h in heads if h != head and head in bodies[h]]
        parent = min(outer, key=lambda h: len(bodies[h]), default=None)
        own = [b for b in bodies[head] if min(holders[b], key=lambda h: len(bodies[h])) == head and not slow[b]]
        result.append(Loop(0 if parent is None else place[parent], profile(_code(code, (blocks[b] for b in own)))))
    return result


def _code(code: tuple[Instruction, ...], ranges: Iterable[tuple[int, int]]) -> Iterator[Instruction]:
    for begin, end in ranges:
        yield from code[begin:end]


def _target(one: Instruction) -> int | None:
    """The place a branch goes to, counted in instructions."""
    found = re.search(r"0x([0-9a-f]+)\s*$", one.operands)
    return int(found[1], 16) // 16 if found else None


def _blocks(code: tuple[Instruction, ...]) -> list[tuple[int, int]]:
    starts = {0}
    for i, one in enumerate(code):
        if one.base in ("BRA", "EXIT", "RET", "BRX", "JMP", "BPT"):
            starts.add(i + 1)
            target = _target(one) if one.base == "BRA" else None
            if target is not None:
                starts.add(target)
    edges = sorted(s for s in starts if s < len(code)) + [len(code)]
    return list(zip(edges, edges[1:], strict=False))


def _followers(code: tuple[Instruction, ...], block: tuple[int, int], blocks: list[tuple[int, int]]) -> list[int]:
    begins = {begin: i for i, (begin, _) in enumerate(blocks)}
    last = code[block[1] - 1]
    result = []
    if last.base == "BRA":
        target = _target(last)
        if target in begins:
            result.append(begins[target])
    goes_on = last.guarded or last.base not in ("BRA", "EXIT", "RET", "BRX", "JMP", "BPT")  # BPT traps
    # A branch may also hang on a predicate among its operands: BRA.U !UP0, `(...); BRA P1, ...
    goes_on = goes_on or (last.base == "BRA" and "," in last.operands)
    if goes_on and block[1] in begins:
        result.append(begins[block[1]])
    return result


def _reached(follow: list[list[int]]) -> tuple[set[int], list[int]]:
    """Blocks that the first leads to, and the reverse of the order in which a walk leaves them."""
    seen, order = {0}, []
    stack = [(0, iter(follow[0]))]
    while stack:
        block, rest = stack[-1]
        for after in rest:
            if after not in seen:
                seen.add(after)
                stack.append((after, iter(follow[after])))
                break
        else:
            order.append(block)
            stack.pop()
    return seen, order[::-1]


def _dominators(follow: list[list[int]], reached: set[int], order: list[int]) -> dict[int, set[int]]:
    before: dict[int, list[int]] = {b: [] for b in reached}
    for b in reached:
        for after in follow[b]:
            before[after].append(b)
    above = {b: set(reached) for b in reached}
    above[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = set.intersection(*(above[p] for p in before[b])) | {b}
            if new != above[b]:
                above[b], changed = new, True
    return above


def _loop_body(follow: list[list[int]], reached: set[int], head: int, tail: int) -> set[int]:
    before: dict[int, list[int]] = {b: [] for b in reached}
    for b in reached:
        for after in follow[b]:
            before[after].append(b)
    body, stack = {head}, [tail]
    while stack:
        b = stack.pop()
        if b not in body:
            body.add(b)
            stack.extend(before[b])
    return body
