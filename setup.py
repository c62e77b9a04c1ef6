"""Builds synergen_ext._C with CMake and ninja. Everything else about the package is in
pyproject.toml.

Read from the environment: SYNERGEN_CUDA=auto|on|off, SYNERGEN_CUDA_ARCHS="80;90", MAX_JOBS, CXX,
CUDACXX. To rebuild in place after changing csrc/:  python setup.py build_ext --inplace
"""

import importlib
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
# Peak memory of one compile job: bindings.cpp, the only file with torch headers, needs 0.9 GiB.
GIB_PER_JOB = 1.0


def find_torch() -> tuple[Path, str]:
    """Folder and version of the installed torch, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(
            "synergen_ext needs torch >= 2.13 to build, and there is none here;"
            " run `pip install 'torch>=2.13'` first, or drop --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH_FLOOR:
        raise SetupError(
            f"synergen_ext needs torch >= 2.13 to build, got {version}; run `pip install -U 'torch>=2.13'`"
        )
    return Path(spec.submodule_search_locations[0]), version


def check_compiler() -> None:
    """Refuse in one line where CMake would need a page."""
    wanted = os.environ.get("CXX")
    names = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise SetupError(
            "synergen_ext needs a C++20 compiler to build, and"
            f" {' or '.join(names)} is not on PATH; install g++ >= 11"
            " (Debian, Ubuntu: apt-get install g++) or set CXX"
        )


def cuda_mode() -> str:
    mode = os.environ.get("SYNERGEN_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        raise SetupError(f"SYNERGEN_CUDA must be auto, on or off, got {mode!r}")
    return mode


def count_jobs() -> int:
    """As many compile jobs as cores, fewer where half the free memory would not hold them."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(0.5 * free / GIB_PER_JOB)))


def prefer_own_tools() -> None:
    """Put the environment's own cmake and ninja before the machine's, which may be too old.

    pip does not activate the environment that it builds in.
    """
    for package, attribute in (("ninja", "BIN_DIR"), ("cmake", "CMAKE_BIN_DIR")):
        if importlib.util.find_spec(package):
            # Without the package, the folder cmake/ of this checkout is found; it has no such attribute.
            folder = getattr(importlib.import_module(package), attribute, None)
            os.environ["PATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PATH"))))


def run(command: list[str]) -> None:
    """Run a build step; its output goes through, and our own line in it becomes the error."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise SetupError(f"synergen_ext needs {command[0]} to build; run `pip install cmake ninja`") from None
    reason = "the first error above says why"
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.strip().startswith("synergen_ext: "):
            reason = line.strip().removeprefix("synergen_ext: ")
    if process.wait():
        raise SetupError(f"synergen_ext: `{' '.join(command[:2])}` failed: {reason}")


class CMakeBuild(build_ext):
    def run(self) -> None:
        # Remembered here, because build_ext clears `inplace` while it builds and copies the result
        # afterwards.
        self.keep_folder = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        torch_dir, torch_version = find_torch()
        check_compiler()
        prefer_own_tools()
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An in-place build keeps its folder, so that the next one compiles only what changed. Any
        # other build may run in an isolated environment whose paths are gone the next time, and
        # starts afresh.
        temporary = Path(self.build_temp).resolve()
        build_dir = ROOT / "build" / "inplace" if self.keep_folder else temporary
        build_dir.mkdir(parents=True, exist_ok=True)
        settings = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SYNERGEN_TORCH_DIR": torch_dir,
            "SYNERGEN_TORCH_BUILT": torch_version,
            "SYNERGEN_VERSION": self.distribution.get_version(),
            "SYNERGEN_CUDA": cuda_mode(),
            "SYNERGEN_CUDA_ARCHS": os.environ.get("SYNERGEN_CUDA_ARCHS", ""),
        }
        fresh = [] if self.keep_folder else ["--fresh"]
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        run(["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *fresh, *defines])
        run(["cmake", "--build", str(build_dir), "--parallel", str(count_jobs())])


if __name__ == "__main__":
    setup(ext_modules=[Extension("synergen_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
