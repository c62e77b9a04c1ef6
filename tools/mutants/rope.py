"""rope."""

from . import planted

MUTANTS, add = planted("rope.cu")

add("  __syncthreads();\n  for (int64_t item", "  for (int64_t item")
add("token * part.heads + head) * p.dim", "token + head) * p.dim")
add("i < launch.pairs; i += kThreads", "i + 1 < launch.pairs; i += kThreads")
add("p.inverse ? -s : s", "s")
add("item - queries, sines", "item, sines")
add("if (item < queries)", "if (item <= queries)")
add("first + i) / static_cast<double>(p.dim)", "i) / static_cast<double>(p.dim)")
add("store_pack(y + half, i, second)", "store_pack(y + half, i, first)")
