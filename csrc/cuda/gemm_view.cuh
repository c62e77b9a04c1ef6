// What kernels around a matrix product share: which tile a block has, how matrices are seen, which
// arithmetic a launch takes.
#pragma once

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
namespace gemm {

// f(Type<G>{}): tensor cores where sums are float and the launcher has found operands fit for them.
template <class F>
void dispatch(DType dtype, bool tensor_cores, F&& f) {
  if (dtype == DType::kFloat64) return f(Type<PlainFma<double>>{});
  if (!tensor_cores) return f(Type<PlainFma<float>>{});
  if (dtype == DType::kBFloat16) return f(Type<TensorCores<bf16>>{});
  f(Type<TensorCores<f16>>{});
}

}  // namespace gemm
}  // namespace synergen::cuda
