"""sample_masses.cuh, in sample_tokens."""

from . import planted

MUTANTS, add = planted("sample_masses.cuh", "sample_tokens.cu")

# Keys and logits.
add("x + 0.0f), sign", "x), sign")
add("x + 0.0));", "x));")
add("bits & sign ? ~bits : bits | sign", "bits | sign")
add("bits & sign ? ~bits : bits | sign", "bits | sign", which=1)
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
