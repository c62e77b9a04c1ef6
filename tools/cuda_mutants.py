"""Plants mistakes in the CUDA kernels, one at a time, and shows which gate finds each.

Every barrier, guard, index and epilogue has at least one. A mistake is a piece of source replaced by another; it must
compile, and is found by numbers (wrong or unwritten results under any schedule, or a report of the emulator), by the
race detector, or by the sanitizers. One that nothing finds is an error of the tests.

    python tools/cuda_mutants.py                 all of them
    python tools/cuda_mutants.py --third 2       every third, beginning with the second
    python tools/cuda_mutants.py --only 14 15    these
"""

import argparse
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "python_tests"
sys.path.insert(0, str(TESTS))

emulator = importlib.import_module("emulator")  # found on the path that was added above

KERNELS = ROOT / "csrc" / "cuda"
SECONDS = 300  # a mistake may make a kernel loop for ever


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    before: str
    after: str
    which: int = 0  # of the places where `before` stands
    unit: str = ""  # the source to compile where `file` is a header

    @property
    def source(self) -> str:
        return self.unit or self.file

    def text(self) -> str:
        text = (KERNELS / self.file).read_text()
        parts = text.split(self.before)
        if len(parts) <= self.which + 1:
            raise ValueError(f"mutant {self.number}: {self.file} has no {self.before!r} number {self.which + 1}")
        head, tail = self.before.join(parts[: self.which + 1]), self.before.join(parts[self.which + 1 :])
        return head + self.after + tail


