// Reading and writing 16 bytes at a time where the layout allows it, one element otherwise; sums
// over a block in an order that never changes.
#pragma once

#include <stdexcept>
#include <string>

#include "common/dispatch.h"
#include "simt/simt.h"

namespace synergen::cuda {

// N elements that move as one access, or as several of 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

// Elements in 16 bytes, the widest access there is.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// Whether rows of T at `base`, `outer` elements apart and `inner` elements between neighbours, may
// be read kPack<T> elements at a time.
template <class T>
inline bool packs(const void* base, int64_t inner, const int64_t* outer, int dims) {
  bool fits = inner == 1 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  for (int d = 0; d < dims; ++d) fits = fits && outer[d] % kPack<T> == 0;
  return fits;
}
template <class T>
inline bool packs(const void* base, int64_t inner, const Rows& rows) {
  return packs<T>(base, inner, rows.strides, rows.dims);
}

// Pack i of a row. A stride other than 1 goes with N = 1 only.
template <int N, class T>
SIMT_FN Pack<T, N> load_pack(const T* row, int64_t i, int64_t stride) {
  if constexpr (N == 1) {
    return {{row[i * stride]}};
  } else {
    return *reinterpret_cast<const Pack<T, N>*>(row + i * N);
  }
}
template <int N, class T>
SIMT_FN void store_pack(T* row, int64_t i, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(row + i * N) = pack;
}

template <class A>
SIMT_FN A warp_sum(A x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;  // the same bits in every lane: a + b = b + a at each step
}

// The sum over a block of whole warps, in every thread. `partial` is shared, [32].
template <class A>
SIMT_FN A block_sum(A x, A* partial) {
  const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  if (lane == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? partial[lane] : A(0));
  __syncthreads();  // partial may be written again
  return x;
}

// Whole warps that take `items` at `each` a thread, at most `most` threads.
inline unsigned threads_for(int64_t items, int64_t each, unsigned most) {
  const int64_t threads = ceil_div(ceil_div(items, each), 32) * 32;
  return threads < 32 ? 32u : threads < most ? static_cast<unsigned>(threads) : most;
}

// Blocks of `each` items.
inline dim3 blocks_for(const char* op, int64_t items, int64_t each) {
  const int64_t blocks = ceil_div(items, each);
  if (blocks > INT32_MAX) {
    throw std::invalid_argument(std::string(op) + ": a launch may have 2^31 - 1 blocks, got " +
                                std::to_string(blocks));
  }
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace synergen::cuda
