"""Compiles every CUDA kernel for each architecture and shows what ptxas made of it: registers, shared memory, spills.

Needs nvcc. Fails on a warning, a spill, or any local memory at all.

    python tools/cuda_compiled.py [--archs 80 90 100 120]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = ("80", "90", "100", "120")
FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\w+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    shared: int
    local: int  # bytes of stack frame and spills


def kernels_in(report: str) -> Iterator[Kernel]:
    for found in FUNCTION.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        local = sum(int(found[part]) for part in ("stack", "stores", "loads"))
        yield Kernel(found["name"], int(found["registers"]), int(shared[1]) if shared else 0, local)


def compiled(source: Path, arch: str, nvcc: str) -> list[Kernel]:
    """The kernels of one source for one architecture.

    Raises:
        RuntimeError: nvcc refuses it or warns.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ("-std=c++17", "-O3", f"-arch=sm_{arch}", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin")
        done = subprocess.run(
            [nvcc, *options, "-I", CSRC, source, "-o", Path(folder) / "x.cubin"], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stderr[-3000:]}")
    return list(kernels_in(done.stderr))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=ARCHS, help="those of them that this nvcc knows are compiled")
    wanted = parser.parse_args().archs
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda_compiled: needs nvcc on PATH", file=sys.stderr)
        return 2
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in wanted if f"compute_{arch}" in known]
    worst = 0
    print(f"{'source':26} {'arch':7} {'kernels':>7} {'registers':>12} {'shared bytes':>12} {'local bytes':>11}")
    sources = [s for s in sorted((CSRC / "cuda").glob("*.cu")) if s.name != "device.cu"]  # asks the driver for GPUs
    own = sorted((CSRC / "simt").glob("*.cu"))  # the emulator's tests: they use every wrapper of PTX
    jobs = [(source, arch, nvcc) for source in sources + own for arch in archs]
    if not jobs:
        raise RuntimeError(f"nothing to compile: this nvcc knows none of {', '.join(wanted)}")
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for (source, arch, _), kernels in zip(jobs, workers.map(lambda job: compiled(*job), jobs), strict=True):
            if not kernels:
                raise RuntimeError(f"{source.name} for sm_{arch}: no kernel in what ptxas says")
            low, high = min(k.registers for k in kernels), max(k.registers for k in kernels)
            shared, local = max(k.shared for k in kernels), max(k.local for k in kernels)
            worst = max(worst, local if source in sources else 0)
            print(
                f"{source.name:26} sm_{arch:4} {len(kernels):7} {low:5} to {high:3} {shared:12} {local:11}", flush=True
            )
    if worst:
        print(f"cuda_compiled: local memory must be 0 bytes, got {worst}", file=sys.stderr)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
