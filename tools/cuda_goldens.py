"""The PTX of every wrapper in csrc/simt/device.cuh, against a text that was read by eye: tools/cuda_goldens.txt.

The emulator runs twins of these wrappers, so it cannot see a wrong operand or qualifier of the real ones. Each is
called by a kernel of its own whose operands come from in[0], in[1], ... and whose results go to out[0], out[1], ...; in
the PTX that nvcc makes of it, registers are replaced by these names. Needs nvcc.

    python tools/cuda_goldens.py
    python tools/cuda_goldens.py --update       # after reading the difference
"""

import argparse
import difflib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from cuda_sass import CSRC, OPTIONS, nvcc

GOLDENS = Path(__file__).with_suffix(".txt")
ARCH = "80"  # the oldest: what it has, all have

#: How each wrapper is called; `in` is const uint32_t*, `out` uint32_t*, `shared` the block's memory.
CALLS = {
    "named_barrier": "simt::named_barrier(static_cast<int>(in[0]), static_cast<int>(in[1]));",
    "load_acquire": "out[0] = simt::load_acquire(in + 3);",
    "add_release": "simt::add_release(out + 3, in[0]);",
    "store_release": "simt::store_release(out + 3, in[0]);",
    "spin_pause": "simt::spin_pause();",
    "load16": "{const simt::Words w = simt::load16(in + 4); PUT4(w.v)}",
    "load16_once": "{const simt::Words w = simt::load16_once(in + 4); PUT4(w.v)}",
    "and_or": "out[0] = simt::and_or(in[0], in[1], in[2]);",
    "add_bf16x2": "out[0] = simt::add_bf16x2(in[0], in[1]);",
    "add_f16x2": "out[0] = simt::add_f16x2(in[0], in[1]);",
    "cp_async16": "simt::cp_async16(shared + in[0], in + 4, in[1] != 0);",
    "cp_async_commit": "simt::cp_async_commit();",
    "cp_async_wait": "simt::cp_async_wait<3>();",
    "ldmatrix_x4": "{uint32_t r[4]; simt::ldmatrix_x4(r, shared + in[0]); PUT4(r)}",
    "ldmatrix_x4_trans": "{uint32_t r[4]; simt::ldmatrix_x4_trans(r, shared + in[0]); PUT4(r)}",
    "mma_bf16": "{FLOATS(d) WORDS(a) simt::mma_bf16(d, a, in[8], in[9]); PUT4F(d)}",
    "mma_f16": "{FLOATS(d) WORDS(a) simt::mma_f16(d, a, in[8], in[9]); PUT4F(d)}",
    "fast_exp": "PUTF(0, simt::fast_exp(GETF(0)))",
    "fast_log": "PUTF(0, simt::fast_log(GETF(0)))",
    "fast_divide": "PUTF(0, simt::fast_divide(GETF(0), GETF(1)))",
    "reciprocal_sqrt": "PUTF(0, simt::reciprocal_sqrt(GETF(0)))",
    "widen": "PUTF(0, simt::widen(f16{static_cast<uint16_t>(in[0])}))",
    "narrow": "out[0] = simt::narrow<bf16>(GETF(0)).bits; out[1] = simt::narrow<f16>(GETF(1)).bits;",
}
#: Wrappers with nothing to compare: no instruction of their own, or none but a call of CUDA's.
NONE = ("grid_sync", "shared_address")

SOURCE = """
#include "simt/simt.h"
#define GETF(i) __uint_as_float(in[i])
#define PUTF(i, x) out[i] = __float_as_uint(x);
#define FLOATS(d) float d[4] = {GETF(0), GETF(1), GETF(2), GETF(3)};
#define WORDS(a) const uint32_t a[4] = {in[4], in[5], in[6], in[7]};
#define PUT4(r) out[0] = r[0]; out[1] = r[1]; out[2] = r[2]; out[3] = r[3];
#define PUT4F(r) PUTF(0, r[0]) PUTF(1, r[1]) PUTF(2, r[2]) PUTF(3, r[3])
using namespace synergen;
"""


def wrappers() -> list[str]:
    """Names of the device functions in device.cuh."""
    text = (CSRC / "simt" / "device.cuh").read_text()
    return list(dict.fromkeys(re.findall(r"^SIMT_FN (?:[\w:]+ )+(\w+)\(", text, re.MULTILINE)))


