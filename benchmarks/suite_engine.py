"""The native engine on the CPU at the paper's size (3.6 B parameters, random weights), and the shipped model.

Each form of the weights (bfloat16, 8 and 4 bits) is held against the machine's own limit, measured in the same rounds:
reading as many bytes, once, on as many threads. Steps of the unfolding head and of text, for one, two and eight rows;
a prompt of 512 tokens; a picture of 512 x 512 pixels with guidance, sampler included; four at once. Beside
transformers' Llama of the same shapes in bfloat16 (sdpa, dynamic cache), whose steps make the estimate of its picture:
256 steps of the backbone without its text classifier and 4,096 of the head, nothing else. What is timed is checked
first: a tiny model of each form against its definition, and the shipped model's ids against the oracle's.

``--quick``: eight patches of a picture instead of 256, and no bfloat16. 9 GB of memory are needed (13 without
``--quick``). As many threads as PyTorch has; `OMP_PROC_BIND=true OMP_PLACES=threads` pins them.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from synergen_ext.bench import Progress, Row
from synergen_ext.generation import oracle
from synergen_ext.generation.engine import Engine, Formats
from synergen_ext.generation.pipeline import Pipeline
from synergen_ext.model import SynerGenConfig, SynerGenVL
from synergen_ext.ops import reference

sys.path.insert(0, str(Path(__file__).parent))
from suite_experts import ends  # noqa: E402

#: Of the speed of reading that a step must reach; of the time of reading that a picture may take.
STEP_BARS = {"bfloat16": ">= 0.85", "int8": ">= 0.75", "int4": ">= 0.65"}
PICTURE_BARS = {"bfloat16": None, "int8": "<= 1.3", "int4": "<= 1.45"}
PAPER = SynerGenConfig()
CONTEXT = 24  # tokens of a prompt before what is timed
STEPS = 12  # of text, timed together


def rows(quick: bool, progress: Progress) -> Iterator[Row]:
    forms = ("int8", "int4") if quick else ("bfloat16", "int8", "int4")
    steps = 2 + len(forms)
    progress("check", 0, steps)
    check()
    yield from shipped(3 if quick else 9)
    progress("transformers", 1, steps)
    rival = Rival()
    for number, form in enumerate(forms):
        progress(form, 2 + number, steps)
        yield from one_form(form, rival, quick)


# --- What is checked --------------------------------------------------------------------------------------------


def check() -> None:
    """Products of every form against their definition; an AssertionError otherwise."""
    from synergen_ext._build import load

    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, 2048, generator=generator) for n in (96, 9))
    for form, group in (("bfloat16", 0), ("int8", 64), ("int4", 32)):
        packed = load().engine.PackedMatrix.pack("w", w, form, group)
        truth = reference.packed_linear(x, w, form, group)
        error = (torch.from_numpy(packed.linear(x.numpy())) - truth).abs().max() / truth.abs().max()
        if not error <= 1e-5:
            raise AssertionError(f"suite engine: error of {form} must be <= 1e-5, got {float(error):.1e}")


def shipped(rounds: int) -> Iterator[Row]:
    """One picture of the shipped model, beside the oracle's, whose ids must be the same."""
    pipeline = Pipeline.from_pretrained()
    engine = Engine.from_model(pipeline.model)
    rows_ = [pipeline.builder.paint_prompt("two red apples left of a blue car")]
    unconditional = pipeline.builder.paint_prompt(None)
    runs: dict[str, Callable[[], Tensor]] = {
        "engine": lambda: engine.generate_image_ids(rows_, unconditional, [7]),
        "oracle": lambda: oracle.generate_image_ids(pipeline.model, rows_, unconditional, [7]),
    }
    if not torch.equal(runs["engine"](), runs["oracle"]()):
        raise AssertionError("suite engine: the engine's ids must be the oracle's")
    took = alternating(runs, rounds)
    ours = median(took["engine"])
    yield Row("shipped model, a picture", ours * 1e3, "ms", None, ends(took["engine"], 1e3), note="float32, ids alone")
    ratios = [a / b for a, b in zip(took["oracle"], took["engine"], strict=True)]
    yield Row("shipped model, oracle / engine", median(ratios), "x", ">= 15", ends(ratios))
    prompts = ("two red apples left of a blue car", "a green cat", "three yellow dogs")
    asked = [pipeline.builder.paint_prompt(p) for p in prompts]
    pictures = engine.generate_image_ids(asked, unconditional, [1, 2, 3])
    truth = engine.states(asked[0])
    for form in ("float32", "int8", "int4"):
        other = Engine.from_model(pipeline.model, form)
        nats = sum(other.image_nats(p, i) for p, i in zip(asked, pictures, strict=True)) / len(asked)
        yield Row(f"shipped model, {form}, a picture that float32 painted", nats, "nats")
        error = float((other.states(asked[0]) - truth).norm() / truth.norm())
        yield Row(f"shipped model, {form}, states away from float32's", error)


