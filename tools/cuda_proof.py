"""Every gate of the CUDA kernels that needs no GPU, and one table of what each ran and found.

python tools/cuda_proof.py                    all of it, some tens of minutes on two cores
python tools/cuda_proof.py --third 1          a third of the planted mistakes
python tools/cuda_proof.py --only compiled ptx bound
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
FILES = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "python_tests").glob("test_cuda_*.py"))]


@dataclass(frozen=True)
class Gate:
    name: str
    shows: str
    command: tuple[str, ...]
    summary: Callable[[str], str]  # of what it printed
    needs: tuple[str, ...] = ()  # programs, without which it is left out
    blocking: bool = True


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "said nothing"


def counts(output: str) -> str:
    """`214 passed, 3 skipped` of pytest's last lines."""
    found = re.findall(
        r"^=*\s*(\d+ (?:passed|failed|error|skipped|deselected).*?)(?: in [\d.]+s.*)?$", output, re.MULTILINE
    )
    return re.sub(r", \d+ (?:deselected|warnings?)", "", found[-1]) if found else last_line(output)


def bars(output: str) -> str:
    met, missed = (len(re.findall(rf"\b{word}\b", output)) for word in ("met", "missed"))
    return f"{met} of {met + missed} bars met, on paper"


def gates(third: int | None) -> list[Gate]:
    def pytest(tests: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", *FILES, "-k", tests)

    def tool(name: str, *words: str) -> tuple[str, ...]:
        return (sys.executable, f"tools/{name}.py", *words)

    builds = ("g++", "cmake", "ninja")
    share = () if third is None else ("--third", str(third))
    return [
        Gate("emulator", "the emulator's own tests: layouts, barriers, planted mistakes in its own kernels",
             (sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "python_tests/test_simt.py"), counts, builds),
        Gate("numbers", "every kernel emulated: against float64, odd sizes, layouts, the CPU's bits",
             pytest("not schedule and not races and not sanitizers"), counts, builds),
        Gate("schedules", "the same bits whatever order CUDA leaves open", pytest("schedule"), counts, builds),
        Gate("race", "CUDA's happens-before rules, reads of what nobody wrote", pytest("races"), counts, builds),
        Gate("sanitize", "AddressSanitizer, UndefinedBehaviorSanitizer", pytest("sanitizers"), counts, builds),
        Gate("mistakes", ("one planted at a time" if third is None else "a third of those planted") + ", each found",
             tool("cuda_mutants", *share), last_line, builds),
        Gate("compiled", "no warning, spill or stale load; registers, shared memory, opcodes within budget",
             tool("cuda_compiled"), last_line, ("nvcc",)),
        Gate("ptx", "the PTX of every wrapper as it was read by eye", tool("cuda_goldens"), last_line, ("nvcc",)),
        Gate("bound", "limited by memory or tensor cores: static bound, not measured",
             (sys.executable, "-m", "synergen_ext", "bench", "--suite", "cuda-bound", "--check", "--quick"), bars),
        Gate("verifier", "a static verifier over the PTX, all schedules at a fixed launch", tool("cuda_verify_ptx"),
             last_line, ("nvcc", "sentryward"), blocking=False),
    ]  # fmt: skip


def there(need: str) -> bool:
    return shutil.which(need, path=PATH) is not None or importlib.util.find_spec(need) is not None


def run(gate: Gate) -> tuple[str, str, float]:
    """What was run, the result, seconds."""
    if missing := [need for need in gate.needs if not there(need)]:
        return f"needs {', '.join(missing)}", "left out", 0.0
    began = time.monotonic()
    environment = {**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(gate.command, cwd=ROOT, capture_output=True, text=True, env=environment)
    seconds = time.monotonic() - began
    if done.returncode:
        print((done.stdout + done.stderr)[-6000:], file=sys.stderr)
    result = "passed" if done.returncode == 0 else "FAILED" if gate.blocking else "failed, not blocking"
    return gate.summary(done.stdout or done.stderr), result, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--third", type=int, choices=(1, 2, 3), help="every third mistake, beginning with this one")
    parser.add_argument("--only", nargs="+", help="these gates")
    chosen = parser.parse_args()
    known = gates(chosen.third)
    if wrong := set(chosen.only or ()) - {gate.name for gate in known}:
        parser.error(f"gates are {', '.join(g.name for g in known)}, got {', '.join(sorted(wrong))}")
    rows, failed = [], False
    for gate in known:
        if chosen.only and gate.name not in chosen.only:
            continue
        ran, result, seconds = run(gate)
        print(f"{gate.name}: {ran}: {result} ({seconds:.0f} s)", flush=True)
        failed = failed or result == "FAILED"
        rows.append((gate.name, gate.shows, ran, result, f"{seconds:.0f}"))
    header = ("gate", "what it shows", "what was run", "result", "s")
    print()
    for row in (header, ("---",) * len(header), *rows):
        print("| " + " | ".join(row) + " |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
