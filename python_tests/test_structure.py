"""The rules of the house that a reader relies on: one stem per op everywhere, torch at the door, no
work at import."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import synergen_ext
from synergen_ext import _C, kernels, ops
from synergen_ext.ops import eager, reference

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
STEMS = sorted(path.stem for path in (CSRC / "ops").glob("*.cpp"))


def includes(path):
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(*folders):
    return [p for f in folders for p in (CSRC / f).rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]


def test_there_are_ops():
    assert {"rms_norm", "rope", "fold_tokens"} <= set(STEMS)


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_in_every_folder(stem):
    for path in (
        f"csrc/cpu/{stem}.cpp",
        f"synergen_ext/ops/{stem}.py",
        f"python_tests/test_{stem}.py",
    ):
        assert (ROOT / path).is_file(), path
    for where in (kernels, ops, reference):
        assert callable(getattr(where, stem)), where.__name__
    assert hasattr(torch.ops.synergen, stem)


def test_no_kernel_without_an_op():
    """A kernel file is named after its op, or after a part of it that fills a file; or after what the engine asks."""
    known = {*STEMS, *(f"{stem}_{part}" for stem in STEMS for part in ("backward", "stream"))}
    params = (CSRC / "engine" / "params.h").read_text()
    asked = {*re.findall(r"X\((\w+),", params.split("SYNERGEN_ENGINE_KERNELS(X)")[1])}
    assert {p.stem for p in (CSRC / "cpu").glob("*.cpp")} - {"dispatch"} == asked | {
        p.stem for p in (CSRC / "cpu").glob("*.cpp") if p.stem in known
    }
    assert {p.stem for p in (CSRC / "cuda").glob("*.cu")} - {"device"} <= known


@pytest.mark.parametrize("stem", STEMS)
def test_public_function_has_the_parameters_of_its_reference(stem):
    """The public function may add keyword-only options that do not change the result."""
    ours = inspect.signature(getattr(ops, stem)).parameters
    slow = inspect.signature(getattr(reference, stem)).parameters
    assert [name for name in ours if name in slow] == list(slow)
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in set(ours) - set(slow))


def test_torch_headers_stop_at_the_binding():
    """csrc/bind/torch_op.h alone includes torch, and only what the stable ABI promises."""
    for path in sources("."):
        found = [i for i in includes(path) if i.startswith(("torch/", "ATen/", "c10/"))]
        if path == CSRC / "bind" / "torch_op.h":
            assert found and all(i.startswith(("torch/csrc/stable/", "torch/headeronly/")) for i in found)
        else:
            assert not found, (path.name, found)
    for path in sources("ops", "cpu", "cuda", "common", "engine"):
        assert not [i for i in includes(path) if i.startswith("bind/")], path.name


def test_kernels_know_no_python():
    for path in sources("ops", "cpu", "cuda", "common", "engine"):
        assert not [i for i in includes(path) if "pybind11" in i or "Python.h" in i], path.name


def test_cpu_kernels_use_no_standard_containers():
    """Inline functions of std:: have one name in all instruction sets' objects; see
    CMakeLists.txt."""
    allowed = {
        "cmath",
        "cstdint",
        "cstdlib",
        "cstring",
        "new",
        "type_traits",
        "limits",
        "omp.h",
        "immintrin.h",
    }
    for path in sources("cpu"):
        if path.stem != "dispatch":
            system = {i for i in includes(path) if "/" not in i and not i.endswith("kernels.h")}
            assert system <= allowed, (path.name, system - allowed)


def test_binary_needs_only_the_stable_abi():
    """No undefined C++ symbol of torch: those change from one release to the next."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm comes with the compiler; a machine that only runs wheels has none")
    out = subprocess.run([nm, "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1].split("@")[0] for line in out.stdout.splitlines()]
    assert any(s.startswith("aoti_torch_") for s in symbols)
    unstable = [s for s in symbols if re.search(r"^_Z.*(3c10|2at|5torch)", s)]
    assert not unstable


def test_import_does_no_work():
    code = (
        "import sys, synergen_ext;"
        "heavy = 'torch', 'numpy', 'transformers', 'synergen_ext._C';"
        "print([m for m in heavy if m in sys.modules], synergen_ext.__version__, 'ops' in dir(synergen_ext))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ") and done.stdout.strip().endswith("True")


def test_submodules_load_when_named():
    code = "import synergen_ext as s;print(s.ops.rms_norm.__name__, s.build_info()['version'] == s.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["rms_norm", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        synergen_ext.nothing  # noqa: B018


@pytest.mark.parametrize("other", [reference, eager], ids=["reference", "eager"])
def test_backend_switch(other, monkeypatch):
    x, weight = torch.ones(2, 4), torch.ones(4)
    name = other.__name__.rsplit(".", 1)[1]
    assert ops.current_backend() == "native"
    calls = []
    original = other.rms_norm
    monkeypatch.setattr(other, "rms_norm", lambda *args: calls.append(args) or original(*args))
    with ops.backend(name):
        ops.rms_norm(x, weight)
        assert ops.current_backend() == name
    ops.rms_norm(x, weight)
    with pytest.raises(KeyError), ops.backend(name):
        raise KeyError
    assert ops.current_backend() == "native" and len(calls) == 1


def test_every_backend_has_every_op():
    """With the same parameters, so that a caller need not know which is chosen (what a kernel saves is its own)."""
    names = [n for n in ops.__all__ if callable(getattr(ops, n)) and "backend" not in n]
    assert len(names) >= 7
    for name in names:
        wanted, *others = (
            [p for p in inspect.signature(getattr(module, name)).parameters if p not in ("recompute", "routing")]
            for module in (ops, reference, eager)
        )
        assert others == [wanted, wanted], name


def test_backends_have_names():
    with pytest.raises(ValueError, match="set_backend: name must be .*, got 'quick'"):
        ops.set_backend("quick")
