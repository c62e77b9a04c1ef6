"""sample_board.cuh, in sample_tokens."""

from . import planted

MUTANTS, add = planted("sample_board.cuh", "sample_tokens.cu")

add("store_pack(bins, threadIdx.x, Pack<uint32_t, N>{});\n  return", "return")
add("x += lane >= distance ? below : 0;", "x += below;")
add("distance < 32; distance *= 2", "distance < 16; distance *= 2")
add("low + (middle << kBits)", "low")
add("if (lane == 31) board.words[warp] = warps;\n  __syncthreads();", "if (lane == 31) board.words[warp] = warps;")
add("if (lane == 31) board", "if (lane == 30) board")
add("lane < kSampleWarps ?", "lane < kSampleWarps / 2 ?")
add("total = lanes_sum(words);", "total = words;")
add("lane < warp ? words", "lane <= warp ? words")
add("board, total) + sum - own;", "board, total) + sum;")
add("return warps_before(sum, board, total) + sum - own;", "warps_before(sum, board, total);\n  return sum - own;")
add("own += weights[b];", "own = weights[b];")
add("if (before < target && target <= before + all) {", "if (before <= target && target < before + all) {")
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
add("+ (high << 2 * kBits)", "")
add("static_cast<uint32_t>(x) & kLow", "static_cast<uint32_t>(x)")
add("const bool has = x >> 32 == high;", "const bool has = true;")
add("return ~lanes_most(~x);", "return lanes_most(x);")
add("before += warp_scan(own) - own;", "before += warp_scan(own);")
add("return meant ? temperature : -1.0;", "return temperature;")
add("top_p >= 0 && top_p <= 1;", "top_p <= 1;")
add("top_k >= 0 && ", "")
add("top_p >= 0 && top_p <= 1;", "top_p >= 0;")
add("guidance - guidance == 0.0 && ", "")
add("temperature - temperature == 0.0 &&", "")
