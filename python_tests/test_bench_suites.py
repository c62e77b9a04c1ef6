"""``synergen bench``'s back end: bars, tables, JSON, exit codes, and that every suite of the checkout loads."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from synergen_ext import bench
from synergen_ext.bench import Row, parse_bar

SUITE = '''"""Two figures."""
from synergen_ext.bench import Row

def rows(quick, progress):
    progress("warming", 1, 2)
    yield Row("speed", 0.5, "s", "<= 1", (0.4, 0.6), note="3 runs")
    yield Row("share", 0.25 if quick else 0.75, "", ">= 0.5", (0.2, 0.8), "95 %")
    yield Row("size", 12.0, "MB")
'''


@pytest.fixture
def suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "suite_two.py").write_text(SUITE)
    monkeypatch.setattr(bench, "suites_folder", lambda: folder)
    return folder


@pytest.mark.parametrize(
    ("value", "bar", "passed"),
    [
        (1.0, "<= 1", True),
        (1.01, "<= 1", False),
        (0.95, ">= 0.95", True),
        (0.9499, ">= 0.95", False),
        (7.0, None, None),
        (math.nan, "<= 1", False),
        (-math.inf, "<= 1", False),
    ],
)
def test_bars(value: float, bar: str | None, passed: bool | None) -> None:
    assert Row("x", value, "", bar).passed is passed


def test_bars_that_are_none() -> None:
    assert parse_bar(">= 0.5") == (">=", 0.5)
    for bad in ("< 1", "1", "<=1", ">= high"):
        with pytest.raises(ValueError):
            parse_bar(bad)


def test_a_suite_prints_its_table_and_writes_its_json(
    suites: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "out.json"
    assert bench.run("two", path) == 0
    printed = capsys.readouterr().out
    for text in ("suite two", "speed", "0.4 - 0.6", "[0.2, 0.8]", "least - largest, or [95 %]", "<= 1", "met", "MB"):
        assert text in printed
    assert "missed" not in printed
    report = json.loads(path.read_text())
    assert report["suite"] == "two" and report["quick"] is False and report["seconds"] >= 0
    assert report["date"].endswith("+00:00") and report["cpu"] and report["cpus"] >= 1
    assert {"synergen_ext", "python", "torch", "numpy"} <= set(report["versions"])
    assert report["rows"][0] == {
        "name": "speed", "value": 0.5, "unit": "s", "bar": "<= 1", "spread": [0.4, 0.6],
        "spread_kind": "min-max", "note": "3 runs", "passed": True,
    }  # fmt: skip
    assert [r["passed"] for r in report["rows"]] == [True, True, None]


def test_only_check_lets_a_missed_bar_fail(suites: Path, capsys: pytest.CaptureFixture) -> None:
    assert bench.run("two", check=True) == 0
    assert bench.run("two", quick=True) == 0
    assert bench.run("two", check=True, quick=True) == 1
    assert "missed" in capsys.readouterr().out


def test_an_unknown_suite_is_refused_with_those_there_are(suites: Path) -> None:
    with pytest.raises(ValueError, match="suite must be one of two, got 'three'"):
        bench.run("three")
    with pytest.raises(ValueError, match="must be one of"):
        bench.run("../suite_two")


def test_without_a_checkout_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "synergen_ext" / "bench.py"))
    with pytest.raises(FileNotFoundError, match="run it from a checkout"):
        bench.suites_folder()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "suite_x.py").write_text(SUITE)
    assert bench.suites_folder() == tmp_path / "benchmarks"


def test_the_commit_is_that_of_this_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench.commit()
    assert found is None or len(found.rstrip("+")) == 40
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "synergen_ext" / "bench.py"))
    assert bench.commit() is None


def test_timed_takes_the_median_after_warming_up() -> None:
    calls: list = []
    value, (low, high) = bench.timed(lambda: calls.append(1), repeats=5, warmup=2)
    assert len(calls) == 7 and 0 <= low <= value <= high


def test_every_suite_of_the_checkout_loads() -> None:
    names = bench.suite_names()
    assert "demo" in names
    for name in names:
        module = bench.load_suite(name)
        assert module.__doc__ and callable(module.rows)


def test_the_demo_suite_holds_the_promised_bars() -> None:
    demo = bench.load_suite("demo")
    assert demo.GENERATION_BARS == {
        "single_object": ">= 0.95", "colors": ">= 0.90", "two_object": ">= 0.75", "counting": ">= 0.70",
        "position": ">= 0.65", "color_attr": ">= 0.60",
    }  # fmt: skip
    assert demo.UNDERSTANDING_BARS == {
        "naming": ">= 0.95", "color": ">= 0.95", "counting": ">= 0.85", "position": ">= 0.85", "caption": ">= 0.90",
    }  # fmt: skip


GPU_CASES = bench.load_suite("cuda").gpu_cases.CASES


@pytest.mark.parametrize("name", GPU_CASES)
def test_what_is_timed_on_a_gpu_runs_and_is_checked(name: str, device: str) -> None:
    """Tiny, so that neither a case nor a rival of it fails first on the day there is a GPU."""
    cuda = bench.load_suite("cuda")
    case = GPU_CASES[name](device, True)
    cuda.check(case)
    for rival in case.rivals.values():
        cuda.call(rival, case.args, case.train)()
    assert case.bytes or case.flops


def test_a_wrong_result_is_not_timed() -> None:
    cuda = bench.load_suite("cuda")
    for name in ("rms_norm 8192 x 2048", "sample_tokens 1 rows"):
        case = GPU_CASES[name]("cpu", True)
        right = case.ours
        if case.ids:
            case.ours = lambda *args, right=right: tuple(1 - r.long() for r in right(*args))
        else:
            case.ours = lambda *args, right=right: right(*args) * 1.1
        with pytest.raises(AssertionError):
            cuda.check(case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
@pytest.mark.parametrize("command", [["benchmarks/gpu.sh"], ["tools/cuda_sanitize.sh"], ["tools/cuda_calls.py"]])
def test_without_a_gpu_one_line_says_so(command: list[str]) -> None:
    root = bench.suites_folder().parent
    python = [sys.executable] if command[0].endswith(".py") else ["bash"]
    argument = [] if command[0].endswith(".py") else [sys.executable]
    done = subprocess.run([*python, *command, *argument], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and ": needs " in done.stderr
