// The gradients of expert_ffn on the GPU, the same bits on every run: sums have one owner and one
// order. Formulas as in cpu/expert_ffn_backward.h; rows are sorted as in expert_ffn.cu.
//
//   gate_up   again, where the forward pass has kept nothing
//   hidden    dh = dy down, and from it dg and du [rows, 2 F], w * h, and parts of dweight
//   input     dx = [dg, du] [gate; up], one product of depth 2 F, to the rows of tokens
//   weights   [dgate; dup] = [dg, du]^T x, and ddown = dy^T (w h): depth is the rows of an expert,
//             none gives zeros. Rows of x and dy come through the order, as in the other products
//   finish    sums of tokens over j, dweight
//
// 8192 tokens of the paper's size: 1.65 TFLOP, 5.3 ms of an A100's tensor cores.
#include "cuda/expert_products.cuh"

namespace synergen::cuda {
namespace {

struct Backward : ExpertFfnBackwardParams, Experts {
  void* hidden_gradients;  // [rows, 2 * hidden]: dg, du
  void* activations;       // [rows, hidden], times the routing weight; or null: not wanted
  void* pair_rows;         // [pairs, dim], where top_k > 1
  void* weight_parts;      // [pairs, parts], in the type of the sums
  int64_t parts;           // one for 64 columns
};

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) hidden_kernel(Backward p) {
  using A = typename G::Sum;
  SIMT_DYNAMIC_SHARED(shared);
  const TileAt block = tile_of(blockIdx.x, p.tiles, ceil_div(p.hidden, gemm::kColumns));
  const RowTile tile = p.row_tiles[block.row];
  if (tile.expert < 0) return;  // all threads together
  const int32_t rows = p.offsets[tile.expert + 1] - tile.begin;
  const int64_t first = static_cast<int64_t>(block.column) * gemm::kColumns;
  const View<G> dy = view<G>(p.dtype, p.dy, p.dy_strides);
  const View<G> down = view_of_expert<G>(p.expert_dtype, p.down, p.down_strides, tile.expert);

  const auto token = [&](int m) {
    if (m >= rows) return dy.nowhere();
    return dy.at(p.token_of[tile.begin + m], 0);
  };
  auto a = G::rows(p.dim, token, p.dtype);
  auto b = G::columns_across(p.dim, p.hidden - first,
                             gemm::Affine<typename G::Element>{down.at(0, first), down.row},
                             p.expert_dtype);
  typename G::Sums sums;
  G::multiply(shared, a, b, p.dim, sums);

  G::each_run(sums, b, [&](int m, int n, auto& left, auto& right) {
    const bool there = m < rows;
    const int64_t row = tile.begin + m;
    const int32_t pair = there ? p.order[row] : 0;
    const A weight = there ? weight_of<A>(p, pair) : A(0);
    A part = 0;
    const auto run = [&](int64_t h, A(&dh)[8]) {
      const int64_t count = p.hidden - h, at = pair * p.hidden + h;
      if (!there || count <= 0) return;
      A g[8], u[8];
      G::load_run(p.dtype, p.gate_pre, at, count, g);
      G::load_run(p.dtype, p.up_pre, at, count, u);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const A s = sigmoid<G>(g[i]), silu = g[i] * s, wdh = weight * dh[i];
        part += silu * u[i] * dh[i];  // past the last column u is 0
        dh[i] = wdh * u[i] * s * (A(1) + g[i] * (A(1) - s));
        g[i] = weight * silu * u[i];
        u[i] = wdh * silu;
      }
      const int64_t to = row * 2 * p.hidden + h;
      G::store_run(p.inner, p.hidden_gradients, to, count, dh);
      G::store_run(p.inner, p.hidden_gradients, to + p.hidden, count, u);
      if (p.activations != nullptr) {
        G::store_run(p.inner, p.activations, row * p.hidden + h, count, g);
      }
    };
    run(first + n, left);
    run(first + n + 32, right);
    part = G::sum_of_row(part);
    const int64_t at = (first + n) / 64;
    if (p.dweight != nullptr && there && n % 64 == 0 && at < p.parts) {
      static_cast<A*>(p.weight_parts)[pair * p.parts + at] = part;
    }
  });
}

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) input_kernel(Backward p) {
  SIMT_DYNAMIC_SHARED(shared);
  const TileAt block = tile_of(blockIdx.x, p.tiles, ceil_div(p.dim, gemm::kColumns));
  const RowTile tile = p.row_tiles[block.row];
  if (tile.expert < 0) return;  // all threads together
  const int32_t rows = p.offsets[tile.expert + 1] - tile.begin;
  const int64_t first = static_cast<int64_t>(block.column) * gemm::kColumns;
  const View<G> inner = view<G>(p.inner, p.hidden_gradients, 2 * p.hidden, 1);
  const View<G> gate = view_of_expert<G>(p.expert_dtype, p.gate, p.gate_strides, tile.expert);
  const View<G> up = view_of_expert<G>(p.expert_dtype, p.up, p.up_strides, tile.expert);

  const auto row = [&](int m) { return m < rows ? inner.at(tile.begin + m, 0) : inner.nowhere(); };
  const gemm::Joined<typename G::Element> weights{gate.at(0, first), up.at(0, first), gate.row,
                                                  up.row, p.hidden};
  auto a = G::rows(2 * p.hidden, row, p.inner);
  auto b = G::columns_across(2 * p.hidden, p.dim - first, weights, p.expert_dtype);
  typename G::Sums sums;
  G::multiply(shared, a, b, 2 * p.hidden, sums);
  put_rows<G>(p, sums, b, tile, rows, first, p.dx, [](int32_t) { return typename G::Sum(1); });
}

