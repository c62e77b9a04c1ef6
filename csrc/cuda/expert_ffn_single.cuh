// expert_ffn for at most 8 pairs of token and expert in one cooperative launch: both products of
// expert_ffn_stream.cuh, with a barrier of the grid between them.
//
//   hidden[pair] = silu(gate[e] x) * (up[e] x)   a warp has 8 columns: 8 rows of gate, 8 of up
//   barrier of the grid
//   y[t] = sum_j weight_tj down[e] hidden[pair]  a warp has 16 columns
//
// What a warp reads next depends on nothing that is computed: while it multiplies its last chunks
// of gate and up, their places in its ring in shared memory fill with its first of down, and are on
// their way over the barrier. 15 of 16 warps have 60 KiB under way on each multiprocessor then, 2.3
// us of an H100's bandwidth; the barrier takes 1.2 to 1.7. With 4-bit weights, D = 2048, F = 8192,
// that is nearly all of down. (In registers the ring would do too, but with 4-bit weights it
// spills, and ptxas moves all its loads to the end of a turn.)
//
// Static bound on an H100, not measured, D = 2048, F = 8192, one expert, 2 rows; a launch takes 1.3
// us in a graph, the first load 0.7, code before and after the weights 0.8:
//   bf16         100.7 MB, 30.0 us + 2.8 = 32.9: 1.09 of the bytes' time
//   int8, rows   50.3 MB, 15.0 + 2.9 = 17.9: 1.19
//   int4, 64     26.7 MB, 8.0; unpacking and what the barrier hides under DRAM 9.1; + 2.9
//   = 12.0: 1.51
//
// Pair n is column n of every mma, whatever its expert: for each expert that is there its rows are
// multiplied by all pairs, and only those that chose it keep the result. So nothing is sorted, and
// a token's experts are added where its warps' sums are joined.
//
// It wants rows of whole rings (kRing chunks: 128 elements in 16 bits, 256 in 8, 512 in 4), rounds
// of whole blocks and groups of at least 64; nothing is guarded then. launch_ffn takes the two
// launches otherwise, and where the GPU cannot hold even one block. No more blocks are launched
// than are resident at once, so the barrier cannot wait for one that never runs.
#pragma once

#include <cmath>

#include "cuda/stream.cuh"
#include "kernels.h"

namespace synergen::cuda::stream {

struct Matrix {  // [experts, columns, k]
  const void* data;
  int64_t strides[3];
  const void* scale;  // [experts, columns, groups]
  int64_t scale_strides[3];
};

template <class T, class W>
SIMT_FN void point(const Matrix& m, int64_t expert, int64_t column, const W*& w, const T*& scale) {
  w = static_cast<const W*>(m.data) + expert * m.strides[0] + column * m.strides[1];
  if constexpr (kQuantised<W>) {
    scale =
        static_cast<const T*>(m.scale) + expert * m.scale_strides[0] + column * m.scale_strides[1];
  }
}

constexpr int kSinglePairs = 8;   // one tile of the mma
constexpr int kSingleWarps = 16;  // of a block: 128 registers a thread
constexpr size_t kSingleRing = kSingleWarps * kRing * 1024;

// One of the two products.
struct SingleProduct {
  Matrix low, high;  // gate and up, or down and down
  int rings;         // of a row of weights
  int split_log2;    // warps to a tile
  int rounds;        // blocks' worth of tiles
  int group_log2;    // as in Operands
};

struct SingleLaunch {
  int pairs, top_k, dim, hidden;
  int inverse;  // 2^16 / top_k + 1: a pair's token is pair * inverse / 2^16, as both are below 9
  int64_t experts;
  SingleProduct product[2];
  const void* x;  // [tokens, dim]
  int64_t x_stride;
  const int64_t* index;  // [tokens, top_k]; a negative one makes NaN
  int64_t index_strides[2];
  const void* weight;  // [tokens, top_k], or null
  bool weight_is_float;
  int64_t weight_strides[2];
  void* inner;  // T [pairs, hidden]
  void* y;      // T [tokens, dim]
};

SIMT_FN int token_of(const SingleLaunch& p, int pair) { return pair * p.inverse >> 16; }

// The first of a warp's own rings in a row; where the next warp of its tile begins, it ends.
SIMT_FN int first_ring(const SingleProduct& product, int part) {
  return product.rings * part >> product.split_log2;
}

// What a pair is multiplied with.
template <class T>
SIMT_FN const T* row_of(const SingleLaunch& p, int phase, int pair) {
  return phase == 0 ? static_cast<const T*>(p.x) + token_of(p, pair) * p.x_stride
                    : static_cast<const T*>(p.inner) + int64_t{pair} * p.hidden;
}

// What a block knows of its pairs, in shared memory.
struct Chosen {
  int expert[kSinglePairs];  // -1: none; -2: refused
  float factor[kSinglePairs];
  unsigned leaders;  // pairs, one for each expert that is there
};

// By one warp: a pair is a lane.
template <class T>
SIMT_FN void choose(const SingleLaunch& p, Chosen& chosen) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int expert = -1;
  if (lane < p.pairs) {
    const int token = token_of(p, lane), j = lane - token * p.top_k;
    const int64_t named = p.index[token * p.index_strides[0] + j * p.index_strides[1]];
    const int64_t at = token * p.weight_strides[0] + j * p.weight_strides[1];
    expert = named < 0 ? -2 : named < p.experts ? static_cast<int>(named) : -1;
    chosen.factor[lane] = p.weight == nullptr ? 1.0f
                          : p.weight_is_float ? static_cast<const float*>(p.weight)[at]
                                              : simt::widen(static_cast<const T*>(p.weight)[at]);
  }
  if (lane < kSinglePairs) chosen.expert[lane] = expert;
  const unsigned alike = __match_any_sync(kAll, expert);
  const bool leads = expert >= 0 && (alike & ((1u << lane) - 1)) == 0;
  const unsigned leaders = __ballot_sync(kAll, leads);
  if (lane == 0) chosen.leaders = leaders;
}

