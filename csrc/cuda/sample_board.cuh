// What the threads of a block that samples tell each other: sums over them, and the bin of a
// histogram in which a running weight reaches its goal.
#pragma once

#include "cuda/access.cuh"

namespace synergen::cuda {

constexpr int kSampleThreads = 512;
constexpr int kSampleWarps = kSampleThreads / 32;
// The first digit of a key, four bins a thread: see FirstDigit.
constexpr int kSampleDigit = 11;
constexpr int kSampleBins = 1 << kSampleDigit;
constexpr int kBinsEach = kSampleBins / kSampleThreads;
// The digits of the exact end, a bin a thread: of a few thousand keys there are a few in each.
constexpr int kEndDigit = 9;
constexpr int kEndBins = 1 << kEndDigit;
static_assert(kEndBins == kSampleThreads);
// So many tokens, or fewer, are put in order by comparing each with all others: four threads a
// token.
constexpr int kSampleRanked = kSampleThreads / 4;

// Of a row.
struct SampleOptions {
  double temperature, top_p;  // a temperature below 0: options that cannot be meant
  int64_t top_k;
  uint32_t word;  // the row's random number
  int bits;       // mass_bits of the vocabulary
};

SIMT_FN double meant_temperature(double guidance, double temperature, double top_p, int64_t top_k) {
  const bool meant = guidance - guidance == 0.0 && temperature - temperature == 0.0 &&
                     temperature >= 0 && top_k >= 0 && top_p >= 0 && top_p <= 1;
  return meant ? temperature : -1.0;
}

struct SampleBoard {
  // Zero, but between the counting of digits and pick_bin.
  alignas(16) uint32_t members[kSampleBins];  // of each bin
  uint32_t low[kEndBins], high[kEndBins];     // halves of what they weigh together
  // Tokens of one bin, in any order.
  uint64_t ranked_key[kSampleRanked], ranked_weight[kSampleRanked];
  uint32_t ranked_place[kSampleRanked];
  SampleOptions options;  // one thread's to write before scan
  uint64_t words[kSampleWarps];
  uint64_t before, inside;  // of the chosen bin: the weight of all before it, and its own
  uint32_t chosen, chosen_members, ranked;
};

// The bins of a thread, which are zero afterwards.
template <int N>
SIMT_FN Pack<uint32_t, N> take_bins(uint32_t* bins) {
  const auto mine = load_pack<N>(bins, threadIdx.x, 1);
  store_pack(bins, threadIdx.x, Pack<uint32_t, N>{});
  return mine;
}

// The sum over the lanes up to this one.
template <class Word>
SIMT_FN Word warp_scan(Word x) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Word below = __shfl_up_sync(0xffffffffu, x, distance);
    x += lane >= distance ? below : 0;
  }
  return x;
}

// The sum over all lanes, in every lane: one instruction for 32 bits, three for 64.
SIMT_FN uint32_t lanes_sum(uint32_t x) { return __reduce_add_sync(0xffffffffu, x); }
SIMT_FN uint64_t lanes_sum(uint64_t x) {
  constexpr int kBits = 22;
  constexpr uint32_t kLow = (1u << kBits) - 1;
  const uint64_t low = lanes_sum(static_cast<uint32_t>(x) & kLow);
  const uint64_t middle = lanes_sum(static_cast<uint32_t>(x >> kBits) & kLow);
  const uint64_t high = lanes_sum(static_cast<uint32_t>(x >> 2 * kBits));
  return low + (middle << kBits) + (high << 2 * kBits);
}
SIMT_FN uint32_t lanes_most(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }
SIMT_FN uint64_t lanes_most(uint64_t x) {
  const uint32_t high = lanes_most(static_cast<uint32_t>(x >> 32));
  const bool has = x >> 32 == high;
  return uint64_t{high} << 32 | lanes_most(has ? static_cast<uint32_t>(x) : 0);
}
SIMT_FN uint32_t lanes_least(uint32_t x) { return ~lanes_most(~x); }

// The sum over the warps before this one of what each of a warp's lanes has in `warps`, and over
// all of them. The caller has a barrier of its own to come, before the words are written again.
template <class Word>
SIMT_FN Word warps_before(Word warps, SampleBoard& board, Word& total) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  if (lane == 31) board.words[warp] = warps;
  __syncthreads();
  const Word words = lane < kSampleWarps ? static_cast<Word>(board.words[lane]) : Word{0};
  total = lanes_sum(words);
  return lanes_sum(lane < warp ? words : Word{0});
}

// The sum over the threads before this one; `total` over all of them.
template <class Word>
SIMT_FN Word block_scan(Word own, SampleBoard& board, Word& total) {
  const Word sum = warp_scan(own);  // of lane 31, the warp's
  return warps_before(sum, board, total) + sum - own;
}

// The bin in which the running weight reaches goal(total): its number, its members, their weight
// and the weight before it are on the board. Thread t has the N bins from N t on. One warp looks
// for it, the others know that it is not theirs.
template <int N, class Word, class Goal>
SIMT_FN void pick_bin(const uint32_t (&members)[N], const Word (&weights)[N], SampleBoard& board,
                      const Goal& goal) {
  Word own = 0, total;
#pragma unroll
  for (int b = 0; b < N; ++b) own += weights[b];
  const Word all = lanes_sum(own);
  Word before = warps_before(all, board, total);
  const Word target = static_cast<Word>(goal(total));
  if (before < target && target <= before + all) {
    before += warp_scan(own) - own;
#pragma unroll
    for (int b = 0; b < N; ++b) {
      if (before < target && target <= before + weights[b]) {
        board.chosen = threadIdx.x * N + static_cast<uint32_t>(b);
        board.chosen_members = members[b];
        board.before = before;
        board.inside = weights[b];
      }
      before += weights[b];
    }
  }
  if (threadIdx.x == 0) board.ranked = 0;
  __syncthreads();
}

// Whether this block is the last of `parts` to be here; what the others have written before is then
// its to read.
SIMT_FN bool last_to_arrive(uint32_t* arrived, uint32_t parts, SampleBoard& board) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    board.chosen = atomicAdd(arrived, 1u);
    __threadfence();
  }
  __syncthreads();
  return board.chosen == parts - 1;
}

}  // namespace synergen::cuda
