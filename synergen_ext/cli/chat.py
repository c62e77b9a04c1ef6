"""``synergen chat``: questions about a picture, one or many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .checks import BadInput, check_checkpoint, check_file, check_text, open_picture, refusing
from .console import load_pipeline, printable
from .options import Checkpoint, Format, Weights, examples

if TYPE_CHECKING:
    from PIL import Image

    from ..generation.pipeline import Pipeline


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            'synergen chat picture.png "How many cars are there?"',
            'synergen chat picture.png "Provide a one-sentence caption for the image"',
            "synergen chat picture.png   [dim]# a conversation, until Ctrl-D[/dim]",
        )
    )(chat)


def chat(
    picture: Annotated[Path, typer.Argument(help="PNG, JPEG, WEBP, GIF, BMP, TIFF or PPM file.")],
    question: Annotated[
        str | None, typer.Argument(help="What to ask. Without it, a conversation begins.")
    ] = None,
    history: Annotated[
        int,
        typer.Option(
            "--history", min=0, max=100,
            help="In a conversation: how many earlier questions the model is reminded of."
            " The package's checkpoint was trained on conversations of three.",
        ),
    ] = 2,
    checkpoint: Checkpoint = None,
    weights: Weights = Format.float32,
) -> None:  # fmt: skip
    """Ask about a picture.

    The picture is fitted into the model's square on white, and the answer is printed on stdout.
    """
    check_checkpoint(checkpoint)
    image = open_picture(check_file("picture", picture))
    if question is not None:
        question = check_text("question", question)
        pipeline = load_pipeline(checkpoint, weights.value)
        with refusing():
            print(printable(str(pipeline.ask(image, question))))
        return
    converse(load_pipeline(checkpoint, weights.value), image, history)


def converse(pipeline: Pipeline, image: Image.Image, remembered: int) -> None:
    """Read questions from stdin and answer each, until end of file."""
    talking = sys.stdin.isatty()
    if talking:
        print("Ask about the picture; Ctrl-D ends.", file=sys.stderr)
    turns: list[tuple[str, str]] = []
    while True:
        try:
            line = input("> " if talking else "")
        except EOFError:
            if talking:
                print(file=sys.stderr)
            return
        try:
            question = check_text("question", line)
            with refusing():
                answer = pipeline.ask(image, question, history=turns[len(turns) - min(remembered, len(turns)) :])
        except BadInput as error:  # one bad question does not end a conversation
            print(error, file=sys.stderr)
            continue
        print(printable(str(answer)), flush=True)
        turns.append((question, str(answer)))