def _mutants() -> list[Mutant]:
    found: list[Mutant] = []

    def add(file: str, before: str, after: str = "", which: int = 0, unit: str = "") -> None:
        found.append(Mutant(len(found) + 1, file, before, after, which, unit))

    # Sums over a block, as rms_norm uses them.
    header = {"file": "access.cuh", "unit": "rms_norm.cu"}
    add(before="distance = 16; distance > 0", after="distance = 8; distance > 0", **header)
    add(before="distance /= 2", after="distance /= 4", **header)
    add(before="__shfl_xor_sync(0xffffffffu, x, distance)", after="__shfl_xor_sync(0xffffu, x, distance)", **header)
    add(before="if (lane == 0) partial[threadIdx.x / 32] = x;", after="if (lane == 0) partial[0] = x;", **header)
    add(before="if (lane == 0) partial[threadIdx.x / 32] = x;", after="partial[threadIdx.x / 32] = x + lane * 0;",
        **header)  # fmt: skip
    add(before="  __syncthreads();\n  x = warp_sum", after="  x = warp_sum", **header)
    add(before="  __syncthreads();  // partial", after="  // partial", **header)
    add(before="lane < warps ? partial[lane] : A(0)", after="partial[lane]", **header)
    add(before="const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32;",
        after="const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32 - 1;", **header)  # fmt: skip
    add(before="return {{row[i * stride]}};", after="return {{row[i]}};", **header)
    add(before="row + i * N) = pack", after="row + i) = pack", **header)
    add(before="return *reinterpret_cast<const Pack<T, N>*>(row + i * N);",
        after="return *reinterpret_cast<const Pack<T, N>*>(row + i);", **header)  # fmt: skip
    add(before="fits = fits && outer[d] % kPack<T> == 0;", after="fits = fits && true;", **header)
    add(before="bool fits = inner == 1 && ", after="bool fits = ", **header)
    add(before=" && reinterpret_cast<uintptr_t>(base) % 16 == 0", **header)
    add(before="ceil_div(ceil_div(items, each), 32) * 32", after="items / each", **header)

    # rms_norm
    file = "rms_norm.cu"
    add(file, "const int64_t row = blockIdx.x;", "const int64_t row = blockIdx.x / 2 * 2;")
    add(file, "if (i < count) add(held[k] =", "if (i <= count) add(held[k] =")
    add(file, "if (i < count) write(i, held[k]);", "if (i <= count) write(i, held[k]);")
    add(file, "if (i < count) write(i, held[k]);", "if (i + 1 < count) write(i, held[k]);")
    add(file, "for (int64_t i = threadIdx.x + beyond; i < count; i += blockDim.x) {\n      add(",
        "for (int64_t i = threadIdx.x + beyond; i + 1 < count; i += blockDim.x) {\n      add(")  # fmt: skip
    add(file, "for (int64_t i = threadIdx.x + beyond; i < count; i += blockDim.x) {\n      write(",
        "for (int64_t i = beyond; false;) {\n      write(")  # fmt: skip
    add(file, "mean + static_cast<A>(p.eps)", "mean")
    add(file, "simt::widen(pack.v[e]) * scale * simt::widen(w.v[e])", "simt::widen(pack.v[e]) * scale")
    add(file, "p.x_rows.offset(row)", "row * p.dim")
    add(file, "p.dy_rows.offset(row)", "row * p.dim")
    add(file, "SIMT_SHARED(A, partial, [32])", "SIMT_SHARED(A, partial, [1])")
    add(file, "block_sum(product, partial) * share", "product * share")
    add(file, "const int64_t last = p.rows * (blockIdx.x + int64_t{1}) / gridDim.x;",
        "const int64_t last = p.rows * (blockIdx.x + int64_t{1}) / gridDim.x + (blockIdx.x == 0);")  # fmt: skip
    add(file, "for (int e = 0; e < N; ++e) total[i * N + e] = 0;", "for (int e = 1; e < N; ++e) total[i * N + e] = 0;")
    add(file, "for (int e = 0; e < N; ++e) total[i * N + e] = column[k][e];",
        "for (int e = 1; e < N; ++e) total[i * N + e] = column[k][e];")  # fmt: skip
    add(file, "sums[e] += d * value * r;", "sums[e] = d * value * r;")
    add(file, "- value * slope) * r", "- value) * r")
    add(file, "piece < p.pieces; ++piece", "piece + 1 < p.pieces; ++piece")
    add(file, "if (i >= p.dim) return;", "if (i > p.dim) return;")

    # rope
    file = "rope.cu"
    add(file, "  __syncthreads();\n  for (int64_t item", "  for (int64_t item")
    add(file, "step < 2; ++step", "step < 1; ++step")
    add(file, "std::fma(-turns, kMiddle, std::fma(-turns, kHigh, r))", "std::fma(-turns, kHigh, r)")
    add(file, "quarter & 2 ? -1.0 : 1.0", "quarter & 4 ? -1.0 : 1.0")
    add(file, "(quarter + 1) & 2", "quarter & 2")
    add(file, "const bool swap = quarter & 1;", "const bool swap = false;")
    add(file, "token * part.heads + head) * p.dim", "token + head) * p.dim")
    add(file, "i < launch.pairs; i += kThreads", "i + 1 < launch.pairs; i += kThreads")
    add(file, "p.inverse ? -s : s", "s")
    add(file, "item - queries, sines", "item, sines")
    add(file, "if (item < queries)", "if (item <= queries)")
    add(file, "first + i) / static_cast<double>(p.dim)", "i) / static_cast<double>(p.dim)")
    add(file, "store_pack(y + half, i, second)", "store_pack(y + half, i, first)")

    # fold_tokens
    file = "fold_tokens.cu"
    add(file, "row / p.m * (p.w / p.n) + col / p.n", "row / p.m * (p.w / p.n) + col / p.m")
    add(file, "row % p.m * p.n + col % p.n", "row % p.m * p.m + col % p.n")
    add(file, "id >= 0 && id < p.vocab", "id >= 0 && id <= p.vocab")
    add(file, "if (token >= tokens) return;", "if (token > tokens) return;")
    add(file, "if (i >= count) continue;\n      b[k]", "if (i > count) continue;\n      b[k]")
    add(file, "if (i >= count) continue;\n      Pack", "if (i > count) continue;\n      Pack")
    add(file, "simt::widen(b[k].v[e]) + mark", "simt::widen(b[k].v[e])")
    add(file, "if (at >= total) return;", "if (at > total) return;")

    # fold_tokens_backward
    file = "fold_tokens_backward.cu"
    add(file, "  __syncwarp();\n  for (int64_t t = tile", "  for (int64_t t = tile")
    add(file, "  __syncwarp();\n  for (int d = lane; d < kDigit && tile", "  for (int d = lane; d < kDigit && tile")
    add(file, "atomicAdd(&counters[warp][digit_of(p.keys[t], p.shift)], 1);",
        "counters[warp][digit_of(p.keys[t], p.shift)] += 1;")  # fmt: skip
    add(file, "d < kDigit && tile < p.tiles; d += 32) {\n    p.counts", "d < kDigit; d += 32) {\n    p.counts")
    add(file, "  __syncthreads();\n  int32_t before", "  int32_t before")
    add(file, "sum += lane >= distance ? below : 0;", "sum += below;")
    add(file, "if (lane == 31) warps[warp] = sum;", "if (lane == 30) warps[warp] = sum;")
    add(file, "  __syncwarp();\n  for (int64_t begin = tile", "  for (int64_t begin = tile")
    add(file, "    __syncwarp();\n    if (there && rank == 0)", "    if (there && rank == 0)")
    add(file, "    __syncwarp();\n    if (there) {", "    if (there) {")
    add(file, "(1u << lane) - 1", "(2u << lane) - 1")
    add(file, "p.other_order[place] = p.order[t];", "p.other_order[place] = static_cast<int32_t>(t);")
    add(file, "if (id > p.vocab) return;", "if (id >= p.vocab) return;")
    add(file, "if (p.keys[middle] < id)", "if (p.keys[middle] <= id)")
    add(file, "if (i >= p.dim / N) return;", "if (i > p.dim / N) return;")
    add(file, "p.first[id] >= begin, ends", "p.first[id] > begin, ends")
    add(file, "p.first[id + 1] <= end;", "p.first[id + 1] < end;")
    add(file, "if (at + k < end) {", "if (at + k <= end) {")
    add(file, "if (id == p.vocab) return;", "")
    add(file, "for (int e = 0; e < N; ++e) sum[e] = 0;", "")
    add(file, "piece <= to; ++piece", "piece < to; ++piece")
    add(file, "begin < end && from == to", "from == to")
    add(file, "if (image + k >= p.batch) continue;", "")
    add(file, "p.vocab >> p.shift; p.shift += 8", "p.shift < 8; p.shift += 8")
    add(file, "take(p.counts, kDigit * p.tiles * 4);", "take(p.counts, kDigit * p.tiles * 2);")
    add(file, "const int64_t part = p.pieces * p.dim", "const int64_t part = (p.pieces - 1) * p.dim")

    # sample_tokens
    file = "sample_tokens.cu"
    add(file, "  if (lane == 0) board.words[warp] = x;\n  __syncthreads();", "  if (lane == 0) board.words[warp] = x;")
    add(file, "  __syncthreads();  // the words", "  // the words")
    add(file, "board.bins[threadIdx.x] = 0;\n  __syncthreads();", "board.bins[threadIdx.x] = 0;")
    add(file, "  __syncthreads();\n  if (threadIdx.x < 32)", "  if (threadIdx.x < 32)")
    add(file, "      board.inside = board.bins[bin];\n    }\n  }\n  __syncthreads();",
        "      board.inside = board.bins[bin];\n    }\n  }")  # fmt: skip
    add(file, "if (threadIdx.x < kBins) board.bins", "if (threadIdx.x + 1 < kBins) board.bins")
    add(file, "board.bins[threadIdx.x] = 0;", "board.bins[threadIdx.x + 1] = 0;")
    add(file, "if (lane == 0) board_.words[warp] = own;\n    __syncthreads();",
        "if (lane == 0) board_.words[warp] = own;")  # fmt: skip
    add(file, "    __syncthreads();\n    return static_cast<int64_t>(board_.reached);",
        "    return static_cast<int64_t>(board_.reached);")  # fmt: skip
    add(file, "x + 0.0f), sign", "x), sign")
    add(file, "bits & sign ? ~bits : bits | sign", "bits | sign")
    add(file, "__fadd_rn(u, __fmul_rn(scale, c - u))", "fmaf(scale, c - u, u)")
    add(file, "x = x > -64.0 ? x : -64.0;", "")
    add(file, "sum >= target", "sum > target")
    add(file, "while (before + board.bins[bin] < target)", "while (before + board.bins[bin] <= target)")
    add(file, "target -= board_.reached;", "")
    add(file, "target -= board_.reached;", "", which=1)
    add(file, "mask |= static_cast<Key>", "mask = static_cast<Key>")
    add(file, "static_cast<uint64_t>(i) > cutoff", "static_cast<uint64_t>(i) >= cutoff")
    add(file, "if (target == inside) return static_cast<uint64_t>(n_);", "if (target == inside) return 0;")
    add(file, "while (n_ - 1 >> shift >= kBins) shift += 8;", "")
    add(file, "static_cast<uint64_t>(k) < count_", "false")
    add(file, "temperature >= 0 && k >= 0", "k >= 0")
    add(file, "bad |= !(x < infinity());", "")
    add(file, "bad |= !(x == x) || !(other == other);", "")
    add(file, "x == -infinity() || other == -infinity() ? -infinity() : mixed", "mixed")
    add(file, "return !bad && count_ > 0;", "return !bad;")
    add(file, "if (logits_[i] == most_ && first == ~uint64_t{0})", "if (logits_[i] == most_)")
    add(file, "if (!(logits_[i] > -infinity())) mass_[i] = 0;", "")
    add(file, "before <= threshold && threshold < before + own", "threshold < before + own")
    add(file, "before += __shfl_sync(kAll, sum, 31);", "")
    add(file, "sum += lane >= distance ? below : 0;", "sum += below;", which=1)
    add(file, "uint64_t sum = i < end ? mass_[i] : 0;", "uint64_t sum = mass_[i];")
    add(file, "p.rows * p.vocab * (p.dtype", "p.rows * (p.vocab - 1) * (p.dtype")
    return found


