"""The plain functions: the same kernels without torch in the call, over the buffer protocol and
DLPack."""

import array
import ctypes
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from synergen_ext import _C, kernels, ops
from synergen_ext.ops import reference
from synergen_ext.testing import DTYPES, LAYOUTS, assert_as_accurate, laid_out, normal

# Arguments of every plain function as torch tensors and numbers; the float ones take the dtype of
# the test.
IDS = torch.randint(11, (2, 4, 8), generator=torch.Generator().manual_seed(0))
CASES = {
    "rms_norm": lambda f: (f(3, 5, 21), f(21), 1e-4),
    "rms_norm_backward": lambda f: (f(3, 5, 21), f(3, 5, 21), f(21), 1e-4),
    "add_rms_norm": lambda f: (f(3, 5, 21), f(3, 5, 21), f(21), 1e-4),
    "add_rms_norm_backward": lambda f: (f(3, 5, 21), f(3, 5, 21), f(3, 5, 21), f(21), 1e-4),
    "decode_attention": lambda f: (f(2, 4, 14), f(2, 5, 2, 14), f(2, 5, 2, 14), torch.tensor([5, 3]), None, 0.4),
    "rope": lambda f: (f(2, 5, 3, 14), f(2, 5, 1, 14), torch.arange(5), 1e5, False),
    "fold_tokens": lambda f: (IDS, f(11, 9), f(4, 8, 9), 2, 4),
    "fold_tokens_backward": lambda f: (f(2, 4, 72), IDS, 11, 2, 4),
    "fold_ids": lambda f: (IDS, 2, 4),
    "unfold_ids": lambda f: (IDS.reshape(2, 4, 8), 4, 8, 2, 4),
}


def arguments(name, dtype):
    seeds = iter(range(10))
    return CASES[name](lambda *shape: normal(*shape, dtype=dtype, seed=next(seeds)))


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def numpy_of(args):
    return [a.numpy() if isinstance(a, torch.Tensor) else a for a in args]


class OnlyDlpack:
    """An array of some other library: nothing but the two methods of the protocol."""

    def __init__(self, tensor, versioned=True):
        self.tensor, self.versioned = tensor, versioned

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options):
        if not self.versioned and "max_version" in options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        return self.tensor.__dlpack__(**options)


@pytest.mark.parametrize("name", CASES)
def test_numpy_in_numpy_out(name):
    for dtype in (torch.float64, torch.float32, torch.float16):
        args = arguments(name, dtype)
        results = as_tuple(getattr(kernels, name)(*numpy_of(args)))
        wanted = as_tuple(getattr(torch.ops.synergen, name)(*args))
        for got, want in zip(results, wanted, strict=True):
            assert type(got) is np.ndarray
            assert torch.equal(torch.from_numpy(got), want)


@pytest.mark.parametrize("name", ["rms_norm", "rope", "fold_tokens", "rms_norm_backward", "fold_tokens_backward"])
def test_against_the_reference(name):
    for dtype in (torch.float32, torch.float16):
        args = arguments(name, dtype)
        ours = [torch.from_numpy(y) for y in as_tuple(getattr(kernels, name)(*numpy_of(args)))]
        wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        function = getattr(reference, name)
        if name == "rope":
            rival, truth = (function(*a[:4], inverse=a[4]) for a in (args, wide))
        else:
            rival, truth = function(*args), function(*wide)
        assert_as_accurate(ours, as_tuple(rival), as_tuple(truth), name)


