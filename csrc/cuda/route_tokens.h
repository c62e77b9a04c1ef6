// What route_tokens and the launchers of expert_ffn share: pairs sorted by expert.
#pragma once

#include "cuda/carver.h"
#include "kernels.h"
#include "simt/simt.h"

namespace synergen::cuda {

struct Router : RouteTokensParams {
  int64_t pairs;        // tokens * top_k
  int64_t count_tiles;  // pieces of the pairs, in the sort
  int32_t* counts;      // [experts, count_tiles]
};

// Without scratch memory: take_counts adds it. `op` is named in what is refused.
Router prepare_router(const char* op, const RouteTokensParams& p);
void take_counts(Carver& carver, Router& router);
void launch_router(const char* op, const Router& router, void* stream);

// Params: RouteTokensParams, or those of expert_ffn.
template <class Params>
SIMT_FN int64_t index_of(const Params& p, int64_t pair) {
  const uint32_t top_k = static_cast<uint32_t>(p.top_k),
                 token = static_cast<uint32_t>(pair) / top_k;
  return p.index[token * p.index_strides[0] + (pair - token * top_k) * p.index_strides[1]];
}
template <class Params>
SIMT_FN bool has_expert(const Params& p, int64_t index) {
  return index >= 0 && index < p.experts;
}

// The sum of `own` over the threads of the block before this one; then warps[w] is that of warp w.
SIMT_FN int32_t sum_before(int32_t own, int32_t* warps) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int32_t sum = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = __shfl_up_sync(0xffffffffu, sum, distance);
    sum += lane >= distance ? below : 0;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warps[w];
  return sum - own;
}

}  // namespace synergen::cuda