// Columns that have one scale for sure: a chunk of 64, or with 4 bits half a chunk of 128. There
// lane t has 32 columns, one run for lanes 0 and 1 and one for 2 and 3: half of exchange() makes
// words 0 and 1 of all four lanes the first run, and 2 and 3 the second. Word i of lane t is then
// 8 columns of the chunk from lane_column(t) + word_column(i) on.
template <class W>
SIMT_FN constexpr int lane_column(int t) {
  return std::is_same_v<W, Nibbles> ? 32 * (t % 2) + 16 * (t / 2) : t * kEach<W>;
}

template <class W>
SIMT_FN constexpr int word_column(int i) {
  return std::is_same_v<W, Nibbles> ? 64 * (i / 2) + 8 * (i % 2) : 8 * i;
}

// Weights of a warp on their way, one ring ahead of what is multiplied, over rows, experts, rounds
// and the barrier.
template <class T, class W>
class Ahead {
 public:
  static constexpr int kElements = kRing * kChunk<W>;

  // Nothing may be read yet. Where there is no expert, nothing ever is.
  SIMT_FN Ahead(const SingleLaunch& p, const Chosen& chosen, int warp, unsigned leaders,
                unsigned char* ring)
      : p_(p),
        own_(ring + warp * kRing * kSlotBytes + threadIdx.x % 32 * 16),
        chosen_(chosen),
        warp_(warp),
        leaders_(leaders),
        until_(0),
        phase_(0),
        round_(static_cast<int>(blockIdx.x)),
        left_(leaders) {}

  // Phases before `until` may be read from now on; all that was read is multiplied.
  SIMT_FN void allow(int until) {
    until_ = until;
    find();
#pragma unroll
    for (int slot = 0; slot < kRing; ++slot) fetch(slot);
    if constexpr (kQuantised<W>) fetch_scales();
    if (more()) advance();
  }

  SIMT_FN bool more() const { return phase_ < until_; }

