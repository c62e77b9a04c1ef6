"""A second opinion on barriers and races: the verifier SentryWard over the PTX that nvcc makes, with inline assembly.

It shows, for every schedule of one block of a fixed launch, that barriers are reached together and that no two accesses
race. It is young, knows few kernels (control flow must follow from the launch alone) and models no fences, so nothing
depends on it: whatever it says, this tool ends with 0, except where a barrier left out on purpose goes unnoticed. Not
among the project's packages (19 MB): pip install sentryward==0.1.1. Needs nvcc.

    python tools/cuda_verify_ptx.py
"""

import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda_sass import CSRC, OPTIONS, nvcc

VERSION = "0.1.1"
SECONDS = 120


@dataclass(frozen=True)
class Case:
    """One launch of one block.

    `layout` is struct's description of the kernel's parameter and `values` its fields; None leaves one open, as every
    pointer must be.
    """

    source: str
    kernel: str  # pattern of the mangled name
    threads: int
    layout: str
    values: tuple[Any, ...]
    controls: tuple[int, ...] = (0,)  # barriers in the order of the text: each, left out, must be noticed


NO_ROWS = (0, *[0] * 16)  # Rows without dimensions: its walk over them is open to this verifier otherwise
RMS_NORM = ("ii qq d Q ixxxx8q8q q Q q Q", (1, 1, 1, 512, None, None, *NO_ROWS, 1, None, 1, None))
CASES = (
    # The second barrier of block_sum is there for a second sum, which this kernel does not make.
    Case("rms_norm.cu", r"15rms_norm_kernelI\w*ffLi4E", 64, *RMS_NORM),
    Case("rms_norm.cu", r"15rms_norm_kernelI\w*4bf16ES\d_Li8E", 64, *RMS_NORM),
)


def arguments(entry: str, case: Case) -> list[dict[str, Any]]:
    found, place, at = [], 0, 0
    names = {1: "u8", 4: "u32", 8: "u64"}
    for letter in re.sub(r"(\d+)(\w)", lambda m: m[2] * int(m[1]), case.layout.replace(" ", "")):
        size = struct.calcsize(letter)
        if letter != "x":
            value = case.values[at]
            at += 1
            if value is not None:
                field = {"parameter": f"{entry}_param_0", "offset": place, "type": names[size], "value": value}
                found.append(field)
        place += size
    return found


def verdict(program: str, ptx: str, case: Case) -> tuple[str, float]:
    entry = next(name for name in re.findall(r"\.entry (\w+)", ptx) if re.search(case.kernel, name))
    settings = {
        "schema": "spverify.kernel-input/v1",
        "entry": entry,
        "launch": {"grid_dim": [1, 1, 1], "block_dim": [case.threads, 1, 1], "dynamic_shared_bytes": 0},
        "arguments": arguments(entry, case),
        "shape_arrays": [],
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        text, given = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
        text.write_text(ptx)
        given.write_text(json.dumps(settings))
        limits = ("--timeout", str(SECONDS), "--memory-limit-mib", "4000")
        done = subprocess.run([program, text, "--input", given, *limits], capture_output=True, text=True)
    try:
        result = str(json.loads(done.stdout)["result"])  # the exit code says nothing of findings
    except (ValueError, KeyError):
        result = "no verdict"
    return result, time.monotonic() - began


def without_barrier(ptx: str, case: Case, number: int) -> str:
    begin = re.search(rf"\.entry \w*{case.kernel}", ptx)
    assert begin
    barriers = list(re.finditer(r"bar(rier)?\.sync[^;]*;", ptx[begin.start() :]))
    barrier = barriers[number]
    return ptx[: begin.start() + barrier.start()] + ptx[begin.start() + barrier.end() :]


def main() -> int:
    beside = Path(sys.executable).with_name("sentryward")
    program = str(beside) if beside.is_file() else shutil.which("sentryward")
    if program is None or nvcc() is None:
        print(f"cuda_verify_ptx: needs nvcc and sentryward (pip install sentryward=={VERSION}); nothing verified")
        return 0
    clean = noticed = planted = 0
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "x.ptx"
            command = [str(nvcc()), *OPTIONS, "-arch=sm_80", "-ptx", str(CSRC / "cuda" / case.source), "-o", str(made)]
            subprocess.run(command, check=True)
            ptx = made.read_text()
        result, seconds = verdict(program, ptx, case)
        clean += result == "race_free"
        print(f"{case.source}: {case.kernel}, {case.threads} threads: {result} ({seconds:.1f} s)")
        for number in case.controls:
            result, seconds = verdict(program, without_barrier(ptx, case, number), case)
            planted += 1
            noticed += result != "race_free"
            print(f"  without its barrier {number + 1}: {result} ({seconds:.1f} s)")
    print(f"{clean} of {len(CASES)} kernels race-free, {noticed} of {planted} barriers left out noticed")
    return 0 if noticed == planted else 1


if __name__ == "__main__":
    sys.exit(main())
