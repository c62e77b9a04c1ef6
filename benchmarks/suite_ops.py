"""Every op beside what a PyTorch program would call instead: the cases of ``bench_ops.py``, as one table.

A case is checked against the reference before it is timed. ``--quick``: the demo's sizes only.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synergen_ext.bench import Progress, Row

CASES = Path(__file__).with_name("bench_ops.py")


def rows(quick: bool, progress: Progress) -> Iterator[Row]:
    progress("time the ops", 0, 1)
    groups: dict[str, dict[str, Any]] = {}
    for case in _measured("demo" if quick else ""):
        groups.setdefault(case["group"], {})[case["extra_info"]["who"]] = case["stats"]
    for group, who in groups.items():
        ours, rival = who["synergen_ext"], who["torch"]
        spread = (ours["min"] * 1e6, ours["max"] * 1e6)
        yield Row(group, ours["median"] * 1e6, "us", None, spread, note=f"median of {ours['rounds']}")
        # Quartiles of both sides bound the ratio: single outliers of a shared machine say nothing.
        spread = (rival["q1"] / ours["q3"], rival["q3"] / ours["q1"])
        yield Row(f"{group}, torch / ours", rival["median"] / ours["median"], "x", None, spread, "quartiles")


def _measured(only: str) -> list[dict[str, Any]]:
    """pytest-benchmark's rows of the cases whose name holds ``only``.

    Raises:
        RuntimeError: a case fails its check, or pytest-benchmark is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "ops.json"
        command = [sys.executable, "-m", "pytest", str(CASES), "-q", f"--benchmark-json={report}"]
        done = subprocess.run([*command, "-k", only] if only else command, capture_output=True, text=True)
        if done.returncode or not report.is_file():
            said = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
            raise RuntimeError("bench_ops.py failed:\n" + "\n".join(said[-20:]))
        cases: list[dict[str, Any]] = json.loads(report.read_text())["benchmarks"]
    return cases
