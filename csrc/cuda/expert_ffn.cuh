// Grouped products: which tile a block has, how matrices are seen, where rows of the result go.
#pragma once

#include <cmath>

#include "cuda/expert_ffn.h"
#include "cuda/gemm_plain.cuh"

namespace synergen::cuda {

// Blocks go column by column through groups of row tiles: 132 of them work on about 16 tiles of 128
// rows and 8 of 256 columns, of all shapes the one that reads least for as many, 4096 x K.
constexpr unsigned kGroup = 16;

struct TileAt {
  unsigned row, column;
};
SIMT_FN TileAt tile_of(unsigned block, int64_t rows, int64_t columns) {
  const unsigned wide = static_cast<unsigned>(columns);
  const unsigned first = block / (kGroup * wide) * kGroup, at = block - first * wide;
  const unsigned left = static_cast<unsigned>(rows) - first, high = left < kGroup ? left : kGroup;
  return {first + at % high, at / high};
}

// A strided matrix as the arithmetic G addresses it.
template <class G>
struct View {
  const typename G::Element* data;
  int64_t row, step;

  SIMT_FN gemm::Place<typename G::Element> at(int64_t r, int64_t c) const {
    return G::place(data + r * row + c * step, step);
  }
  SIMT_FN gemm::Place<typename G::Element> nowhere() const { return G::place(nullptr, step); }
};
template <class G>
SIMT_FN View<G> view(DType dtype, const void* data, int64_t row_stride, int64_t stride) {
  return {static_cast<const typename G::Element*>(data), G::steps(dtype, row_stride),
          G::steps(dtype, stride)};
}
template <class G>
SIMT_FN View<G> view(DType dtype, const void* data, const int64_t (&strides)[2]) {
  return view<G>(dtype, data, strides[0], strides[1]);
}
template <class G>
SIMT_FN View<G> view_of_expert(DType dtype, const void* data, const int64_t (&strides)[3],
                               int64_t expert) {
  View<G> all = view<G>(dtype, data, strides[1], strides[2]);
  all.data += G::steps(dtype, expert * strides[0]);
  return all;
}

SIMT_FN int64_t index_of(const ExpertFfnParams& p, int64_t pair) {
  const uint32_t top_k = static_cast<uint32_t>(p.top_k),
                 token = static_cast<uint32_t>(pair) / top_k;
  return p.index[token * p.index_strides[0] + (pair - token * top_k) * p.index_strides[1]];
}
SIMT_FN bool has_expert(const ExpertFfnParams& p, int64_t index) {
  return index >= 0 && index < p.experts;
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
  if (p.dtype == DType::kFloat64) return f(Type<gemm::PlainFma<double>>{});
  if (!e.tensor_cores) return f(Type<gemm::PlainFma<float>>{});
  if (p.dtype == DType::kBFloat16) return f(Type<gemm::TensorCores<bf16>>{});
  f(Type<gemm::TensorCores<f16>>{});
}

}  // namespace synergen::cuda
