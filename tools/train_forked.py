"""Small training runs of one or several processes on this machine, started by fork: the imports are paid once.

    python tools/train_forked.py jobs.json

runs jobs one after another: ``[{"recipe": FILE, "out": FOLDER, "processes": N}, ...]``. A job with a ``limit`` has a
disk that is full for its last process, which writes no file longer than that, and must fail. Beside what a run writes,
its folder then holds ``exact.txt``, every step's losses and gradient norm to the bit, and ``rank-N.txt``, what each
process said.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import yaml
from PIL import Image

from synergen_ext.training import run
from synergen_ext.training.data import train_text_tokenizer
from synergen_ext.training.sources.conversations import Captions, Conversations
from synergen_ext.training.sources.files import Lines
from synergen_ext.training.sources.tokens import write_tokens

with contextlib.suppress(ImportError):  # the extra `train`; a run imports them, here they are paid once
    import matplotlib.pyplot  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

GRID, SIZE, CODES = (4, 8), (32, 64), 64
EXACT = "exact.txt"


def make_data(folder: Path, seed: int = 0) -> None:
    """A text tokenizer, and pictures as ids: captions to paint, and questions with a picture, with two, with none."""
    rng = np.random.default_rng(seed)
    (folder / "text").mkdir(parents=True)
    train_text_tokenizer(1, 300, scenes=40).save(folder / "text")
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")

    def talk(i: int) -> dict[str, Any]:
        turns = [{"from": "human", "value": f"What is number {i}?"}, {"from": "gpt", "value": f"It is {i}. " * (i % 5)}]
        pictures = {"image": [f"{i}.png", f"{i - 1}.png"][: i % 3]} if i % 3 else {}
        if i % 3 == 2:
            turns[0]["value"] = "<image><image>" + turns[0]["value"]
        return {"id": i, "conversations": turns, **pictures}

    rows = {
        "talks": [talk(i) for i in range(1, 12)],
        "captions": [{"image": f"{i}.png", "caption": "a picture of " + "one " * (i + 1)} for i in range(12)],
    }
    for name, data in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))

    def encode(pixels: Any) -> Any:
        return pixels.reshape(GRID[0], 8, GRID[1], 8, 3).astype(np.int64).sum((1, 3, 4)) % CODES

    for name, kind, task in (("talks", Conversations, "understand"), ("captions", Captions, "generate")):
        source = kind(Lines(str(folder / f"{name}.jsonl")), str(folder), SIZE)
        write_tokens(source, task, encode, CODES, folder / f"{name}-ids")


def recipe_of(data: Path, rows: int = 4, steps: int = 8, pack: int = 0, **changes: Any) -> dict[str, Any]:
    """Two stages as the paper's: the first trains what the language model did not have, the last everything."""
    stage = dict(steps=steps, learning_rate=3e-3, warmup=2, paint=rows, describe=rows, pack=pack)
    sources = {
        name: [dict(name=what, format="tokens", path=str(data / f"{what}-ids"))]
        for name, what in (("understand", "talks"), ("generate", "captions"))
    }
    return {
        "name": "forked",
        "model": dict(preset="tiny", image_grid=list(GRID)),
        "tokenizer": dict(model=dict(codebook_size=CODES)),
        "sources": {**sources, "text_tokenizer": str(data / "text")},
        "stages": [
            dict(name="one", train=["vision"], copy_experts=True, **stage),
            dict(name="two", train=["vision", "attention", "language_model"], ema=0.9, schedule="cosine", **stage),
        ],
        "bfloat16": False,
        "save_every": 2,
        "sample_every": 0,
        **changes,
    }


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def exact(out: Path) -> list[tuple[str, str]]:
    """(stage and step, figures) of every step that was taken, half lines left out."""
    path = out / EXACT
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [(line.split("|")[0], line.split("|")[1].strip()) for line in lines if line.endswith(";\n")]


def start(recipe: Path, out: Path, processes: int, limit: int = 0) -> list[int]:
    """Fork the processes of one run; returns their ids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if limit and rank == processes - 1:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                code = _process(recipe, out, rank, processes, port)
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def wait(pids: list[int], seconds: float = 120) -> list[int]:
    """Exit codes, negative for a signal; what has not ended in time is killed."""
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
        if time.monotonic() > until:
            kill([p for p in pids if p not in codes])
            raise TimeoutError(f"{len(pids) - len(codes)} of {len(pids)} processes did not end in {seconds:g} s")
    return [codes[p] for p in pids]


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def _process(recipe: Path, out: Path, rank: int, processes: int, port: int) -> int:
    said = os.open(out / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    step = run.Reporter.step

    def exactly(self: Any, stage: str, number: int, figures: dict[str, float]) -> None:
        step(self, stage, number, figures)
        if rank == 0:
            shown = " ".join(f"{k}={v.hex()}" for k, v in figures.items() if "/" in k or k == "gradient_norm")
            with open(out / EXACT, "a") as f:
                f.write(f"{stage} {number}|{shown};\n")

    run.Reporter.step = exactly  # type: ignore[method-assign]
    try:
        run.run_recipe(recipe, out)
    except Exception as e:
        traceback.print_exc()
        print(f"LAST: {type(e).__name__}: {e}", flush=True)
        return 1
    return 0


def main() -> int:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        began = time.monotonic()
        codes = wait(start(Path(job["recipe"]), Path(job["out"]), job["processes"], job.get("limit", 0)))
        print(f"{job['out']}: {job['processes']} processes, {codes}, {time.monotonic() - began:.1f} s", flush=True)
        if any(codes) != ("limit" in job):
            print((Path(job["out"]) / "rank-0.txt").read_text(), flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
