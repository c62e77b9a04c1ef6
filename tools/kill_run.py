"""Kill a training run with SIGKILL again and again, resume it each time, and compare it with an unbroken run.

    python tools/kill_run.py --kills 20

A third of the kills come while a checkpoint is being written, a third around a step, and a third at any moment after
the start. Every step that was taken, also those taken again after a resume, must have the losses and gradient norm of
the unbroken run to the bit, and the last weights the same bytes. With several processes some kills take one of
them, and the others must end by themselves with a line that says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from train_forked import EXACT, exact, kill, make_data, recipe_of, start, wait, write_recipe

#: What a kill found on the disk while it was being written.
HALF = ("*.partial", "*.tmp", "*/*.partial", "*/*.tmp")


def half_written(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for pattern in HALF for p in out.glob(pattern))


def lines(out: Path) -> int:
    path = out / EXACT
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def ended(pids: list[int]) -> bool:
    """Whether any process has ended; it is left for `wait` to collect."""
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None for pid in pids)


def until_moment(rng: random.Random, kind: str, out: Path, pids: list[int]) -> bool:
    """Wait for the moment to kill and stop the processes there; False: the run ended before it came."""
    old, more, writes = set(half_written(out)), lines(out) + rng.randint(1, 4), rng.randint(0, 1)

    def half() -> bool:
        return any(name.startswith("state") and name not in old for name in half_written(out))

    if kind == "write":
        for _ in range(writes):  # let some of them pass
            while not half() and not ended(pids):
                time.sleep(0.0003)
            while half() and not ended(pids):
                time.sleep(0.0003)
    while not ended(pids):
        if kind == "any":
            time.sleep(rng.uniform(0, 1.5))
        elif kind == "step":
            while lines(out) < more and not ended(pids):
                time.sleep(0.0003)
            time.sleep(rng.uniform(0, 0.05))
        else:
            while not half() and not ended(pids):
                time.sleep(0.0003)
            time.sleep(rng.uniform(0, 0.003))
        send(signal.SIGSTOP, pids)
        if kind != "write" or half():
            return not ended(pids)
        send(signal.SIGCONT, pids)  # too late for this one
    return False


def send(what: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, what)


def check(whole: Path, broken: Path) -> None:
    """
    Raises:
        AssertionError: a step of the broken run differs from the unbroken one's.
    """
    steps = dict(exact(whole))
    taken = exact(broken)
    for step, figures in taken:
        assert figures == steps[step], f"step {step}: unbroken {steps[step]}, resumed {figures}"
    assert {step for step, _ in taken} == set(steps), f"steps {set(steps) - {s for s, _ in taken}} were never taken"
    name = "checkpoint/model.safetensors"
    one, two = (hashlib.sha256((out / name).read_bytes()).hexdigest() for out in (whole, broken))
    assert one == two, f"{name} differs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--parallel", default="fsdp", choices=("ddp", "fsdp"))
    parser.add_argument("--asynchronous", action="store_true", help="checkpoints are written while steps run")
    parser.add_argument("--steps", type=int, default=24, help="of each of the two stages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_data(root / "data")
        parallel = dict(kind=args.parallel, async_save=args.asynchronous)
        recipe = write_recipe(
            root / "recipe.yaml", recipe_of(root / "data", steps=args.steps, save_every=2, parallel=parallel)
        )
        began = time.monotonic()
        codes = wait(start(recipe, root / "whole", args.processes))
        assert not any(codes), (root / "whole" / "rank-0.txt").read_text()
        print(f"unbroken: {len(exact(root / 'whole'))} steps in {time.monotonic() - began:.1f} s", flush=True)
        kills = runs = in_writes = 0
        while kills < args.kills:
            out = root / f"broken-{runs}"
            runs += 1
            while True:
                kind = ("write", "step", "any")[kills % 3]
                old = half_written(out)
                pids = start(recipe, out, args.processes)
                if kills == args.kills or not until_moment(rng, kind, out, pids):
                    break
                one = (
                    args.processes > 1 and kills % 4 == 3 and kind != "any"
                )  # before all have met, only torchrun knows
                if one:
                    gone = rng.randrange(args.processes)
                    kill([pids.pop(gone)])
                    send(signal.SIGCONT, pids)
                    wait(pids, 60)
                    for rank in set(range(args.processes)) - {gone}:
                        last = (out / f"rank-{rank}.txt").read_text().splitlines()[-1]
                        assert "another process was lost" in last, f"after process {gone} was lost {rank} said: {last}"
                else:
                    kill(pids)
                kills += 1
                half = [name for name in half_written(out) if name not in old]
                in_writes += bool(half)
                shown = f"one of {args.processes}" if one else "all"
                print(f"kill {kills}: {kind}, {shown}, after {lines(out)} steps; half-written: {half}", flush=True)
            codes = wait(pids)
            assert not any(codes), (out / "rank-0.txt").read_text()
            check(root / "whole", out)
            print(f"run {runs}: {len(exact(out))} steps taken for {len(exact(root / 'whole'))}, all equal to the bit")
    figures = {"kills": kills, "in_writes": in_writes, "runs": runs, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