  // Asks for chunk `slot` of the next ring; a group of copies even where there is none, so that
  // take() can count groups. A lane copies the bytes that it multiplies itself: no barrier is
  // wanted.
  SIMT_FN void fetch(int slot) {
    if (more()) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        simt::cp_async16(own_ + slot * kSlotBytes + h * (kSlotBytes / 2),
                         w_[h] + slot * kChunkBytes, true);
      }
    }
    simt::cp_async_commit();
  }

  // This lane's part of chunk `slot`: 16 bytes of either row. Whatever follows must not read it
  // again from its place.
  SIMT_FN void take(int slot, simt::Words (&words)[2]) const {
    simt::cp_async_wait<kRing - 1>();
    words[0] = simt::load16(own_ + slot * kSlotBytes);
    words[1] = simt::load16(own_ + slot * kSlotBytes + kSlotBytes / 2);
  }

  // Before the first chunk of a ring: its scales, which have come, and the next ones on their way.
  SIMT_FN void turn() {
    if constexpr (kQuantised<W>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scales_[i] = next_scales_[2 * i].bits | static_cast<uint32_t>(next_scales_[2 * i + 1].bits)
                                                    << 16;
      }
      fetch_scales();
    }
  }

  // The scales of the next chunk of the ring: for a run's two lanes, the even one has the first
  // row's and the odd one the second's. Every group of at least 64 columns is whole runs.
  SIMT_FN float take_scale() {
    const T scale{static_cast<uint16_t>(scales_[0])};
    scales_[0] = scales_[0] >> 16 | scales_[1] << 16;
    scales_[1] >>= 16;
    return simt::widen(scale);
  }

  // After all chunks of a ring.
  SIMT_FN void advance() {
    at_ += kElements;
    w_[0] += kRing * kChunkBytes;
    w_[1] += kRing * kChunkBytes;
    if (--rings_ > 0) return;
    left_ &= left_ - 1;
    if (left_ == 0) {
      left_ = leaders_;
      round_ += static_cast<int>(gridDim.x);
    }
    find();
  }

 private:
  static constexpr int kSlotBytes = 1024, kChunkBytes = kChunk<W> * kBits<W> / 8;

  SIMT_FN void fetch_scales() {
    if (!more()) return;
    const int own = at_ + static_cast<int>(threadIdx.x % 4) * kEach<W>;
#pragma unroll
    for (int slot = 0; slot < kRing; ++slot) {
      next_scales_[slot] = scale_[(own + slot * kChunk<W>) >> group_log2_];
    }
  }

  // The first rows from round_ on that there are.
  SIMT_FN void find() {
    while (phase_ < until_ && round_ >= p_.product[phase_].rounds) {
      ++phase_;
      round_ = static_cast<int>(blockIdx.x);
    }
    if (!more()) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const SingleProduct& product = p_.product[phase_];
    const int log2 = product.split_log2, part = warp_ & ((1 << log2) - 1);
    const int first = first_ring(product, part);
    rings_ = first_ring(product, part + 1) - first;
    at_ = first * kElements;
    group_log2_ = product.group_log2;
    const int tile = (round_ * kSingleWarps + warp_) >> log2;
    const int64_t column = tile * (phase_ == 0 ? 8 : 16) + lane / 4;
    const int expert = chosen_.expert[__ffs(static_cast<int>(left_)) - 1];
    const W* rows[2];
    const T* scale[2] = {nullptr, nullptr};
    point(product.low, expert, column, rows[0], scale[0]);
    point(product.high, expert, column + (phase_ == 0 ? 0 : 8), rows[1], scale[1]);
    scale_ = lane % 2 == 0 ? scale[0] : scale[1];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      w_[h] = reinterpret_cast<const char*>(rows[h]) +
              static_cast<int64_t>(at_ + lane % 4 * kEach<W>) * kBits<W> / 8;
    }
  }

  const SingleLaunch& p_;
  unsigned char* const own_;
  const Chosen& chosen_;
  const int warp_;
  const unsigned leaders_;
  int until_, phase_, round_;
  unsigned left_;  // pairs whose experts are to come in this round
  int rings_;      // left in these rows
  int at_, group_log2_;
  const char* w_[2];
  T next_scales_[kRing];
  uint32_t scales_[2];  // kRing of 16 bits, the next chunk's lowest
  const T* scale_;
};

// Chunk `slot`: sum[2 h + b] += weight row h of this lane's g times activation row 2 t + b.
// `x`: row g, at this lane's first element of the chunk.
template <class T, class W>
SIMT_FN void multiply_chunk(Ahead<T, W>& ahead, int slot, const T* x, float (&sum)[4]) {
  constexpr bool kNibbles = std::is_same_v<W, Nibbles>;
  constexpr int kSteps = kEach<W> / 8, kRuns = kNibbles ? 2 : 1;
  const int lane = static_cast<int>(threadIdx.x % 32);
  simt::Words words[2];
  ahead.take(slot, words);
  // No barrier: after that of the grid ptxas takes the lanes for parted, and asks before each
  // shuffle.
  if constexpr (kNibbles) __syncwarp();
  if constexpr (kNibbles) {
    exchange_at<2>(words[0], lane % 4);
    exchange_at<2>(words[1], lane % 4);
  }
  float scale = 0;
  if constexpr (kQuantised<W>) scale = ahead.take_scale();
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    float part[4] = {};
    float (&to)[4] = kQuantised<W> ? part : sum;
#pragma unroll
    for (int step = run * kSteps / kRuns; step < (run + 1) * kSteps / kRuns; ++step) {
      uint32_t low[4], high[4];
      eight_of<T, W>(words[0], step, low);
      eight_of<T, W>(words[1], step, high);
      const uint32_t a[2][4] = {{low[0], high[0], low[1], high[1]},
                                {low[2], high[2], low[3], high[3]}};
      const simt::Words b = simt::load16(x + word_column<W>(step));
      mma<T>(to, a[0], b.v[0], b.v[1]);
      mma<T>(to, a[1], b.v[2], b.v[3]);
    }
    if constexpr (kQuantised<W>) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float of = __shfl_sync(kAll, scale, (lane & ~3) | (2 * run + h));
        sum[2 * h] += of * part[2 * h];
        sum[2 * h + 1] += of * part[2 * h + 1];
      }
    }
  }
}

