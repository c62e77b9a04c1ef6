"""sample_masses.cuh, in sample_tokens."""

from . import planted

MUTANTS, add = planted("sample_masses.cuh", "sample_tokens.cu")

# Keys and logits.
add("x + 0.0f)", "x)")
add("x + 0.0);", "x);")
add("static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 1u << 31", "1u << 31")
add("bits >> 63 | INT64_MIN", "INT64_MIN")
add("__uint_as_float(key & sign ? key ^ sign : ~key)", "__uint_as_float(key ^ sign)")
add("key & sign ? key ^ sign : ~key", "key ^ sign", which=1)
add("32 - __clz(", "31 - __clz(")
add("64 - __clzll(", "63 - __clzll(")
add("__fadd_rn(u, __fmul_rn(scale, c - u))", "fmaf(scale, c - u, u)")
add("c > -infinity<A>() && u > -infinity<A>()", "c > -infinity<A>()")
add("c > -infinity<A>() && u > -infinity<A>()", "u > -infinity<A>()")
add("uncond == nullptr || scale == A(1) ? c", "uncond == nullptr ? c")
add("if (there && mixed == mixed)", "if (there)")
add("return there || c != c || u != u ?", "return c != c || u != u ?")
add("return there || c != c || u != u ?", "return there || u != u ?")
add("return there || c != c || u != u ?", "return there || c != c ?")
add("i + first + N <= vocab", "i + first < vocab")
add("i + e < vocab ? static_cast", "i + e <= vocab ? static_cast")
add("row[(i + e) * between]", "row[i + e]")
add("logits[i * stride]", "logits[i]")
add("uncond[i * uncond_stride]", "uncond[i * stride]")
add("read(uncond, uncond_stride,", "read(uncond, stride,")
# Masses.
add("x[e] > -64.0 ? x[e] : -64.0", "x[e]")
# First digits, and the short way.
add("<< kShift) : 0);", "<< (kShift - 1)) : 0);")
add("above < 0 ? 0 : ", "")
add("above < kEach ? above : kEach - 1", "above")
add("(bin ^ static_cast<int>(negative))", "bin")
add("bin < -1 ? kFrom", "true ? kFrom")
add("static_cast<Key>(-1 - bin)", "static_cast<Key>(-bin)")
add("static_cast<Key>(bin + 1)", "static_cast<Key>(bin)")
add("bin < kEach - 1 ?", "true ?")
add("usual = usual && c[e] + u[e] > -infinity<A>() && mixed", "usual = usual && mixed")
add("usual = usual && c[e] + u[e]", "usual = c[e] + u[e]")
add("    if (usual) return;\n", "    return;\n")
add("const bool one_side = uncond == nullptr || scale == A(1);", "const bool one_side = uncond == nullptr;")
