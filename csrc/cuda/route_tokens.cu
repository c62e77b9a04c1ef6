// route_tokens on the GPU: a counting sort that keeps the order of pairs of one expert.
//
//   count     of each expert in each piece of 256 pairs
//   scan      where each piece's pairs of an expert begin
//   scatter   pairs to their places
//
// No atomics whose order shows, no word to the host.
#include <stdexcept>
#include <string>

#include "cuda/access.cuh"
#include "cuda/route_tokens.h"

namespace synergen::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kCountTile = 256;     // pairs that one warp sorts
constexpr int64_t kMostExperts = 8192;  // whose counters, 32 KiB, a block's shared memory takes

// counts[expert, tile], one warp a tile.
__global__ void __launch_bounds__(32) count_pairs_kernel(Router p) {
  SIMT_DYNAMIC_SHARED(shared);
  int32_t* counters = reinterpret_cast<int32_t*>(shared);
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t tile = blockIdx.x;
  for (int64_t e = lane; e < p.experts; e += 32) counters[e] = 0;
  __syncwarp();
  for (int64_t i = tile * kCountTile + lane; i < (tile + 1) * kCountTile && i < p.pairs; i += 32) {
    const int64_t e = index_of(p, i);
    if (has_expert(p, e)) atomicAdd(&counters[e], 1);
  }
  __syncwarp();
  for (int64_t e = lane; e < p.experts; e += 32) {
    p.counts[e * p.count_tiles + tile] = counters[e];
  }
}

// counts becomes its own exclusive running sum.
__global__ void __launch_bounds__(1024) scan_counts_kernel(Router p) {
  SIMT_SHARED(int32_t, warps, [32]);
  const int64_t total = p.experts * p.count_tiles, each = ceil_div(total, 1024);
  const int64_t begin = threadIdx.x * each, end = begin + each < total ? begin + each : total;
  int32_t own = 0;
  for (int64_t i = begin; i < end; ++i) own += p.counts[i];
  int32_t before = sum_before(own, warps);
  for (int64_t i = begin; i < end; ++i) {
    const int32_t count = p.counts[i];
    if (i % p.count_tiles == 0) p.offsets[i / p.count_tiles] = before;
    p.counts[i] = before;
    before += count;
  }
  if (threadIdx.x == 1023) p.offsets[p.experts] = before;
}

// Pairs go to their places, those of one expert in the order they came.
__global__ void __launch_bounds__(32) scatter_pairs_kernel(Router p) {
  SIMT_DYNAMIC_SHARED(shared);
  int32_t* next = reinterpret_cast<int32_t*>(shared);
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t tile = blockIdx.x, rows = p.offsets[p.experts];
  for (int64_t e = lane; e < p.experts; e += 32) next[e] = p.counts[e * p.count_tiles + tile];
  for (int64_t first = tile * kCountTile; first < (tile + 1) * kCountTile && first < p.pairs;
       first += 32) {
    const int64_t pair = first + lane;
    const int64_t index = pair < p.pairs ? index_of(p, pair) : -1;
    const bool there = has_expert(p, index);
    const unsigned same = __match_any_sync(kAll, there ? static_cast<int>(index) : -1);
    const int rank = __popc(same & ((1u << lane) - 1));
    __syncwarp();  // next is up to date
    if (there) p.order[next[index] + rank] = static_cast<int32_t>(pair);
    if (pair >= rows && pair < p.pairs) p.order[pair] = -1;  // as a row: nobody's
    __syncwarp();
    if (there && rank == 0) next[index] += __popc(same);
  }
}

}  // namespace

Router prepare_router(const char* op, const RouteTokensParams& p) {
  if (p.experts > kMostExperts) {
    throw std::invalid_argument(std::string(op) + ": E must be at most " +
                                std::to_string(kMostExperts) + " on CUDA, got " +
                                std::to_string(p.experts));
  }
  if (p.tokens * p.top_k > INT32_MAX) {
    throw std::invalid_argument(std::string(op) + ": T * k must be below 2^31 on CUDA, got " +
                                std::to_string(p.tokens * p.top_k));
  }
  Router router{};
  static_cast<RouteTokensParams&>(router) = p;
  router.pairs = p.tokens * p.top_k;
  router.count_tiles = router.pairs > 0 ? ceil_div(router.pairs, kCountTile) : 1;  // none count too
  return router;
}

void take_counts(Carver& carver, Router& router) {
  carver.take(router.counts, router.experts * router.count_tiles * 4);
}

void launch_router(const char* op, const Router& router, void* stream) {
  const dim3 tiles = blocks_for(op, router.count_tiles, 1);
  const size_t counters = static_cast<size_t>(router.experts) * 4;
  simt::launch(op, count_pairs_kernel, tiles, dim3(32), counters, stream, router);
  simt::launch(op, scan_counts_kernel, dim3(1), dim3(1024), 0, stream, router);
  simt::launch(op, scatter_pairs_kernel, tiles, dim3(32), counters, stream, router);
}

int64_t scratch_bytes(const RouteTokensParams& params) {
  Router router = prepare_router("route_tokens", params);
  Carver carver(nullptr);
  take_counts(carver, router);
  return carver.bytes();
}

void route_tokens(const RouteTokensParams& params, void* stream) {
  const char* op = "route_tokens";
  Router router = prepare_router(op, params);
  Carver carver(params.scratch);
  take_counts(carver, router);
  launch_router(op, router, stream);
}

}  // namespace synergen::cuda
