// decode_attention on tensor cores: 16-bit types, heads of 64 or 128.
#pragma once

#include "cuda/decode_attention_common.cuh"

namespace synergen::cuda::decoding {

SIMT_FN uint32_t pair(uint32_t low, uint32_t high) { return (low & 0xffffu) | high << 16; }
SIMT_FN uint32_t high_pair(uint32_t low, uint32_t high) { return low >> 16 | (high & 0xffff0000u); }

template <class T>
SIMT_FN void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    simt::mma_bf16(d, a, b0, b1);
  } else {
    simt::mma_f16(d, a, b0, b1);
  }
}

// 16-bit types, D = 64 or 128, everything in packs. Lane = 4 * row + column of a fragment. Dims may
// be summed in any order and out's may lie in any order, so every lane loads 16 bytes of a key or a
// value, as they lie, and these are fragments: of K as they are, of V after a permutation of pairs.
template <class T, int D>
__global__ void __launch_bounds__(32 * kWarps, 2) decode_attention_mma_kernel(DecodeLaunch launch) {
  SIMT_DYNAMIC_SHARED(shared);
  using Words = Pack<uint32_t, 4>;
  const DecodeAttentionParams& p = launch.p;
  const Task task(launch);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int row = lane / 4, column = lane % 4;
  const auto load = [](const T* at, bool valid) {
    return valid ? load_pack<4>(reinterpret_cast<const uint32_t*>(at), 0, 1) : Words{};
  };
  const T* queries = static_cast<const T*>(p.q) + task.row * p.q_strides[0] +
                     (task.head + row) * p.q_strides[1] + column * 8;
  const int64_t at = task.begin + warp * kMmaKeys;
  const T* keys = static_cast<const T*>(p.k) + task.row * p.k_strides[0] +
                  task.kv_head * p.k_strides[2] + (at + row) * p.k_strides[1] + column * 8;
  const T* values = static_cast<const T*>(p.v) + task.row * p.v_strides[0] +
                    task.kv_head * p.v_strides[2] + (at + column * 2) * p.v_strides[1] + row * 8;
  Words* q = reinterpret_cast<Words*>(shared) + lane;  // registers are for what is under way
  float* parts = reinterpret_cast<float*>(shared + D * 16);
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < D / 32; ++i) q[i * 32] = load(queries + i * 32, row < task.queries);
  }
  __syncthreads();
  float out[D / 16][4] = {}, peak = minus_infinity(0.0f), total = 0;
  const float scale = static_cast<float>(p.scale);
  const int turn = kMmaKeys * static_cast<int>(blockDim.x / 32);
  for (int left = static_cast<int>(task.end - at); left > 0; left -= turn) {
    Words k[2][D / 32], v[2][2][D / 64];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        k[half][i] = load(keys + half * 8 * p.k_strides[1] + i * 32, half * 8 + row < left);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int one = half * 8 + odd;
#pragma unroll
        for (int i = 0; i < D / 64; ++i) {
          v[half][odd][i] = load(values + one * p.v_strides[1] + i * 64, column * 2 + one < left);
        }
      }
    }
    keys += turn * p.k_strides[1];
    values += turn * p.v_strides[1];
    // Logits of query `row` and keys 8 half + 2 column + {0, 1}; rows 8 to 15 of q are nobody's.
    float weight[2][2], most = peak;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float logit[4] = {};
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const Words words = q[i * 32];
        const uint32_t first[4] = {words.v[0], 0, words.v[1], 0};
        const uint32_t second[4] = {words.v[2], 0, words.v[3], 0};
        mma<T>(logit, first, k[half][i].v[0], k[half][i].v[1]);
        mma<T>(logit, second, k[half][i].v[2], k[half][i].v[3]);
      }
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const bool valid = half * 8 + column * 2 + odd < left;
        weight[half][odd] = valid ? logit[odd] * scale : minus_infinity(0.0f);
        most = weight[half][odd] > most ? weight[half][odd] : most;
      }
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float other = __shfl_xor_sync(kAll, most, distance);
      most = other > most ? other : most;
    }
    // Weights are rounded before they are summed, so that they add up to one as they are used.
    const float shrink = simt::fast_exp(peak - most);
    uint32_t rounded[2];
    total *= shrink;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T low = simt::narrow<T>(simt::fast_exp(weight[half][0] - most));
      const T high = simt::narrow<T>(simt::fast_exp(weight[half][1] - most));
      total += simt::widen(low) + simt::widen(high);
      rounded[half] = pair(low.bits, high.bits);
    }
    peak = most;
    // The answers' fragments have queries 2 column + {0, 1}, whose lanes begin at 4 times that.
    const float even = __shfl_sync(kAll, shrink, column * 8);
    const float odd = __shfl_sync(kAll, shrink, column * 8 + 4);
#pragma unroll
    for (int i = 0; i < D / 64; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float (&o)[4] = out[i * 4 + j];
        o[0] *= even, o[1] *= odd, o[2] *= even, o[3] *= odd;
        const uint32_t a0 = v[0][0][i].v[j], a1 = v[0][1][i].v[j];
        const uint32_t b0 = v[1][0][i].v[j], b1 = v[1][1][i].v[j];
        const uint32_t fragment[4] = {pair(a0, a1), high_pair(a0, a1), pair(b0, b1),
                                      high_pair(b0, b1)};
        mma<T>(o, fragment, rounded[0], rounded[1]);
      }
    }
  }
  total += __shfl_xor_sync(kAll, total, 1);
  total += __shfl_xor_sync(kAll, total, 2);
  float* own = parts + warp * task.queries * (D + 2);
  if (column == 0 && row < task.queries) {
    own[row * (D + 2) + D] = peak;
    own[row * (D + 2) + D + 1] = total;
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int query = column * 2 + e;
    if (query >= task.queries) continue;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      float* at = own + query * (D + 2) + i / 4 * 64 + row * 8 + i % 4 * 2;
      at[0] = out[i][e], at[1] = out[i][e + 2];
    }
  }
  finish<T>(launch, task, parts);
}

}  // namespace synergen::cuda::decoding
