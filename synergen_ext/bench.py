"""``synergen bench``: runs one suite of ``benchmarks/`` and holds its figures against their bars.

A suite is a file ``benchmarks/suite_NAME.py`` of the checkout with a docstring and a function
``rows(quick: bool, progress: Progress) -> Iterable[Row]``, which measures as it is iterated and calls
``progress(what, done, total)`` in between. It may have a ``TITLE`` for its table.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from ._version import __version__

#: Called with what is being measured, steps done and steps in all.
Progress = Callable[[str, int, int], None]

#: Distributions whose versions a figure may depend on.
_PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "pillow", "resvg-py")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured.
        value: the figure; its median where it was measured several times.
        unit: "s", "MB", "dB", ...; "" for a share.
        bar: "<= 15" or ">= 0.95", or None for a figure without one.
        spread: two ends around the value.
        spread_kind: which: "min-max" (least and largest seen), "95 %" (an interval), or in other words.
        note: what the figure was measured on.
    """

    name: str
    value: float
    unit: str = ""
    bar: str | None = None
    spread: tuple[float, float] | None = None
    spread_kind: str = "min-max"
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the bar is met; None without a bar. A value that is not a number meets none."""
        if self.bar is None:
            return None
        relation, limit = parse_bar(self.bar)
        if not math.isfinite(self.value):
            return False
        return self.value <= limit if relation == "<=" else self.value >= limit


def parse_bar(bar: str) -> tuple[str, float]:
    """``"<= 15"`` -> ``("<=", 15.0)``."""
    relation, _, limit = bar.partition(" ")
    if relation not in ("<=", ">="):
        raise ValueError(f"bar must begin with '<= ' or '>= ', got {bar!r}")
    return relation, float(limit)


def suites_folder() -> Path:
    """``benchmarks/`` of the checkout: beside the package, or in the current folder.

    Raises:
        FileNotFoundError: neither is there (suites are not part of an installed package).
    """
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if any((root / "benchmarks").glob("suite_*.py")):
            return root / "benchmarks"
    raise FileNotFoundError(
        "bench: no benchmarks/suite_*.py beside the package or here; run it from a checkout of the project"
    )


def suite_names() -> list[str]:
    return sorted(p.stem.removeprefix("suite_").replace("_", "-") for p in suites_folder().glob("suite_*.py"))


def load_suite(name: str) -> ModuleType:
    """The module of one suite.

    Raises:
        ValueError: no such suite; the message lists those there are.
    """
    names = suite_names()
    if name not in names:
        raise ValueError(f"bench: suite must be one of {', '.join(names)}, got {name!r}")
    stem = name.replace("-", "_")
    path = suites_folder() / f"suite_{stem}.py"
    spec = importlib.util.spec_from_file_location(f"synergen_suite_{stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"bench: cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of a suite look their module up
    spec.loader.exec_module(module)
    return module


def run(suite: str, json_path: str | Path | None = None, check: bool = False, quick: bool = False) -> int:
    """Measure a suite, print its table, write its JSON.

    Args:
        suite: NAME of ``benchmarks/suite_NAME.py``, with - for _.
        json_path: file for rows, versions, CPU, commit and date.
        check: let a missed bar decide the exit code.
        quick: fewer samples; the suite says how many.

    Returns:
        Exit code: 1 if ``check`` and a bar is missed, else 0.

    Raises:
        ValueError, FileNotFoundError: no such suite.
    """
    from rich.console import Console

    module = load_suite(suite)
    console = Console()
    began = datetime.now(timezone.utc)
    rows = _measure(module, quick, console)
    _print(getattr(module, "TITLE", f"suite {suite}"), quick, rows, console)
    if json_path is not None:
        report = {
            "suite": suite,
            "quick": quick,
            "date": began.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(timezone.utc) - began).total_seconds(), 1),
            **environment(),
            "rows": [{**asdict(r), "passed": r.passed} for r in rows],
        }
        Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
    missed = [r.name for r in rows if r.passed is False]
    return 1 if check and missed else 0


def _measure(module: ModuleType, quick: bool, console: Any) -> list[Row]:
    """All rows, each shown as it arrives, with a bar for what is under way: a full suite takes many minutes."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(module.__name__.removeprefix("synergen_suite_"), total=None)

        def progress(what: str, done: int, total: int) -> None:
            if what != bars.tasks[0].description:
                bars.reset(task, description=what)
            bars.update(task, completed=done, total=total)

        rows = []
        for row in module.rows(quick, progress):
            note = f"  ({row.note})" if row.note else ""
            console.print(
                f"{row.name}: {_number(row.value)} {row.unit}".rstrip() + note,
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            rows.append(row)
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def _spread(row: Row) -> str:
    """``0.4 - 0.6`` for least and largest value, ``[0.4, 0.6]`` for an interval."""
    if row.spread is None:
        return ""
    low, high = map(_number, row.spread)
    return f"{low} - {high}" if row.spread_kind == "min-max" else f"[{low}, {high}]"


def _print(title: str, quick: bool, rows: list[Row], console: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    kinds = dict.fromkeys(r.spread_kind for r in rows if r.spread and r.spread_kind != "min-max")
    caption = "spread: least - largest" + (f", or [{', '.join(kinds)}]" if kinds else "")
    table = Table(title=f"{title}{' (quick)' if quick else ''}", caption=escape(caption))
    columns = ["figure", "value", "unit", "spread"]
    if any(r.bar for r in rows):
        columns += ["bar", ""]
    for column in columns:
        right = column in ("value", "spread")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "figure")
    for r in rows:
        mark = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}[r.passed]
        cells = [escape(r.name), _number(r.value), r.unit, escape(_spread(r)), r.bar or "", mark]
        table.add_row(*cells[: len(columns)])
    console.print(table)


# ---- what the figures depend on -------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions, CPU, threads and commit behind a figure."""
    versions = {"synergen_ext": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "commit": commit(),
    }


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with ``+`` if tracked files differ from it; None outside of one."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def timed(work: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> tuple[float, tuple[float, float]]:
    """Median seconds of ``work()`` over ``repeats`` calls after ``warmup`` unmeasured ones, and least and largest."""
    from statistics import median
    from time import perf_counter

    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return median(seconds), (min(seconds), max(seconds))
