"""Sums over a block and packs, as rms_norm uses them."""

from . import planted

MUTANTS, add = planted("access.cuh", unit="rms_norm.cu")

add("distance = 16; distance > 0", "distance = 8; distance > 0")
add("distance /= 2", "distance /= 4")
add("__shfl_xor_sync(0xffffffffu, x, distance)", "__shfl_xor_sync(0xffffu, x, distance)")
add("if (lane == 0) partial[threadIdx.x / 32] = x;", "if (lane == 0) partial[0] = x;")
add("if (lane == 0) partial[threadIdx.x / 32] = x;", "partial[threadIdx.x / 32] = x + lane * 0;")
add("  __syncthreads();\n  x = warp_sum", "  x = warp_sum")
add("  __syncthreads();  // partial", "  // partial")
add("lane < warps ? partial[lane] : A(0)", "partial[lane]")
add("const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32;",
    "const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32 - 1;")  # fmt: skip
add("return {{row[i * stride]}};", "return {{row[i]}};")
add("row + i * N) = pack", "row + i) = pack")
add("return *reinterpret_cast<const Pack<T, N>*>(row + i * N);",
    "return *reinterpret_cast<const Pack<T, N>*>(row + i);")  # fmt: skip
add("fits = fits && outer[d] % kPack<T> == 0;", "fits = fits && true;")
add("bool fits = inner == 1 && ", "bool fits = ")
add(" && reinterpret_cast<uintptr_t>(base) % 16 == 0")
add("ceil_div(ceil_div(items, each), 32) * 32", "items / each")
