// expert_ffn on the GPU, without a word to the host: pairs (token, expert) are sorted by expert,
// then two grouped products read their rows through that order. Nothing is padded or dropped.
//
//   route_tokens, list           order, offsets and tiles of rows: small; the first only where the
//                                caller has not done it
//   gate_up                      one product of 2 F columns, gate's and up's by turns of 32, so
//   that
//                                a thread has both sums and writes silu(g) * u
//   down                         rows go to their token, times the routing weight
//   finish                       the sum of a token over j, in order; tokens without an expert
//
// 8192 tokens, D = 2048, F = 8192, E = 2, bf16: 825 GFLOP, 2.6 ms of an A100's tensor cores, next
// to 201 MB of weights, 67 of x and y and 268 of activations, 0.3 ms of its memory.
#include <algorithm>

#include "cuda/expert_products.cuh"

namespace synergen::cuda {
namespace {

// ---- Rows

// token_of by all blocks, and by the first row_tiles; after the last, tiles that are not there.
__global__ void __launch_bounds__(1024) list_tiles_kernel(Forward p) {
  SIMT_SHARED(int32_t, warps, [32]);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 1024 + threadIdx.x;
  if (p.top_k > 1 && row < p.pairs) {
    // After the last row -1, whose token nobody asks for.
    p.divided[row] =
        static_cast<int32_t>(static_cast<uint32_t>(p.order[row]) / static_cast<uint32_t>(p.top_k));
  }
  if (blockIdx.x > 0) return;  // all threads together
  const int32_t high =
      p.tensor_cores ? gemm::TensorCores<bf16>::kRows : gemm::PlainFma<float>::kRows;
  const int64_t each = ceil_div(p.experts, 1024), first = threadIdx.x * each;
  const int64_t last = first + each < p.experts ? first + each : p.experts;
  int32_t own = 0;
  for (int64_t e = first; e < last; ++e) own += (p.offsets[e + 1] - p.offsets[e] + high - 1) / high;
  int64_t at = sum_before(own, warps);
  for (int64_t e = first; e < last; ++e) {
    for (int32_t row = p.offsets[e]; row < p.offsets[e + 1]; row += high) {
      p.row_tiles[at++] = {static_cast<int32_t>(e), row};
    }
  }
  int64_t total = 0;
  for (int w = 0; w < 32; ++w) total += warps[w];
  for (int64_t i = total + threadIdx.x; i < p.tiles; i += 1024) p.row_tiles[i] = {-1, 0};
}

// ---- Products

constexpr int64_t kHidden = gemm::kColumns / 2;  // hidden columns of a block: of gate, and of up

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) gate_up_kernel(Forward p) {
  SIMT_DYNAMIC_SHARED(shared);
  const TileAt block = tile_of(blockIdx.x, p.tiles, ceil_div(p.hidden, kHidden));
  const RowTile tile = p.row_tiles[block.row];
  if (tile.expert < 0) return;  // all threads together
  const int32_t rows = p.offsets[tile.expert + 1] - tile.begin;
  const int64_t first = block.column * kHidden;
  const View<G> x = view<G>(p.dtype, p.x, p.x_strides);
  const View<G> gate = view_of_expert<G>(p.expert_dtype, p.gate, p.gate_strides, tile.expert);
  const View<G> up = view_of_expert<G>(p.expert_dtype, p.up, p.up_strides, tile.expert);

  const auto token = [&](int m) {
    if (m >= rows) return x.nowhere();
    return x.at(p.token_of[tile.begin + m], 0);
  };
  const auto column = [&](int n) {
    const int64_t h = first + n / 64 * 32 + n % 32;
    if (h >= p.hidden) return gate.nowhere();
    return n % 64 < 32 ? gate.at(h, 0) : up.at(h, 0);
  };
  auto a = G::rows(p.dim, token, p.dtype);
  auto b = G::columns(p.dim, column, p.expert_dtype);
  typename G::Sums sums;
  G::multiply(shared, a, b, p.dim, sums);

  G::each_run(sums, b, [&](int m, int n, auto& g, auto& u) {
    const int64_t h = first + n / 64 * 32 + n % 32, count = p.hidden - h;
    if (m >= rows || count <= 0) return;
    const int64_t row = tile.begin + m;
    if (p.gate_pre != nullptr) {
      const int64_t at = p.order[row] * p.hidden + h;
      G::store_run(p.dtype, p.gate_pre, at, count, g);
      G::store_run(p.dtype, p.up_pre, at, count, u);
    }
    if (p.activations == nullptr) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] *= sigmoid<G>(g[i]) * u[i];
    G::store_run(p.inner, p.activations, row * p.hidden + h, count, g);
  });
}

