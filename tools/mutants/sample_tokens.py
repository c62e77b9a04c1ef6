"""sample_tokens."""

from . import planted

MUTANTS, add = planted("sample_tokens.cu")

add("  if (lane == 0) board.words[warp] = x;\n  __syncthreads();", "  if (lane == 0) board.words[warp] = x;")
add("  __syncthreads();  // the words", "  // the words")
add("board.bins[threadIdx.x] = 0;\n  __syncthreads();", "board.bins[threadIdx.x] = 0;")
add("  __syncthreads();\n  if (threadIdx.x < 32)", "  if (threadIdx.x < 32)")
add("      board.inside = board.bins[bin];\n    }\n  }\n  __syncthreads();",
    "      board.inside = board.bins[bin];\n    }\n  }")  # fmt: skip
add("if (threadIdx.x < kBins) board.bins", "if (threadIdx.x + 1 < kBins) board.bins")
add("board.bins[threadIdx.x] = 0;", "board.bins[threadIdx.x + 1] = 0;")
add("if (lane == 0) board_.words[warp] = own;\n    __syncthreads();",
    "if (lane == 0) board_.words[warp] = own;")  # fmt: skip
add("    __syncthreads();\n    return static_cast<int64_t>(board_.reached);",
    "    return static_cast<int64_t>(board_.reached);")  # fmt: skip
add("x + 0.0f), sign", "x), sign")
add("bits & sign ? ~bits : bits | sign", "bits | sign")
add("__fadd_rn(u, __fmul_rn(scale, c - u))", "fmaf(scale, c - u, u)")
add("x = x > -64.0 ? x : -64.0;", "")
add("sum >= target", "sum > target")
add("while (before + board.bins[bin] < target)", "while (before + board.bins[bin] <= target)")
add("target -= board_.reached;", "")
add("target -= board_.reached;", "", which=1)
add("mask |= static_cast<Key>", "mask = static_cast<Key>")
add("static_cast<uint64_t>(i) > cutoff", "static_cast<uint64_t>(i) >= cutoff")
add("if (target == inside) return static_cast<uint64_t>(n_);", "if (target == inside) return 0;")
add("while (n_ - 1 >> shift >= kBins) shift += 8;", "")
add("static_cast<uint64_t>(k) < count_", "false")
add("temperature >= 0 && k >= 0", "k >= 0")
add("bad |= !(x < infinity());", "")
add("bad |= !(x == x) || !(other == other);", "")
add("x == -infinity() || other == -infinity() ? -infinity() : mixed", "mixed")
add("return !bad && count_ > 0;", "return !bad;")
add("if (logits_[i] == most_ && first == ~uint64_t{0})", "if (logits_[i] == most_)")
add("if (!(logits_[i] > -infinity())) mass_[i] = 0;", "")
add("before <= threshold && threshold < before + own", "threshold < before + own")
add("before += __shfl_sync(kAll, sum, 31);", "")
add("sum += lane >= distance ? below : 0;", "sum += below;", which=1)
add("uint64_t sum = i < end ? mass_[i] : 0;", "uint64_t sum = mass_[i];")
add("p.rows * p.vocab * (p.dtype", "p.rows * (p.vocab - 1) * (p.dtype")
