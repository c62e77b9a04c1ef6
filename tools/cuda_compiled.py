"""Compiles every CUDA kernel for each architecture and holds what came out against rules and budgets.

Rules: no warning, no local memory (spills, stack), no non-coherent load in a kernel that reads what the same launch
writes. Budgets, in tools/cuda_budgets.json: of each kernel and architecture its registers, static shared memory,
instructions in all, those of the kinds in COUNTED and calls by name; none may grow, and tensor-core instructions may
not change. They hold for the nvcc they were made with; another one is held to the rules alone.

Needs nvcc; instructions need nvdisasm (package nvidia-cuda-nvdisasm), without which only what ptxas says is checked.

    python tools/cuda_compiled.py [--archs 80 90 100 120]
    python tools/cuda_compiled.py --update       # writes what there is as the new budgets
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cuda_sass
from cuda_sass import ROOT, Instruction, Kernel

sys.path.insert(0, str(ROOT / "benchmarks"))
from cuda_bound import budgets as file  # noqa: E402  (the bound reads the same file)

#: Opcodes counted by their first part.
COUNTED = ("HMMA", "IMMA", "LDSM", "LDGSTS", "BAR", "LDG", "STG", "LDS", "STS", "LDL", "STL", "ATOMS", "ATOMG", "RED")
#: Kernels that read again what they wrote, beyond those that wait for other blocks (found by themselves): a load
#: through the non-coherent path might see the old value.
READS_OWN_WRITES = ("sample_tokens_kernel", "scan_counts_kernel", "rms_norm_backward_kernel")


def call_name(one: Instruction) -> str:
    """`div_s64` of `$__internal_3_$__cuda_sm20_div_s64`."""
    return re.sub(r"^`?\(?\$?_*(internal_\d+_)?(\$_*)?(cuda_)?(sm\w+?_)?|\)$", "", one.operands.split(",")[-1])


def facts(kernel: Kernel) -> dict[str, int]:
    """What the budgets hold."""
    counts: Counter[str] = Counter()
    for one in kernel.instructions or ():
        counts["instructions"] += 1
        if one.base in COUNTED:
            counts[one.base] += 1
        elif one.base == "CALL":
            counts[f"CALL {call_name(one)}"] += 1
    return {"registers": kernel.registers, "shared": kernel.shared, **{k: counts[k] for k in sorted(counts)}}


def broken_rules(kernel: Kernel) -> Iterator[str]:
    if kernel.local:
        yield f"local memory must be 0 bytes, got {kernel.local}"
    code = kernel.instructions or ()
    kinds = Counter(one.base for one in code)
    if kinds["LDL"] or kinds["STL"]:
        yield f"LDL and STL must be 0, got {kinds['LDL']} and {kinds['STL']}"
    waits = any(one.base in ("LD", "LDG") and "STRONG" in one.opcode and "GPU" in one.opcode for one in code)
    if waits or kernel.name.split("<")[0] in READS_OWN_WRITES:
        # Loads marked EF or NA name their policy: they come from a wrapper that says what is never written.
        stale = [
            one
            for one in code
            if one.base == "LDG" and "CONSTANT" in one.opcode and not re.search(r"\.(EF|NA)\b", one.opcode)
        ]
        if stale:
            yield f"reads what its launch writes, so LDG.CONSTANT must be 0, got {len(stale)}"


def over_budget(now: dict[str, int], budget: dict[str, int]) -> Iterator[str]:
    for what in sorted({*now, *budget}):
        have, may = now.get(what, 0), budget.get(what, 0)
        if have > may or (what in ("HMMA", "IMMA") and have != may):
            yield f"{what} must be {'' if what in ('HMMA', 'IMMA') else 'at most '}{may}, got {have}"


def _compile(job: tuple[Path, str, tuple[str, ...]]) -> tuple[list[tuple[Kernel, dict[str, int]]], dict[str, Any]]:
    """Kernels with their facts, and the loops of those in the bound; without instructions, which are many."""
    source, arch, bounded = job
    found, loops = [], {}
    for kernel in cuda_sass.kernels(source, arch):
        broken = list(broken_rules(kernel))
        found.append((kernel.name, kernel.registers, kernel.shared, kernel.local, facts(kernel), broken))
        named = {kernel.name, f"{source.stem}/{kernel.name}"} & set(bounded)
        if named and kernel.instructions:
            loops[named.pop()] = [[loop.parent, loop.counts] for loop in cuda_sass.loops(kernel.instructions)]
    return found, loops


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=cuda_sass.ARCHS, help="those that this nvcc knows are compiled")
    parser.add_argument("--update", action="store_true", help="write the budgets")
    chosen = parser.parse_args()
    if cuda_sass.nvcc() is None:
        print("cuda_compiled: needs nvcc on PATH", file=sys.stderr)
        return 2
    archs = [arch for arch in chosen.archs if arch in cuda_sass.known_archs()]
    if not archs:
        raise RuntimeError(f"nothing to compile: this nvcc knows none of {', '.join(chosen.archs)}")
    if cuda_sass.nvdisasm() is None:
        print("cuda_compiled: no nvdisasm (pip install nvidia-cuda-nvdisasm): only what ptxas says is checked")
        if chosen.update:
            return 2
    old = file.read()
    version = ".".join(cuda_sass.nvcc_version().split(".")[:2])
    compare = version == old.get("nvcc") and not chosen.update
    if not compare and not chosen.update:
        print(f"cuda_compiled: the budgets are of nvcc {old.get('nvcc')}, this is {version}: rules alone are checked")

    own = cuda_sass.emulator_sources()
    # The longest first, as far as the budgets know, so that no processor waits for one at the end.
    size = {
        s: sum(k["instructions"] for kernel in ks.values() for k in kernel.values()) for s, ks in old["kernels"].items()
    }
    order = sorted(cuda_sass.sources() + own, key=lambda s: -size.get(s.name, 0))
    jobs = [(s, arch, file.bounded()) for s in order for arch in archs]
    new: dict[str, Any] = {"nvcc": version, "kernels": {}, "loops": {}}
    findings, lower, checked = [], 0, 0
    print(f"{'source':28} {'arch':7} {'kernels':>7} {'registers':>12} {'shared bytes':>12} {'local bytes':>11}")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        for (source, arch, _), (kernels, loops) in zip(jobs, workers.map(_compile, jobs), strict=True):
            _, registers, shared, local, *_ = zip(*kernels, strict=True)
            print(
                f"{source.name:28} sm_{arch:4} {len(kernels):7} {min(registers):5} to {max(registers):3} "
                f"{max(shared):12} {max(local):11}",
                flush=True,
            )
            if source in own:
                continue
            for name, *_, now, broken in kernels:
                where = f"{source.name}: {name}, sm_{arch}"
                checked += 1
                findings += [f"{where}: {what}" for what in broken]
                new["kernels"].setdefault(source.name, {}).setdefault(name, {})[arch] = now
                if compare:
                    budget = old["kernels"].get(source.name, {}).get(name, {}).get(arch)
                    if budget is None:
                        findings.append(f"{where}: has no budget (--update gives it one)")
                        continue
                    if cuda_sass.nvdisasm() is None:
                        budget = {what: budget[what] for what in ("registers", "shared")}
                        now = {what: now[what] for what in ("registers", "shared")}
                    findings += [f"{where}: {what}" for what in over_budget(now, budget)]
                    lower += any(now.get(what, 0) < budget[what] for what in budget)
            for name, tree in loops.items():
                new["loops"].setdefault(name, {})[arch] = tree
    if compare and set(archs) == set(cuda_sass.ARCHS):
        gone = [f"{s}: {k}" for s, ks in old["kernels"].items() for k in ks if k not in new["kernels"].get(s, {})]
        findings += [f"{which}: has a budget but is no kernel any more (--update)" for which in gone]
        if cuda_sass.nvdisasm() and new["loops"] != old["loops"] and not findings:
            findings.append("loops of kernels in the bound have changed (--update)")
    if chosen.update:
        if missing := sorted(set(file.bounded()) - set(new["loops"])):
            findings.append(f"the bound names kernels that there are not: {', '.join(missing)}")
        file.write(new)
    for finding in findings:
        print(f"cuda_compiled: {finding}", file=sys.stderr)
    what = "against rules and budgets" if compare else "against the rules"
    note = f", {lower} below budget (--update lowers it)" if lower else ""
    print(f"{checked} kernels checked {what}: {len(findings)} findings{note}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