template <class G>
__global__ void __launch_bounds__(gemm::kThreads) down_kernel(Forward p) {
  SIMT_DYNAMIC_SHARED(shared);
  const TileAt block = tile_of(blockIdx.x, p.tiles, ceil_div(p.dim, gemm::kColumns));
  const RowTile tile = p.row_tiles[block.row];
  if (tile.expert < 0) return;  // all threads together
  const int32_t rows = p.offsets[tile.expert + 1] - tile.begin;
  const int64_t first = static_cast<int64_t>(block.column) * gemm::kColumns;
  const View<G> inner = view<G>(p.inner, p.activations, p.hidden, 1);
  const View<G> down = view_of_expert<G>(p.expert_dtype, p.down, p.down_strides, tile.expert);

  const auto row = [&](int m) { return m < rows ? inner.at(tile.begin + m, 0) : inner.nowhere(); };
  const auto column = [&](int n) {
    return first + n < p.dim ? down.at(first + n, 0) : down.nowhere();
  };
  auto a = G::rows(p.hidden, row, p.inner);
  auto b = G::columns(p.hidden, column, p.expert_dtype);
  typename G::Sums sums;
  G::multiply(shared, a, b, p.hidden, sums);
  put_rows<G>(p, sums, b, tile, rows, first, p.y,
              [&](int32_t pair) { return weight_of<typename G::Sum>(p, pair); });
}

// ---- What is left

constexpr int kFinishThreads = 128;

// One token. A negative index makes NaN of all that depends on it: no kernel can refuse it.
template <class G>
__global__ void __launch_bounds__(kFinishThreads) finish_tokens_kernel(Forward p) {
  using A = typename G::Sum;
  const int64_t token = blockIdx.x;
  A start = 0;
  bool all = true;
  for (int64_t j = 0; j < p.top_k; ++j) {
    const int64_t index = index_of(p, token * p.top_k + j);
    if (index < 0) start = A(NAN);
    all = all && has_expert(p, index);
  }
  if (p.top_k == 1 && all) return;
  for (int64_t c = threadIdx.x * 8; c < p.dim; c += kFinishThreads * 8) {
    A sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = start;
    for (int64_t j = 0; j < p.top_k; ++j) {
      const int64_t pair = token * p.top_k + j;
      if (!has_expert(p, index_of(p, pair))) continue;
      A row[8];
      G::load_run(p.inner, p.pair_rows, pair * p.dim + c, p.dim - c, row);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += row[i];
    }
    G::store_run(p.dtype, p.y, token * p.dim + c, p.dim - c, sum);
  }
  if (p.gate_pre == nullptr) return;
  for (int64_t j = 0; j < p.top_k; ++j) {
    const int64_t pair = token * p.top_k + j, index = index_of(p, pair);
    if (has_expert(p, index)) continue;
    A none[8];
    for (int i = 0; i < 8; ++i) none[i] = index < 0 ? A(NAN) : A(0);
    for (int64_t h = threadIdx.x * 8; h < p.hidden; h += kFinishThreads * 8) {
      G::store_run(p.dtype, p.gate_pre, pair * p.hidden + h, p.hidden - h, none);
      G::store_run(p.dtype, p.up_pre, pair * p.hidden + h, p.hidden - h, none);
    }
  }
}

// ---- Launching

Forward prepare(const ExpertFfnParams& params) {
  Forward p{};
  static_cast<ExpertFfnParams&>(p) = params;
  static_cast<Experts&>(p) = prepare_experts(params, true);
  return p;
}

int64_t lay_out(Forward& p) {
  Carver carver(p.scratch);
  carver.take(p.activations, p.pairs * p.hidden * gemm::bytes_of(p.inner));
  carver.take(p.pair_rows, p.top_k > 1 ? p.pairs * p.dim * gemm::bytes_of(p.inner) : 0);
  carve_routing(carver, p, p);
  return carver.bytes();
}

}  // namespace

