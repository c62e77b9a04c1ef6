"""fold_tokens_backward."""

from . import planted

MUTANTS, add = planted("fold_tokens_backward.cu")

add("  __syncwarp();\n  for (int64_t t = tile", "  for (int64_t t = tile")
add("  __syncwarp();\n  for (int d = lane; d < kDigit && tile", "  for (int d = lane; d < kDigit && tile")
add("atomicAdd(&counters[warp][digit_of(p.keys[t], p.shift)], 1);",
    "counters[warp][digit_of(p.keys[t], p.shift)] += 1;")  # fmt: skip
add("d < kDigit && tile < p.tiles; d += 32) {\n    p.counts", "d < kDigit; d += 32) {\n    p.counts")
add("  __syncthreads();\n  int32_t before", "  int32_t before")
add("sum += lane >= distance ? below : 0;", "sum += below;")
add("if (lane == 31) warps[warp] = sum;", "if (lane == 30) warps[warp] = sum;")
add("  __syncwarp();\n  for (int64_t begin = tile", "  for (int64_t begin = tile")
add("    __syncwarp();\n    if (there && rank == 0)", "    if (there && rank == 0)")
add("    __syncwarp();\n    if (there) {", "    if (there) {")
add("(1u << lane) - 1", "(2u << lane) - 1")
add("p.other_order[place] = p.order[t];", "p.other_order[place] = static_cast<int32_t>(t);")
add("if (id > p.vocab) return;", "if (id >= p.vocab) return;")
add("if (p.keys[middle] < id)", "if (p.keys[middle] <= id)")
add("if (i >= p.dim / N) return;", "if (i > p.dim / N) return;")
add("p.first[id] >= begin, ends", "p.first[id] > begin, ends")
add("p.first[id + 1] <= end;", "p.first[id + 1] < end;")
add("if (at + k < end) {", "if (at + k <= end) {")
add("if (id == p.vocab) return;", "")
add("for (int e = 0; e < N; ++e) sum[e] = 0;", "")
add("piece <= to; ++piece", "piece < to; ++piece")
add("begin < end && from == to", "from == to")
add("if (image + k >= p.batch) continue;", "")
add("p.vocab >> p.shift; p.shift += 8", "p.shift < 8; p.shift += 8")
add("take(p.counts, kDigit * p.tiles * 4);", "take(p.counts, kDigit * p.tiles * 2);")
add("const int64_t part = p.pieces * p.dim", "const int64_t part = (p.pieces - 1) * p.dim")
