"""Options that several commands share."""

from enum import Enum
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


class Format(str, Enum):
    """How matrices are kept in memory."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"
    int4 = "int4"


Weights = Annotated[
    Format,
    typer.Option(
        "--weights",
        help="How the model is kept in memory: bfloat16, int8 and int4 take about a half, a quarter and a seventh of"
        " float32's, and so much less time to read. float32 reproduces the measured scores.",
    ),
]


def examples(*lines: str) -> str:
    """The end of a help text: example command lines, one a line."""
    return "\n\n".join(("[bold]Examples[/bold]", *lines))
