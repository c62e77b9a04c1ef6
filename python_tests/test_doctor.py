"""The report says what is here, and names a remedy for everything that is not."""

import importlib.metadata
import importlib.util
import sys

import pytest
import torch

from synergen_ext import _C, doctor


def by_name():
    return {check.check: check for check in doctor.report()}


def test_report_of_this_installation():
    checks = by_name()
    assert checks["torch"].value == torch.__version__ and checks["torch"].ok
    assert checks["compiled module"].ok
    assert _C.current_isa() in checks["CPU kernels"].value
    for op in ("rms_norm", "rope", "fold_tokens", "sample_tokens"):
        assert f"CPU: {_C.kernel_isa(op)} kernel" in checks[f"op {op}"].value
    assert f"CPU: {_C.current_isa()} kernel" in checks["op expert_ffn"].value
    assert _C.current_isa() == "avx512bf16" or _C.kernel_isa("rope") == _C.current_isa()
    assert _C.kernel_isa("rope") != "avx512bf16"  # it multiplies no bfloat16
    for check in checks.values():
        assert check.value and "\n" not in check.value
        assert check.ok == (not check.remedy), check


def test_cuda_line_agrees_with_the_binary():
    line = by_name()["CUDA kernels"].value
    info = _C.build_info()
    assert (info["nvcc"] if info["cuda"] else "not compiled") in line


def test_missing_module_is_reported_not_raised(monkeypatch):
    monkeypatch.setitem(sys.modules, "synergen_ext._C", None)
    check = by_name()["compiled module"]
    assert not check.ok
    assert "_C is not built" in check.value and "pip install ." in check.remedy


def test_old_or_missing_packages(monkeypatch):
    versions = {"torch": "2.12.1+cpu"}

    def version(name):
        if name in versions:
            return versions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = by_name()
    assert checks["torch"] == ("torch", "2.12.1+cpu", False, "pip install -U 'torch>=2.13'")
    assert checks["transformers"] == (
        "transformers",
        "not installed",
        False,
        "pip install 'transformers>=5.7'",
    )


@pytest.mark.parametrize("extra", doctor.EXTRAS)
def test_missing_extra(extra, monkeypatch):
    real = importlib.util.find_spec
    missing = doctor.EXTRAS[extra][0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))
    check = doctor._extra(extra)
    assert not check.ok and check.remedy == f"pip install 'synergen_ext[{extra}]'"


@pytest.mark.parametrize(
    ("compiled", "devices", "ok", "text"),
    [
        (True, [], True, "none"),
        (True, ["H100, sm_90"], torch.cuda.is_available(), "H100, sm_90"),
    ],
)
def test_gpu_line(compiled, devices, ok, text):
    if torch.cuda.is_available() and not devices:
        text = torch.cuda.get_device_name(0)
    check = doctor._gpu(compiled, devices)
    assert check.ok is ok and text in check.value


def test_gpu_without_cuda_kernels_asks_for_a_rebuild(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A100")
    check = doctor._gpu(False, [])
    assert check == ("GPU", "A100", False, "install nvcc and rebuild with SYNERGEN_CUDA=on")


def test_checkpoint_line(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "files", lambda package: tmp_path)
    assert not doctor._checkpoint().ok
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "model.safetensors").write_bytes(b"0" * 1_500_000)
    assert doctor._checkpoint().value == "demo: 1 files, 1.5 MB"
