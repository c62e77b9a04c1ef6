"""``synergen eval``, ``synergen bench`` and ``synergen doctor``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .checks import (
    check_checkpoint,
    check_guidance,
    check_output_file,
    check_seed,
    check_text,
    refusing,
)
from .console import load_pipeline, progress
from .options import Checkpoint, Guidance, examples

if TYPE_CHECKING:
    from rich.table import Table


class Exam(str, Enum):
    """What `synergen eval` measures."""

    all = "all"
    generation = "generation"
    understanding = "understanding"
    tokenizer = "tokenizer"


def register(app: typer.Typer) -> None:
    app.command(
        name="eval",
        epilog=examples(
            "synergen eval --per-tag 10   [dim]# a tenth of the exam[/dim]",
            "synergen eval --checkpoint runs/mine/checkpoint --json scores.json",
            "synergen eval --exam understanding",
        ),
    )(evaluate)
    app.command(
        epilog=examples(
            "synergen bench --suite demo --quick",
            "synergen bench --suite demo --json demo.json --check",
        )
    )(bench)
    app.command(epilog=examples("synergen doctor"))(doctor)


def evaluate(
    exam: Annotated[Exam, typer.Option("--exam", help="Which exam.")] = Exam.all,
    per_tag: Annotated[
        int, typer.Option("--per-tag", min=1, max=100, help="Requests (or scenes) of each of the six tags.")
    ] = 100,
    images: Annotated[int, typer.Option("--images", min=1, max=64, help="Pictures painted for each request.")] = 4,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of each request's first picture.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE.json", help="Also write the scores here.")
    ] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Score a checkpoint on the held-out exam: GenEval's six tags, questions, reconstruction.

    The requests and scenes are fixed and were kept out of training.
    """
    check_guidance(guidance)
    check_seed(seed, images)
    check_checkpoint(checkpoint)
    if json_file is not None:
        check_output_file(json_file, ".json")
    pipeline = load_pipeline(checkpoint)
    from ..evaluation import exam as exams

    scores: dict[str, Any] = {}
    if exam in (Exam.all, Exam.generation):
        with progress("Painting the exam") as on_progress, refusing():
            scores["generation"] = exams.generation_exam(
                pipeline, per_tag=per_tag, images_per_prompt=images, guidance=guidance, seed=seed,
                on_progress=on_progress,
            )  # fmt: skip
    if exam in (Exam.all, Exam.understanding):
        with progress("Asking about scenes") as on_progress, refusing():
            scores["understanding"] = exams.understanding_exam(pipeline, per_tag=per_tag, on_progress=on_progress)
    if exam in (Exam.all, Exam.tokenizer):
        with refusing():
            scores["tokenizer"] = exams.tokenizer_exam(pipeline.image_tokenizer, n=6 * per_tag)
    _print(_score_table(scores))
    if json_file is not None:
        json_file.write_text(json.dumps(scores, indent=1) + "\n")


def bench(
    suite: Annotated[str, typer.Option("--suite", metavar="NAME", help="benchmarks/suite_NAME.py of a checkout.")],
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE.json", help="Write the rows with versions, CPU and commit."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a bar is missed.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples: wider spread, minutes saved.")] = False,
) -> None:
    """Measure a suite of figures: each with its unit, spread and bar."""
    suite = check_text("suite", suite)
    if json_file is not None:
        check_output_file(json_file, ".json")
    from ..bench import run

    with refusing():
        code = run(suite, json_file, check, quick=quick)
    raise typer.Exit(code)


def doctor() -> None:
    """Say what this installation is made of, what it will run on, and how to get what is missing."""
    from ..doctor import report

    for check in report():
        print(f"{'ok  ' if check.ok else 'MISS'} {check.check}: {check.value}")
        if check.remedy:
            print(f"     -> {check.remedy}")


def _score_table(scores: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("exam", "figure", "value")
    for exam, figures in scores.items():
        for name, value in _flat(figures):
            table.add_row(exam, name, f"{value:.3f}" if isinstance(value, float) else str(value))
    return table


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested figures as dotted names."""
    rows: list[tuple[str, Any]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)
