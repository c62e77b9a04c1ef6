"""``synergen plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from .checks import BadInput, refusing
from .console import status
from .options import examples
from .train import find_recipe


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "synergen plan paper --gpu h100 --nodes 4   [dim]# the paper's three stages at full size[/dim]",
            "synergen plan my_recipe.yaml --gpu rtx4090 --gpus 1 --text-tokens 200",
        )
    )(plan)


def plan(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a recipe in the package.")],
    gpu: Annotated[str, typer.Option("--gpu", help="a100, h100, h200, b200 or rtx4090.")] = "h100",
    nodes: Annotated[int, typer.Option("--nodes", help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus", help="Cards of a machine.")] = 8,
    utilisation: Annotated[
        float, typer.Option("--utilisation", help="Share of the cards' bfloat16 FLOP/s that is reached.")
    ] = 0.4,
    sharded: Annotated[
        bool, typer.Option("--sharded/--replicated", help="Divide weights and moments among the cards, or not.")
    ] = True,
    text_tokens: Annotated[int, typer.Option("--text-tokens", help="Text tokens of a sample.")] = 64,
    learned_tokens: Annotated[int, typer.Option("--learned-tokens", help="Of them, those of answers.")] = 32,
    pictures: Annotated[int, typer.Option("--pictures", help="Pictures of a sample of understanding.")] = 1,
) -> None:
    """Say what a recipe costs: parameters, memory, FLOPs and bytes of each stage, and days."""
    path = find_recipe(recipe)
    with status("Loading"):
        from ..training.gpus import GPUS
        from ..training.plan import Machines, Samples, describe
        from ..training.recipe import load_recipe
        from ..training.run import model_config
    if gpu.lower() not in GPUS:
        raise BadInput(f"--gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    with refusing():
        loaded = load_recipe(path)
        machines = Machines(GPUS[gpu.lower()], nodes, gpus, utilisation, sharded)
        print(describe(loaded, model_config(loaded), machines, Samples(text_tokens, learned_tokens, pictures)))
