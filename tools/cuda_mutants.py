"""Plants mistakes in the CUDA kernels, one at a time, and shows which gate finds each.

Every barrier, guard, index and epilogue has at least one. A mistake is a piece of source replaced by another; it must
compile, and is found by numbers (wrong or unwritten results under any schedule, or a report of the emulator), by the
race detector, or by the sanitizers. One that nothing finds is an error of the tests.

tools/mutants/finders.json remembers which test found a mistake: that one is asked first, and all gates only if it
finds nothing any more. So a mistake costs a compilation and one test instead of all tests of its op.

    python tools/cuda_mutants.py                 all of them
    python tools/cuda_mutants.py --third 2       every third, beginning with the second
    python tools/cuda_mutants.py --only rope rms_norm:14    those of a file, or single ones
    python tools/cuda_mutants.py --known         those that a test has found before
    python tools/cuda_mutants.py --record        all, and remember what found each
"""

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import random
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

SECONDS = 60  # of one test: a mistake may make a kernel loop for ever. The slowest takes 22 s, with the sanitizers
SECONDS_KNOWN = 8  # where the same test had to be stopped before: it takes 2 s when all is well
LATER = "later"  # in place of a gate: its time was over
FINDERS = ROOT / "tools" / "mutants" / "finders.json"

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


