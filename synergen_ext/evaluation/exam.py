"""The demo's exams: painting 600 held-out requests, questions about 600 held-out scenes, reconstruction.

The requests and scenes are fixed (``scenes.exam_requests``, ``scenes.compose.exam_scene``) and training never draws
them. Anything chosen by measurement, such as the guidance scale, is chosen on training-side prompts
(``guidance_sweep``), never here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scenes import SPRITE, TAGS, Request, Scene
from ..scenes import exam_requests as _exam_requests
from ..scenes.compose import exam_scene, training_scene
from .answers import exam_questions
from .folders import write_folder
from .geneval import SCENE_RULES, score, wilson
from .scorer import read_pictures
from .validation import read_exactly

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from ..generation.pipeline import Pipeline
    from ..processing.image_tokenizer import ImageTokenizer

Progress = Callable[[int, int], None]

#: Which exam: the seed of ``scenes.exam_requests``.
EXAM_SEED = 2024
#: Stream of training-side scenes used to choose settings.
SWEEP_SEED = 99


# ---- painting -------------------------------------------------------------------------------


def generation_exam(
    pipeline: Pipeline,
    per_tag: int = 100,
    images_per_prompt: int = 4,
    guidance: float | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    batch: int = 32,
    folder: str | Path | None = None,
    keep_results: bool = False,
) -> dict[str, Any]:
    """Paint every held-out request and score the pictures with GenEval's rules.

    Args:
        per_tag: requests of each of the six tags, at most 100.
        images_per_prompt: pictures a request; picture ``k`` of every request has the seed ``seed + k``.
        guidance, temperature, top_k, top_p: None takes the checkpoint's own.
        on_progress: called with (done, total) while painting.
        folder: also write the pictures there, in GenEval's layout.
        keep_results: also return ``results``, one row a picture.

    Returns:
        ``geneval.summarise``'s figures; ``exact``: share of pictures that hold what was asked and nothing else
        (GenEval forgives extra objects outside of counting); ``settings``.
    """
    requests = _exam_requests(per_tag, EXAM_SEED)
    sampling = {
        "guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p, "batch": batch,
    }  # fmt: skip
    figures = _paint_and_score(pipeline, requests, images_per_prompt, seed, sampling, on_progress, folder, keep_results)
    figures["settings"]["exam_seed"] = EXAM_SEED
    return figures


def guidance_sweep(
    pipeline: Pipeline,
    values: Sequence[float],
    per_tag: int = 20,
    images_per_prompt: int = 1,
    seed: int = 0,
    on_progress: Progress | None = None,
    **sampling: Any,
) -> dict[float, dict[str, Any]]:
    """``generation_exam``'s figures for each guidance scale, on prompts of the training side.

    Args:
        values: guidance scales to try.
        per_tag: prompts of each tag, from the training stream ``SWEEP_SEED``.
        sampling: ``temperature``, ``top_k``, ``top_p``, ``batch``, the same for all values.
    """
    requests = sweep_requests(per_tag)
    total = len(values)
    figures = {}
    for i, value in enumerate(values):

        def progress(done: int, whole: int, before: int = i) -> None:
            if on_progress:
                on_progress(before * whole + done, total * whole)

        setting = {**sampling, "guidance": value}
        figures[value] = _paint_and_score(pipeline, requests, images_per_prompt, seed, setting, progress, None, False)
    return figures


def sweep_requests(per_tag: int) -> list[Request]:
    """The first ``per_tag`` requests of each tag in the training stream ``SWEEP_SEED``."""
    found: dict[str, list[Request]] = {tag: [] for tag in TAGS}
    index = 0
    while any(len(f) < per_tag for f in found.values()):
        request = training_scene(SWEEP_SEED, index).request
        index += 1
        if len(found.get(request.tag, [None] * per_tag)) < per_tag:
            found[request.tag].append(request)
    return [r for f in found.values() for r in f]


def _paint_and_score(
    pipeline: Pipeline,
    requests: Sequence[Request],
    images_per_prompt: int,
    seed: int,
    sampling: dict[str, Any],
    on_progress: Progress | None,
    folder: str | Path | None,
    keep_results: bool,
) -> dict[str, Any]:
    if images_per_prompt < 1:
        raise ValueError(f"generation_exam: images_per_prompt must be >= 1, got {images_per_prompt}")
    prompts = [r.prompt for r in requests for _ in range(images_per_prompt)]
    seeds = [seed + k for _ in requests for k in range(images_per_prompt)]
    painted = pipeline.paint(prompts, seeds=seeds, on_progress=on_progress, **_given(sampling))
    pictures: list[list[Image.Image]] = [
        painted[i : i + images_per_prompt] for i in range(0, len(painted), images_per_prompt)
    ]
    rows = [r.metadata() for r in requests]
    if folder is not None:
        write_folder(folder, rows, pictures)
    read = [read_pictures(group) for group in pictures]
    found = [[[d.as_dict() for d in r] for r in group] for group in read]
    figures = score(rows, found, SCENE_RULES)
    results = figures.pop("results")
    if keep_results:
        figures["results"] = results
    exact = [
        result["correct"] and sum(g.count for g in requests[result["index"]].groups) == len(
            found[result["index"]][result["picture"]]
        )
        for result in results
    ]  # fmt: skip
    config = pipeline.config
    figures["exact"] = float(np.mean(exact))
    figures["settings"] = {
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "guidance": _first(sampling.get("guidance"), config.guidance),
        "temperature": _first(sampling.get("temperature"), config.image_temperature),
        "top_k": _first(sampling.get("top_k"), config.image_top_k),
        "top_p": _first(sampling.get("top_p"), config.image_top_p),
    }
    return figures


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if v is not None}


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


# ---- answering ------------------------------------------------------------------------------


def understanding_exam(
    pipeline: Pipeline, per_tag: int = 100, on_progress: Progress | None = None, *, batch: int = 64
) -> dict[str, Any]:
    """Questions about the true pictures of the first ``per_tag`` exam requests of each tag.

    Returns:
        Shares of right answers:

        - ``naming``: the objects named are exactly those shown; ``naming_counts``: with their counts;
        - ``color``: one question a group, the whole answer right;
        - ``counting``: one question a group and one about an object that is absent ("zero");
        - ``position``: asked from both sides wherever two groups stand in a relation, the whole answer right;
        - ``caption``: the caption names every object; ``caption_exact``: it says what the true one says, counts,
          colours and relation, in either order;

        ``asked``: questions behind each figure, ``interval``: its 95 % interval, ``settings``.
    """
    pictures: list[Any] = []
    questions: list[str] = []
    checks: list[tuple[tuple[str, Callable[[str], bool]], ...]] = []
    for scene in exam_scenes(per_tag):
        picture = _picture(scene)
        for question, marks in exam_questions(scene):
            pictures.append(picture)
            questions.append(question)
            checks.append(marks)
    right: dict[str, list[bool]] = {}
    for start in range(0, len(questions), batch):
        stop = min(start + batch, len(questions))
        answers = pipeline.ask(pictures[start:stop], questions[start:stop], batch=batch)
        for answer, marks in zip(answers, checks[start:stop], strict=True):
            for figure, check in marks:
                right.setdefault(figure, []).append(check(answer))
        if on_progress:
            on_progress(stop, len(questions))
    shares = {k: float(np.mean(v)) for k, v in right.items()}
    return {
        **shares,
        "asked": {k: len(v) for k, v in right.items()},
        "interval": {k: wilson(shares[k], len(v)) for k, v in right.items()},
        "settings": {"per_tag": per_tag, "exam_seed": EXAM_SEED},
    }


def exam_scenes(per_tag: int = 100) -> list[Scene]:
    """The true pictures' scenes of the first ``per_tag`` exam requests of each tag."""
    if not 1 <= per_tag <= 100:
        raise ValueError(f"exam_scenes: per_tag must be in [1, 100], got {per_tag}")
    return [exam_scene(t * 100 + i, EXAM_SEED) for t in range(len(TAGS)) for i in range(per_tag)]


