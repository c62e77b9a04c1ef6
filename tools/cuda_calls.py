"""Calls every CUDA kernel on a GPU, each small and each odd call of the tests once: what `tools/cuda_sanitize.sh` runs
under compute-sanitizer.

    python tools/cuda_calls.py [--only rms_norm rope]
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="families of kernels, as in python_tests/test_cuda_<family>.py")
    parser.add_argument("--device", default="cuda", help="cpu tries the calls without a GPU")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("cuda_calls: needs an NVIDIA GPU and a torch with CUDA; torch sees none", file=sys.stderr)
        return 2
    families = importlib.import_module("test_cuda_emulated").FAMILIES
    kernels = importlib.import_module("emulator").OnGpu(chosen.device)
    calls = 0
    for name, family in families.items():
        if chosen.only and name not in chosen.only:
            continue
        for op, args in [*((op, make()) for op, make in family.SMALL.items()), *family.sanitized()]:
            getattr(kernels, op)(*args)
            calls += 1
    if chosen.device == "cuda":
        torch.cuda.synchronize()
    print(calls, "calls")
    return 0 if calls else 1


if __name__ == "__main__":
    sys.exit(main())
