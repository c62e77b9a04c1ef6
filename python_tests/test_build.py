"""The build: what it refuses in one line, which CUDA architectures it picks, and every instruction
set it compiled."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import synergen_ext
from synergen_ext import _C, _build

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "python_tests"


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("synergen_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(function):
    from setuptools.errors import SetupError

    with pytest.raises(SetupError) as caught:
        function()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_build_without_torch(setup_py, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "run `pip install 'torch>=2.13'`" in refusal(setup_py.find_torch)


def test_build_with_an_old_torch(setup_py, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1+cu128")
    assert "needs torch >= 2.13 to build, got 2.9.1+cu128" in refusal(setup_py.find_torch)


def test_build_with_this_torch(setup_py):
    folder, version = setup_py.find_torch()
    assert folder == Path(torch.__file__).parent and version == torch.__version__


def test_build_without_a_compiler(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "c++ or g++ or clang++ is not on PATH; install g++" in refusal(setup_py.check_compiler)
    monkeypatch.setenv("CXX", "icpx -v")
    assert "icpx is not on PATH" in refusal(setup_py.check_compiler)


def test_build_takes_the_environments_own_cmake(setup_py, monkeypatch, tmp_path):
    for name in ("cmake", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")  # a machine's, too old
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    setup_py.prefer_own_tools()
    for name in ("cmake", "ninja"):
        assert Path(shutil.which(name)).parent != tmp_path
        subprocess.run([name, "--version"], check=True, capture_output=True)


def test_build_without_cmake(setup_py):
    assert "needs no-such-cmake to build" in refusal(lambda: setup_py.run(["no-such-cmake"]))


def test_a_failing_step_repeats_our_own_line(setup_py, capsys):
    script = "print('noise'); print('  synergen_ext: nvcc is too old; buy a new one');raise SystemExit(3)"
    text = refusal(lambda: setup_py.run([sys.executable, "-c", script]))
    assert text.endswith("failed: nvcc is too old; buy a new one")
    assert "noise" in capsys.readouterr().out


def test_cuda_mode(setup_py, monkeypatch):
    monkeypatch.setenv("SYNERGEN_CUDA", "ON")
    assert setup_py.cuda_mode() == "on"
    monkeypatch.setenv("SYNERGEN_CUDA", "maybe")
    assert refusal(setup_py.cuda_mode) == "SYNERGEN_CUDA must be auto, on or off, got 'maybe'"


def test_jobs(setup_py, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= setup_py.count_jobs() <= os.cpu_count()
    monkeypatch.setattr(os, "sysconf", lambda name: 2**19 if name == "SC_AVPHYS_PAGES" else 4096)
    assert setup_py.count_jobs() == 1  # 2 GiB free hold one job
    monkeypatch.setenv("MAX_JOBS", "5")
    assert setup_py.count_jobs() == 5


def cuda_archs(nvcc, wanted=""):
    cmake = shutil.which("cmake")
    assert cmake, "cmake is a build requirement and in the dev extra"
    script = ROOT / "cmake" / "cuda_archs.cmake"
    command = [cmake, f"-Dnvcc_archs={nvcc}", f"-DSYNERGEN_CUDA_ARCHS={wanted}", "-P", str(script)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("nvcc", "wanted", "archs"),
    [
        ("compute_75 compute_80 compute_90 compute_100 compute_120", "", "80;90;100;120"),
        ("compute_50 compute_80 compute_86 compute_90", "", "80;90"),
        ("compute_75 compute_86 compute_90", "9.0, sm_86", "86;90"),
        ("compute_75 compute_90", "75;75", "75"),
    ],
)
def test_cuda_archs(nvcc, wanted, archs):
    done = cuda_archs(nvcc, wanted)
    assert done.returncode == 0 and done.stdout.split() == ["--", archs], done.stderr


@pytest.mark.parametrize(
    ("nvcc", "wanted", "message"),
    [
        (
            "compute_80 compute_90",
            "80;120",
            "SYNERGEN_CUDA_ARCHS asks for 120, this nvcc compiles for 80, 90; install a newer",
        ),
        (
            "compute_50 compute_70",
            "",
            "nvcc knows no architecture from 80 on; install CUDA 11.8 or later",
        ),
        ("", "", "nvcc knows no architecture from 80 on"),
    ],
)
def test_nvcc_too_old(nvcc, wanted, message):
    done = cuda_archs(nvcc, wanted)
    assert done.returncode != 0
    assert any(f"synergen_ext: {message}" in line for line in done.stderr.splitlines()), done.stderr


def import_refusal():
    with pytest.raises(ImportError) as caught:
        _build.load()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_import_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs torch >= 2.13, and there is none here; run `pip install" in import_refusal()


def test_import_with_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    assert "needs torch >= 2.13, got 2.12.0; run `pip install -U" in import_refusal()


def test_import_with_a_later_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "3.0.0a0+git1234")
    assert _build.load() is _C


def test_import_without_the_compiled_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "synergen_ext._C", None)
    assert "_C is not built for this Python; run `pip install .`" in import_refusal()


def test_import_of_a_broken_module():
    """A file that is no shared library stands in for one with a missing symbol: both fail in the
    loader."""
    code = (
        "import sys, torch, importlib.machinery, importlib.util;"
        "from synergen_ext import _build;"
        "class_ = type('Broken', (), {'find_spec': staticmethod(lambda name, path=None, t=None:"
        " importlib.util.spec_from_loader(name,"
        " importlib.machinery.ExtensionFileLoader(name, sys.argv[1]))"
        " if name == 'synergen_ext._C' else None)});"
        "sys.meta_path.insert(0, class_); _build.load()"
    )
    done = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: synergen_ext._C does not load (") and "rebuild it" in last


def test_build_info():
    info = synergen_ext.build_info()
    assert info["version"] == synergen_ext.__version__
    assert info["torch_target"] == "2.13"
    assert re.match(r"\d+\.\d+", info["torch_built"])
    assert "baseline" in info["cpu_isas"]
    if info["cuda"]:
        assert re.match(r"\d+\.\d+", info["nvcc"])
        newest = info["cuda_archs"][-2]
        assert info["cuda_archs"][-1] == f"ptx{newest}"
        assert {"fold_tokens", "fold_ids"} <= set(_C.cuda_kernels())
    else:
        assert info["nvcc"] == "" and info["cuda_archs"] == [] and _C.cuda_kernels() == []


def test_isa_is_the_best_there_is():
    if "SYNERGEN_ISA" not in os.environ:
        assert _C.current_isa() == _C.available_isas()[-1]
    assert set(_C.available_isas()) <= set(_C.compiled_isas())


@pytest.mark.parametrize("isa", [isa for isa in _C.available_isas() if isa != _C.current_isa()])
def test_values_on_every_instruction_set(isa):
    """The other instruction sets pass the same value tests; each needs a process of its own."""
    files = [
        str(TESTS / f"test_{op}.py")
        for op in ("rms_norm", "rope", "fold_tokens", "expert_ffn", "packed_linear", "engine")
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        "accurate or layouts or empty",
        *files,
    ]
    done = subprocess.run(command, env={**os.environ, "SYNERGEN_ISA": isa}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]


def test_forced_isa_is_used_and_a_wrong_one_refused():
    code = "from synergen_ext import _build; print(_build.load().current_isa())"

    def run(isa):
        env = {**os.environ, "SYNERGEN_ISA": isa}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert run("baseline").stdout.strip() == "baseline"
    wrong = run("sse9")
    assert wrong.returncode == 1
    assert "SYNERGEN_ISA must be one of baseline" in wrong.stderr.splitlines()[-1]
    assert wrong.stderr.splitlines()[-1].endswith("got sse9")