// The sum over the warps of a tile, in their order; `sums` is [warps, 2, 8, kSinglePairs].
SIMT_FN float joined(const float* sums, int split) {
  float sum = sums[0];
  for (int warp = 1; warp < split; ++warp) sum += sums[warp * 128];
  return sum;
}

template <class T, class W>
__global__ void __launch_bounds__(32 * kSingleWarps, 1)
    ffn_single_kernel(const __grid_constant__ SingleLaunch p) {
  constexpr int kElements = Ahead<T, W>::kElements;
  SIMT_DYNAMIC_SHARED(shared);
  SIMT_SHARED(float, sums, [kSingleWarps * 2 * 8 * kSinglePairs]);
  SIMT_SHARED(Chosen, chosen, [1]);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32), t = lane % 4;
  if (warp == 0) choose<T>(p, chosen[0]);
  __syncthreads();
  const unsigned leaders = chosen[0].leaders;
  Ahead<T, W> ahead(p, chosen[0], warp, leaders, shared);
#pragma unroll 1
  for (int phase = 0; phase < 2; ++phase) {
    const SingleProduct& product = p.product[phase];
    if (phase == 1) simt::grid_sync();
    // The fence of the barrier waits for what its own thread has under way. That is the block's
    // first: its warp asks for nothing of down until the barrier is past.
    if (leaders != 0 && (phase == 0 || warp == 0)) ahead.allow(phase == 0 && warp == 0 ? 1 : 2);
    const int log2 = product.split_log2;
    const int part = warp & ((1 << log2) - 1), begin = first_ring(product, part);
#pragma unroll 1
    for (int round = static_cast<int>(blockIdx.x); round < product.rounds;
         round += static_cast<int>(gridDim.x)) {
#pragma unroll 1
      for (unsigned left = leaders; left != 0; left &= left - 1) {
        float sum[4] = {};
        // Some pair where there is none: nobody keeps its sums.
        const T* from =
            row_of<T>(p, phase, min(lane / 4, p.pairs - 1)) + begin * kElements + lane_column<W>(t);
#pragma unroll 1
        for (int rings = first_ring(product, part + 1) - begin; rings > 0; --rings) {
          ahead.turn();
#pragma unroll 1
          for (int slot = 0; slot < kRing; ++slot) {
            multiply_chunk(ahead, slot, from, sum);
            ahead.fetch(slot);
            from += kChunk<W>;
          }
          if (ahead.more()) ahead.advance();
        }
        // Pairs of other experts got sums that nobody wants.
        const int now = chosen[0].expert[__ffs(static_cast<int>(left)) - 1];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          if (chosen[0].expert[2 * t + b] != now) continue;
          sums[warp * 128 + 2 * lane + b] = sum[b];
          sums[warp * 128 + 64 + 2 * lane + b] = sum[2 + b];
        }
      }
      __syncthreads();
      const int first = round * kSingleWarps >> log2, split = 1 << log2;
      if (phase == 0) {  // [tiles, pairs, 8]
        for (int i = static_cast<int>(threadIdx.x); i < kSingleWarps * 64 >> log2;
             i += 32 * kSingleWarps) {
          const int tile = i / 64, pair = i / 8 % 8, column = i % 8;
          if (pair >= p.pairs) continue;
          float value = 0;  // as somebody reads it
          if (chosen[0].expert[pair] >= 0) {
            const float* of = sums + (tile << log2) * 128 + column * 8 + pair;
            const float gate = joined(of, split), up = joined(of + 64, split);
            value = gate / (1 + std::exp(-gate)) * up;
          }
          static_cast<T*>(p.inner)[int64_t{pair} * p.hidden + (first + tile) * 8 + column] =
              simt::narrow<T>(value);
        }
      } else {  // [tiles, tokens, 16]
        for (int i = static_cast<int>(threadIdx.x); i < kSingleWarps * 128 >> log2;
             i += 32 * kSingleWarps) {
          const int tile = i / 128, token = i / 16 % 8, column = i % 16;
          float sum = 0;
          for (int pair = token * p.top_k; pair < min((token + 1) * p.top_k, p.pairs); ++pair) {
            if (chosen[0].expert[pair] >= 0) {
              sum += chosen[0].factor[pair] *
                     joined(sums + (tile << log2) * 128 + column * 8 + pair, split);
            } else if (chosen[0].expert[pair] == -2) {
              sum = NAN;
            }
          }
          if (token * p.top_k < p.pairs) {
            static_cast<T*>(p.y)[int64_t{token} * p.dim + (first + tile) * 16 + column] =
                simt::narrow<T>(sum);
          }
        }
      }
      __syncthreads();  // sums may be written again
    }
  }
}

}  // namespace synergen::cuda::stream
