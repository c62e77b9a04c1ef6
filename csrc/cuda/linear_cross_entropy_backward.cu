// The gradients of linear_cross_entropy on the GPU, the same bits on every run. With p =
// (exp(logit - lse) - [v = target]) * dloss: dx = p weight, dweight = p^T x. Columns pass in
// pieces, three products each:
//
//   probabilities   the logits of a piece again, and p of them, [rows, piece] in the dtype of x
//   input           dx += p weight: sums in float between the pieces, in scratch
//   weights         dweight = p^T x: the piece's rows, complete, in one sum over all rows
//
// 8192 rows, D = 2048, V = 32,768, bf16: 3.3 TFLOP (6 N D V), 10.6 ms of an A100's tensor cores.
// Bytes, for pieces of C columns: p is written once and read twice, 6 N V; the sums of dx are read
// and written, 8 N D V / C; x is read again, 4 N D V / C. They balance at C = 2 D, and 8192 = 4 D
// costs 2.0 GB, 1 ms, all of it under the products. What else could be done:
//
//   pieces of rows     the sums of dweight pass instead, 8 N D V / R bytes: as much for R = C, but
//                      their scratch is [V, D] floats, 268 MB to 758 MB, not [N, D], 67 MB
//   one kernel         a tile of p, kept in shared memory, would need all of D as sums for dx: 128
//   x
//                      2048 floats, 1 MB; or sums by atomics, and other bits on every run
//   logits kept        4 N D V instead of 6, and [N, V] in memory: what this op is there to avoid
#include "cuda/carver.h"
#include "cuda/linear_cross_entropy.cuh"

namespace synergen::cuda {
namespace {

// Tiles of dweight in a piece: 64 x 8 for D = 2048, which 132 multiprocessors take in 4
// waves, 97 % full, and 108 in 5, 95 %.
constexpr int64_t kMostColumns = 8192, kLeastColumns = 1024;
constexpr int64_t kMostBytes = int64_t{256} << 20;  // of p: above 16,384 rows pieces are smaller

struct Backward : LinearCrossEntropyBackwardParams {
  bool tensor_cores;
  DType inner;             // of p: as x, or the type of the sums
  int64_t piece;           // columns, a multiple of 256
  int64_t first, columns;  // of this launch
  void* probabilities;     // [rows, piece]
  void* sums;              // [rows, dim] in the type of the sums; or null: one piece
};

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) probabilities_kernel(Backward p) {
  using A = typename G::Sum;
  SIMT_DYNAMIC_SHARED(shared);
  const TileAt block =
      tile_of(blockIdx.x, ceil_div(p.rows, G::kRows), ceil_div(p.columns, gemm::kColumns));
  const int64_t row = static_cast<int64_t>(block.row) * G::kRows;
  const int64_t column = static_cast<int64_t>(block.column) * gemm::kColumns;
  typename G::Sums sums;
  const auto b = multiply_logits<G>(p, shared, row, p.first + column, sums);

  G::each_run(sums, b, [&](int m, int n, auto& left, auto& right) {
    const int64_t r = row + m;
    if (r >= p.rows) return;
    const int64_t target = target_of(p, r);
    const bool counts = target != p.ignore_index;
    const double lse = p.lse[r];
    const A high = static_cast<A>(lse), low = static_cast<A>(lse - high);
    A scale = static_cast<const A*>(p.dloss)[r * p.dloss_stride];
    if (target < 0 || target >= p.vocab) scale = A(NAN);  // nobody can refuse it
    const auto run = [&](int64_t c, A(&values)[8]) {
      const int64_t count = p.columns - c, at = target - p.first - c;
      A wanted = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const A z = (values[i] - high) - low;
        wanted = at == i ? z : wanted;
        values[i] = exp_of<G>(z) * scale;
      }
      if (at >= 0 && at < 8) {
        wanted = std::expm1(wanted) * scale;
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = at == i ? wanted : values[i];
      }
      if (!counts || count < 8) {  // what lies past the last column meets zeros, as numbers
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = counts && i < count ? values[i] : A(0);
      }
      G::store_run(p.inner, p.probabilities, r * p.piece + c, 8, values);
    };
    run(column + n, left);
    run(column + n + 32, right);
  });
}

