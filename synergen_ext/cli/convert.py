"""``synergen convert`` and ``synergen export``."""

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
            "synergen convert --llm internlm2-1_8b --image-tokenizer Emu3-VisionTokenizer --out start",
            "synergen convert --llm Qwen2-0.5B-Instruct --image-tokenizer Emu3-VisionTokenizer --out start"
            " --image-size 256 --fold 2x4",
            "synergen convert --llm SmolLM2-135M-Instruct.Q4_1.gguf --out start --dtype bfloat16",
        )
    )(convert)
    app.command(epilog=examples("synergen export --checkpoint start --out plain   [dim]# the LLM, as it came[/dim]"))(
        export
    )


Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder; appears whole, or not at all.")]


def convert(
    llm: Annotated[
        Path,
        typer.Option(
            "--llm",
            metavar="DIR",
            help="Language model: InternLM2, Qwen2, Llama, SmolLM2 or Mono-InternVL, with config.json and safetensors"
            " (or .bin, or a .gguf file).",
        ),
    ],
    out: Out,
    image_tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--image-tokenizer",
            metavar="DIR",
            help="Emu3's tokenizer, original or of transformers, or one of ours. Default: none is written.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="NAME", help="float32, bfloat16 or float16. Default: the language model's."),
    ] = None,
    image_size: Annotated[int, typer.Option("--image-size", metavar="N", help="Largest side in pixels.")] = 512,
    fold: Annotated[
        str, typer.Option("--fold", metavar="MxN", help="Rows x columns of image tokens in one folded token.")
    ] = "2x8",
) -> None:
    """Make a starting checkpoint from a pretrained language model and an image tokenizer.

    Text stays as it was: its scores are the language model's. Vision experts begin as copies of the text FFNs; what
    reads and writes image tokens is new and has to be trained.
    """
    window = re.fullmatch(r"(\d{1,4})x(\d{1,4})", fold)
    if window is None:
        raise BadInput(f"--fold must be rows x columns, such as 2x8, got {fold!r}")
    _check_new(out)
    with status("Loading"):
        from ..convert import convert as run
    with refusing(), progress("Converting") as on_progress:
        config = run(
            llm, out, image_tokenizer, dtype=dtype, image_size=image_size, fold=(int(window[1]), int(window[2])),
            on_progress=on_progress, on_note=_note,
        )  # fmt: skip
    h, w = config.image_grid
    print(f"Converted: {out} ({config.num_layers} layers of {config.hidden_size}, pictures of {h} x {w} tokens)")


def export(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", metavar="DIR", help="Folder that `synergen convert` wrote.")
    ],
    out: Out,
) -> None:
    """Write a checkpoint's language model, without experts, in the layout that it came in."""
    _check_new(out)
    with status("Loading"):
        from ..convert import export_llm
    with refusing(), progress("Exporting") as on_progress:
        export_llm(checkpoint, out, on_progress)
    print(f"Exported: {out}")


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out must not exist or be an empty folder, and {out} has something in it")


def _note(sentence: str) -> None:
    print(f"synergen convert: {sentence}", file=sys.stderr)
