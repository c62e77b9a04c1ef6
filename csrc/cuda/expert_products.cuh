// Grouped products: how matrices of experts are seen, where rows of the result go.
#pragma once

#include <cmath>

#include "cuda/expert_ffn.h"
#include "cuda/gemm_view.cuh"

namespace synergen::cuda {

template <class G>
SIMT_FN View<G> view_of_expert(DType dtype, const void* data, const int64_t (&strides)[3],
                               int64_t expert) {
  View<G> all = view<G>(dtype, data, strides[1], strides[2]);
  all.data += G::steps(dtype, expert * strides[0]);
  return all;
}

// The routing weight of a pair.
template <class A>
SIMT_FN A weight_of(const ExpertFfnParams& p, int32_t pair) {
  if (p.weight == nullptr) return A(1);
  const uint32_t top_k = static_cast<uint32_t>(p.top_k),
                 token = static_cast<uint32_t>(pair) / top_k;
  const int64_t at = token * p.weight_strides[0] + (pair - token * top_k) * p.weight_strides[1];
  const char* data = static_cast<const char*>(p.weight);
  return gemm::read<A>(p.weight_dtype, data + at * gemm::bytes_of(p.weight_dtype));
}

// 1 / (1 + exp(-x)), within 3 units of the last place of 16-bit storage, or of float and double.
template <class G, class A>
SIMT_FN A sigmoid(A x) {
  if constexpr (sizeof(typename G::Element) == 2) {
    return simt::fast_divide(1.0f, 1.0f + simt::fast_exp(-x));
  } else {
    return A(1) / (A(1) + std::exp(-x));
  }
}

// Rows of sums from column `first` on: with one expert a token to the token's row in `out`, with
// more to the pair's in pair_rows. Times weight(pair).
template <class G, class P, class B, class W>
SIMT_FN void put_rows(const P& p, const typename G::Sums& sums, const B& b, const RowTile& tile,
                      int32_t rows, int64_t first, void* out, const W& weight) {
  const bool direct = p.top_k == 1;
  G::each_run(sums, b, [&](int m, int n, auto& left, auto& right) {
    if (m >= rows) return;
    const int32_t pair = p.order[tile.begin + m];
    const auto scale = weight(pair);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      left[i] *= scale;
      right[i] *= scale;
    }
    const int64_t c = first + n, at = pair * p.dim + c, count = p.dim - c;
    const DType dtype = direct ? p.dtype : p.inner;
    void* to = direct ? out : p.pair_rows;
    if (count > 0) G::store_run(dtype, to, at, count, left);
    if (count > 32) G::store_run(dtype, to, at + 32, count - 32, right);
  });
}

// f(Type<G>{}), G the arithmetic of a launch.
template <class F>
void dispatch_arithmetic(const ExpertFfnParams& p, const Experts& e, F&& f) {
  gemm::dispatch(p.dtype, e.tensor_cores, f);
}

}  // namespace synergen::cuda
