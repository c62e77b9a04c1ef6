"""``synergen train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .checks import BadInput, check_output_folder, refusing
from .console import status
from .options import examples

#: Recipes that come with the package.
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "synergen train demo --out runs/mine   [dim]# the recipe of the package's checkpoint[/dim]",
            "synergen train demo --out runs/mine   [dim]# again, after a stop: goes on[/dim]",
            "synergen train paper --dry-run   [dim]# sizes, stages, what it costs[/dim]",
        )
    )(train)


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="YAML file with model, tokenizer, data and stages; or the name of a recipe in the package."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Logs, samples, resumable state; the result is DIR/checkpoint."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Go on from what DIR holds, or insist that it is empty."),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print the plan.")] = False,
) -> None:
    """Train a model from one recipe: tokenizers, then the stages, in order."""
    path = find_recipe(recipe)
    if dry_run:
        _dry_run(path)
        return
    if out is None:
        raise BadInput("Missing option '--out'.")
    check_output_folder(out)
    with status("Loading"):
        from ..training.run import run_recipe
    with refusing():
        folder = run_recipe(path, out, resume=resume)
    print(f"Trained: {folder}")


def _dry_run(path: Path) -> None:
    """The recipe's own sizes, and what it costs on 4 machines of 8 H100."""
    with status("Loading"):
        from ..training.gpus import GPUS
        from ..training.plan import Machines, Samples, describe
        from ..training.recipe import load_recipe
        from ..training.run import model_config, run_recipe
    with refusing():
        run_recipe(path, path, dry_run=True)
        recipe = load_recipe(path)
        print(describe(recipe, model_config(recipe), Machines(GPUS["h100"], 4), Samples()))


def find_recipe(name: str) -> Path:
    """A recipe file, or one of the package's by its name."""
    if Path(name).is_file():
        return Path(name)
    known = {p.stem: p for p in sorted(RECIPES.glob("*.yaml"))}
    if name in known:
        return known[name]
    raise BadInput(f"recipe {name} is neither a file nor one of the package's ({', '.join(known)})")
