"""decode_attention_common.cuh: which keys a block reads, and how parts of an answer are joined."""

from . import planted

MUTANTS, add = planted("decode_attention_common.cuh", "decode_attention.cu")

add("end(within(p.lengths.at(row, 0), p.keys))", "end(p.lengths.at(row, 0))")
add("begin = within(p.starts.at(row, 0), end);", "begin = p.starts.at(row, 0);")
add("begin = within(p.starts.at(row, 0), end);", "begin = 0;")
add("place < 0 ? 0 : place", "place")
add("ceil_div(group, kQueries);", "group / kQueries + (group < kQueries);")
add("rest % chunks * kQueries", "rest % chunks")
add("head = kv_head * group + first;", "head = first;")
add("group - first < kQueries ? group - first : kQueries", "group")
add("begin = keys.begin + split * launch.span;", "begin = split * launch.span;")
add("keys.end - begin < launch.span ? keys.end : begin + launch.span", "keys.end")
add("keys.end - begin < launch.span ? keys.end : begin + launch.span", "begin + launch.span")
add("peak = other > peak ? other : peak;", "peak = other;")
add("if (one[width + 1] == 0) continue;", "")
add("value += weight * one[d];", "value += one[d];")
add("total += weight * one[width + 1];", "total += one[width + 1];")
add("total == 0 ? A(0) : value / total", "value / total")
add(
    "  __syncthreads();\n  for (int64_t i = threadIdx.x; i < task.queries",
    "  for (int64_t i = threadIdx.x; i < task.queries",
)
add("i < task.queries * launch.width; i += blockDim.x", "i < task.queries * launch.width - 1; i += blockDim.x")
add("i < task.queries * launch.width; i += blockDim.x", "i < task.queries * launch.width; i += 2 * blockDim.x")
add("if (column >= p.dim) continue;", "if (column > p.dim) continue;")
add("task.slice * launch.width + d", "d")
add("warps, task.queries * each", "warps - 1, task.queries * each")
add("task.row * p.heads + task.head + query", "task.row * p.heads + query")
add("(row * launch.splits + task.split) * (p.dim + 2)", "(row * launch.splits + task.split) * p.dim")
add("if (column == 0) part[p.dim] = all.peak, part[p.dim + 1] = all.total;", "if (column == 0) part[p.dim] = all.peak;")
add("part[p.dim + 1] = all.total;", "part[p.dim + 1] = 1;")
