"""The tensor-core tile of matrix products."""

from . import planted

MUTANTS, add = planted("gemm.cuh", "expert_ffn_backward.cu")

add("(slot & ~31) + slot % 8 / 2 * 8 + slot % 32 / 8 * 2", "(slot & ~31) + slot % 32 / 8 * 8 + slot % 8 / 2 * 2",
    unit="expert_ffn.cu")  # fmt: skip
add("const bool late = k >= first;", "const bool late = k > first;")
add("(late ? k - first : k)", "k")
add("(late ? then_stride : stride)", "stride")
add("kStages = 4;", "kStages = 3;")
add("kAhead = 2;", "kAhead = 3;")
add("const int slot = thread / 4, chunk = thread % 4;", "const int slot = thread / 4, chunk = thread % 2;",
    unit="expert_ffn.cu")  # fmt: skip
add("slot * 64 + (chunk ^ (slot / 2 % 4)) * 16", "slot * 64 + (chunk ^ (slot % 4)) * 16", unit="expert_ffn.cu")
add("rows_[i] != nullptr && k0 + from_ < depth_", "rows_[i] != nullptr", unit="expert_ffn.cu")
add("warp % 4 * 64 + lane / 16 * 8 + lane % 8", "warp % 4 * 64 + lane % 16", unit="expert_ffn.cu")
add("const int half = kRight ? lane / 8 % 2 : lane / 16;", "const int half = lane / 16;", unit="expert_ffn.cu")
add("(fragment_ + sixteen * 16 * 64) ^ (step * 32)", "(fragment_ + sixteen * 16 * 64) + (step * 32)")
add("there_ = from_ < count;", "there_ = true;")
add("const bool valid = there_ && k0 + k_ + i * kEach < depth_;", "const bool valid = there_;")
add("to_ = k_ * C * 2 + (chunk ^ (k_ % 8)) * 16;", "to_ = k_ * C * 2 + chunk * 16;")
add("(kRight ? lane / 8 % 2 : lane / 16) * 8 + lane % 8", "(lane / 16) * 8 + lane % 8")
add("kRight ? warp % 4 * 8 + lane / 16 : warp", "kRight ? warp % 4 * 8 + lane / 8 % 2 : warp")
add("(fragment_ ^ (sixteen * 32))", "(fragment_ + (sixteen * 32))")
add("step * 16 * C * 2));", "step * 8 * C * 2));")
add("look_ahead(k0 + kDepth);", "look_ahead(k0);")
add("      look_ahead(0);\n")
add("if (k < depth_) handles_[i]", "handles_[i]")
add("if (tile < tiles) {\n        a.copy", "{\n        a.copy")
add("      simt::cp_async_commit();  // of nothing", "      // of nothing")
add("i % 4] = 0;\n    if (tiles == 0) return;", "i % 4] = 1;\n    if (tiles == 0) return;")
add("if (tiles == 0) return;  // all threads together\n\n    for", "for")
add("simt::cp_async_wait<kAhead - 1>();\n    __syncthreads();  // tile 0", "__syncthreads();  // tile 0")
add("    __syncthreads();  // tile 0 has come\n")
add("      simt::cp_async_wait<kAhead - 1>();\n      __syncthreads();", "      __syncthreads();")
add(
    "simt::cp_async_wait<kAhead - 1>();\n      __syncthreads();",
    "simt::cp_async_wait<kAhead>();\n      __syncthreads();",
)
add("      __syncthreads();  // the next tile has come, and everybody is done with the one before this\n")
add("load_left(tile, i / 3, (i + 1) % 4);", "load_left(tile, 0, (i + 1) % 4);")
add("if (i == 3 && tile + 1 < tiles)", "if (i == 3 && tile + 2 < tiles)")
add("b1 = words[j % 2 * 2 + 1];", "b1 = words[j % 2 * 2];")
add("if constexpr (std::is_same_v<T, bf16>) {\n          simt", "if constexpr (true) {\n          simt")
add("i % 2 * 2 + j % 2];", "j % 2 * 2 + i % 2];")
add("if constexpr (!B::kSlots) turn", "if constexpr (B::kSlots) turn")
add("warp / 4 * 64 + i / 2 * 16", "warp / 4 * 64 + i / 2 * 8")
add("    x += __shfl_xor_sync(0xffffffffu, x, 1);\n    return x +", "    return x +")
add("bit <= 2; bit *= 2", "bit <= 1; bit *= 2")
add("if (pair & bit) continue;", "if (pair & 1) continue;")
add("const bool upper = lane & bit;", "const bool upper = lane & 1;")
