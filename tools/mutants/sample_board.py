"""sample_board.cuh, in sample_tokens."""

from . import planted

MUTANTS, add = planted("sample_board.cuh", "sample_tokens.cu")

add("store_pack(bins, threadIdx.x, Pack<uint32_t, N>{});\n  return", "return")
add("x += lane >= distance ? below : 0;", "x += below;")
add("distance < 32; distance *= 2", "distance < 16; distance *= 2")
add("distance = 16; distance > 0", "distance = 8; distance > 0")
add("if (lane == 31) board.words[warp] = sum;\n  __syncthreads();", "if (lane == 31) board.words[warp] = sum;")
add("if (lane == 31) board", "if (lane == 30) board")
add("lane < kSampleWarps ?", "lane < kSampleWarps / 2 ?")
add("total = __shfl_sync(0xffffffffu, warps, 31);", "total = warps;")
add("warp > 0 ? warp - 1 : 0", "warp")
add("return sum - own + (warp > 0 ? before : 0);", "return sum - own + before;")
add("return sum - own + (warp > 0 ? before : 0);", "return sum + (warp > 0 ? before : 0);")
add("own += weights[b];", "own = weights[b];")
add("if (before < target && target <= before + own) {", "if (before <= target && target < before + own) {")
add("before < target && target <= before + weights[b]", "before <= target && target < before + weights[b]")
add("threadIdx.x * N + static_cast", "threadIdx.x + static_cast")
add("board.chosen_members = members[b];", "board.chosen_members = 1;")
add("board.before = before;", "board.before = 0;")
add("      before += weights[b];\n", "")
add("if (threadIdx.x == 0) board.ranked = 0;", "")
add("board.ranked = 0;\n  __syncthreads();", "board.ranked = 0;")
# The last block to arrive.
add("  __syncthreads();\n  if (threadIdx.x == 0) {\n    __threadfence();",
    "  if (threadIdx.x == 0) {\n    __threadfence();")  # fmt: skip
add("    __threadfence();\n    board", "    board")
add("1u);\n    __threadfence();", "1u);")
add("    __threadfence();\n  }\n  __syncthreads();", "    __threadfence();\n  }")
add("board.chosen == parts - 1", "board.chosen == 0")
