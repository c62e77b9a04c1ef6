"""The CUDA kernels without a GPU: their sources run by the emulator, under every schedule, with the race detector and
with sanitizers. Their numbers, against float64 and the CPU kernels, are in the files test_cuda_<op>.py, each of which
gives its small calls (SMALL) and its odd ones (sanitized)."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from emulator import SCHEDULES

from synergen_ext import _C

HERE = Path(__file__).parent
FAMILIES = {
    path.stem.removeprefix("test_cuda_"): importlib.import_module(path.stem)
    for path in sorted(HERE.glob("test_cuda_*.py"))
    if path.stem != "test_cuda_emulated"
}
SMALL = {op: call for family in FAMILIES.values() for op, call in family.SMALL.items()}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
def test_every_cuda_kernel_is_here():
    assert set(emulator.load("plain").module.cuda_kernels()) == set(SMALL)
    assert set(_C.cuda_kernels()) <= set(SMALL)


@pytest.mark.parametrize("op", SMALL)
def test_no_schedule_changes_a_bit(emulated, op):
    args = SMALL[op]()
    results = []
    for n, (policy, seed) in enumerate(SCHEDULES):
        emulated.schedule(policy, seed, 1 if n % 2 else 3)
        results.append(as_tuple(getattr(emulated, op)(*args)))
    emulated.schedule()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
@pytest.mark.parametrize("op", SMALL)
def test_no_races(op):
    raced = emulator.load("race")
    for policy, seed in ((0, 0), (2, 7)):
        raced.schedule(policy, seed, 2)
        getattr(raced, op)(*SMALL[op]())


@pytest.mark.skipif(not emulator.available(), reason="needs g++, cmake and ninja")
@pytest.mark.parametrize("family", FAMILIES)
def test_sanitizers(family):
    """Every small call, and odd ones, in a process under AddressSanitizer and UBSan."""
    emulator.load("sanitize")
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": asan.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
    }
    done = subprocess.run([sys.executable, __file__, family], capture_output=True, text=True, env=environment, cwd=HERE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.strip().endswith("calls without a finding")


def sanitized_calls(family):
    sanitized = emulator.load("sanitize")
    calls = 0
    for policy, seed in SCHEDULES[:3]:
        sanitized.schedule(policy, seed, 2)
        for op, args in FAMILIES[family].SMALL.items():
            getattr(sanitized, op)(*args())
            calls += 1
    for op, args in FAMILIES[family].sanitized():
        getattr(sanitized, op)(*args)
        calls += 1
    print(calls, "calls without a finding")


if __name__ == "__main__":
    sanitized_calls(sys.argv[1])