def _picture(scene: Scene) -> Image.Image:
    from PIL import Image

    return Image.fromarray(scene.image())


# ---- the image tokenizer --------------------------------------------------------------------


def tokenizer_exam(
    image_tokenizer: ImageTokenizer,
    n: int = 600,
    batch: int = 32,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode and decode ``n`` held-out scenes.

    Returns:
        ``box_psnr``: dB inside the objects' 40 x 40 boxes, mean over scenes (``box_psnr_middle``: the middle
        80 % of them); ``psnr``: dB over whole pictures; ``codes_used``: share of the codebook that these scenes use;
        ``steady_ids``: share of the objects' tokens whose id is the commonest one at this place in an object of this
        name and colour (the rest is noise to a model that paints from words);
        ``read_true``, ``read_reconstructed``: share of scenes that the scorer reads without a fault (names, colours,
        places) from the true picture and from the reconstruction.
    """
    import torch

    from ..processing.image_tokenizer import box_psnr, to_pixels, to_uint8

    if n < 1:
        raise ValueError(f"tokenizer_exam: n must be >= 1, got {n}")
    inside: list[float] = []
    whole: list[float] = []
    true_read: list[bool] = []
    read: list[bool] = []
    used = np.zeros(image_tokenizer.codebook_size, bool)
    chosen: dict[tuple[str, str], list[NDArray[np.int64]]] = {}
    for start in range(0, n, batch):
        # Beyond the exam's 600 scenes further ones are drawn in the same way from later seeds.
        scenes = [exam_scene(i % 600, EXAM_SEED + i // 600) for i in range(start, min(start + batch, n))]
        true = np.stack([s.image() for s in scenes])
        mask = np.zeros(true.shape[:3], np.float32)
        for k, scene in enumerate(scenes):
            for item in scene.items:
                mask[k, item.y : item.y + SPRITE, item.x : item.x + SPRITE] = 1
        ids = image_tokenizer.encode(to_pixels(true))
        used[ids.unique().cpu().numpy()] = True
        p = image_tokenizer.stride
        for scene, tokens in zip(scenes, ids.cpu().numpy(), strict=True):
            for item in scene.items:
                box = np.s_[item.y // p : (item.y + SPRITE) // p, item.x // p : (item.x + SPRITE) // p]
                chosen.setdefault((item.name, item.color), []).append(tokens[box].ravel())
        out = to_uint8(image_tokenizer.decode(ids)).cpu()
        pair = (out, torch.from_numpy(true))
        inside += box_psnr(*pair, torch.from_numpy(mask)).tolist()
        whole += box_psnr(*pair, torch.ones(mask.shape)).tolist()
        true_read += read_exactly(scenes, true)
        read += read_exactly(scenes, out.numpy())
        if on_progress:
            on_progress(min(start + batch, n), n)
    return {
        "box_psnr": float(np.mean(inside)),
        "box_psnr_middle": [float(q) for q in np.quantile(inside, [0.1, 0.9])],
        "psnr": float(np.mean(whole)),
        "codes_used": float(used.mean()),
        "steady_ids": _steadiness([np.stack(objects) for objects in chosen.values()]),
        "read_true": float(np.mean(true_read)),
        "read_reconstructed": float(np.mean(read)),
        "settings": {"n": n, "exam_seed": EXAM_SEED},
    }


def _steadiness(objects: list[NDArray[np.int64]]) -> float:
    """Share of tokens that are the commonest in their column; each array is ``[objects, tokens]`` of one kind."""
    commonest = sum(int(np.unique(column, return_counts=True)[1].max()) for o in objects for column in o.T)
    return commonest / sum(o.size for o in objects)