Experts prepare_experts(const ExpertFfnParams& p, bool aligned) {
  const auto stack_packs = [](const void* data, const int64_t (&strides)[3]) {
    return packs<bf16>(data, strides[2], strides, 2);
  };
  const bool short_floats = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  Experts e{};
  e.tensor_cores = short_floats && p.expert_dtype == p.dtype && p.dim % 8 == 0 &&
                   p.hidden % 8 == 0 && packs<bf16>(p.x, p.x_strides[1], p.x_strides, 1) &&
                   stack_packs(p.gate, p.gate_strides) && stack_packs(p.up, p.up_strides) &&
                   stack_packs(p.down, p.down_strides) && packs<bf16>(p.y, 1, nullptr, 0) &&
                   packs<bf16>(p.gate_pre, 1, nullptr, 0) && packs<bf16>(p.up_pre, 1, nullptr, 0) &&
                   aligned;
  e.inner = e.tensor_cores || p.dtype == DType::kFloat64 ? p.dtype : DType::kFloat32;
  RouteTokensParams pairs{};
  pairs.tokens = p.tokens;
  pairs.top_k = p.top_k;
  pairs.experts = p.experts;
  pairs.index = p.index;
  std::copy_n(p.index_strides, 2, pairs.index_strides);
  e.router = prepare_router("expert_ffn", pairs);
  e.pairs = e.router.pairs;
  const int64_t high =
      e.tensor_cores ? gemm::TensorCores<bf16>::kRows : gemm::PlainFma<float>::kRows;
  // Each expert with rows leaves at most high - 1 rows of a tile empty.
  e.tiles = (e.pairs + (p.experts < e.pairs ? p.experts : e.pairs) * (high - 1)) / high;
  if (p.experts == 0) e.tiles = 0;
  return e;
}

void carve_routing(Carver& carver, const ExpertFfnParams& p, Experts& e) {
  carver.take(e.row_tiles, e.tiles * static_cast<int64_t>(sizeof(RowTile)));
  if (p.routed_order == nullptr) {
    carver.take(e.router.offsets, (p.experts + 1) * 4);
    take_counts(carver, e.router);
    carver.take(e.router.order, e.pairs * 4);
  }
  carver.take(e.divided, p.top_k > 1 ? e.pairs * 4 : 0);
  e.order = p.routed_order != nullptr ? p.routed_order : e.router.order;
  e.offsets = p.routed_order != nullptr ? p.routed_offsets : e.router.offsets;
  e.token_of = p.top_k > 1 ? e.divided : e.order;
}

void route(const char* op, const Forward& p, void* stream) {
  if (p.routed_order == nullptr) launch_router(op, p.router, stream);
  const dim3 blocks = blocks_for(op, p.top_k > 1 ? std::max<int64_t>(p.pairs, 1) : 1, 1024);
  simt::launch(op, list_tiles_kernel, blocks, dim3(1024), 0, stream, p);
}

void gate_up(const char* op, const Forward& p, void* stream) {
  if (p.tiles == 0 || p.hidden == 0) return;
  dispatch_arithmetic(p, p, [&](auto tag) {
    using G = typename decltype(tag)::type;
    const dim3 blocks = blocks_for(op, p.tiles * ceil_div(p.hidden, kHidden), 1);
    simt::launch(op, gate_up_kernel<G>, blocks, dim3(gemm::kThreads), G::kSharedBytes, stream, p);
  });
}

void finish_tokens(const char* op, const Forward& p, void* stream) {
  if (p.tokens == 0) return;
  dispatch_arithmetic(p, p, [&](auto tag) {
    using G = typename decltype(tag)::type;
    simt::launch(op, finish_tokens_kernel<G>, blocks_for(op, p.tokens, 1), dim3(kFinishThreads), 0,
                 stream, p);
  });
}

int64_t scratch_bytes(const ExpertFfnParams& params) {
  if (streams(params)) return expert_ffn_stream_scratch(params);
  Forward p = prepare(params);
  return lay_out(p);
}

void expert_ffn(const ExpertFfnParams& params, void* stream) {
  if (streams(params)) return expert_ffn_stream(params, stream);
  const char* op = "expert_ffn";
  Forward p = prepare(params);
  lay_out(p);
  route(op, p, stream);
  gate_up(op, p, stream);
  if (p.tiles > 0 && p.dim > 0) {
    dispatch_arithmetic(p, p, [&](auto tag) {
      using G = typename decltype(tag)::type;
      const dim3 blocks = blocks_for(op, p.tiles * ceil_div(p.dim, gemm::kColumns), 1);
      simt::launch(op, down_kernel<G>, blocks, dim3(gemm::kThreads), G::kSharedBytes, stream, p);
    });
  }
  finish_tokens(op, p, stream);
}

}  // namespace synergen::cuda
