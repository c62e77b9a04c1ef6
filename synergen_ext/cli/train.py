"""``synergen train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .checks import check_file, check_output_folder, refusing
from .console import status
from .options import examples


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "synergen train recipe.yaml --out runs/mine",
            "synergen train recipe.yaml --out runs/mine   [dim]# again, after a stop: goes on[/dim]",
            "synergen train recipe.yaml --out runs/mine --dry-run   [dim]# sizes and stages[/dim]",
        )
    )(train)


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, tokenizer, data and stages.")],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Logs, samples, resumable state; the result is DIR/checkpoint."),
    ],
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from what DIR holds, or insist that it is empty.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print the plan.")] = False,
) -> None:
    """Train a model from one recipe: tokenizers, then the stages, in order.

    The package's checkpoint has its recipe beside it: synergen_ext/checkpoints/demo/recipe.yaml.
    """
    check_file("recipe", recipe)
    if not dry_run:
        check_output_folder(out)
    with status("Loading"):
        from ..training.run import run_recipe
    with refusing():
        folder = run_recipe(recipe, out, resume=resume, dry_run=dry_run)
    if not dry_run:
        print(f"Trained: {folder}")