MUTANTS = _mutants()

GATES = {
    "numbers": ("plain", "not races and not sanitizers"),
    "race": ("race", "races"),
    "sanitize": ("sanitize", "sanitizers"),
}
FLAGS = {
    "plain": ("-O1",),
    "race": ("-O1", "-fsanitize=thread"),
    "sanitize": ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
}


def build(mutant: Mutant, kind: str, folder: Path) -> Path:
    """The library kernels_<kind> with the mutant in place of its source."""
    where = folder / "cuda" / mutant.file
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(mutant.text())
    source = where if not mutant.unit else KERNELS / mutant.unit
    made, library = folder / f"{kind}.o", folder / f"libkernels_{kind}.so"
    common = ("g++", "-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", *FLAGS[kind])
    _run(*common, "-I", folder, "-I", ROOT / "csrc", "-x", "c++", "-c", source, "-o", made)
    objects = [*(emulator.BUILD / "CMakeFiles" / f"kernels_{kind}_objects.dir").rglob("*.o")]
    objects += (emulator.BUILD / "CMakeFiles" / f"kernels_{kind}.dir").rglob("*.o")
    rest = [o for o in objects if o.name != f"{mutant.source}.o"]
    link = FLAGS["sanitize"] if kind == "sanitize" else ()
    _run("g++", "-shared", *link, made, *rest, "-o", library, "-ldl")
    return library


