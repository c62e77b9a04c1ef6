"""The emulator that runs kernels on the CPU: what its built-ins compute, and that it finds planted bugs
and reports their lines, under every order of threads that it knows."""

import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SIMT = ROOT / "csrc" / "simt"
CORE = ["fibers", "scheduler", "emulator", "report", "collectives", "memory", "matrix"]
KERNELS = ["selftest", "selftest_bugs"]
FLAGS = [
    "-std=c++20",
    f"-I{ROOT / 'csrc'}",
    "-g",
    "-O2",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
]

FIFO, LIFO, RANDOM = 0, 1, 2
ORDERS = [(FIFO, 0), (LIFO, 0), (RANDOM, 1), (RANDOM, 2), (RANDOM, 3)]
SEEDS = range(20)

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the emulator with")


class Stats(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_uint64)
            for name in ("launches", "switches", "barriers", "grid_syncs", "warp_ops", "atomics")
        ),
        *((name, ctypes.c_uint64) for name in ("cp_async", "ldmatrix", "ldmatrix_wavefronts", "mma")),
        *((name, ctypes.c_uint64) for name in ("races", "uninitialised")),
    ]


class ProbeParams(ctypes.Structure):
    _fields_ = [
        ("input", ctypes.c_void_p),
        ("more", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("width", ctypes.c_int),
        ("mask", ctypes.c_uint),
    ]


class PlantedParams(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("bug", ctypes.c_int),
    ]


class Emulator:
    """A build of the emulator with its test kernels."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_probe.restype = ctypes.c_char_p
        self.library.simt_planted.restype = ctypes.c_char_p
        self.library.simt_race_report.restype = ctypes.c_char_p
        self.library.simt_stats.restype = ctypes.POINTER(Stats)
        self.library.simt_set_options.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        self.order(FIFO)

    def order(self, policy, seed=0, resident=1):
        self.library.simt_set_options(policy, seed, resident)

    @property
    def stats(self):
        return self.library.simt_stats().contents

    def probe(self, name, array, out, *, more=None, grid=(1, 1, 1), block=(32, 1, 1), n=0, width=32, mask=0xFFFFFFFF):
        params = ProbeParams(address(array), address(more), address(out), n, width, mask)
        sizes = ctypes.c_uint * 3
        error = self.library.simt_probe(name.encode(), sizes(*grid), sizes(*block), ctypes.byref(params))
        assert error is None, error.decode()
        return out

    def planted(self, kernel, bug, *, blocks=1, threads=128, x=None, y=None, words=None, n=0):
        params = PlantedParams(address(x), address(y), address(words), n, bugs().index(bug))
        error = self.library.simt_planted(kernel.encode(), blocks, threads, ctypes.byref(params))
        return None if error is None else error.decode()


@functools.cache
def bugs():
    listed = re.search(r"enum Bug {(.*?)}", (SIMT / "selftest_bugs.cu").read_text(), re.DOTALL)
    return re.findall(r"k(\w+)", listed.group(1))


def address(array):
    return None if array is None else array.ctypes.data


def compile_objects(folder, names, flags):
    """The objects of these sources, each compiled once."""
    folder.mkdir(exist_ok=True)
    objects = []
    for source in names:
        objects.append(folder / (source.name + ".o"))
        command = [COMPILER, "-x", "c++", *FLAGS, *flags, "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(command, check=True, timeout=300)
    return objects


def link(objects, library):
    subprocess.run([COMPILER, "-shared", *map(str, objects), "-o", str(library), "-ldl"], check=True, timeout=300)
    return Emulator(library)


@pytest.fixture(scope="session")
def core(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simt")
    return compile_objects(folder / "core", [SIMT / f"{name}.cpp" for name in CORE], [])


@pytest.fixture(scope="session")
def plain(core):
    folder = core[0].parents[1]
    kernels = compile_objects(folder / "plain", [SIMT / f"{name}.cu" for name in KERNELS], [])
    return link([*core, *kernels], folder / "plain.so")


@pytest.fixture(scope="session")
def race(core):
    """The kernels call the detector at each access; the emulator itself does not."""
    folder = core[0].parents[1]
    detector = compile_objects(folder / "race", [SIMT / "race.cpp"], [])
    kernels = compile_objects(folder / "race", [SIMT / f"{name}.cu" for name in KERNELS], ["-fsanitize=thread"])
    return link([*core, *detector, *kernels], folder / "race.so")


@pytest.fixture(params=["plain", "race"])
def build(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=ORDERS, ids=lambda order: f"{('fifo', 'lifo', 'random')[order[0]]}{order[1]}")
def order(request):
    return request.param


@pytest.fixture
def emulator(build, order):
    build.order(*order)
    return build


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- Conversions


def test_every_f16_widens(plain):
    x = np.arange(1 << 16, dtype=np.uint16)
    y = plain.probe("f16_to_f32", x, np.empty(1 << 16, np.float32), n=1 << 16)
    np.testing.assert_array_equal(y, x.view(np.float16).astype(np.float32))


def test_every_bf16_widens(plain):
    x = np.arange(1 << 16, dtype=np.uint16)
    y = plain.probe("bf16_to_f32", x, np.empty(1 << 16, np.float32), n=1 << 16)
    np.testing.assert_array_equal(y.view(np.uint32), x.astype(np.uint32) << 16)


@functools.cache
def floats_to_round():
    """Random bits, and every f16 and bf16 with what lies halfway to the next and just beside that."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    halfway = np.concatenate([half + 0x1000, (np.arange(1 << 16, dtype=np.uint32) << 16) + 0x8000])
    subnormal = ((np.arange(4096) + 0.5) * 2.0**-24).astype(np.float32).view(np.uint32)
    exact = np.concatenate([bits, half, halfway, subnormal, subnormal | 0x80000000])
    return np.concatenate([exact, exact - np.uint32(1), exact + np.uint32(1)]).view(np.float32)


def test_f32_narrows_to_f16(plain):
    x = floats_to_round()
    y = plain.probe("f32_to_f16", x, np.empty(x.size, np.float16), n=x.size)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_array_equal(y.view(np.uint16)[~np.isnan(x)], expected.view(np.uint16)[~np.isnan(x)])


def test_f32_narrows_to_bf16(plain):
    torch = pytest.importorskip("torch")
    x = floats_to_round()
    y = plain.probe("f32_to_bf16", x, np.empty(x.size, np.uint16), n=x.size)
    expected = torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(y[number], expected[number])
    assert np.isnan((y[~number].astype(np.uint32) << 16).view(np.float32)).all()


def test_f64_narrows(plain, rng):
    x = rng.standard_normal(1000)
    assert (plain.probe("f64_to_f64", x, np.empty(1000), n=1000) == x).all()
    assert (plain.probe("f64_to_f32", x, np.empty(1000, np.float32), n=1000) == x.astype(np.float32)).all()


# ---- Threads together


@pytest.mark.parametrize("resident", [1, 3, 100])
def test_every_thread_runs_once(emulator, order, resident):
    emulator.order(*order, resident)
    grid, block = (3, 2, 2), (5, 3, 4)
    out = emulator.probe("coordinates", None, np.full((12, 60, 6), 99, np.uint32), grid=grid, block=block)
    expected = [
        [(bx, by, bz, tx, ty, tz) for tz in range(4) for ty in range(3) for tx in range(5)]
        for bz in range(2)
        for by in range(2)
        for bx in range(3)
    ]
    np.testing.assert_array_equal(out, expected)


def shuffled(values, lanes, width):
    """values[lanes[i]] where that lane is in the segment of lane i, and its own value otherwise."""
    own = np.arange(32)
    inside = (lanes >= own // width * width) & (lanes < own // width * width + width)
    return values[np.where(inside, lanes, own)]


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("name, dtype", [("shuffle32", np.float32), ("shuffle64", np.uint64)])
def test_shuffles(emulator, rng, name, dtype, width):
    x = rng.integers(0, 1 << 20, 32).astype(dtype)
    operand = rng.integers(0, 64, 32).astype(np.int32)
    for distance in (1, 3, 5):
        out = emulator.probe(name, x, np.zeros((4, 32), dtype), more=operand, n=distance, width=width)
        lane = np.arange(32)
        np.testing.assert_array_equal(out[0], x[lane // width * width + operand % width])
        np.testing.assert_array_equal(out[1], shuffled(x, lane - distance, width))
        np.testing.assert_array_equal(out[2], shuffled(x, lane + distance, width))
        if distance < width:
            np.testing.assert_array_equal(out[3], x[lane ^ distance])


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x12345678])
def test_votes(emulator, rng, mask):
    x = rng.integers(0, 6, 32).astype(np.uint32)
    x[31] += 0xFFFFFFF0  # so that a sum goes round, and is not signed
    out = emulator.probe("vote", x, np.zeros((6, 32), np.uint32), mask=mask)
    lanes = [i for i in range(32) if mask >> i & 1]
    even = [i for i in lanes if x[i] % 2 == 0]
    for lane in lanes:
        assert out[0, lane] == sum(1 << i for i in even)
        assert out[1, lane] == (len(even) > 0)
        assert out[2, lane] == (even == lanes)
        assert out[3, lane] == sum(1 << i for i in lanes if x[i] == x[lane])
        assert out[4, lane] == sum(map(int, x[lanes])) % 2**32
        assert out[5, lane] == x[lanes].max()


@pytest.mark.parametrize("n", [0, 1, 69, 70])
def test_block_votes(emulator, n):
    out = emulator.probe("block_vote", None, np.full((3, 70), -1, np.int32), block=(70, 1, 1), n=n)
    assert (out[0] == (n > 0)).all() and (out[1] == (n == 70)).all() and (out[2] == n).all()


def test_named_barriers(emulator):
    out = emulator.probe("named_barrier", None, np.empty((2, 64), np.int32), block=(128, 1, 1), n=5)
    np.testing.assert_array_equal(out, [4 + np.arange(63, -1, -1), 9 + np.arange(63, -1, -1)])


def test_words(emulator, rng):
    """16 bytes at once; sums of two floats of 16 bits; bytes and bits picked from words."""
    torch = pytest.importorskip("torch")
    bf16 = torch.from_numpy(rng.standard_normal((64, 4))).bfloat16()
    f16 = rng.standard_normal((64, 4)).astype(np.float16)
    words = np.concatenate([bf16.view(torch.int16).numpy().view(np.uint32), f16.view(np.uint32)], 1)
    which = rng.integers(0, 0x8888, 64, dtype=np.uint32) & 0x7777
    out = emulator.probe("words", words, np.empty((64, 8), np.uint32), more=which, block=(64, 1, 1))
    np.testing.assert_array_equal(out[:, :4], words ^ words[:, ::-1])
    sums = (bf16[:, :2].float() + bf16[:, 2:].float()).bfloat16()
    np.testing.assert_array_equal(out[:, 4:5], sums.view(torch.int16).numpy().view(np.uint32))
    np.testing.assert_array_equal(out[:, 5:6], (f16[:, :2] + f16[:, 2:]).view(np.uint32))
    np.testing.assert_array_equal(out[:, 6], words[:, 0] & words[:, 1] | words[:, 2])
    picked = words[:, :2].copy().view(np.uint8)
    digits = which[:, None] >> (4 * np.arange(4, dtype=np.uint32)) & 7
    np.testing.assert_array_equal(out[:, 7:].copy().view(np.uint8), np.take_along_axis(picked, digits.astype(int), 1))


def test_bits(emulator, rng):
    a = rng.integers(0, 1 << 63, 64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    a[:4] = [0, 1, 1 << 31, 1 << 63]
    b = rng.integers(0, 1 << 63, 64, dtype=np.uint64)
    out = emulator.probe("bits", a, np.empty((64, 8), np.uint64), more=b, block=(64, 1, 1))
    for x, y, got in zip(map(int, a), map(int, b), out, strict=True):
        low = x & 0xFFFFFFFF
        expected = [
            low.bit_count(),
            x.bit_count(),
            32 - low.bit_length(),
            64 - x.bit_length(),
            int(f"{low:032b}"[::-1], 2),
            (low & -low).bit_length(),
            low * (y & 0xFFFFFFFF) >> 32,
            x * y >> 64,
        ]
        assert list(map(int, got)) == expected


def test_atomics(emulator, rng):
    x = rng.integers(0, 1000, (4, 32)).astype(np.int32)
    out = np.array([5, -1, 1 << 30, 0, -1, 0, 0, 0], np.int32)
    top = np.zeros(1, np.uint64)
    emulator.probe("atomic", x, out, more=top, grid=(4, 1, 1))
    assert list(out[:5]) == [
        5 + x.sum(),
        x.max(),
        x.min(),
        np.bitwise_or.reduce(x, None),
        np.bitwise_and.reduce(x, None),
    ]
    assert out[5:6].view(np.float32)[0] == x.sum() and out[6] == 0 and out[7] == x.sum()
    assert top[0] == int(x.max()) << 32 | 7


# ---- Tensor cores


def layout(thread_strides, value_shape, value_strides):
    """A CuTe layout of (4, 8) threads and some values: offset(lane, value)."""

    def offset(lane, value):
        at = lane % 4 * thread_strides[0] + lane // 4 * thread_strides[1]
        for size, stride in zip(value_shape, value_strides, strict=True):
            at += value % size * stride
            value //= size
        return at

    return offset


# The thread-value layouts that CUTLASS publishes in MMA_Traits of the 16x8x16 instructions of SM80: offsets into
# column-major A [16, 16], B [8, 16] (n, k) and C [16, 8].
A_LAYOUT = layout((32, 1), (2, 2, 2), (16, 8, 128))
B_LAYOUT = layout((16, 1), (2, 2), (8, 64))
C_LAYOUT = layout((32, 1), (2, 2), (16, 8))


def fragments(matrix, at, values):
    """[32, values]: what each lane holds of a matrix."""
    column_major = matrix.ravel(order="F")
    return np.array([[column_major[at(lane, v)] for v in range(values)] for lane in range(32)])


@pytest.mark.parametrize("name", ["mma_bf16", "mma_f16"])
def test_mma_follows_the_published_layout(emulator, rng, name):
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) / 4 for shape in ((16, 16), (8, 16), (16, 8)))

    def packed(x):
        half = (
            x.astype(np.float16).view(np.uint16) if name == "mma_f16" else (x.view(np.uint32) >> 16).astype(np.uint16)
        )
        return np.ascontiguousarray(half)

    out = np.ascontiguousarray(fragments(c, C_LAYOUT, 4))
    emulator.probe(name, packed(fragments(a, A_LAYOUT, 8)), out, more=packed(fragments(b, B_LAYOUT, 4)))
    np.testing.assert_array_equal(out, fragments(a @ b.T + c, C_LAYOUT, 4))  # quarters: exact in any order
    assert emulator.stats.mma == 1


@pytest.mark.parametrize("name", ["ldmatrix", "ldmatrix_trans"])
def test_ldmatrix_follows_ptx(emulator, rng, name):
    """Matrix m has the rows that lanes 8 m to 8 m + 7 point at; lane i gets elements 2 (i % 4) and the next of row
    i / 4, or of column i / 4 when transposed, in register m."""
    rows = rng.integers(0, 1 << 16, (32, 8)).astype(np.uint16)
    order = rng.permutation(32).astype(np.int32)
    out = emulator.probe(name, rows, np.empty((32, 4), np.uint32), more=order)
    for lane in range(32):
        for m in range(4):
            matrix = rows[order[8 * m : 8 * m + 8]]
            line = matrix[:, lane // 4] if name.endswith("trans") else matrix[lane // 4]
            low, high = map(int, line[2 * (lane % 4) : 2 * (lane % 4) + 2])
            assert out[lane, m] == low | high << 16


@pytest.mark.parametrize("swizzled, wavefronts", [(0, 16), (1, 4)])
def test_ldmatrix_wavefronts(plain, swizzled, wavefronts):
    """Rows 64 bytes apart: only every second starts at other banks."""
    plain.order(FIFO)
    plain.probe("swizzle", None, np.empty(32, np.uint32), n=swizzled)
    assert (plain.stats.ldmatrix, plain.stats.ldmatrix_wavefronts) == (1, wavefronts)


# ---- Asynchronous copies


@pytest.mark.parametrize("n", [0, 13, 32])
def test_copies_fill_with_zeros(emulator, rng, n):
    x = rng.integers(0, 256, (n, 16)).astype(np.uint8) if n else np.zeros((1, 16), np.uint8)
    storage = np.empty(16 * len(x) + 16, np.uint8)
    aligned = storage[-storage.ctypes.data % 16 :][: 16 * len(x)].reshape(len(x), 16)
    aligned[:] = x
    out = emulator.probe("zero_fill", aligned, np.full((32, 16), 7, np.uint8), n=n)
    np.testing.assert_array_equal(out[:n], x[:n])
    assert (out[n:] == 0).all() and emulator.stats.cp_async == 32


def test_copies_land_early_or_late(plain):
    x = aligned_floats(4).view(np.uint32)
    x[:] = 2
    landed = set()
    for policy, seed in [(FIFO, 0), (LIFO, 0), *((RANDOM, seed) for seed in SEEDS)]:
        plain.order(policy, seed)
        early, late = plain.probe("landing", x, np.zeros(2, np.uint32), block=(1, 1, 1))
        assert late == 2
        assert policy == RANDOM or early == (1 if policy == FIFO else 2)
        landed.add(int(early))
    assert landed == {1, 2}


# ---- Kernels with planted bugs


def aligned_floats(count):
    """Zeros at a multiple of 16 bytes."""
    storage = np.zeros(count + 4, np.float32)
    return storage[-storage.ctypes.data % 16 // 4 :][:count]


def numbers(count):
    x = aligned_floats(count)
    x[:] = np.random.default_rng(1).integers(0, 100, count)
    return x


@functools.cache
def case(kernel):
    """(launch, x, y before, y after), sums of small integers: exact in any order."""
    x = numbers(4096)
    if kernel == "sum":
        return dict(blocks=2, n=5), x, np.full(10, -1, np.float32), x[: 10 * 128].reshape(10, 128).sum(1)
    if kernel == "exchange":
        return dict(n=3), x, np.full(128, -1, np.float32), x[:128].reshape(64, 2)[:, ::-1].ravel() + 2
    if kernel == "rotate":
        return dict(blocks=2), x, np.zeros(257, np.float32), np.append(np.roll(x[:256].reshape(2, 128), -1, 1), 0)
    if kernel == "shuffle":
        return dict(), x, np.full(128, -1, np.float32), x[:128].reshape(64, 2)[:, ::-1].ravel()
    if kernel == "barrier":
        return dict(), x, np.full(128, -1, np.float32), x[127::-1]
    if kernel == "copy":
        tiles = np.roll(x[: 4 * 512].reshape(4, 128, 4), -32, 1)
        return dict(n=4), x, np.full(128, -1, np.float32), (tiles[:, :, 0] + tiles[:, :, 3]).sum(0)
    if kernel == "matrix":
        return dict(threads=32), x, np.zeros(1, np.float32), np.zeros(1, np.float32)
    if kernel == "count":
        return dict(blocks=3), x, np.zeros(128, np.float32), np.zeros(128, np.float32)
    if kernel in ("grid", "hand_made"):
        y = np.zeros((2, 3 * 128), np.float32)
        for step in range(4):
            y[(step + 1) % 2] = np.roll(y[step % 2], -1) + x[: 3 * 128]
        return dict(blocks=3, n=4), x, np.zeros((2, 3 * 128), np.float32), y
    assert kernel == "flag"
    return dict(blocks=3, threads=32), x, np.zeros(96, np.float32), np.tile(x[:32], 3)


def run(emulator, kernel, bug="None"):
    """(error or None, whether the numbers are right)"""
    launch, x, before, after = case(kernel)
    if bug == "AbsentLane":
        launch = launch | dict(threads=48)
    y, words = before.copy(), np.zeros(64, np.uint32)
    error = emulator.planted(kernel, bug, x=x, y=y, words=words, **launch)
    right = np.array_equal(y.ravel(), after.ravel())
    if kernel == "matrix":
        right = np.array_equal(words[:32], np.arange(32) // 4 * 0x10001)
    if kernel == "count":
        right = words[0] == 3 * 128
    return error, right


CORRECT = ["sum", "exchange", "rotate", "shuffle", "barrier", "copy", "matrix", "count", "grid", "hand_made", "flag"]


@pytest.mark.parametrize("kernel", CORRECT)
def test_correct_kernels_pass(emulator, kernel):
    assert run(emulator, kernel) == (None, True)
    assert emulator.stats.races == emulator.stats.uninitialised == 0


@functools.cache
def line_of(tag):
    source = (SIMT / "selftest_bugs.cu").read_text().splitlines()
    lines = [n for n, text in enumerate(source, 1) if re.search(rf"// @{tag}$", text)]
    assert len(lines) == 1, tag
    return f"selftest_bugs.cu:{lines[0]}"


def check_report(error, what, tags):
    assert error is not None and re.search(what, error), error
    for tag in tags.split():
        assert re.search(re.escape(line_of(tag)) + r"\b", error), (tag, error)


# The emulator's own checks, in any build and any order: (kernel, bug, what the report says, the lines it names).
CHECKED = [
    ("shuffle", "DivergentShuffle", "divergent warp|deadlock", "shuffle-xor shuffle-after"),
    ("shuffle", "WrongMask", "lane [0-9]+ is not in its mask 0xfffe|divergent warp", "shuffle-mask"),
    ("shuffle", "AbsentLane", "lane 16 of its mask does not exist", "shuffle-xor"),
    ("shuffle", "LaneOutsideMask", "reads lane 20, which is not in the mask", "shuffle-outside"),
    ("shuffle", "ExitedLane", "lane 31 of its mask has exited|exits while lane", "shuffle-xor"),
    ("shuffle", "AwaitedExit", "lane 0 of its mask has exited|exits while lane", "shuffle-xor"),
    ("shuffle", "MixedOperations", "divergent warp: .*(vote.*shuffle|shuffle.*vote)", "shuffle-mixed"),
    ("shuffle", "BadWidth", "width 24 is not a power of 2", "shuffle-width"),
    ("barrier", "DivergentBarrier", "divergent barrier", "barrier-other barrier-first"),
    ("barrier", "EarlyExit", "exits while|exited early", "barrier-first"),
    ("barrier", "LateExit", "exits while|exited early", "barrier-last"),
    ("barrier", "Deadlock", "deadlock", "barrier-96 barrier-first"),
    ("barrier", "CountMismatch", "expects 64|deadlock", "barrier-count"),
    ("barrier", "PartOfWarp", "part of the warp", "barrier-part"),
    ("copy", "MisalignedCopy", "global address is not a multiple of 16", "copy-issue"),
    ("copy", "CopyOutOfRange", "outside the shared memory", "copy-issue"),
    ("copy", "NotCommitted", "cp.async not committed", "copy-issue"),
    ("copy", "ExitInFlight", "cp.async in flight", "copy-issue"),
    ("matrix", "MisalignedMatrix", "shared address is not a multiple of 16", "matrix-read"),
    ("matrix", "MatrixOutOfRange", "outside the shared memory", "matrix-read"),
    ("count", "MisalignedAtomic", "address is not a multiple of 4", "count-misaligned"),
    ("grid", "NotCooperative", "not cooperative", "grid-sync"),
    ("grid", "BlockExitsEarly", "exits while|exited early", "grid-sync"),
    ("hand_made", "Livelock", "livelock", "grid-spin"),
    (
        "rotate",
        "DynamicWriteOutOfRange",
        "0 bytes after the dynamic shared array of 512 bytes|outside a shared array",
        "",
    ),
    ("exchange", "StaticOutOfRange", "0 bytes after a static shared array of 512 bytes|outside a shared array", ""),
]


@pytest.mark.parametrize("kernel, bug, what, tags", CHECKED, ids=[row[1] for row in CHECKED])
def test_checks_find(emulator, kernel, bug, what, tags):
    check_report(run(emulator, kernel, bug)[0], what, tags)
    assert run(emulator, kernel) == (None, True)  # the launch after a failed one is not harmed


# Found by the race detector whatever the order: the same, and whether some order also shows it by wrong numbers.
RACES = [
    ("sum", "NoSyncAfterPartials", "not written", "sum-write sum-read", True),
    ("sum", "NoSyncBeforeReuse", "race", "sum-write sum-read", True),
    ("exchange", "NoSyncwarp", "race|not written", "exchange-write exchange-read", True),
    ("exchange", "NotWritten", "read of shared memory that was not written", "exchange-read", True),
    ("exchange", "StaticOutOfRange", "outside a shared array", "exchange-write", True),
    ("rotate", "DynamicWriteOutOfRange", "outside a shared array", "rotate-past", False),
    ("rotate", "DynamicReadOutOfRange", "outside a shared array", "rotate-read", True),
    ("rotate", "PastTheRow", "race of two writes", "rotate-read rotate-next-row", True),
    ("copy", "NoWait", "read of cp.async in flight", "copy-issue copy-read", True),
    ("copy", "WeakWait", "read of cp.async in flight", "copy-issue copy-read", True),
    ("copy", "NoSyncAfterWait", "race|in flight", "copy-issue copy-read", True),
    ("copy", "StageOverwritten", "race of a write with an earlier read", "copy-issue copy-read", True),
    ("count", "LostUpdate", "race", "count-plain", False),
    ("count", "PlainReadOfAtomic", "race", "count-atomic count-read", False),
    ("grid", "NoGridBarrier", "race", "grid-read grid-write", True),
    ("hand_made", "NoLeadingSync", "race", "grid-read grid-write", False),
    ("hand_made", "NoTrailingSync", "race", "grid-read grid-write", True),
    ("hand_made", "RelaxedArrival", "race", "grid-read grid-write", False),
    ("hand_made", "RelaxedWait", "race", "grid-read grid-write", False),
    ("flag", "NoFenceBeforeFlag", "race of a read with an earlier write", "flag-read flag-write", False),
]


@pytest.mark.parametrize("kernel, bug, what, tags, wrong", RACES, ids=[row[1] for row in RACES])
def test_race_detector_finds(race, order, kernel, bug, what, tags, wrong):
    race.order(*order)
    error = run(race, kernel, bug)[0]
    check_report(error, what, tags)
    assert race.stats.races > 0 and race.library.simt_race_report().decode() in error
    assert run(race, kernel) == (None, True)
    assert race.library.simt_race_report() == b""


@pytest.mark.parametrize("kernel, bug", [row[:2] for row in RACES if row[4]], ids=[row[1] for row in RACES if row[4]])
def test_some_order_shows_it_in_numbers(plain, kernel, bug):
    """Without a detector, an order that lets some warps run ahead still comes to wrong numbers."""
    found = 0
    for seed in SEEDS:
        plain.order(RANDOM, seed)
        error, right = run(plain, kernel, bug)
        found += error is not None or not right
    assert found >= 10


def test_every_bug_has_a_test():
    assert {"None", *(row[1] for row in CHECKED + RACES)} == set(bugs())


def test_orders_repeat(plain):
    """The same seed, the same run."""
    switches = []
    for _ in range(2):
        plain.order(RANDOM, 5)
        run(plain, "copy", "NoSyncAfterWait")
        switches.append(plain.stats.switches)
    assert switches[0] == switches[1]


def test_launches_are_refused(plain):
    assert "a block may have 1024 threads, got 1056" in plain.planted("sum", "None", threads=1056)
    assert "the grid or the block is empty" in plain.planted("sum", "None", blocks=0)


def test_race_detector_says_what_it_takes(race):
    error = race.planted("grid", "None", blocks=65, threads=128)
    assert error == "grid: emulator: the race detector takes 8192 threads in a cooperative launch, got 8320"
