"""route_tokens.h: what route_tokens and expert_ffn share."""

from . import planted

MUTANTS, add = planted("route_tokens.h", "route_tokens.cu")

add("return index >= 0 && index < p.experts;", "return index < p.experts;")
add("return index >= 0 && index < p.experts;", "return index >= 0;")
add("token * p.index_strides[0] + (pair - token * top_k) * p.index_strides[1]", "token * p.index_strides[0] + pair % 2")
add("token * p.index_strides[0] +", "token * top_k +")
add("sum += lane >= distance ? below : 0;", "sum += below;")
add("if (lane == 31) warps[warp] = sum;", "if (lane == 30) warps[warp] = sum;")
add("  __syncthreads();\n  for (int w = 0; w < warp; ++w)", "  for (int w = 0; w < warp; ++w)")
add("for (int w = 0; w < warp; ++w) sum", "for (int w = 1; w < warp; ++w) sum")
add("return sum - own;", "return sum;")
