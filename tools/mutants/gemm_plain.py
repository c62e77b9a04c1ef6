"""Matrix products without tensor cores."""

from . import planted

MUTANTS, add = planted("gemm_plain.cuh", "expert_ffn_backward.cu")

add("if (dtype == DType::kBFloat16) return simt::widen(*static_cast<const bf16*>(p));")
add("if (dtype == DType::kFloat16) return simt::widen(*static_cast<const f16*>(p));")
add("p.data + i * p.step", "p.data + i")
add("} else if (dtype == DType::kFloat16) {", "} else if (dtype == DType::kOther) {")
add("return (n / 32 % 2 * 2 + n / 4 % 2) * 64", "return (n / 4 % 2 * 2 + n / 32 % 2) * 64")
add("rows_[i].data != nullptr && k0 + k_ < depth_", "rows_[i].data != nullptr")
add("rows_[i].data != nullptr && k0 + k_ < depth_", "k0 + k_ < depth_")
add("kIsRight ? slot_of(r) : r", "r", unit="expert_ffn.cu")
add("kIsRight ? slot_of(slot_) : slot_", "slot_")
add("there_ = slot_ < count;", "there_ = true;")
add("const bool valid = there_ && k < depth_;", "const bool valid = there_;")
add("tile % 2 * kDepth * (kLeft + kRight)", "0 * kDepth * (kLeft + kRight)")
add("if (tiles == 0) return;  // all threads together\n\n    a.fetch", "a.fetch")
add("    __syncthreads();  // tile 0 is there\n")
add("a.fetch((tile + 1) * kDepth);", "a.fetch(tile * kDepth);")
add("if (tile + 1 < tiles) put(tile + 1);", "put(tile + 1);")
add("      __syncthreads();  // the next tile is there, and everybody is done with this one\n")
add("(kLeft + kRight) * static_cast<int>(sizeof(A));", "(kLeft + kRight) * 4;")
add("r = load_pack<4>(right + k * kRight + chunk * 64, 0, 1);", "r = load_pack<4>(right + k * kRight, 0, 1);")
add("f(thread * 4 + i, quarter / 4 * 64", "f(thread * 4, quarter / 4 * 64")
add("    x += __shfl_xor_sync(0xffffffffu, x, 1);\n    return x +", "    return x +")
add("if (i < count) write(", "if (i <= count) write(")
