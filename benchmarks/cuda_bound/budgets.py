"""tools/cuda_budgets.json: what nvcc made of each kernel, written by `tools/cuda_compiled.py --update`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[2] / "tools" / "cuda_budgets.json"


@cache
def read() -> dict[str, Any]:
    """{"nvcc": release, "kernels": {source: {kernel: {arch: {what: count}}}}, "loops": {kernel as entries
    name it: {arch: [...]}}}.

    A loop is [number of the loop around it, {what: count in it and in no loop inside}]; loop 0 is the code outside.
    """
    if not FILE.is_file():
        return {"nvcc": None, "kernels": {}, "loops": {}}
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def write(budgets: dict[str, Any]) -> None:
    """One line for each kernel and architecture, so that a change reads well in a diff."""
    text = json.dumps(_packed(budgets, 4), indent=1, sort_keys=True)
    FILE.write_text(text.replace('"\\u0000', "").replace('\\u0000"', "").replace('\\"', '"') + "\n")
    read.cache_clear()


def _packed(value: Any, depth: int) -> Any:
    if isinstance(value, dict) and depth and any(isinstance(v, dict) for v in value.values()):
        return {k: _packed(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list) or (isinstance(value, dict) and value):
        return "\0" + json.dumps(value) + "\0"
    return value


def place(name: str) -> tuple[str, str]:
    """Source and name of a kernel. Where several sources have one of that name: "rms_norm/" and the name.

    Raises:
        KeyError: there is no such kernel, or more than one.
    """
    stem, _, rest = name.rpartition("/")
    found = [(s, rest) for s, kernels in read()["kernels"].items() if rest in kernels and stem in ("", Path(s).stem)]
    if len(found) != 1:
        raise KeyError(f"{FILE.name}: {len(found)} kernels are called {name}")
    return found[0]


def kernel(name: str, arch: str) -> dict[str, int]:
    """Registers, shared memory and counts of a kernel."""
    source, rest = place(name)
    found: dict[str, int] = read()["kernels"][source][rest][arch]
    return found


def loops(name: str, arch: str) -> list[tuple[int, dict[str, int]]]:
    return [(parent, counts) for parent, counts in read()["loops"][name][arch]]


def bounded() -> tuple[str, ...]:
    """Kernels whose loops the file holds: those of the entries."""
    from cuda_bound import entries  # which read this file

    return tuple(sorted({name for entry in entries.ENTRIES for name in entry.kernels()}))
