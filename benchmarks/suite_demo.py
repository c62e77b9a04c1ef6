"""The shipped demo checkpoint: painting time, what it paints, what it understands, what its tokenizer keeps.

Full: the whole exams (600 requests x 4 pictures, 600 scenes). ``--quick``: a tenth of the requests with one picture
each, so its intervals are about six times as wide.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from synergen_ext.bench import Progress, Row, timed
from synergen_ext.evaluation import exam
from synergen_ext.evaluation.geneval import wilson
from synergen_ext.evaluation.validation import validate
from synergen_ext.generation.pipeline import Pipeline, shipped_checkpoint

PROMPTS = (
    "a photo of a cat", "a photo of a red car", "a photo of three apples", "a photo of a dog and a star",
    "a photo of a house left of a tree", "a photo of a blue fish and a yellow duck",
    "a photo of a bear above a book", "a photo of two green butterflies",
)  # fmt: skip

GENERATION_BARS = {
    "single_object": ">= 0.95", "colors": ">= 0.90", "two_object": ">= 0.75", "counting": ">= 0.70",
    "position": ">= 0.65", "color_attr": ">= 0.60",
}  # fmt: skip
UNDERSTANDING_BARS = {
    "naming": ">= 0.95", "color": ">= 0.95", "counting": ">= 0.85", "position": ">= 0.85",
    "caption": ">= 0.90",
}  # fmt: skip


def rows(quick: bool, progress: Progress) -> Iterator[Row]:
    def on(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total)

    progress("load the checkpoint", 0, 1)
    pipeline = Pipeline.from_pretrained()
    yield _size()
    yield _painting_time(pipeline)
    yield from _scorer(400 if quick else 2000, on("validate the scorer"))
    # Fewer than 600 scenes cannot show every code.
    yield from _tokenizer(pipeline, 600, on("reconstruct scenes"))
    yield from _understanding(pipeline, 10 if quick else 100, on("ask about scenes"))
    yield from _generation(pipeline, 10 if quick else 100, 1 if quick else 4, on("paint the exam"))


def _size() -> Row:
    files = [p for p in shipped_checkpoint().rglob("*") if p.is_file()]
    return Row("checkpoint", sum(p.stat().st_size for p in files) / 1e6, "MB", "<= 25", note=f"{len(files)} files")


def _painting_time(pipeline: Pipeline, repeats: int = 3) -> Row:
    # The first, cold call counts too: it is what a person waits for.
    paint = partial(pipeline.paint, PROMPTS, seeds=list(range(len(PROMPTS))))
    seconds, spread = timed(paint, repeats, warmup=0)
    return Row("paint 8 pictures", seconds, "s", "<= 15", spread, note=f"{repeats} runs")


def _scorer(n: int, on_progress: Callable[[int, int], None]) -> Iterator[Row]:
    figures = validate(n, on_progress=on_progress)
    share = figures["true"]["all"]
    yield Row("scorer: true scenes read right", share, "", ">= 0.99", wilson(share, n), "95 %", f"{n} scenes")
    worst = min(figures["rejected"], key=lambda k: figures["rejected"][k])
    share = figures["rejected"][worst]
    yield Row(
        f"scorer: refused of {worst}, its worst kind of wrong shape", share, "", None, wilson(share, n // 4), "95 %"
    )


def _tokenizer(pipeline: Pipeline, n: int, on_progress: Callable[[int, int], None]) -> Iterator[Row]:
    figures = exam.tokenizer_exam(pipeline.image_tokenizer, n, on_progress=on_progress)
    note = f"{n} scenes"
    psnr = "tokenizer: PSNR in the objects' boxes"
    yield Row(psnr, figures["box_psnr"], "dB", ">= 24", tuple(figures["box_psnr_middle"]), "middle 80 %", note)
    yield Row("tokenizer: PSNR of whole pictures", figures["psnr"], "dB", note=note)
    yield Row("tokenizer: codes used", figures["codes_used"], "", ">= 0.90", note=note)
    lost = figures["read_true"] - figures["read_reconstructed"]
    yield Row("tokenizer: scorer's loss on reconstructions", lost, "", "<= 0.01", note=note)


def _understanding(pipeline: Pipeline, per_tag: int, on_progress: Callable[[int, int], None]) -> Iterator[Row]:
    figures = exam.understanding_exam(pipeline, per_tag, on_progress)
    for name in (*UNDERSTANDING_BARS, "naming_counts", "caption_exact"):
        yield _share(f"understanding: {name}", name, figures, UNDERSTANDING_BARS.get(name), figures["asked"][name])


def _generation(
    pipeline: Pipeline, per_tag: int, images: int, on_progress: Callable[[int, int], None]
) -> Iterator[Row]:
    figures = exam.generation_exam(pipeline, per_tag, images, on_progress=on_progress)
    flat = {**figures["tags"], "overall": figures["overall"], "interval": figures["interval"]}
    for name, bar in GENERATION_BARS.items():
        yield _share(f"generation: {name}", name, flat, bar, per_tag * images)
    yield _share("generation: overall", "overall", flat, ">= 0.76", figures["pictures"])
    yield Row("generation: prompts with a right picture", figures["any_correct"], note=f"{images} pictures each")
    yield Row("generation: exactly what was asked", figures["exact"], note=f"{figures['pictures']} pictures")


def _share(name: str, key: str, figures: dict[str, Any], bar: str | None, n: int) -> Row:
    return Row(name, figures[key], "", bar, tuple(figures["interval"][key]), "95 %", f"{n} drawn")
