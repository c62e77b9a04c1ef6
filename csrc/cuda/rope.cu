// rope on the GPU: a block takes a token, computes its sines and cosines once, and rotates every
// head with them. Bound by memory: each element is read and written once.
#include <cmath>

#include "cuda/access.cuh"
#include "cuda/angle.cuh"
#include "kernels.h"

namespace synergen::cuda {
namespace {

// Pairs of a head that one launch rotates: 512 dimensions, more than any head has. The frequencies
// travel with the kernel's parameters, so CPU and GPU use the same ones to the bit.
constexpr int kPairs = 256;
constexpr int kThreads = 128;

struct RopeLaunch {
  RopeParams p;
  int64_t first, pairs;  // of the head's dim / 2 pairs
  double frequency[kPairs];
};

template <class T, int N>
SIMT_FN void rotate(const RopeLaunch& launch, const RopeParams::Part& part, int64_t token,
                    int64_t item, const Acc<T>* sines, const Acc<T>* cosines) {
  const RopeParams& p = launch.p;
  const int64_t packs_a_head = launch.pairs / N, half = p.dim / 2;
  const int64_t head = item / packs_a_head, i = item % packs_a_head;
  const T* x = static_cast<const T*>(part.x) + part.rows.offset(token) + head * part.head_stride +
               launch.first * part.stride;
  T* y = static_cast<T*>(part.y) + (token * part.heads + head) * p.dim + launch.first;
  const Pack<T, N> a = load_pack<N>(x, i, part.stride);
  const Pack<T, N> b = load_pack<N>(x + half * part.stride, i, part.stride);
  Pack<T, N> first, second;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const Acc<T> s = sines[i * N + e], c = cosines[i * N + e];
    const Acc<T> u = simt::widen(a.v[e]), v = simt::widen(b.v[e]);
    first.v[e] = simt::narrow<T>(u * c - v * s);
    second.v[e] = simt::narrow<T>(v * c + u * s);
  }
  store_pack(y, i, first);
  store_pack(y + half, i, second);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) rope_kernel(RopeLaunch launch) {
  using A = Acc<T>;
  SIMT_SHARED(A, sines, [kPairs]);
  SIMT_SHARED(A, cosines, [kPairs]);
  const RopeParams& p = launch.p;
  const int64_t queries = p.parts[0].heads * (launch.pairs / N);
  const int64_t items = queries + p.parts[1].heads * (launch.pairs / N);
  const int64_t token = blockIdx.x;
  const int64_t position = p.positions[p.position_rows.offset(token)];
  for (int i = static_cast<int>(threadIdx.x); i < launch.pairs; i += kThreads) {
    double s, c;
    sine_cosine(static_cast<double>(position) * launch.frequency[i], s, c);
    sines[i] = static_cast<A>(p.inverse ? -s : s);
    cosines[i] = static_cast<A>(c);
  }
  __syncthreads();
  for (int64_t item = threadIdx.x; item < items; item += kThreads) {
    if (item < queries) {
      rotate<T, N>(launch, p.parts[0], token, item, sines, cosines);
    } else {
      rotate<T, N>(launch, p.parts[1], token, item - queries, sines, cosines);
    }
  }
}

template <class T>
bool part_packs(const RopeParams::Part& part, int64_t dim) {
  return dim / 2 % kPack<T> == 0 && packs<T>(part.x, part.stride, part.rows) &&
         packs<T>(part.x, part.stride, &part.head_stride, 1) && packs<T>(part.y, 1, nullptr, 0);
}

template <class T>
void run(const RopeParams& p, void* stream) {
  const bool packed = part_packs<T>(p.parts[0], p.dim) && part_packs<T>(p.parts[1], p.dim);
  const dim3 blocks = blocks_for("rope", p.tokens, 1);
  for (int64_t first = 0; first < p.dim / 2; first += kPairs) {
    const int64_t left = p.dim / 2 - first;
    RopeLaunch launch{p, first, left < kPairs ? left : kPairs, {}};
    for (int64_t i = 0; i < launch.pairs; ++i) {
      launch.frequency[i] =
          std::pow(p.theta, -2.0 * static_cast<double>(first + i) / static_cast<double>(p.dim));
    }
    if (packed) {
      simt::launch("rope", rope_kernel<T, kPack<T>>, blocks, dim3(kThreads), 0, stream, launch);
    } else {
      simt::launch("rope", rope_kernel<T, 1>, blocks, dim3(kThreads), 0, stream, launch);
    }
  }
}

}  // namespace

void rope(const RopeParams& p, void* stream) {
  dispatch_float(p.dtype, [&](auto tag) { run<typename decltype(tag)::type>(p, stream); });
}

}  // namespace synergen::cuda
