"""What this installation is made of and what it will run on: the facts to read first when something
goes wrong."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from ._version import __version__

# Extra of pyproject.toml -> the modules it brings, and what is missing without them.
EXTRAS = {
    "train": (("tensorboard", "matplotlib"), "TensorBoard logs of training"),
    "scenes": (("resvg_py",), "rendering of training scenes"),
}
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


class Check(NamedTuple):
    """One line of the report; `remedy` is empty where `ok`."""

    check: str
    value: str
    ok: bool
    remedy: str = ""


def _package(name: str, floor: str) -> Check:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "not installed", False, f"pip install '{name}>={floor}'")
    wanted, found = ([int(n) for n in re.findall(r"\d+", v)[:2]] for v in (floor, version))
    if found < wanted:
        return Check(name, version, False, f"pip install -U '{name}>={floor}'")
    return Check(name, version, True)


def _cpu() -> Check:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    has = set(flags.group(1).split()) if flags else set()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = " ".join(f for f in CPU_FEATURES if f in has) or "no vector extensions that we know"
    brand = name.group(1).strip() if name else platform.processor() or platform.machine()
    return Check("CPU", f"{brand}, {cores} cores, {features}", True)


def _compiled() -> list[Check]:
    """The compiled module, the devices it sees, and the path that each op takes on them."""
    from ._build import REBUILD, build_info, kernel_of, load

    try:
        module = load()
        isa = module.current_isa()
    except (ImportError, RuntimeError) as error:
        return [Check("compiled module", str(error), False, f"pip install . (or {REBUILD})")]
    info = build_info()
    # `load` refuses a torch older than the target, so what is here now is fit to run with.
    checks = [
        Check(
            "compiled module",
            f"{info['version']}, {info['compiler']}",
            info["version"] == __version__,
            "" if info["version"] == __version__ else f"built for another version: {REBUILD}",
        ),
        Check(
            "torch ABI",
            f"built with {info['torch_built']}, runs with {info['torch_target']} and later",
            True,
        ),
        Check(
            "CPU kernels",
            f"{isa} in use; compiled: {', '.join(info['cpu_isas'])}; this CPU runs: "
            f"{', '.join(module.available_isas())}",
            True,
        ),
    ]
    if info["cuda"]:
        value = f"nvcc {info['nvcc']}, {' '.join(info['cuda_archs'])}"
    else:
        value = "not compiled (no nvcc at build time, or SYNERGEN_CUDA=off)"
    checks.append(Check("CUDA kernels", value, True))
    checks.append(_gpu(info["cuda"], module.cuda_devices()))
    with_cuda = set(module.cuda_kernels())
    import torch

    gpu = torch.cuda.is_available()
    for op in sorted(name for name in dir(module.kernels) if not name.startswith("_")):
        kernel = kernel_of(op)
        value = f"CPU: {module.kernel_isa(kernel)} kernel"
        if gpu:
            native = kernel in with_cuda
            value += "; CUDA: kernel" if native else "; CUDA: PyTorch reference"
        checks.append(Check(f"op {op}", value, True))
    return checks


def _gpu(compiled: bool, devices: list[str]) -> Check:
    import torch

    seen = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not devices and not seen:
        return Check("GPU", "none; the CPU kernels do all the work", True)
    value = "; ".join(devices or seen)
    if not compiled:
        return Check("GPU", value, False, "install nvcc and rebuild with SYNERGEN_CUDA=on")
    if not seen:
        return Check(
            "GPU",
            f"{value}; torch {torch.__version__} does not see it",
            False,
            "install a CUDA build of torch",
        )
    return Check("GPU", value, True)


def _extra(name: str) -> Check:
    modules, purpose = EXTRAS[name]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        return Check(
            f"extra {name}",
            f"not installed: {purpose}",
            False,
            f"pip install 'synergen_ext[{name}]'",
        )
    return Check(f"extra {name}", purpose, True)


def _checkpoint() -> Check:
    found = sorted(Path(str(files("synergen_ext"))).rglob("*.safetensors"))
    if not found:
        return Check(
            "shipped checkpoint",
            "none in this installation",
            False,
            "install from a complete source tree or wheel, or train one: synergen train",
        )
    size = sum(path.stat().st_size for path in found) / 1e6
    names = ", ".join(sorted({path.parent.name for path in found}))
    return Check("shipped checkpoint", f"{names}: {len(found)} files, {size:.1f} MB", True)


def report() -> list[Check]:
    """Every fact that decides how this installation behaves, in reading order.

    Returns:
        (check, value, ok, remedy) tuples. `ok` is False where something that the package can do is
        out of reach; `remedy` then says in one line how to get it.
    """
    checks = [
        Check("synergen_ext", __version__, True),
        Check("Python", f"{platform.python_version()} on {platform.platform()}", True),
        _package("torch", "2.13"),
        _package("transformers", "5.7"),
        _cpu(),
    ]
    return [*checks, *_compiled(), *map(_extra, EXTRAS), _checkpoint()]
