"""``synergen tokenize``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from .checks import BadInput, refusing
from .console import progress, status
from .options import examples


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "synergen tokenize captions.jsonl --root pictures --image-tokenizer runs/mine/image_tokenizer"
            " --grid 12x12 --out tokens",
            "synergen tokenize talks.jsonl --format conversations --root pictures --image-tokenizer start"
            " --grid 64x64 --out tokens",
            "synergen tokenize 'part-{000..007}.tar' --format tar --task generate --image-tokenizer start"
            " --grid 64x64 --out tokens",
        )
    )(tokenize)


def tokenize(
    path: Annotated[str, typer.Argument(help="JSONL file or tar; a path or a URL that fsspec knows.")],
    image_tokenizer: Annotated[
        Path, typer.Option("--image-tokenizer", metavar="DIR", help="Folder with the image tokenizer.")
    ],
    grid: Annotated[str, typer.Option("--grid", metavar="HxW", help="Tokens of a picture, as in model.image_grid.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for shards of ids and their rows.")],
    form: Annotated[str, typer.Option("--format", metavar="NAME", help="captions, conversations or tar.")] = "captions",
    root: Annotated[str, typer.Option("--root", metavar="DIR", help="Where picture names begin.")] = "",
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="understand or generate. Default: the only one of the format."),
    ] = None,
    max_bad: Annotated[float, typer.Option("--max-bad", help="Share of samples that may be bad.")] = 0.01,
) -> None:
    """Turn a data set's pictures into image token ids, once: training from them needs no image tokenizer."""
    side = re.fullmatch(r"(\d{1,4})x(\d{1,4})", grid)
    if side is None or not int(side[1]) or not int(side[2]):
        raise BadInput(f"--grid must be rows x columns, such as 12x12, got {grid!r}")
    if not 0 <= max_bad < 1:
        raise BadInput(f"--max-bad must be in [0, 1), got {max_bad}")
    with status("Loading"):
        from ..training.sources.tokenize import tokenize_source
    with refusing(), progress("Tokenising") as on_progress:
        bad = tokenize_source(
            path, form, root, task, image_tokenizer, (int(side[1]), int(side[2])), out, max_bad, on_progress
        )
    if bad:
        causes = ", ".join(f"{cause} {n}" for cause, n in bad.most_common())
        print(f"synergen tokenize: left out {bad.total()} ({causes}), listed in {out}", file=sys.stderr)
    print(f"Tokenised: {out}")
