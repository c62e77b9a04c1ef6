"""stream.cuh: few rows times streamed weights."""

from . import planted

MUTANTS, add = planted("stream.cuh", unit="expert_ffn_quantized.cu")

# Reading.
add("if (first + i < last) pack.v[i]", "if (first + i <= last) pack.v[i]")
add("row[(first + i) * step]", "row[first + i]")
add("if (at < end) pack = *reinterpret_cast", "if (at <= end) pack = *reinterpret_cast")
add("if (at + i < end) pack.v[i]", "if (at + i <= end) pack.v[i]")
add("row[(at + i) * step]", "row[at + i]")
add("(kPacked ? 1 : in.scale_step[h])", "1")
add("(at >> in.group_log2)", "0")
add("!decltype(guarded)::value || at < end) {\n        words", "true) {\n        words")
add("!decltype(guarded)::value || at < end) {\n          b", "true) {\n          b")
add(
    "words = simt::load16_once(w[h] + slot * kChunk<W> * kBits<W> / 8)",
    "words = simt::load16_once(w[h] + slot % kSlots * kChunk<W> * kBits<W> / 8)",
)
add("load_scale<kPacked>(in, h, min(at, end - 1))", "load_scale<kPacked>(in, h, at)")
add("static_cast<int64_t>(begin + own) * kBits<W> / 8", "static_cast<int64_t>(own) * kBits<W> / 8")
add("x[i] = in.x[i] + begin + own_x", "x[i] = in.x[i] + own_x")

# Integers to floats.
add("words.v[2 * step + i / 2]", "words.v[i / 2]")
add("i % 2 == 0 ? 0x4140u : 0x4342u", "i % 2 == 0 ? 0x4342u : 0x4140u")
add("pair & 0xFF7FFF7Fu", "pair")
add("0x43804380u, 0x80008000u", "0x43004300u, 0x80008000u")
add("word ^ 0x80808080u", "word")
add("0xE480E480u", "0xE400E400u")
add("word >> 4 * i,", "word >> 4 * (3 - i),")
add("0xC308C308u : 0xE408E408u", "0xC307C307u : 0xE408E408u")
add("0xC308C308u : 0xE408E408u", "0xC308C308u : 0xE407E407u")
add("const uint32_t word = words.v[step];", "const uint32_t word = words.v[step / 2];")
add("  exchange_at<2>(words, t);\n}", "}")
add("  exchange_at<1>(words, t);\n", "")
add("upper ? low : high, kDistance", "upper ? high : low, kDistance")
add("if ((i & kDistance) != 0) continue;", "if (i > 1) continue;")
add("exchange(ring[slot][1], t);", "")
add("static_cast<int8_t>(words.v[i / 4] >> 8 * (i % 4))", "static_cast<uint8_t>(words.v[i / 4] >> 8 * (i % 4))")
add("i % 2 * 4 + i % 8 / 2", "i % 8")
add("& 15u) - 8)", "& 15u) - 7)")

# Tensor cores.
add("{{low[0], high[0], low[1], high[1]},", "{{low[0], high[0], low[2], high[1]},")
add("{low[2], high[2], low[3], high[3]}}", "{low[2], low[2], low[3], high[3]}}")
add("mma<T>(to, a[1], b.v[2], b.v[3]);", "mma<T>(to, a[1], b.v[3], b.v[2]);")
add("kStride = kNibbles ? 32 : 8", "kStride = 8")
add("kNibbles ? 8 * t : own", "own")
add("scale[j / 2] * part[i][j]", "scale[0] * part[i][j]")
add("        part[i][j] = 0;\n", "")
add("(lane & ~3) | step", "lane & ~3")
add("((base + offset + kStride) & group_mask) == 0) flush()", "((base + offset) & group_mask) == 0) flush()")
add(
    "((base + (slot + 1) * kChunk<W>)&group_mask) == 0) flush()", "((base + slot * kChunk<W>)&group_mask) == 0) flush()"
)
add("  if constexpr (kQuantised<W>) flush();\n}", "}")
add("    base += kRingSize;\n", "    base += kRingSize - 1;\n")
add("w[1] += kRingSize * kBits<W> / 8;", "")
add("for (int i = 0; i < NT; ++i) x[i] += kRingSize;", "for (int i = 0; i < NT; ++i) x[i] += 0;")
add("const bool more = base + 2 * kRingSize <= end;", "const bool more = base + 3 * kRingSize <= end;")
add("const bool more = base + 2 * kRingSize <= end;", "const bool more = true;")
add("if (base + slot * kChunk<W> < end) consume", "if (base + (slot + 1) * kChunk<W> < end) consume")
add("if (base + slot * kChunk<W> < end) fetch", "if (slot == 0) fetch")

# Fused multiply-add.
add("__shfl_sync(kAll, address, 4 * row)", "__shfl_sync(kAll, address, row)")
add("      } else if (at < end) {\n", "      } else {\n")
add("const int safe = min(at, end - 1);", "const int safe = begin;")
add("value_of<A, W>(ring[slot][1], e + j) * scale[1]", "value_of<A, W>(ring[slot][1], e + j) * scale[0]")
add("at + word * kInWord + e;", "at + e;")
add("v[0] = v[1], v[1] = v[2], v[2] = v[3];", "v[0] = v[1], v[1] = v[2];")
add(
    "if (first + slot + kRing < chunks) fetch(slot, first + slot + kRing);",
    "if (first + slot + kRing < chunks) fetch(slot, first + kRing);",
)
add("total += __shfl_xor_sync(kAll, total, 2);", "")
add("if (row / 2 == t) sum[0]", "if (row / 4 == t / 2) sum[0]")

# Several warps.
add("ceil_div(k, unit) * i / n * unit", "ceil_div(k, unit) / n * i * unit")
add("begin < k ? begin : k", "begin")
add("  __syncthreads();\n  if (warp % split == 0) {", "  if (warp % split == 0) {")
add("for (int other = 1; other < split", "for (int other = 2; other < split")
add("own[(other * NT * 4 + i) * 32]", "own[(other * NT * 4) * 32]")
