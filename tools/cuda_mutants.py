"""Plants mistakes in the CUDA kernels, one at a time, and shows which gate finds each.

Every barrier, guard, index and epilogue has at least one. A mistake is a piece of source replaced by another; it must
compile, and is found by numbers (wrong or unwritten results under any schedule, or a report of the emulator), by the
race detector, or by the sanitizers. One that nothing finds is an error of the tests.

    python tools/cuda_mutants.py                 all of them
    python tools/cuda_mutants.py --third 2       every third, beginning with the second
    python tools/cuda_mutants.py --only rope rms_norm:14    those of a file, or single ones
"""

import argparse
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from mutants import KERNELS, Mutant, every

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "python_tests"
sys.path.insert(0, str(TESTS))

emulator = importlib.import_module("emulator")  # found on the path that was added above

SECONDS = 300  # a mistake may make a kernel loop for ever

GATES = {
    "numbers": ("plain", "not races and not sanitizers"),
    "race": ("race", "races"),
    "sanitize": ("sanitize", "sanitizers"),
}
FLAGS = {
    "plain": ("-O1",),
    "race": ("-O1", "-fsanitize=thread"),
    "sanitize": ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
}


def build(mutant: Mutant, kind: str, folder: Path) -> Path:
    """The library kernels_<kind> with the mutant in place of its source."""
    where = folder / "cuda" / mutant.file
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(mutant.text())
    source = where if mutant.unit == mutant.file else KERNELS / mutant.unit
    made, library = folder / f"{kind}.o", folder / f"libkernels_{kind}.so"
    common = ("g++", "-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", *FLAGS[kind])
    _run(*common, "-I", folder, "-I", ROOT / "csrc", "-x", "c++", "-c", source, "-o", made)
    objects = [*(emulator.BUILD / "CMakeFiles" / f"kernels_{kind}_objects.dir").rglob("*.o")]
    objects += (emulator.BUILD / "CMakeFiles" / f"kernels_{kind}.dir").rglob("*.o")
    rest = [o for o in objects if o.name != f"{mutant.unit}.o"]
    link = FLAGS["sanitize"] if kind == "sanitize" else ()
    _run("g++", "-shared", *link, made, *rest, "-o", library, "-ldl")
    return library


def _run(*command: object) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a mutant must compile:\n{done.stderr[-3000:]}")


def found_by(mutant: Mutant, folder: Path) -> str:
    """The first gate that finds the mutant, "killed" where its tests did not end in time, or the empty string."""
    for gate, (kind, tests) in GATES.items():
        library = build(mutant, kind, folder)
        passed = _passes(library, f"({tests}) and {mutant.op}")
        if not passed:
            return "killed" if passed is None else gate
    return ""


def _passes(library: Path, tests: str) -> bool | None:
    """The tests over that library, in a child of this process, which has torch imported already; None where they had
    to be killed."""
    child = os.fork()
    if child == 0:
        os.environ["SYNERGEN_SIMT_KERNELS"] = str(library)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", "-k", tests)
        os._exit(int(pytest.main([*map(str, sorted(TESTS.glob("test_cuda_*.py"))), *options])))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code in (2, 3, 4, 5):  # pytest itself went wrong, or ran no test
                raise RuntimeError(f"pytest ended with {code} for -k {tests!r}")
            return code == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def _judge(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return found_by(mutant, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--third", type=int, choices=(1, 2, 3), help="every third mutant, beginning with this one")
    parser.add_argument("--only", nargs="+", help="the mutants of these files, or these: rope rms_norm:14")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="how many at a time (all cores)")
    chosen = parser.parse_args()
    mutants = [m for m in every() if not chosen.only or {m.name, m.name.split(":")[0]} & set(chosen.only)]
    mutants = mutants[chosen.third - 1 :: 3] if chosen.third else mutants
    if not emulator.available():
        print("cuda_mutants: needs g++, cmake and ninja on PATH", file=sys.stderr)
        return 2
    for kind in FLAGS:
        emulator.build("synergen_simt", f"kernels_{kind}")
    counts: dict[str, int] = {}
    # Forked workers: each has torch imported already, and forks again for every run of the tests.
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("fork")) as workers:
        for mutant, gate in zip(mutants, workers.map(_judge, mutants), strict=True):
            counts[gate] = counts.get(gate, 0) + 1
            what = " ".join(mutant.before.split())[:60]
            print(f"{mutant.name:28} {gate or 'NOT FOUND':10} {what}", flush=True)
    missed = counts.pop("", 0)
    print(f"{len(mutants) - missed} of {len(mutants)} found: " + ", ".join(f"{n} by {g}" for g, n in counts.items()))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
