"""What a run shows and keeps: progress bars, a JSON-lines log, TensorBoard, sample pictures, the final curve."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import ops
from ..generation.oracle import generate_image_ids, generate_text
from ..model import SynerGenVL
from ..processing.image_tokenizer import ImageTokenizer, to_uint8
from ..processing.sequences import SequenceBuilder
from ..scenes import CAPTION_INSTRUCTION
from .page import write_page
from .recipe import Recipe, StageRecipe

SAMPLE_PROMPTS = (
    "a photo of a cat", "a photo of a red car", "a photo of three apples", "a photo of a dog and a star",
    "a photo of a house left of a tree", "a photo of a blue fish and a yellow duck",
    "a photo of a bear above a book", "a photo of two green butterflies",
)  # fmt: skip
ANSWER_TOKENS = 24  # most of what is said of a sample


class Reporter:
    """Use as a context manager around a run. Figures go to ``log.jsonl`` (every step), TensorBoard if
    installed, and W&B if the recipe names a project.

    Of several processes one reports; the others are ``silent``.
    """

    def __init__(self, recipe: Recipe, out: Path, silent: bool = False) -> None:
        self.recipe, self.out, self.silent = recipe, out, silent
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), disable=silent,
        )  # fmt: skip
        self.task_id: Any = None
        self.board: Any = None
        self.wandb: Any = None

    def __enter__(self) -> Reporter:
        self.log = open(os.devnull if self.silent else self.out / "log.jsonl", "a")  # noqa: SIM115 (closed in __exit__)
        self.log.write("\n" if self.log.tell() else "")  # after half a line, begin a new one
        if not self.silent:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.out / "tensorboard"))  # type: ignore[no-untyped-call]
            if self.recipe.wandb:
                try:
                    import wandb
                except ImportError as e:
                    raise ImportError("recipe: wandb wants its package: pip install 'synergen_ext[wandb]'") from e
                name = f"{self.recipe.name}-{self.out.name}"
                self.wandb = wandb.init(
                    project=self.recipe.wandb, name=name, dir=str(self.out), resume="allow", id=name
                )
        self.began = time.time()
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.log.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish(1 if kind else 0)

    @contextmanager
    def task(self, name: str, total: int, done: int) -> Iterator[None]:
        """A progress bar for one piece of work."""
        self.task_id = self.progress.add_task(name, total=total, completed=done, figures="")
        yield
        self.progress.remove_task(self.task_id)

    @contextmanager
    def stage(self, stage: StageRecipe) -> Iterator[None]:
        with self.task(stage.name, stage.steps, 0):
            yield

    def advance(self, count: int) -> None:
        self.progress.advance(self.task_id, count)

    def step(self, stage: str, step: int, figures: dict[str, float]) -> None:
        """Record one training step."""
        short = (
            "  ".join(f"{k} {v:.3f}" for k, v in figures.items() if "/" in k)
            + f"  {figures['tokens_per_second']:,.0f} tokens/s  {figures['filled']:.0%} filled"
        )
        self._record(stage, step, figures, short)

    def tokenizer_step(self, step: int, figures: dict[str, float]) -> None:
        self._record("image_tokenizer", step, figures, f"loss {figures['loss']:.3f}  psnr {figures['psnr']:.1f} dB")

    def _record(self, stage: str, step: int, figures: dict[str, float], short: str) -> None:
        self.progress.update(self.task_id, completed=step + 1, figures=short)
        row = {"stage": stage, "step": step, **{k: round(v, 6) for k, v in figures.items()}}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        if self.board:
            for k, v in figures.items():
                self.board.add_scalar(f"{stage}/{k}", v, step)
        if self.wandb:  # steps of W&B count through the stages, so a stage's own is a figure
            self.wandb.log({f"{stage}/{k}": v for k, v in figures.items()} | {f"{stage}/step": step})

    def sample(
        self, model: SynerGenVL, builder: SequenceBuilder, tokenizer: ImageTokenizer, stage: str, step: int
    ) -> None:
        """Paint the sample prompts with the weights as they are, side by side, to ``samples/STAGE-STEP.png``, and say
        what is to be seen in each, a line a picture, to ``samples/STAGE-STEP.txt``."""
        from PIL import Image

        model.eval()
        with torch.no_grad(), ops.backend("eager"):
            prompts = [builder.paint_prompt(p) for p in SAMPLE_PROMPTS]
            ids = generate_image_ids(
                model, prompts, builder.paint_prompt(None), seeds=[0] * len(prompts), guidance=model.config.guidance
            )
            pixels = to_uint8(tokenizer.decode(ids))  # [N, H, W, 3]
            asked, stops = builder.ask_prompt(CAPTION_INSTRUCTION), (builder.text.im_end, builder.text.eos)
            said = generate_text(model, [asked] * len(ids), ids, ANSWER_TOKENS, stops)
        model.train()
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        row = torch.cat(list(pixels), dim=1).numpy()
        Image.fromarray(row).save(folder / f"{stage}-{step:06d}.png")
        answers = [" ".join(builder.text.decode(a).split()) for a in said]
        lines = [f"{prompt}: {answer}\n" for prompt, answer in zip(SAMPLE_PROMPTS, answers, strict=True)]
        (folder / f"{stage}-{step:06d}.txt").write_text("".join(lines))
        if self.board:
            self.board.add_image(f"{stage}/samples", row, step, dataformats="HWC")

    def write_curve(self, folder: Path) -> None:
        """``curve.json`` (means over 1/200 of the run) and ``curve.png`` from the log."""
        rows = []
        for line in (self.out / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a run that was killed may leave half a line
                rows.append(json.loads(line))
        latest = {(r["stage"], r["step"]): r for r in rows}  # a resumed step counts once
        stages = list(dict.fromkeys(r["stage"] for r in rows))
        curve: dict[str, Any] = {}
        for stage in stages:
            mine = [latest[k] for k in sorted(k for k in latest if k[0] == stage)]
            width = max(1, len(mine) // 200)
            keys = [k for k in mine[0] if "/" in k or k in ("loss", "psnr")]
            curve[stage] = {
                "step": [part[-1]["step"] + 1 for part in _chunks(mine, width)],
                **{k: [round(sum(r[k] for r in part) / len(part), 4) for part in _chunks(mine, width)] for k in keys},
            }
        (folder / "curve.json").write_text(json.dumps(curve) + "\n")
        _plot(curve, folder / "curve.png")
        write_page(self.out)


def _chunks(rows: list[dict[str, Any]], width: int) -> list[list[dict[str, Any]]]:
    return [rows[i : i + width] for i in range(0, len(rows), width)]


def _plot(curve: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return  # the extra `train` brings matplotlib; curve.json holds the same figures
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curve), figsize=(4 * len(curve), 3), squeeze=False)
    for axis, (stage, rows) in zip(axes[0], curve.items(), strict=True):
        for key, values in rows.items():
            if key not in ("step", "psnr"):
                axis.plot(rows["step"], values, label=key)
        axis.set(
            title=stage, xlabel="step", ylabel="loss (nats)" if stage != "image_tokenizer" else "loss", yscale="log"
        )
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
