// linear_cross_entropy on the GPU: logits live in registers, a tile at a time. A tile leaves two
// numbers a row, its largest logit and the sum of exp(logit - largest), and the target's logit; a
// second kernel joins the tiles of a row in order.
//
// 8192 rows, D = 2048, V = 92,544, bf16: 3.1 TFLOP, 10 ms of an A100's tensor cores. With groups of
// 16 row tiles the weights, 379 MB, pass four times, 0.8 ms of its memory; scratch is V / 256 pairs
// of floats a row, 24 MB, where the logits would be 1.5 GB. A tile's 32,768 exponentials are 2,048
// cycles of an SM beside 65,536 of its tensor cores: 3 %, the price of the epilogue.
#include <limits>

#include "cuda/carver.h"
#include "cuda/linear_cross_entropy.cuh"

namespace synergen::cuda {
namespace {

struct Forward : LinearCrossEntropyParams {
  bool tensor_cores;
  int64_t tiles;           // of columns
  void *largest, *totals;  // [tiles, rows]
  void* wanted;            // [rows]: the target's logit, where there is such a target
};

// Where the search for the largest begins: -infinity minus it is -infinity, not NaN.
template <class A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) logits_kernel(Forward p) {
  using A = typename G::Sum;
  SIMT_DYNAMIC_SHARED(shared);
  const TileAt block = tile_of(blockIdx.x, ceil_div(p.rows, G::kRows), p.tiles);
  const int64_t row = static_cast<int64_t>(block.row) * G::kRows;
  const int64_t column = static_cast<int64_t>(block.column) * gemm::kColumns;
  typename G::Sums sums;
  const auto b = multiply_logits<G>(p, shared, row, column, sums);

  A *largest = reinterpret_cast<A*>(shared), *totals = largest + 4 * G::kRows;  // [4][kRows] each
  __syncthreads();  // the last stage has been read by everybody
  G::each_run(sums, b, [&](int m, int n, auto& left, auto& right) {
    const int64_t c = column + n, count = p.vocab - c;
    if (count < 40) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        left[i] = i < count ? left[i] : A(-INFINITY);
        right[i] = i + 32 < count ? right[i] : A(-INFINITY);
      }
    }
    A most = kLowest<A>, total = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = std::fmax(most, std::fmax(left[i], right[i]));
    most = std::fmax(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = std::fmax(most, __shfl_xor_sync(0xffffffffu, most, 2));
#pragma unroll
    for (int i = 0; i < 8; ++i) total += exp_of<G>(left[i] - most) + exp_of<G>(right[i] - most);
    total = G::sum_of_row(total);
    if (n % 64 == 0) {
      largest[n / 64 * G::kRows + m] = most;
      totals[n / 64 * G::kRows + m] = total;
    }
    if (row + m >= p.rows) return;
    const int64_t target = target_of(p, row + m), at = target - c;
    if (static_cast<uint64_t>(at) >= 40) return;  // nearly always
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (at == i) static_cast<A*>(p.wanted)[row + m] = left[i];
      if (at == i + 32) static_cast<A*>(p.wanted)[row + m] = right[i];
    }
  });
  __syncthreads();  // four parts of each row are there
  const int m = static_cast<int>(threadIdx.x);
  if (m >= G::kRows || row + m >= p.rows) return;
  A most = largest[m], total = 0;
#pragma unroll
  for (int w = 1; w < 4; ++w) most = std::fmax(most, largest[w * G::kRows + m]);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    total += totals[w * G::kRows + m] * exp_of<G>(largest[w * G::kRows + m] - most);
  }
  static_cast<A*>(p.largest)[block.column * p.rows + row + m] = most;
  static_cast<A*>(p.totals)[block.column * p.rows + row + m] = total;
}

constexpr int kJoinWarps = 8;

// 32 rows, one a lane; each warp takes an eighth of the tiles.
template <class A>
__global__ void __launch_bounds__(32 * kJoinWarps) join_kernel(Forward p) {
  SIMT_SHARED(A, board, [2][kJoinWarps][32]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const bool there = row < p.rows;
  const A *largest = static_cast<const A*>(p.largest), *totals = static_cast<const A*>(p.totals);
  A most = kLowest<A>;
  for (int64_t t = warp; t < p.tiles && there; t += kJoinWarps) {
    most = std::fmax(most, largest[t * p.rows + row]);
  }
  board[0][warp][lane] = most;
  __syncthreads();
  for (int w = 0; w < kJoinWarps; ++w) most = std::fmax(most, board[0][w][lane]);
  A total = 0;
  for (int64_t t = warp; t < p.tiles && there; t += kJoinWarps) {
    total += totals[t * p.rows + row] * std::exp(largest[t * p.rows + row] - most);
  }
  board[1][warp][lane] = total;
  __syncthreads();
  if (warp != 0 || !there) return;
  total = 0;
  for (int w = 0; w < kJoinWarps; ++w) total += board[1][w][lane];
  const int64_t target = target_of(p, row);
  const bool ignored = target == p.ignore_index;
  const double lse = most + std::log(static_cast<double>(total));
  A loss = A(NAN);  // nobody can refuse this target
  if (target >= 0 && target < p.vocab) {
    loss = static_cast<A>(lse - static_cast<const A*>(p.wanted)[row]);
  }
  static_cast<A*>(p.loss)[row] = ignored ? A(0) : loss;
  p.lse[row] = ignored ? 0 : lse;
}

Forward prepare(const LinearCrossEntropyParams& params) {
  Forward p{};
  static_cast<LinearCrossEntropyParams&>(p) = params;
  p.tensor_cores = logits_pack(params);
  p.tiles = ceil_div(p.vocab, gemm::kColumns);
  return p;
}

int64_t lay_out(Forward& p) {
  const int64_t width = p.dtype == DType::kFloat64 ? 8 : 4;
  Carver carver(p.scratch);
  carver.take(p.largest, p.tiles * p.rows * width);
  carver.take(p.totals, p.tiles * p.rows * width);
  carver.take(p.wanted, p.rows * width);
  return carver.bytes();
}

}  // namespace

int64_t scratch_bytes(const LinearCrossEntropyParams& params) {
  Forward p = prepare(params);
  return lay_out(p);
}

void linear_cross_entropy(const LinearCrossEntropyParams& params, void* stream) {
  const char* op = "linear_cross_entropy";
  Forward p = prepare(params);
  lay_out(p);
  gemm::dispatch(p.dtype, p.tensor_cores, [&](auto tag) {
    using G = typename decltype(tag)::type;
    const dim3 blocks = blocks_for(op, ceil_div(p.rows, G::kRows) * p.tiles, 1);
    simt::launch(op, logits_kernel<G>, blocks, dim3(gemm::kThreads), G::kSharedBytes, stream, p);
    simt::launch(op, join_kernel<typename G::Sum>, blocks_for(op, p.rows, 32),
                 dim3(32 * kJoinWarps), 0, stream, p);
  });
}

}  // namespace synergen::cuda