def ptx() -> str:
    kernels = [
        f'extern "C" __global__ void {name}_(const uint32_t* in, uint32_t* out) {{\n'
        f"  SIMT_DYNAMIC_SHARED(shared);\n  {call}\n}}\n"
        for name, call in CALLS.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "goldens.cu", Path(folder) / "goldens.ptx"
        source.write_text(SOURCE + "".join(kernels))
        quiet = [o for o in OPTIONS if o not in ("-Werror", "all-warnings")]  # shared memory that a call does not use
        command = [str(nvcc()), *quiet, f"-arch=sm_{ARCH}", "-w", "-ptx", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cuda_goldens: the calls must compile:\n{done.stderr[-3000:]}")
        return made.read_text()


def normalised(text: str) -> str:
    """Every kernel's instructions with the places of their operands, one paragraph each."""
    paragraphs = []
    for name, body in re.findall(r"\.entry (\w+)_\([^)]*\)[^{]*\{(.*?)\n\}", text, re.DOTALL):
        paragraphs.append("\n".join([f"{name}:", *(f"  {line}" for line in _lines(body))]))
    return "\n\n".join(paragraphs) + "\n"


def _lines(body: str) -> list[str]:
    held: dict[str, str] = {}  # what a register holds, in words
    lines = []
    for statement in re.sub(r"//[^\n]*", "", body).split(";"):
        statement = re.sub(r"^[{}\s]+", "", re.sub(r"\s+", " ", statement)).strip()
        if not statement or statement.startswith((".reg", "ret")):
            continue
        opcode, _, operands = statement.partition(" ")
        registers = re.findall(r"%\w+", operands)
        if opcode.startswith("ld.param"):
            held[registers[0]] = "in" if "param_0" in operands else "out"
        elif opcode.startswith(("cvta", "mov.b32", "mov.u32", "mov.b64")) and len(registers) == 2:
            held[registers[0]] = held.get(registers[1], registers[1])
        elif opcode.startswith("mov") and "shared" in operands:
            held[registers[0]] = "shared"
        elif opcode.startswith("ld.global") and re.fullmatch(r"%\w+, \[%\w+(\+\d+)?\]", operands):
            at = re.search(r"\+(\d+)", operands)
            place = f"{held[registers[1]]}{int(at[1]) // 4 if at else 0}"
            held[registers[0]] = place
            if "global.nc" not in opcode and opcode not in ("ld.global.u32", "ld.global.b32", "ld.global.f32"):
                lines.append(f"{opcode} {place}")
        elif opcode.startswith("st.global") and re.fullmatch(r"\[%\w+(\+\d+)?\], %\w+", operands):
            at = re.search(r"\+(\d+)", operands)
            place = f"{held[registers[0]]}{int(at[1]) // 4 if at else 0}"
            lines.append(f"{place} = {held.get(registers[1], registers[1])}")
        else:
            known = re.sub(r"%\w+", lambda r: held.get(r[0], r[0]), operands)
            lines.append(f"{opcode} {known}".strip())
    return _renamed(lines)


def _renamed(lines: list[str]) -> list[str]:
    """Registers that are neither operand nor result, numbered as they come."""
    order: dict[str, str] = {}

    def number(found: "re.Match[str]") -> str:
        return order.setdefault(found[0], f"t{len(order)}")

    return [re.sub(r"%\w+", number, line) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write {GOLDENS.name}")
    chosen = parser.parse_args()
    if nvcc() is None:
        print("cuda_goldens: needs nvcc on PATH", file=sys.stderr)
        return 2
    missing = [name for name in wrappers() if name not in (*CALLS, *NONE)]
    if missing:
        print(f"cuda_goldens: wrappers without a call in CALLS: {', '.join(missing)}", file=sys.stderr)
        return 1
    found = normalised(ptx())
    if chosen.update:
        GOLDENS.write_text(found)
    wanted = GOLDENS.read_text()
    for line in difflib.unified_diff(wanted.splitlines(), found.splitlines(), GOLDENS.name, "nvcc", lineterm=""):
        print(line, file=sys.stderr)
    print(f"{len(CALLS)} wrappers: PTX {'as read by eye' if found == wanted else 'has changed'}")
    return 0 if found == wanted else 1


if __name__ == "__main__":
    sys.exit(main())