# --- The paper's size -------------------------------------------------------------------------------------------


def random_engine(form: str) -> Engine:
    """The paper's config; each weight is a piece of the same million random numbers."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in SynerGenVL(PAPER).state_dict().items()}
    pool = (torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        n = math.prod(shape)
        return pool.repeat(-(-n // len(pool)))[:n].view(shape)

    return Engine._packed(PAPER, read, Formats(form))


def one_form(form: str, rival: "Rival", quick: bool) -> Iterator[Row]:
    rounds = 3 if quick else 5
    engine = random_engine(form)
    matrices = engine._native.matrices
    head = [m for name, m in matrices.items() if name.startswith("head.")]
    text = [m for name, m in matrices.items() if name.startswith("layers.") and ".vision." not in name]
    text.append(matrices["output"])
    yield Row(f"{form}, packed weights", engine.nbytes / 1e9, "GB")

    for count in (1, 2, 8):
        states = torch.randn(count, PAPER.hidden_size)
        ids = torch.zeros(count, PAPER.window, dtype=torch.long)
        run = partial(engine.head_logits, states, ids)
        yield from against_reading(f"{form}, head step, {count} rows", run, PAPER.window, head, STEP_BARS[form], rounds)
    for count in (1, 2, 8):
        prompts = [[5] * CONTEXT] * count
        run, first = (partial(engine.generate_text, prompts, None, n, ()) for n in (STEPS + 1, 1))
        name, bar = f"{form}, text step, {count} rows", STEP_BARS[form]
        yield from against_reading(name, run, STEPS, text, bar, rounds, first)
    yield from prompt(form, engine, rival, rounds)
    yield from picture(form, engine, rival, quick)


def reading(matrices: list[Any]) -> Callable[[], None]:
    """All bytes of the matrices once."""

    def read() -> None:
        for m in matrices:
            m.read()

    return read


def against_reading(
    name: str, run: Callable[[], Any], steps: int, matrices: list[Any], bar: str | None, rounds: int,
    without: Callable[[], Any] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Milliseconds of a step, and the time of reading its weights over it. ``without``: what is no step of ``run``."""
    read = reading(matrices)
    runs = {"run": run, "read": lambda: [read() for _ in range(steps)], "without": without or (lambda: None)}
    took = alternating(runs, rounds)
    step = [(a - b) / steps for a, b in zip(took["run"], took["without"], strict=True)]
    lines = sum(len(m.data()) for m in matrices) / 1e9  # `read` leaves the scales out
    ratio = sum(m.nbytes for m in matrices) / 1e9 / lines
    plain = [r / steps * ratio for r in took["read"]]
    share = [a / b for a, b in zip(plain, step, strict=True)]
    note = f"{lines * ratio / median(step):.1f} of {lines * ratio / median(plain):.1f} GB/s"
    yield Row(name, median(step) * 1e3, "ms", None, ends(step, 1e3), note=f"median of {rounds}")
    yield Row(f"{name}, of reading speed", median(share), "", bar, ends(share), note=note)


def prompt(form: str, engine: Engine, rival: "Rival", rounds: int) -> Iterator[Row]:
    ids = [7] * 512
    runs = {
        "ours": lambda: engine.generate_text([ids], None, 1, ()),
        "theirs": lambda: rival.prefill(512),
    }
    took = alternating(runs, min(rounds, 3))
    yield Row(f"{form}, prompt of 512 tokens", 512 / median(took["ours"]), "tokens/s", None)
    ratios = [a / b for a, b in zip(took["theirs"], took["ours"], strict=True)]
    yield Row(f"{form}, prompt of 512 tokens, transformers / ours", median(ratios), "x", ">= 2", ends(ratios))