// Up to eight of the sums between pieces: beside tensor cores 16-byte aligned and all there, else
// of the type of p.
template <class G, class A>
SIMT_FN void add_sums(const Backward& p, int64_t at, int64_t count, A (&run)[8]) {
  if constexpr (sizeof(typename G::Element) == 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pack<A, 4> pack = load_pack<4>(static_cast<const A*>(p.sums) + at, half, 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) run[half * 4 + i] += pack.v[i];
    }
  } else {
    A before[8];
    G::load_run(p.inner, p.sums, at, count, before);
#pragma unroll
    for (int i = 0; i < 8; ++i) run[i] += before[i];
  }
}
template <class G, class A>
SIMT_FN void store_sums(const Backward& p, int64_t at, int64_t count, const A (&run)[8]) {
  if constexpr (sizeof(typename G::Element) == 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pack<A, 4> pack;
#pragma unroll
      for (int i = 0; i < 4; ++i) pack.v[i] = run[half * 4 + i];
      store_pack(static_cast<A*>(p.sums) + at, half, pack);
    }
  } else {
    G::store_run(p.inner, p.sums, at, count, run);
  }
}

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) input_kernel(Backward p) {
  SIMT_DYNAMIC_SHARED(shared);
  const TileAt block =
      tile_of(blockIdx.x, ceil_div(p.rows, G::kRows), ceil_div(p.dim, gemm::kColumns));
  const int64_t row = static_cast<int64_t>(block.row) * G::kRows;
  const int64_t column = static_cast<int64_t>(block.column) * gemm::kColumns;
  const View<G> inner = view<G>(p.inner, p.probabilities, p.piece, 1);
  const View<G> weight = view<G>(p.weight_dtype, p.weight, p.weight_strides);
  const auto row_of = [&](int m) {
    return row + m < p.rows ? inner.at(row + m, 0) : inner.nowhere();
  };
  auto a = G::rows(p.columns, row_of, p.inner);
  auto b = G::columns_across(
      p.columns, p.dim - column,
      gemm::Affine<typename G::Element>{weight.at(p.first, column), weight.row}, p.weight_dtype);
  typename G::Sums sums;
  G::multiply(shared, a, b, p.columns, sums);

  const bool begun = p.first > 0, done = p.first + p.columns == p.vocab;
  G::each_run(sums, b, [&](int m, int n, auto& left, auto& right) {
    if (row + m >= p.rows) return;
    const auto run = [&](int64_t c, auto& values) {
      const int64_t count = p.dim - c, at = (row + m) * p.dim + c;
      if (count <= 0) return;
      if (begun) add_sums<G>(p, at, count, values);
      if (done) {
        G::store_run(p.dtype, p.dx, at, count, values);
      } else {
        store_sums<G>(p, at, count, values);
      }
    };
    run(column + n, left);
    run(column + n + 32, right);
  });
}

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) weights_kernel(Backward p) {
  using E = typename G::Element;
  SIMT_DYNAMIC_SHARED(shared);
  const TileAt block =
      tile_of(blockIdx.x, ceil_div(p.columns, G::kRows), ceil_div(p.dim, gemm::kColumns));
  const int64_t row = static_cast<int64_t>(block.row) * G::kRows;
  const int64_t column = static_cast<int64_t>(block.column) * gemm::kColumns;
  const View<G> inner = view<G>(p.inner, p.probabilities, p.piece, 1);
  const View<G> x = view<G>(p.dtype, p.x, p.x_strides);
  auto a = G::rows_across(p.rows, p.columns - row, gemm::Affine<E>{inner.at(0, row), inner.row},
                          p.inner);
  auto b =
      G::columns_across(p.rows, p.dim - column, gemm::Affine<E>{x.at(0, column), x.row}, p.dtype);
  typename G::Sums sums;
  G::multiply(shared, a, b, p.rows, sums);
  G::each_run(sums, b, [&](int m, int n, auto& left, auto& right) {
    if (row + m >= p.columns) return;
    const int64_t c = column + n, count = p.dim - c, at = (p.first + row + m) * p.dim + c;
    if (count > 0) G::store_run(p.weight_dtype, p.dweight, at, count, left);
    if (count > 32) G::store_run(p.weight_dtype, p.dweight, at + 32, count - 32, right);
  });
}

Backward prepare(const LinearCrossEntropyBackwardParams& params) {
  Backward p{};
  static_cast<LinearCrossEntropyBackwardParams&>(p) = params;
  p.tensor_cores = logits_pack(params) && packs<bf16>(p.dx, 1, nullptr, 0) &&
                   packs<bf16>(p.dweight, 1, nullptr, 0);
  p.inner = p.tensor_cores || p.dtype == DType::kFloat64 ? p.dtype : DType::kFloat32;
  const int64_t each = (p.rows > 0 ? p.rows : 1) * gemm::bytes_of(p.inner);
  int64_t most = kMostBytes / each;
  most = most < kLeastColumns ? kLeastColumns : most < kMostColumns ? most : kMostColumns;
  p.piece = ceil_div(ceil_div(p.vocab, ceil_div(p.vocab, most)), gemm::kColumns) * gemm::kColumns;
  return p;
}

int64_t lay_out(Backward& p) {
  Carver carver(p.scratch);
  carver.take(p.probabilities, p.rows * p.piece * gemm::bytes_of(p.inner));
  if (p.dx != nullptr && p.piece < p.vocab) {
    carver.take(p.sums, p.rows * p.dim * (p.dtype == DType::kFloat64 ? 8 : 4));
  }
  return carver.bytes();
}

template <class G>
void launch_all(Backward p, void* stream) {
  const auto run = [&](void (*kernel)(Backward), int64_t high, int64_t wide) {
    const char* op = "linear_cross_entropy_backward";
    const int64_t blocks = ceil_div(high, G::kRows) * ceil_div(wide, gemm::kColumns);
    if (blocks == 0) return;
    simt::launch(op, kernel, blocks_for(op, blocks, 1), dim3(gemm::kThreads), G::kSharedBytes,
                 stream, p);
  };
  for (p.first = 0; p.first < p.vocab; p.first += p.piece) {
    p.columns = p.vocab - p.first < p.piece ? p.vocab - p.first : p.piece;
    run(probabilities_kernel<G>, p.rows, p.columns);
    if (p.dx != nullptr) run(input_kernel<G>, p.rows, p.dim);
    if (p.dweight != nullptr) run(weights_kernel<G>, p.columns, p.dim);
  }
}

}  // namespace

int64_t scratch_bytes(const LinearCrossEntropyBackwardParams& params) {
  Backward p = prepare(params);
  return lay_out(p);
}

void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& params, void* stream) {
  Backward p = prepare(params);
  lay_out(p);
  gemm::dispatch(p.dtype, p.tensor_cores,
                 [&](auto tag) { launch_all<typename decltype(tag)::type>(p, stream); });
}

}  // namespace synergen::cuda