def build(mutant: Mutant, kind: str, folder: Path, *flags: str) -> Path:
    """The library kernels_<kind> with the mutant in place of its source."""
    where = folder / "cuda" / mutant.file
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(mutant.text())
    source = where if mutant.unit == mutant.file else KERNELS / mutant.unit
    made, library = folder / f"{kind}.o", folder / f"libkernels_{kind}.so"
    common = ("g++", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", *FLAGS[kind], *flags)
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
        raise DoesNotCompile(done.stderr)


class DoesNotCompile(RuntimeError):
    """Then a mistake proves nothing about the tests."""


def found_by(mutant: Mutant, finder: dict[str, str] | None, folder: Path) -> dict[str, str]:
    """The first gate and test that find the mutant, the gate "killed" where the test did not end in time; nothing
    where none does."""
    if finder and (TESTS / finder["test"].split("::")[0]).is_file():
        gate = "numbers" if finder["gate"] == "killed" else finder["gate"]
        # Compiled faster (1.1 s for 2.4 s, mean of the sources) for one short test.
        seconds = SECONDS_KNOWN if finder["gate"] == "killed" else SECONDS
        found = _first_failure(build(mutant, GATES[gate][0], folder, "-O0"), [finder["test"]], seconds)
        if found:
            return {"gate": "killed" if found[1] else gate, "test": found[0]}
    files = sorted(path.name for path in TESTS.glob("test_cuda_*.py"))
    for gate, (kind, tests) in GATES.items():
        library = build(mutant, kind, folder)
        found = _first_failure(library, [*files, "-k", f"({tests}) and {mutant.op}"])
        if found:
            return {"gate": "killed" if found[1] else gate, "test": found[0]}
    return {}


class _Teller:
    """Writes the name of each test that begins to a pipe, so that it is known though the process dies in it."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        os.write(self.pipe, f"{nodeid}\n".encode())


def _first_failure(library: Path, tests: list[str], seconds: float = SECONDS) -> tuple[str, bool] | None:
    """The first of the tests that fails over that library, and whether it had to be killed; None where all pass. In a
    child of this process, which has torch imported already."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.environ["SYNERGEN_SIMT_KERNELS"] = str(library)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.chdir(TESTS)
        options = ["-x", "-q", "--rootdir", str(TESTS)]
        for plugin in ("cacheprovider", "benchmark", "xdist"):
            options += ["-p", f"no:{plugin}"]
        os._exit(int(pytest.main([*tests, *options], plugins=[_Teller(writing)])))
    os.close(writing)
    os.set_blocking(reading, False)
    told, code, since = b"", None, time.monotonic()
    while code is None and time.monotonic() < since + seconds:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        now = _drained(reading, told)
        told, since = now, since if now == told else time.monotonic()
    if code is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    os.close(reading)
    if code in (2, 3, 4, 5) and tests[1:]:  # pytest itself went wrong, or ran no test
        raise RuntimeError(f"pytest ended with {code} for {tests}")
    last = told.decode().split("\n")[-2] if told else ""
    return None if code in (0, 4, 5) else (last, code is None)  # 4 and 5: the test is not there any more


def _drained(pipe: int, before: bytes) -> bytes:
    """The last lines of what was written to the pipe so far."""
    while True:
        try:
            piece = os.read(pipe, 65536)
        except BlockingIOError:
            return before
        if not piece:
            return before
        before = (before + piece)[-65536:]


def _judge(mutant: Mutant, finder: dict[str, str] | None, until: float) -> dict[str, str]:
    if time.time() > until:
        return {"gate": LATER}
    with tempfile.TemporaryDirectory() as folder:
        try:
            return found_by(mutant, finder, Path(folder))
        except DoesNotCompile as error:
            print(f"{mutant.name}\n{str(error)[-3000:]}", file=sys.stderr)
            return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--third", type=int, choices=(1, 2, 3), help="every third mutant, beginning with this one")
    parser.add_argument("--only", nargs="+", help="the mutants of these files, or these: rope rms_norm:14")
    parser.add_argument("--known", action="store_true", help="those alone that a test has found before")
    parser.add_argument("--minutes", type=float, default=1e9, help="plant none after that; in the day's order")
    parser.add_argument("--record", action="store_true", help="write tools/mutants/finders.json")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="how many at a time (all cores)")
    chosen = parser.parse_args()
    planted = every()
    names = {m.name for m in planted}
    unknown = set(chosen.only or ()) - names - {name.split(":")[0] for name in names}
    if unknown:
        print(f"cuda_mutants: no such mistakes: {' '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    mutants = [m for m in planted if not chosen.only or {m.name, m.name.split(":")[0]} & set(chosen.only)]
    finders = json.loads(FINDERS.read_text()) if FINDERS.is_file() else {}
    mutants = [m for m in mutants if not chosen.known or m.name in finders]
    mutants = mutants[chosen.third - 1 :: 3] if chosen.third else mutants
    if chosen.minutes < 1e9:  # so that those at the end of the list have their turn
        random.Random(str(datetime.date.today())).shuffle(mutants)
    if not emulator.available():
        print("cuda_mutants: needs g++, cmake and ninja on PATH", file=sys.stderr)
        return 2
    for kind in FLAGS:
        emulator.build("synergen_simt", f"kernels_{kind}")
    counts: dict[str, int] = {}
    unfound: list[str] = []
    known, until = [finders.get(m.name) for m in mutants], time.time() + 60 * chosen.minutes
    # Forked workers: each has torch imported already, and forks again for every run of the tests.
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("fork")) as workers:
        for mutant, found in zip(mutants, workers.map(_judge, mutants, known, [until] * len(mutants)), strict=True):
            gate = found.get("gate", "")
            counts[gate] = counts.get(gate, 0) + 1
            unfound += [mutant.name] * (not gate)
            if gate == LATER:
                continue
            what = " ".join(mutant.before.split())[:60]
            print(f"{mutant.name:32} {gate or 'NOT FOUND':10} {what}", flush=True)
            if chosen.record:
                finders.pop(mutant.name, None)
                finders.update({mutant.name: found} if found else {})
                _write(finders, names)
    missed, later = counts.pop("", 0), counts.pop(LATER, 0)
    planted_now, gates = len(mutants) - later, ", ".join(f"{n} by {g}" for g, n in counts.items())
    if unfound:
        print(f"not found: {' '.join(unfound)}")
    print(f"{planted_now - missed} of {planted_now} found: {gates}" + (f"; {later} not planted" if later else ""))
    return 1 if missed else 0


def _write(finders: dict[str, dict[str, str]], names: set[str]) -> None:
    kept = {name: finders[name] for name in sorted(finders) if name in names}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in kept.items())
    FINDERS.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    sys.exit(main())