def _run(*command: object) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a mutant must compile:\n{done.stderr[-3000:]}")


def found_by(mutant: Mutant, folder: Path) -> str:
    """The first gate that finds the mutant, or the empty string."""
    op = mutant.source.removesuffix(".cu").removesuffix("_backward")
    for gate, (kind, tests) in GATES.items():
        library = build(mutant, kind, folder)
        if not _passes(library, f"({tests})" + ("" if gate == "sanitize" else f" and {op}")):
            return gate
    return ""


def _passes(library: Path, tests: str) -> bool:
    """The tests over that library, in a child of this process, which has torch imported already."""
    child = os.fork()
    if child == 0:
        os.environ["SYNERGEN_SIMT_KERNELS"] = str(library)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", "-k", tests)
        os._exit(int(pytest.main([str(TESTS / "test_cuda_emulated.py"), *options])))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code in (2, 3, 4, 5):  # pytest itself went wrong, or ran no test
                raise RuntimeError(f"pytest ended with {code} for -k {tests!r}")
            return code == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    print(f"     killed after {SECONDS} s: -k {tests!r}", flush=True)
    return False


def _judge(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return found_by(mutant, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--third", type=int, choices=(1, 2, 3), help="every third mutant, beginning with this one")
    parser.add_argument("--only", type=int, nargs="+", help="these mutants")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="how many at a time (all cores)")
    chosen = parser.parse_args()
    mutants = [m for m in MUTANTS if not chosen.only or m.number in chosen.only]
    mutants = mutants[chosen.third - 1 :: 3] if chosen.third else mutants
    if not emulator.available():
        print("cuda_mutants: needs g++, cmake and ninja on PATH", file=sys.stderr)
        return 2
    for kind in FLAGS:
        emulator.build("synergen_simt", f"kernels_{kind}")
    counts: dict[str, int] = {}
    # Forked workers: each has torch imported already, and forks again for every run of the tests.
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("fork")) as workers:
        for mutant, gate in zip(mutants, workers.map(_judge, mutants), strict=True):
            counts[gate] = counts.get(gate, 0) + 1
            what = " ".join(mutant.before.split())[:60]
            print(f"{mutant.number:3}  {mutant.file:24} {gate or 'NOT FOUND':10} {what}", flush=True)
    missed = counts.pop("", 0)
    print(f"{len(mutants) - missed} of {len(mutants)} found: " + ", ".join(f"{n} by {g}" for g, n in counts.items()))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
