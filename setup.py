"""Builds synergen_ext._C with CMake and ninja. Everything else about the package is in pyproject.toml.

SYNERGEN_CUDA=auto|on|off, SYNERGEN_CUDA_ARCHS="80;90" and MAX_JOBS are read from the environment.
Rebuild in place after changing csrc/:  python setup.py build_ext --inplace
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
TORCH_FLOOR = (2, 13)
# Peak memory of one compile job: bindings.cpp, the only file with torch headers, needs about 0.9 GiB.
GIB_PER_JOB = 1.0


def find_torch() -> tuple[Path, str]:
    """Folder and version of the installed torch, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(
            "synergen_ext needs torch >= 2.13 to build, and there is none here; run `pip install 'torch>=2.13'`"
            " first, or drop --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < TORCH_FLOOR:
        raise SetupError(
            f"synergen_ext needs torch >= 2.13 to build, got {version}; run `pip install -U 'torch>=2.13'`"
        )
    return Path(spec.submodule_search_locations[0]), version


def find_compiler() -> None:
    wanted = os.environ.get("CXX") or "c++"
    if not any(shutil.which(name) for name in (wanted.split()[0], "g++", "clang++")):
        raise SetupError(
            f"synergen_ext needs a C++20 compiler to build, and {wanted} is not on PATH; install g++ >= 11"
            " (Debian, Ubuntu: apt-get install g++) or set CXX"
        )


def count_jobs() -> int:
    """As many compile jobs as there are cores, fewer where half the free memory would not hold them."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(0.5 * free / GIB_PER_JOB)))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch_dir, torch_version = find_torch()
        find_compiler()
        cuda = os.environ.get("SYNERGEN_CUDA", "auto").lower()
        if cuda not in ("auto", "on", "off"):
            raise SetupError(f"SYNERGEN_CUDA must be auto, on or off, got {cuda!r}")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An in-place build keeps its folder, so that the next one compiles only what changed. Any other build
        # may run in an isolated environment whose paths are gone the next time, and starts afresh.
        build_dir = ROOT / "build" / "inplace" if self.inplace else Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        version = self.distribution.get_version()
        configure = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(build_dir),
            "-G", "Ninja",
            *([] if self.inplace else ["--fresh"]),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSYNERGEN_TORCH_DIR={torch_dir}",
            f"-DSYNERGEN_TORCH_BUILT={torch_version}",
            f"-DSYNERGEN_VERSION={version}",
            f"-DSYNERGEN_CUDA={cuda}",
            f"-DSYNERGEN_CUDA_ARCHS={os.environ.get('SYNERGEN_CUDA_ARCHS', '')}",
        ]  # fmt: skip
        _run(configure)
        _run(["cmake", "--build", str(build_dir), "--parallel", str(count_jobs())])


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise SetupError("synergen_ext needs cmake and ninja to build; run `pip install cmake ninja`") from None
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"synergen_ext: `{' '.join(command[:2])} ...` failed with exit code {error.returncode};"
            " the first error above this line says why"
        ) from None


setup(
    ext_modules=[Extension("synergen_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