def picture(form: str, engine: Engine, rival: "Rival", quick: bool) -> Iterator[Row]:
    """512 x 512 pixels, guided; its floor is reading the weights of its steps at the speed measured beside it."""
    size = (2, 64) if quick else PAPER.image_grid
    patches = PAPER.folded_length(*size)
    names = engine._native.matrices
    head = [m for name, m in names.items() if name.startswith("head.")]
    backbone = [m for name, m in names.items() if name.startswith("layers.") and ".text." not in name]
    backbone += [names["image.proj_in"], names["image.proj_out"]]

    def paint(n: int) -> Callable[[], Tensor]:
        prompts = [[5] * CONTEXT + [PAPER.boi_id]] * n
        seeds = list(range(n))
        return lambda: engine.generate_image_ids(prompts, [PAPER.uncond_id, PAPER.boi_id], seeds, size=size)

    read_head, read_backbone = reading(head), reading(backbone)

    def read() -> None:
        for _ in range(PAPER.window):
            read_head()
        read_backbone()

    def sample() -> None:
        rival.head_step()
        rival.body_step()

    # A long run drifts: what it is held against is measured before and after it.
    runs = {"one": paint(1), "read": read, "rival": sample}
    took = alternating(runs, 3 if quick else 1, warm=quick)
    before = after = took["read"]
    if not quick:
        after = alternating({"read": read}, 3)["read"]
    lines = PAPER.window * sum(len(m.data()) for m in head) + sum(len(m.data()) for m in backbone)
    whole = PAPER.window * sum(m.nbytes for m in head) + sum(m.nbytes for m in backbone)
    floor = median([*before, *after]) * whole / lines * patches
    one = median(took["one"])
    scale = PAPER.image_tokens / patches
    note = f"{patches} of {PAPER.image_tokens} patches, guidance on"
    yield Row(f"{form}, a picture", one * scale, "s", None, note=note)
    yield Row(f"{form}, a picture / reading its weights", one / floor, "x", PICTURE_BARS[form], note=note)
    theirs = rival.picture_seconds()
    bar = ">= 2.5" if form == "int8" else None
    yield Row(f"{form}, a picture, transformers in bfloat16 / ours", theirs / (one * scale), "x", bar, note="estimate")
    four = median(alternating({"four": paint(4)}, 1, warm=False)["four"])
    yield Row(f"{form}, four pictures / one", four / one, "x", "<= 1.6", note=note)


# --- The rival --------------------------------------------------------------------------------------------------


class Rival:
    """transformers' Llama of the backbone's and of the head's shape, bfloat16, random weights."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        def build(layers: int, vocab: int) -> Any:
            config = LlamaConfig(
                hidden_size=PAPER.hidden_size, intermediate_size=PAPER.intermediate_size, num_hidden_layers=layers,
                num_attention_heads=PAPER.num_heads, num_key_value_heads=PAPER.num_kv_heads, head_dim=PAPER.head_dim,
                vocab_size=vocab, max_position_embeddings=2048,
            )  # fmt: skip
            with torch.device("meta"):
                model = LlamaForCausalLM(config)
            model = model.to(torch.bfloat16).to_empty(device="cpu")
            for p in model.parameters():
                torch.nn.init.constant_(p, 0.01) if p.ndim == 1 else p.data.fill_(0.01)
            rotary = model.model.rotary_emb  # its buffers were on the meta device too
            rotary.__init__(config)
            return model.eval()

        self.body, self.head = build(PAPER.num_layers, 64), build(PAPER.head_layers, PAPER.codebook_size)
        self.took: dict[str, list[float]] = {"body": [], "head": []}
        self.caches = {name: self._context(name) for name in ("body", "head")}

    @torch.no_grad()
    def _context(self, name: str) -> Any:
        ids = torch.zeros(2, CONTEXT if name == "body" else 2, dtype=torch.long)
        return getattr(self, name)(ids, use_cache=True).past_key_values

    @torch.no_grad()
    def _step(self, name: str, times: int) -> None:
        model, cache = getattr(self, name), self.caches[name]
        ids = torch.zeros(2, 1, dtype=torch.long)
        for _ in range(times):
            began = time.perf_counter()
            model(ids, past_key_values=cache, use_cache=True)
            self.took[name].append(time.perf_counter() - began)

    def head_step(self) -> None:
        self._step("head", 8)

    def body_step(self) -> None:
        self._step("body", 3)

    @torch.no_grad()
    def prefill(self, tokens: int) -> None:
        self.body(torch.zeros(1, tokens, dtype=torch.long), logits_to_keep=1)

    def picture_seconds(self) -> float:
        """Of the steps so far: 256 of the backbone (without its text classifier) and 4,096 of the head."""
        body, head = (median(self.took[name]) for name in ("body", "head"))
        return PAPER.image_tokens * (body + PAPER.window * head)


def alternating(runs: dict[str, Callable[[], Any]], rounds: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each, taking turns; with ``warm``, a first turn of all is not counted."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + warm):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_ >= warm:
                took[name].append(time.perf_counter() - start)
    return took