@pytest.mark.parametrize("versioned", [True, False], ids=["dlpack1", "dlpack0"])
@pytest.mark.parametrize("name", CASES)
def test_dlpack_with_out(name, versioned):
    for dtype in DTYPES:
        args = arguments(name, dtype)
        wanted = as_tuple(getattr(torch.ops.synergen, name)(*args))
        outs = tuple(torch.full_like(y, 7) for y in wanted)
        wrapped = [OnlyDlpack(a, versioned) if isinstance(a, torch.Tensor) else a for a in args]
        given = tuple(OnlyDlpack(y, versioned) for y in outs)
        result = getattr(kernels, name)(*wrapped, out=given if len(given) > 1 else given[0])
        assert all(a is b for a, b in zip(as_tuple(result), given, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(outs, wanted, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    x, weight = laid_out(normal(4, 6, 10), layout), laid_out(normal(10, seed=1), layout)
    wanted = ops.rms_norm(x, weight).numpy()
    assert np.array_equal(kernels.rms_norm(x.numpy(), weight.numpy()), wanted)
    assert np.array_equal(kernels.rms_norm(x, weight), wanted)
    backwards = np.ascontiguousarray(x.numpy()[..., ::-1])[..., ::-1]
    assert backwards.strides[-1] < 0
    assert np.array_equal(kernels.rms_norm(backwards, weight.numpy()), wanted)


def test_other_buffers():
    x = array.array("d", [3.0, 4.0])
    got = kernels.rms_norm(memoryview(x), array.array("d", [1.0, 2.0]), eps=0.0)
    np.testing.assert_allclose(got, np.array([3.0, 8.0]) / np.sqrt(12.5))


def test_read_only_inputs_are_read_and_never_written():
    x, weight = np.ones((2, 4), np.float32), np.ones(4, np.float32)
    x.flags.writeable = weight.flags.writeable = False
    assert kernels.rms_norm(x, weight).shape == (2, 4)
    with pytest.raises(ValueError, match="rms_norm: out must be a writable array"):
        kernels.rms_norm(x, weight, out=x)


def test_inputs_live_as_long_as_the_call_and_no_longer():
    x, weight = np.ones((2, 4), np.float32), np.ones(4, np.float32)
    before = sys.getrefcount(x), sys.getrefcount(weight)
    for _ in range(100):
        kernels.rms_norm(x, weight)
        with pytest.raises(ValueError):
            kernels.rms_norm(x, weight[:3])
    assert (sys.getrefcount(x), sys.getrefcount(weight)) == before


def test_a_capsule_is_used_once():
    class Worn:
        def __init__(self, tensor):
            self.capsule, self.device = tensor.__dlpack__(), tensor.__dlpack_device__()

        def __dlpack_device__(self):
            return self.device

        def __dlpack__(self, **_):
            return self.capsule

    worn = Worn(torch.ones(2, 4))
    assert kernels.rms_norm(worn, np.ones(4, np.float32)).shape == (2, 4)
    with pytest.raises(ValueError, match="x must give a DLPack capsule that was not used before"):
        kernels.rms_norm(worn, np.ones(4, np.float32))


def test_the_interpreter_runs_on_while_a_kernel_runs():
    """Another thread ticks all through a long call; under the lock its longest pause would be the
    whole call."""
    ids = np.broadcast_to(np.arange(1024).reshape(1, 32, 32), (3000, 32, 32))
    dy = np.broadcast_to(np.ones((1, 1, 1), np.float32), (3000, 64, 16 * 16))
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.perf_counter()
        kernels.fold_tokens_backward(dy, ids, 1024, 4, 4)
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    during = [start, *(t for t in ticks if start < t < end), end]
    longest = max(b - a for a, b in zip(during, during[1:], strict=False))
    assert longest < 0.5 * (end - start), (longest, end - start)


def test_every_op_has_both_forms():
    plain = {name for name in dir(_C.kernels) if not name.startswith("_")}
    assert plain == set(kernels.__all__)
    for name in plain:
        assert torch._C._dispatch_has_kernel(f"synergen::{name}"), name
        schema = getattr(torch.ops.synergen, name).default._schema
        text = getattr(kernels, name).__doc__
        for argument in schema.arguments:
            assert f"{argument.name}: " in text, (name, argument.name)


class FakeCuda:
    """The shape of a CUDA array, with no memory behind it: it must be refused before it is read."""

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **options):
        assert options["stream"] == 1
        return self.capsule(torch.ones(2, 4), device=2)

    @staticmethod
    def capsule(tensor, device):
        capsule = tensor.__dlpack__()
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # DLManagedTensor begins with the data pointer, then the device type.
        ctypes.c_int32.from_address(get(capsule, b"dltensor") + 8).value = device
        return capsule


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_cuda_array_without_a_gpu():
    # Without CUDA kernels the weight's device is refused before the kernel is looked for.
    wanted = "CUDA says: .*; use CPU arrays" if _C.build_info()["cuda"] else "(no CUDA kernel|must be on)"
    with pytest.raises((RuntimeError, ValueError), match=f"rms_norm: .*{wanted}") as caught:
        kernels.rms_norm(FakeCuda(), np.ones(4, np.float32))
    assert "\n" not in str(caught.value)


X, W = np.ones((2, 4), np.float32), np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X, W[:3]), {}, r"rms_norm: weight must be \[D\] = \[4\], got \[3\]"),
        ((X.astype(np.int32), W), {}, "rms_norm: x must be float64, .* got int32"),
        ((X.astype(">f4"), W), {}, "rms_norm: x must be float64, .* got another dtype"),
        (
            ([1.0], W),
            {},
            "rms_norm: x must be an array with the buffer protocol or __dlpack__, got list",
        ),
        (
            (X, W),
            {"out": np.ones((2, 5), np.float32)},
            r"rms_norm: out for y must be .* = \[2, 4\], got \[2, 5\]",
        ),
        ((X, W), {"out": np.ones((2, 4))}, "rms_norm: out for y must be float32, got float64"),
        (
            (X, W),
            {"out": np.ones((4, 2), np.float32).T},
            r"rms_norm: out for y must be contiguous, got strides \[1, 2\]",
        ),
        (
            (torch.ones(2, 4).bfloat16(), torch.ones(4)),
            {},
            "rms_norm: NumPy has no bfloat16; pass out=",
        ),
        (
            (np.ones([1] * 9, np.float32), W[:1]),
            {},
            "rms_norm: x may have at most 8 dimensions, got 9",
        ),
    ],
)
def test_errors(args, options, message):
    with pytest.raises(ValueError, match=message):
        kernels.rms_norm(*args, **options)


def test_too_few_outs():
    with pytest.raises(ValueError, match="rope: out must hold one array per result, got 1"):
        q = np.ones((2, 1, 4), np.float32)
        kernels.rope(q, q, np.arange(2), out=q.copy())


def test_strides_of_part_of_an_element():
    record = np.zeros(4, np.dtype([("a", "f4"), ("b", "i1")]))["a"]
    with pytest.raises(ValueError, match="x must have strides that are whole elements, got 5 bytes"):
        kernels.rms_norm(record, W)


def test_plain_call_in_a_process_of_its_own():
    """As a user without torch tensors would: NumPy only."""
    code = (
        "import numpy as np; from synergen_ext import kernels;"
        "print(kernels.fold_ids(np.arange(8).reshape(1, 2, 4), 2, 2).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[[0, 1, 4, 5], [2, 3, 6, 7]]]"
