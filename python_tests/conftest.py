"""Fixtures of all tests: every device there is, every dtype, and seeds that do not depend on the
order of tests."""

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


@pytest.fixture(scope="module")
def emulated() -> emulator.Emulated:
    """The CUDA kernels, run by the emulator."""
    if not emulator.available():
        pytest.skip("needs g++, cmake and ninja")
    kernels = emulator.load("plain")
    kernels.schedule()
    return kernels


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