// Which tile of which expert's gradient a block has: all rows of it are there.
struct WeightTile {
  int64_t expert, row, column;
  int64_t begin, depth;  // its rows, over which the product sums
};
template <class G>
SIMT_FN WeightTile weight_tile(const Backward& p, int64_t high, int64_t wide) {
  const int64_t rows = ceil_div(high, G::kRows), columns = ceil_div(wide, gemm::kColumns);
  const unsigned each = static_cast<unsigned>(rows * columns), expert = blockIdx.x / each;
  const TileAt at = tile_of(blockIdx.x - expert * each, rows, columns);
  const int64_t begin = p.offsets[expert];
  return {expert, static_cast<int64_t>(at.row) * G::kRows,
          static_cast<int64_t>(at.column) * gemm::kColumns, begin, p.offsets[expert + 1] - begin};
}

// Sums to their place in `out` [experts, high, wide], and from row `high` on in `then`.
template <class G, class B>
SIMT_FN void put_weights(const Backward& p, const typename G::Sums& sums, const B& b,
                         const WeightTile& tile, int64_t high, int64_t wide, void* out,
                         void* then) {
  G::each_run(sums, b, [&](int m, int n, auto& left, auto& right) {
    const int64_t row = tile.row + m, c = tile.column + n, count = wide - c;
    if (row >= (then == nullptr ? high : 2 * high)) return;
    void* to = row < high ? out : then;
    const int64_t at = (tile.expert * high + (row < high ? row : row - high)) * wide + c;
    if (count > 0) G::store_run(p.expert_dtype, to, at, count, left);
    if (count > 32) G::store_run(p.expert_dtype, to, at + 32, count - 32, right);
  });
}

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) gate_up_gradient_kernel(Backward p) {
  using E = typename G::Element;
  SIMT_DYNAMIC_SHARED(shared);
  const WeightTile tile = weight_tile<G>(p, 2 * p.hidden, p.dim);
  const View<G> inner = view<G>(p.inner, p.hidden_gradients, 2 * p.hidden, 1);
  const View<G> x = view<G>(p.dtype, p.x, p.x_strides);
  auto a = G::rows_across(tile.depth, 2 * p.hidden - tile.row,
                          gemm::Affine<E>{inner.at(tile.begin, tile.row), inner.row}, p.inner);
  auto b = G::columns_across(
      tile.depth, p.dim - tile.column,
      gemm::Gathered<E>{x.at(0, tile.column), x.row, p.token_of + tile.begin}, p.dtype);
  typename G::Sums sums;
  G::multiply(shared, a, b, tile.depth, sums);
  put_weights<G>(p, sums, b, tile, p.hidden, p.dim, p.dgate, p.dup);
}

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) down_gradient_kernel(Backward p) {
  using E = typename G::Element;
  SIMT_DYNAMIC_SHARED(shared);
  const WeightTile tile = weight_tile<G>(p, p.dim, p.hidden);
  const View<G> dy = view<G>(p.dtype, p.dy, p.dy_strides);
  const View<G> inner = view<G>(p.inner, p.activations, p.hidden, 1);
  auto a = G::rows_across(tile.depth, p.dim - tile.row,
                          gemm::Gathered<E>{dy.at(0, tile.row), dy.row, p.token_of + tile.begin},
                          p.dtype);
  auto b =
      G::columns_across(tile.depth, p.hidden - tile.column,
                        gemm::Affine<E>{inner.at(tile.begin, tile.column), inner.row}, p.inner);
  typename G::Sums sums;
  G::multiply(shared, a, b, tile.depth, sums);
  put_weights<G>(p, sums, b, tile, p.dim, p.hidden, p.ddown, nullptr);
}

