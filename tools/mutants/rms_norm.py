"""rms_norm."""

from . import planted

MUTANTS, add = planted("rms_norm.cu")

add("const int64_t row = blockIdx.x;", "const int64_t row = blockIdx.x / 2 * 2;")
add("if (i < count) add(held[k] =", "if (i <= count) add(held[k] =")
add("if (i < count) write(i, held[k]);", "if (i <= count) write(i, held[k]);")
add("if (i < count) write(i, held[k]);", "if (i + 1 < count) write(i, held[k]);")
add("for (int64_t i = threadIdx.x + beyond; i < count; i += blockDim.x) {\n      add(",
    "for (int64_t i = threadIdx.x + beyond; i + 1 < count; i += blockDim.x) {\n      add(")  # fmt: skip
add("for (int64_t i = threadIdx.x + beyond; i < count; i += blockDim.x) {\n      write(",
    "for (int64_t i = beyond; false;) {\n      write(")  # fmt: skip
add("mean + static_cast<A>(p.eps)", "mean")
add("simt::widen(pack.v[e]) * scale * simt::widen(w.v[e])", "simt::widen(pack.v[e]) * scale")
add("p.x_rows.offset(row)", "row * p.dim")
add("p.dy_rows.offset(row)", "row * p.dim")
add("SIMT_SHARED(A, partial, [32])", "SIMT_SHARED(A, partial, [1])")
add("block_sum(product, partial) * share", "product * share")
add("const int64_t last = p.rows * (blockIdx.x + int64_t{1}) / gridDim.x;",
    "const int64_t last = p.rows * (blockIdx.x + int64_t{1}) / gridDim.x + (blockIdx.x == 0);")  # fmt: skip
add("for (int e = 0; e < N; ++e) total[i * N + e] = 0;", "for (int e = 1; e < N; ++e) total[i * N + e] = 0;")
add("for (int e = 0; e < N; ++e) total[i * N + e] = column[k][e];",
    "for (int e = 1; e < N; ++e) total[i * N + e] = column[k][e];")  # fmt: skip
add("sums[e] += d * value * r;", "sums[e] = d * value * r;")
add("- value * slope) * r", "- value) * r")
add("piece < p.pieces; ++piece", "piece + 1 < p.pieces; ++piece")
add("if (i >= p.dim) return;", "if (i > p.dim) return;")
add("p.residual_rows.offset(row)", "row * p.dim")
add("load_pack<N>(residual_, i, stride_)", "load_pack<N>(residual_, i, 1)")
add("simt::narrow<T>(simt::widen(x.v[e]) + simt::widen(residual.v[e]))", "x.v[e]")
add("store_pack(sum_, i, x);", "if (i > 0) store_pack(sum_, i, x);")
add("static_cast<T*>(p.sum) + row * p.dim", "static_cast<T*>(p.sum)")
add("return load_pack<N>(sum_, i, 1);", "return x_.read(i);")
add("p.dsum_rows.offset(row)", "row * p.dim")
add("load_pack<N>(dsum, i, p.dsum_stride)", "load_pack<N>(dsum, i, 1)")
add("if constexpr (kSum<P>) result += simt::widen(own.v[e]);", "")
add("packs<T>(p.residual, p.residual_stride, p.residual_rows)", "true")
add("return packs<T>(p.dsum, p.dsum_stride, p.dsum_rows);", "return true;")
