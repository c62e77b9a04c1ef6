"""Fixtures of all tests: every device there is, every dtype, and seeds that do not depend on the
order of tests."""

from types import SimpleNamespace

import emulator
import pytest
import torch

from synergen_ext.testing import DTYPES

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=["emulator", *DEVICES[1:]])
def emulated(request: pytest.FixtureRequest) -> emulator.Emulated | emulator.OnGpu:
    """The CUDA kernels, run by the emulator, and by a GPU where there is one."""
    if request.param == "cuda":
        return emulator.OnGpu()
    if not emulator.available():
        pytest.skip("needs g++, cmake and ninja")
    kernels = emulator.load("plain")
    kernels.schedule()
    return kernels


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m cuda` chooses whatever runs on a GPU."""
    for item in items:
        values = getattr(item, "callspec", SimpleNamespace(params={})).params.values()
        if any(isinstance(value, str) and value == "cuda" for value in values):  # others may be arrays
            item.add_marker("cuda")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