// dweight, one warp a pair.
template <class A>
__global__ void __launch_bounds__(128) weight_sum_kernel(Backward p) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const bool there = pair < p.pairs;
  const int64_t index = there ? index_of(p, pair) : -1;
  A sum = 0;
  for (int64_t i = threadIdx.x % 32; has_expert(p, index) && i < p.parts; i += 32) {
    sum += static_cast<const A*>(p.weight_parts)[pair * p.parts + i];
  }
  sum = warp_sum(sum);
  if (!there || threadIdx.x % 32 != 0) return;
  char* out = static_cast<char*>(p.dweight) + pair * gemm::bytes_of(p.weight_dtype);
  gemm::write(p.weight_dtype, out, index < 0 ? A(NAN) : sum);
}

// ---- Launching

Backward prepare(const ExpertFfnBackwardParams& params) {
  Backward p{};
  static_cast<ExpertFfnBackwardParams&>(p) = params;
  bool aligned = packs<bf16>(p.dy, p.dy_strides[1], p.dy_strides, 1);
  for (const void* out : {p.dx, p.dgate, p.dup, p.ddown}) {
    aligned = aligned && packs<bf16>(out, 1, nullptr, 0);
  }
  static_cast<Experts&>(p) = prepare_experts(params, aligned);
  p.parts = ceil_div(p.hidden, 64);
  return p;
}

// The params of a forward launch that shares this one's rows.
Forward forward_of(const Backward& p) {
  Forward f{};
  static_cast<ExpertFfnParams&>(f) = p;
  static_cast<Experts&>(f) = p;
  f.pair_rows = p.pair_rows;
  return f;
}

int64_t lay_out(Backward& p) {
  const int64_t width = gemm::bytes_of(p.inner);
  Carver carver(p.scratch);
  if (p.ddown != nullptr) carver.take(p.activations, p.pairs * p.hidden * width);
  if (p.gate_pre == nullptr) {
    carver.take(p.gate_pre, p.pairs * p.hidden * gemm::bytes_of(p.dtype));
    carver.take(p.up_pre, p.pairs * p.hidden * gemm::bytes_of(p.dtype));
  }
  if (p.top_k > 1 && p.dx != nullptr) carver.take(p.pair_rows, p.pairs * p.dim * width);
  if (p.dweight != nullptr) {
    const int64_t sum = p.dtype == DType::kFloat64 ? 8 : 4;
    carver.take(p.weight_parts, p.pairs * p.parts * sum);
  }
  carve_routing(carver, p, p);
  // Last, so that a read past its last row leaves the scratch memory, which sanitizers see.
  carver.take(p.hidden_gradients, p.pairs * 2 * p.hidden * width);
  return carver.bytes();
}

template <class G>
void launch_all(const Backward& p, void* stream) {
  const char* op = "expert_ffn_backward";
  const auto run = [&](void (*kernel)(Backward), int64_t blocks) {
    if (blocks == 0) return;
    simt::launch(op, kernel, blocks_for(op, blocks, 1), dim3(gemm::kThreads), G::kSharedBytes,
                 stream, p);
  };
  const auto tiles = [](int64_t high, int64_t wide) {
    return ceil_div(high, G::kRows) * ceil_div(wide, gemm::kColumns);
  };
  run(hidden_kernel<G>, p.tiles * ceil_div(p.hidden, gemm::kColumns));
  if (p.dx != nullptr) run(input_kernel<G>, p.tiles * ceil_div(p.dim, gemm::kColumns));
  if (p.ddown != nullptr) {
    run(gate_up_gradient_kernel<G>, p.experts * tiles(2 * p.hidden, p.dim));
    run(down_gradient_kernel<G>, p.experts * tiles(p.dim, p.hidden));
  }
  if (p.dweight != nullptr && p.pairs > 0) {
    simt::launch(op, weight_sum_kernel<typename G::Sum>, blocks_for(op, p.pairs, 4), dim3(128), 0,
                 stream, p);
  }
}

}  // namespace

int64_t scratch_bytes(const ExpertFfnBackwardParams& params) {
  Backward p = prepare(params);
  return lay_out(p);
}

void expert_ffn_backward(const ExpertFfnBackwardParams& params, void* stream) {
  const char* op = "expert_ffn_backward";
  Backward p = prepare(params);
  lay_out(p);
  const Forward f = forward_of(p);
  route(op, f, stream);
  if (params.gate_pre == nullptr) gate_up(op, f, stream);
  dispatch_arithmetic(p, p, [&](auto tag) { launch_all<typename decltype(tag)::type>(p, stream); });
  if (p.dx != nullptr) {
    Forward g = f;
    g.y = p.dx;
    g.gate_pre = g.up_pre = nullptr;
    finish_tokens(op, g, stream);
  }
}

}  // namespace synergen::cuda
