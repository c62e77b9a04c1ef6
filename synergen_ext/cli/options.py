"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="DIR", help="Checkpoint folder. Default: the one in the package."),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        metavar="S",
        help="Strength of the prompt: 1 is plain sampling, more follows the words more closely."
        " Default: the checkpoint's own (the paper's preset says 7.5).",
    ),
]


def examples(*lines: str) -> str:
    """The end of a help text: example command lines, one a line."""
    return "\n\n".join(("[bold]Examples[/bold]", *lines))
