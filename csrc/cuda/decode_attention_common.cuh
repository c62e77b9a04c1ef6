// What decode_attention's kernels share: which keys a block reads, and how parts of an answer are
// joined.
#pragma once

#include <cmath>

#include "cuda/access.cuh"
#include "kernels.h"

namespace synergen::cuda::decoding {

constexpr int kWarps = 8;  // a block: with 128 registers a thread, two on a multiprocessor
constexpr int64_t kWhole = 512, kSpan = 256;  // the reasons are in decode_attention.cu
constexpr int kQueries = 8;                   // the columns of an mma
constexpr int kMmaKeys = 16, kFmaKeys = 32;   // a step of a warp
constexpr unsigned kAll = 0xffffffffu;

struct DecodeLaunch {
  DecodeAttentionParams p;
  int64_t splits, span;   // blocks of a row's keys, and keys in each
  int64_t slices, width;  // blocks of a row's dim, and elements in each
};

SIMT_FN float minus_infinity(float) { return __uint_as_float(0xff800000u); }
SIMT_FN double minus_infinity(double) { return minus_infinity(0.0f); }

// The row's keys, within the cache whatever the row asks for.
struct Keys {
  int64_t begin, end;
  SIMT_FN Keys(const DecodeAttentionParams& p, int64_t row)
      : end(within(p.lengths.at(row, 0), p.keys)) {
    begin = within(p.starts.at(row, 0), end);
  }
  SIMT_FN static int64_t within(int64_t place, int64_t most) {
    return place < 0 ? 0 : place < most ? place : most;
  }
};

// What a block works on.
struct Task {
  int64_t row, kv_head, head, split, slice;
  int64_t begin, end;  // keys
  int queries;         // query heads from `head` on
  SIMT_FN explicit Task(const DecodeLaunch& launch) {
    const DecodeAttentionParams& p = launch.p;
    const int64_t group = p.heads / p.kv_heads, chunks = ceil_div(group, kQueries);
    int64_t rest = blockIdx.x;
    split = rest % launch.splits, rest /= launch.splits;
    slice = rest % launch.slices, rest /= launch.slices;
    const int64_t first = rest % chunks * kQueries;
    rest /= chunks;
    kv_head = rest % p.kv_heads, row = rest / p.kv_heads;
    head = kv_head * group + first;
    queries = static_cast<int>(group - first < kQueries ? group - first : kQueries);
    const Keys keys(p, row);
    begin = keys.begin + split * launch.span;
    end = keys.end - begin < launch.span ? keys.end : begin + launch.span;
  }
};

// A part of an answer is [values.., peak, total]: sums of e^(logit - peak) v and of e^(logit -
// peak) over some keys; total = 0 where there were none. Joins `parts` of them, `each` elements
// apart, in order: the value at d, with the peak and total of all.
template <class A>
struct Joined {
  A value, peak, total;
  SIMT_FN Joined(const A* part, int64_t parts, int64_t each, int64_t d, int64_t width)
      : value(0), peak(minus_infinity(A())), total(0) {
    for (int64_t i = 0; i < parts; ++i) {
      const A other = part[i * each + width];
      peak = other > peak ? other : peak;
    }
    for (int64_t i = 0; i < parts; ++i) {
      const A* one = part + i * each;
      if (one[width + 1] == 0) continue;
      const A weight = std::exp(one[width] - peak);
      value += weight * one[d];
      total += weight * one[width + 1];
    }
  }
  SIMT_FN A answer() const { return total == 0 ? A(0) : value / total; }
};

// The warps' parts, [warps, queries, width + 2] in shared memory, become the answer, or a part of
// it in scratch, [batch * heads, splits, dim + 2], where the block had keys.
template <class T>
SIMT_FN void finish(const DecodeLaunch& launch, const Task& task, const Acc<T>* parts) {
  using A = Acc<T>;
  const DecodeAttentionParams& p = launch.p;
  const int64_t each = launch.width + 2, warps = blockDim.x / 32;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < task.queries * launch.width; i += blockDim.x) {
    const int64_t query = i / launch.width, d = i % launch.width;
    const int64_t column = task.slice * launch.width + d;
    if (column >= p.dim) continue;
    const Joined<A> all(parts + query * each, warps, task.queries * each, d, launch.width);
    const int64_t row = task.row * p.heads + task.head + query;
    if (launch.splits == 1) {
      static_cast<T*>(p.out)[row * p.dim + column] = simt::narrow<T>(all.answer());
    } else if (task.begin < task.end) {
      A* part = static_cast<A*>(p.scratch) + (row * launch.splits + task.split) * (p.dim + 2);
      part[column] = all.value;
      if (column == 0) part[p.dim] = all.peak, part[p.dim + 1] = all.total;
    }
  }
}

}  // namespace synergen::cuda::decoding
