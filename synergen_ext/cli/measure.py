"""``synergen eval``, ``synergen bench`` and ``synergen doctor``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

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
        with progress("Reconstructing scenes") as on_progress, refusing():
            scores["tokenizer"] = exams.tokenizer_exam(pipeline.image_tokenizer, n=6 * per_tag, on_progress=on_progress)
    _print(scores)
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
    from ..bench import load_suite, run

    with refusing():
        load_suite(suite)  # an unknown name is refused; an error while measuring is an error
    raise typer.Exit(run(suite, json_file, check, quick=quick))


def doctor() -> None:
    """Say what this installation is made of, what it will run on, and how to get what is missing."""
    from ..doctor import report

    for check in report():
        print(f"{'ok  ' if check.ok else 'MISS'} {check.check}: {check.value}")
        if check.remedy:
            print(f"     -> {check.remedy}")


def figure_rows(scores: dict[str, Any]) -> list[tuple[str, str, float, tuple[float, float] | None]]:
    """Exam, figure, value and 95 % interval of everything that `synergen eval` measured."""
    rows = []
    for exam, figures in scores.items():
        shares = {**figures.get("tags", {}), **{k: v for k, v in figures.items() if isinstance(v, float)}}
        intervals = figures.get("interval", {})
        for name, value in shares.items():
            rows.append((exam, name, value, tuple(intervals[name]) if name in intervals else None))
    return rows


def _print(scores: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("exam", "figure", "value", "95 %")
    for exam, name, value, interval in figure_rows(scores):
        bounds = f"{interval[0]:.3f} .. {interval[1]:.3f}" if interval else ""
        table.add_row(exam, name, f"{value:.3f}", bounds)
    Console().print(table)
