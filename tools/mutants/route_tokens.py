"""route_tokens."""

from . import planted

MUTANTS, add = planted("route_tokens.cu")

add("  for (int64_t e = lane; e < p.experts; e += 32) counters[e] = 0;\n")
add("counters[e] = 0;\n  __syncwarp();", "counters[e] = 0;")
add("if (has_expert(p, e)) atomicAdd(&counters[e], 1);", "if (has_expert(p, e)) counters[e] += 1;")
add("if (has_expert(p, e)) atomicAdd(&counters[e], 1);", "if (e >= 0) atomicAdd(&counters[e], 1);")
STRIDE = "  for (int64_t e = lane; e < p.experts; e += 32) {"
add("  __syncwarp();\n" + STRIDE, STRIDE)
add("i < (tile + 1) * kCountTile && i < p.pairs; i += 32", "i < (tile + 1) * kCountTile; i += 32")
add("if (i % p.count_tiles == 0) p.offsets", "p.offsets")
add("if (threadIdx.x == 1023) p.offsets", "if (threadIdx.x == 0) p.offsets")
add("(1u << lane) - 1", "(2u << lane) - 1")
add("    __syncwarp();  // next is up to date\n")
add("    __syncwarp();\n    if (there && rank == 0)", "    if (there && rank == 0)")
add("if (there && rank == 0) next[index] += __popc(same);", "if (there && rank == 0) next[index] += 1;")
add("if (there) p.order[next[index] + rank]", "if (there) p.order[next[index]]")
add("if (pair >= rows && pair < p.pairs) p.order[pair] = -1;  // as a row: nobody's", "")
add("if (pair >= rows && pair < p.pairs)", "if (pair > rows && pair < p.pairs)")
add("if (pair >= rows && pair < p.pairs)", "if (pair >= rows)")
add("if (pair >= rows && pair < p.pairs)", "if (pair < p.pairs)")
add("tile * kCountTile; first <", "0; first <")
add("pair < p.pairs ? index_of(p, pair) : -1", "index_of(p, pair)")
add("p.counts[i] = before;", "")
add("begin + each < total ? begin + each : total", "begin + each")
add("router.experts * router.count_tiles * 4", "router.experts * 4")
add("static_cast<size_t>(router.experts) * 4", "4")
add("router.pairs > 0 ? ceil_div(router.pairs, kCountTile) : 1", "ceil_div(router.pairs, kCountTile)")
