"""Builds the CUDA kernels for the emulator and calls them on torch tensors."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import synergen_ext.ops  # noqa: F401  (torch.ops.synergen)

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "simt"

#: Orders in which the emulator runs what CUDA leaves open.
SCHEDULES = [(0, 0), (1, 0), *((2, seed) for seed in range(1, 11))]


# The environment's cmake and ninja are found though nobody has activated it.
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def available() -> bool:
    return all(shutil.which(tool, path=PATH) for tool in ("g++", "cmake", "ninja"))


def build(*targets: str) -> None:
    """Bring targets of cmake/simt up to date; one process at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache = BUILD / "CMakeCache.txt"
        configured = f"\nPython_EXECUTABLE:UNINITIALIZED={sys.executable}\n"
        if cache.is_file() and configured not in cache.read_text():  # for another Python
            shutil.rmtree(BUILD / "CMakeFiles")
            for stale in (cache, *BUILD.glob("synergen_simt*.so")):
                stale.unlink()
        if not cache.is_file():
            import pybind11  # not beside an installed package (tools/abi_check.sh)

            paths = (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}")
            paths += ("-DCMAKE_CXX_COMPILER=g++",)  # as in the other places that compile for the emulator
            _run("cmake", "-G", "Ninja", "-S", ROOT / "cmake" / "simt", "-B", BUILD, *paths)
        _run("cmake", "--build", BUILD, "--target", *targets)


def _run(*command: Any) -> None:
    environment = {**os.environ, "PATH": PATH}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}{done.stderr[-2000:]}")


def load(kernels: str = "plain") -> "Emulated":
    """The ops over kernels built `plain`, with the `race` detector, or to `sanitize`."""
    if given := os.environ.get("SYNERGEN_SIMT_KERNELS"):  # tools/cuda_mutants.py tests the tests
        return Emulated(Path(given))
    build("synergen_simt", f"kernels_{kernels}")
    return Emulated(BUILD / f"libkernels_{kernels}.so")


def _module() -> ModuleType:
    if "synergen_simt" not in sys.modules:
        (path,) = BUILD.glob("synergen_simt*.so")
        spec = importlib.util.spec_from_file_location("synergen_simt", path)
        assert spec and spec.loader
        sys.modules["synergen_simt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["synergen_simt"])
    return sys.modules["synergen_simt"]


class Emulated:
    """The ops as functions over CPU tensors that run the CUDA kernels: `emulated.rms_norm(x, weight, 1e-5)`."""

    def __init__(self, library: Path) -> None:
        self.module, self.library = _module(), library

    def schedule(self, policy: int = 0, seed: int = 0, resident_blocks: int = 1) -> None:
        self.module.use(str(self.library))
        self.module.schedule(policy, seed, resident_blocks)

    def __getattr__(self, op: str) -> Any:
        self.module.use(str(self.library))
        return lambda *args: self._call(op, args)

    def _call(self, op: str, args: tuple[Any, ...]) -> Any:
        """Results in fresh tensors that hold NaN (or -7), so an element left unwritten shows."""
        shapes = getattr(torch.ops.synergen, op)(*map(_without_data, args))
        many = isinstance(shapes, tuple)
        out = tuple(_unwritten(s) for s in (shapes if many else (shapes,)))
        getattr(self.module, op)(*args, out=out if many else out[0])
        return out if many else out[0]


def _without_data(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_data(v) for v in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def _unwritten(shape: Tensor) -> Tensor:
    return torch.full(shape.shape, torch.nan if shape.dtype.is_floating_point else -7, dtype=shape.dtype, device="cpu")


class OnGpu:
    """The same functions over CPU tensors, run by a GPU: `on_gpu.rms_norm(x, weight, 1e-5)`."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def schedule(self, policy: int = 0, seed: int = 0, resident_blocks: int = 1) -> None:
        """A GPU takes its own order."""

    def __getattr__(self, op: str) -> Any:
        def call(*args: Any) -> Any:
            result = getattr(torch.ops.synergen, op)(*(self._sent(a) for a in args))
            return tuple(r.cpu() for r in result) if isinstance(result, tuple | list) else result.cpu()

        return call

    def _sent(self, value: Any) -> Any:
        """On the GPU with the strides and the place in its storage that it has here."""
        if isinstance(value, list | tuple):
            return [self._sent(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        flat = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return flat.to(self.device).as_strided(value.size(), value.stride(), value.storage_offset())
