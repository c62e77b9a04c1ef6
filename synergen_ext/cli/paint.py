"""``synergen demo`` and ``synergen generate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .checks import (
    check_checkpoint,
    check_guidance,
    check_output_file,
    check_output_folder,
    check_seed,
    check_text,
    refusing,
)
from .console import load_pipeline, printable, progress
from .options import Checkpoint, Format, Guidance, Weights, examples

if TYPE_CHECKING:
    from PIL import Image

#: A saved picture is enlarged by the least whole number that makes its short side this many pixels.
EASY_TO_SEE = 384
MAX_COUNT, MAX_SCALE = 1000, 16

Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", help="Same words, seed and checkpoint: same picture."),
]


def register(app: typer.Typer) -> None:
    app.command(epilog=examples("synergen demo", "synergen demo --out pictures --seed 3"))(demo)
    app.command(
        epilog=examples(
            'synergen generate "a blue dog"',
            'synergen generate "two red apples left of a blue car" -o apples.png --seed 7',
            'synergen generate "three yellow ducks" -o ducks.png --count 4   [dim]# ducks-0.png ... ducks-3.png[/dim]',
            'synergen generate "a red cat" -o cat.png --scale 1   [dim]# the model\'s own pixels[/dim]',
        )
    )(generate)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the pictures go.")] = Path("synergen-demo"),
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    weights: Weights = Format.float32,
) -> None:
    """Paint eight pictures from words, describe six drawn pictures, and say where the results are."""
    from .. import demo as show

    check_seed(seed, len(show.REQUESTS))
    check_checkpoint(checkpoint)
    check_output_folder(out)
    with refusing():
        show.check_can_draw()
    pipeline = load_pipeline(checkpoint, weights.value)
    began = time.perf_counter()
    with progress("Painting") as on_progress, refusing():
        painted = show.paint(pipeline, out, seed, on_progress)
    seconds = time.perf_counter() - began
    with progress("Describing") as on_progress:
        described = show.describe(pipeline, out, seed, on_progress)
    page = show.write_page(out, painted, described)

    print(f"Painted {len(painted.prompts)} pictures from words in {seconds:.1f} s: {painted.path}")
    for prompt in painted.prompts:
        print(f"  {prompt}")
    right, asked = described.score
    print(f"\nShowed the same model {len(described.pictures)} drawn pictures: {described.path}")
    print(f"It answered {right} of {asked} questions right:")
    for picture in described.pictures:
        print(f"  {printable(picture.caption)}")
        for answer in picture.answers:
            note = "" if answer.right else f"   (wrong: {answer.truth})"
            print(f"    {answer.question} {printable(answer.text)}{note}")
    print(f"\nBoth on one page: {page}")


def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint, in words.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.png", help="The picture to write.")
    ] = Path("picture.png"),
    seed: Seed = 0,
    guidance: Guidance = None,
    count: Annotated[
        int,
        typer.Option(
            "--count", "-n", min=1, max=MAX_COUNT,
            help="How many pictures, with seeds SEED, SEED + 1, ...; each file's name then ends in its seed.",
        ),
    ] = 1,
    scale: Annotated[
        int | None,
        typer.Option(
            "--scale", min=1, max=MAX_SCALE,
            help=f"Enlarge the saved picture this many times; 1 saves the model's own pixels."
            f" Default: the least that makes the short side {EASY_TO_SEE} pixels (4 for the package's checkpoint).",
        ),
    ] = None,
    preview: Annotated[
        int,
        typer.Option(
            "--preview", min=0, metavar="N",
            help="Write each file every N patches while it is being painted, white where nothing is yet. 0: never.",
        ),
    ] = 0,
    checkpoint: Checkpoint = None,
    weights: Weights = Format.float32,
) -> None:  # fmt: skip
    """Paint a picture from words.

    The PNG carries its prompt, seed, guidance and format of weights as text, so that it can be painted again.
    """
    prompt = check_text("prompt", prompt)
    check_seed(seed, count)
    check_guidance(guidance)
    check_checkpoint(checkpoint)
    check_output_file(output, ".png")
    pipeline = load_pipeline(checkpoint, weights.value)
    used = pipeline.config.guidance if guidance is None else guidance
    seeds = list(range(seed, seed + count))

    def save(first: int, pictures: list[Image.Image]) -> list[Path]:
        paths = []
        for number, picture in enumerate(pictures, seed + first):
            path = output if count == 1 else output.with_stem(f"{output.stem}-{number}")
            save_picture(picture, path, prompt, number, used, scale, weights.value)
            paths.append(path)
        return paths

    with progress("Painting") as on_progress, refusing():
        pictures = pipeline.paint(
            [prompt] * count, seeds, guidance, on_progress=on_progress,
            on_preview=save if preview else None, preview_every=max(preview, 1),
        )  # fmt: skip
        paths = save(0, pictures)
    for path in paths:
        print(path)


def save_picture(
    picture: Image.Image, path: Path, prompt: str, seed: int, guidance: float, scale: int | None = None,
    weights: str = "float32",
) -> None:  # fmt: skip
    """Write a PNG, enlarged ``scale`` times, that says what it was painted from."""
    from PIL import Image, PngImagePlugin

    from .._version import __version__

    short = min(picture.size)
    times = scale or max(1, -(-EASY_TO_SEE // short))
    if times > 1:
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_text("seed", str(seed))
    info.add_text("guidance", repr(guidance))
    info.add_text("weights", weights)
    info.add_text("Software", f"synergen_ext {__version__}")
    picture.save(path, format="PNG", pnginfo=info)
