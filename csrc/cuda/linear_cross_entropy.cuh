// What both directions of linear_cross_entropy share: a tile of logits, and what a target is.
#pragma once

#include <cmath>

#include "cuda/gemm_view.cuh"
#include "kernels.h"

namespace synergen::cuda {

// sums = x weight^T for rows `row`.. and columns `column`.. of a tile; zeros past the last of
// either. Returns the right operand, as each_run wants it.
template <class G>
SIMT_FN auto multiply_logits(const LinearCrossEntropyParams& p, unsigned char* shared, int64_t row,
                             int64_t column, typename G::Sums& sums) {
  const View<G> x = view<G>(p.dtype, p.x, p.x_strides);
  const View<G> weight = view<G>(p.weight_dtype, p.weight, p.weight_strides);
  const auto row_of = [&](int m) { return row + m < p.rows ? x.at(row + m, 0) : x.nowhere(); };
  const auto column_of = [&](int n) {
    return column + n < p.vocab ? weight.at(column + n, 0) : weight.nowhere();
  };
  auto a = G::rows(p.dim, row_of, p.dtype);
  auto b = G::columns(p.dim, column_of, p.weight_dtype);
  G::multiply(shared, a, b, p.dim, sums);
  return b;
}

SIMT_FN int64_t target_of(const LinearCrossEntropyParams& p, int64_t row) {
  return p.targets[row * p.target_stride];
}

// Beside 16-bit operands within 2 units of the 22nd bit for what counts, above -16; else as exact
// as the type.
template <class G, class A>
SIMT_FN A exp_of(A x) {
  if constexpr (sizeof(typename G::Element) == 2) {
    return simt::fast_exp(x);
  } else {
    return std::exp(x);
  }
}

// Whether tensor cores can take the product of x and weight.
inline bool logits_pack(const LinearCrossEntropyParams& p) {
  const bool short_floats = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  return short_floats && p.weight_dtype == p.dtype && p.dim % 8 == 0 &&
         packs<bf16>(p.x, p.x_strides[1], p.x_strides, 1) &&
         packs<bf16>(p.weight, p.weight_strides[1], p.weight_strides, 1);
}

}  // namespace synergen::cuda
