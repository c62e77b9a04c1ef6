// The pieces of sampling: one row by one block or by several, in three steps with a barrier between
// them. sample_tokens.cu puts them together; a kernel that already has the whole grid can too.
//
// The integers are those of the CPU kernel: the mass of a token is exp((l - max) / T) in units of
// 2^-bits, computed in double and without fused multiply-add. Integer sums have no rounding and no
// order, so every division of the work gives the same id to the bit.
//
//   scan   every part of the row, its own tiles: the largest logit, and for top-k how many keys
//          begin with each digit. A barrier over the row's parts.
//   weigh  every part, its own tiles: masses. Without filters a sum for each thread's eight tokens;
//          with filters a list of what may survive, in the order of the ids. For top-k that is what
//          begins with the digit of the k-th logit or a larger one: k tokens and part of one bin.
//          A barrier, or the last part to arrive goes on alone.
//   draw   one block: the filters' exact ends, by radix selection over the list, and the draw.
//
// Logits are read once from memory by scan, and again by weigh, when the first-level cache holds
// them: a tile is 8 to 64 KB.
#pragma once

#include <cmath>

#include "common/philox.h"
#include "cuda/access.cuh"

namespace synergen::cuda {

// A thread takes 8 neighbours, 16 bytes of 16-bit logits. A tile of 4,096 makes 8 blocks of a row
// of 32,768 tokens, 128 of 16 rows, for the 132 multiprocessors of an H100, where the 39 operations
// in double of each mass then take 2,500 cycles: the whole row on one would take 20,000.
constexpr int kSampleThreads = 512;
constexpr int kSampleEach = 8;
constexpr int kSampleTile = kSampleThreads * kSampleEach;
// Four bins a thread. The sign, the exponent and 2 bits of the mantissa of a float: about 20 bins
// hold all of a bell curve. Selection in 32-bit keys takes three passes.
constexpr int kSampleDigit = 11;
constexpr int kSampleBins = 1 << kSampleDigit;
constexpr int kBinsEach = kSampleBins / kSampleThreads;
constexpr int kSampleWarps = kSampleThreads / 32;

// ---- Logits as integers in their order

// -0 and 0 are one. The largest key of all is kept for what has no place in the order.
SIMT_FN uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f), sign = 1u << 31;
  return bits & sign ? ~bits : bits | sign;
}
SIMT_FN uint64_t key_of(double x) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x + 0.0));
  const uint64_t sign = uint64_t{1} << 63;
  return bits & sign ? ~bits : bits | sign;
}
SIMT_FN float logit_of(uint32_t key) {
  const uint32_t sign = 1u << 31;
  return __uint_as_float(key & sign ? key ^ sign : ~key);
}
SIMT_FN double logit_of(uint64_t key) {
  const uint64_t sign = uint64_t{1} << 63;
  return __longlong_as_double(static_cast<int64_t>(key & sign ? key ^ sign : ~key));
}
SIMT_FN int bit_width(uint32_t x) { return 32 - __clz(static_cast<int>(x)); }
SIMT_FN int bit_width(uint64_t x) { return 64 - __clzll(static_cast<int64_t>(x)); }
template <class A>
using KeyOf = decltype(key_of(A{}));

template <class A>
SIMT_FN A infinity() {
  return static_cast<A>(__uint_as_float(0x7f800000u));
}

SIMT_FN float mix(float c, float u, float scale) { return __fadd_rn(u, __fmul_rn(scale, c - u)); }
SIMT_FN double mix(double c, double u, double scale) {
  return __dadd_rn(u, __dmul_rn(scale, c - u));
}

// A row of logits, guided or not, read N elements at a time.
template <class T, int N>
struct RowLogits {
  using A = Acc<T>;
  const T *logits, *uncond;  // uncond may be null
  int64_t stride, uncond_stride, vocab;
  A scale;

  // The keys of tokens i to i + 7; past the end as those of -infinity.
  SIMT_FN void keys(int64_t i, KeyOf<A> (&out)[kSampleEach]) const {
    A c[kSampleEach], u[kSampleEach];
    read(logits, stride, i, c);
    if (uncond) read(uncond, uncond_stride, i, u);
#pragma unroll
    for (int e = 0; e < kSampleEach; ++e) out[e] = guided(c[e], uncond ? u[e] : c[e]);
  }
  SIMT_FN KeyOf<A> key(int64_t i) const {
    const A c = simt::widen(logits[i * stride]);
    return guided(c, uncond ? simt::widen(uncond[i * uncond_stride]) : c);
  }

 private:
  // A token at -infinity on either side stays there. NaN, also behind such a one, is marked.
  SIMT_FN KeyOf<A> guided(A c, A u) const {
    const bool number = c == c && u == u;
    const bool masked = c == -infinity<A>() || u == -infinity<A>();
    const A mixed = uncond == nullptr || scale == A(1) ? c : mix(c, u, scale);
    if (masked && number) return key_of(-infinity<A>());
    return number && mixed == mixed ? key_of(mixed) : ~KeyOf<A>{0};
  }
  SIMT_FN void read(const T* row, int64_t between, int64_t i, A (&x)[kSampleEach]) const {
#pragma unroll
    for (int first = 0; first < kSampleEach; first += N) {
      if (N > 1 && i + first + N <= vocab) {
        const Pack<T, N> pack = load_pack<N>(row, (i + first) / N, between);
#pragma unroll
        for (int e = 0; e < N; ++e) x[first + e] = simt::widen(pack.v[e]);
      } else {
#pragma unroll
        for (int e = first; e < first + N; ++e) {
          x[e] =
              i + e < vocab ? static_cast<A>(simt::widen(row[(i + e) * between])) : -infinity<A>();
        }
      }
    }
  }
};

// ---- Masses

// x = e^x for x <= 0, the arithmetic of the CPU kernel step by step; below -64 as at -64: no mass.
// All N go through each step together: a constant is two instructions, and is loaded once for N.
template <int N>
SIMT_FN void exp_below_zero(double (&x)[N]) {
  constexpr double kRound = 0x1.8p52 + 1023;  // leaves the rounded integer as an exponent field
  constexpr double kTerms[] = {1.0 / 479001600,
                               1.0 / 39916800,
                               1.0 / 3628800,
                               1.0 / 362880,
                               1.0 / 40320,
                               1.0 / 5040,
                               1.0 / 720,
                               1.0 / 120,
                               1.0 / 24,
                               1.0 / 6,
                               0.5,
                               1.0,
                               1.0};
  double r[N], sum[N];
  uint64_t power[N];
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const double z = x[e] > -64.0 ? x[e] : -64.0;
    const double t = __dadd_rn(__dmul_rn(z, 1.4426950408889634074), kRound);
    const double n = __dsub_rn(t, kRound);
    r[e] = __dsub_rn(z, __dmul_rn(n, 0x1.62e42fee00000p-1));
    r[e] = __dsub_rn(r[e], __dmul_rn(n, 0x1.a39ef35793c76p-33));
    power[e] = static_cast<uint64_t>(__double_as_longlong(t)) << 52;
    sum[e] = 1.0 / 6227020800;
  }
#pragma unroll
  for (double term : kTerms) {
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] = __dadd_rn(__dmul_rn(sum[e], r[e]), term);
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    x[e] = __dmul_rn(sum[e], __longlong_as_double(static_cast<int64_t>(power[e])));
  }
}

// The first bit of a mass is worth 2^-bits: vocab * 2^bits <= 2^62.
inline int mass_bits(int64_t vocab) {
  int bits = 50;
  while (bits > 0 && vocab > int64_t{1} << (62 - bits)) --bits;
  return bits;
}

// ---- What the threads of a block tell each other

// Of a row.
struct SampleOptions {
  double temperature, top_p;
  int64_t top_k;
  uint32_t word;  // the row's random number
  int bits;       // mass_bits of the vocabulary
};

struct SampleBoard {
  // Zero, but between the counting of digits and pick_bin.
  alignas(16) uint32_t members[kSampleBins];                 // of each bin
  alignas(16) uint32_t low[kSampleBins], high[kSampleBins];  // halves of what they weigh together
  SampleOptions options;                                     // one thread's to write before scan
  uint64_t words[kSampleWarps];
  uint64_t before, inside;  // of the chosen bin: the weight of all before it, and its own
  uint32_t chosen, chosen_members;
};

// Four bins of a thread, which are zero afterwards.
SIMT_FN Pack<uint32_t, kBinsEach> take_bins(uint32_t* bins) {
  const auto mine = load_pack<kBinsEach>(bins, threadIdx.x, 1);
  store_pack(bins, threadIdx.x, Pack<uint32_t, kBinsEach>{});
  return mine;
}

// join(words of all threads) in every thread; join must not care for order.
template <class Join>
SIMT_FN uint64_t block_join(uint64_t x, SampleBoard& board, const Join& join) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = join(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  if (lane == 0) board.words[warp] = x;
  __syncthreads();
  x = board.words[lane % kSampleWarps];
#pragma unroll
  for (int distance = kSampleWarps / 2; distance > 0; distance /= 2) {
    x = join(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  __syncthreads();  // the words may be written again
  return x;
}

// The sum over the threads before this one; `total` over all of them. The caller has a barrier of
// its own to come, before the words are written again.
SIMT_FN uint64_t block_scan(uint64_t own, SampleBoard& board, uint64_t& total) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  uint64_t sum = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t below = __shfl_up_sync(0xffffffffu, sum, distance);
    sum += lane >= distance ? below : 0;
  }
  if (lane == 31) board.words[warp] = sum;
  __syncthreads();
  uint64_t warps = board.words[lane % kSampleWarps];
#pragma unroll
  for (int distance = 1; distance < kSampleWarps; distance *= 2) {
    const uint64_t below = __shfl_up_sync(0xffffffffu, warps, distance, kSampleWarps);
    warps += lane % kSampleWarps >= distance ? below : 0;
  }
  total = __shfl_sync(0xffffffffu, warps, kSampleWarps - 1);
  const uint64_t before = __shfl_sync(0xffffffffu, warps, (warp + kSampleWarps - 1) % kSampleWarps);
  return sum - own + (warp > 0 ? before : 0);
}

// The bin of 2,048 in which the running weight reaches goal(total): its number, its members, their
// weight and the weight before it are on the board. Thread t has bins 4 t to 4 t + 3.
template <class Goal>
SIMT_FN void pick_bin(const uint32_t (&members)[kBinsEach], const uint64_t (&weights)[kBinsEach],
                      SampleBoard& board, const Goal& goal) {
  uint64_t own = 0, total;
#pragma unroll
  for (int b = 0; b < kBinsEach; ++b) own += weights[b];
  uint64_t before = block_scan(own, board, total);
  const uint64_t target = goal(total);
#pragma unroll
  for (int b = 0; b < kBinsEach; ++b) {
    if (before < target && target <= before + weights[b]) {
      board.chosen = threadIdx.x * kBinsEach + static_cast<uint32_t>(b);
      board.chosen_members = members[b];
      board.before = before;
      board.inside = weights[b];
    }
    before += weights[b];
  }
  __syncthreads();
}

// ---- A row

// Tokens in the order of their ids, tile by tile: each has 4,096 places.
template <class Key>
struct SampleList {
  Key* keys;      // [tiles, 4096]
  uint32_t* ids;  // [tiles, 4096]

  SIMT_FN SampleList row(int64_t tiles_before) const {
    const int64_t places_before = tiles_before * kSampleTile;
    return {keys + places_before, ids + places_before};
  }
};

// What is known of a part after scan: the largest key, and where it is first met, for temperature
// 0.
template <class Key>
struct SamplePart {
  Key most;
  uint32_t first;
};

// And of a tile after weigh: what its tokens weigh, and how many places of each list it has filled.
struct SampleTile {
  uint64_t mass;
  uint32_t left, edge;
};

// Memory of one row, or of all of them one after the other.
template <class Key>
struct SampleScratch {
  SamplePart<Key>* parts;  // [parts]
  SampleTile* tiles;       // [tiles]
  uint32_t* counts;        // [parts, bins] how many keys begin with a digit, falling
  uint32_t* arrived;       // [1] parts that are done with their masses; zero after scan
  uint64_t* mass;          // [tiles, 4096] of `left`; without filters [512] sums in each tile
  SampleList<Key> left;    // what the filters may leave
  SampleList<Key> edge;    // and of that what begins with the digit of the k-th key

  SIMT_FN SampleScratch row(int64_t r, int tiles_each) const {
    const int64_t before = r * tiles_each;
    return {parts + before,
            tiles + before,
            counts + before * kSampleBins,
            arrived + r,
            mass + before * kSampleTile,
            left.row(before),
            edge.row(before)};
  }
};

// Where each array lies from `base` on; returns the bytes of all.
template <class Key>
int64_t lay_out(SampleScratch<Key>& s, void* base, int64_t rows, int64_t tiles) {
  int64_t bytes = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<Element*>(reinterpret_cast<uintptr_t>(base) +
                                         static_cast<uintptr_t>(bytes));
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(Element)), 256) * 256;
  };
  take(s.parts, rows * tiles);
  take(s.tiles, rows * tiles);
  take(s.counts, rows * tiles * kSampleBins);
  take(s.arrived, rows);
  take(s.mass, rows * tiles * kSampleTile);
  for (auto* list : {&s.left, &s.edge}) {
    take(list->keys, rows * tiles * kSampleTile);
    take(list->ids, rows * tiles * kSampleTile);
  }
  return bytes;
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

// kAhead: places of the list that a thread asks for before it waits for the first.
template <class Logits, int kAhead = 4>
class RowSampler {
  using A = typename Logits::A;
  using Key = KeyOf<A>;
  static constexpr int kKeyBits = 8 * static_cast<int>(sizeof(Key));

 public:
  SIMT_FN RowSampler(const Logits& logits, const SampleScratch<Key>& scratch, int part, int parts,
                     SampleBoard& board)
      : logits_(logits),
        options_(board.options),
        scratch_(scratch),
        part_(part),
        parts_(parts),
        tiles_(static_cast<int>(ceil_div(logits.vocab, kSampleTile))),
        board_(board) {}

  SIMT_FN void scan() {
    hold(part_);  // asked for before the options are there
    clear(board_.members);
    clear(board_.low);
    clear(board_.high);
    __syncthreads();
    const bool counting = options_.temperature != 0 && options_.top_k > 0;
    Key most = least();
    uint32_t first = 0;
    for (int tile = part_; tile < tiles_; tile += parts_) {
      if (tile != held_) hold(tile);
#pragma unroll
      for (int e = 0; e < kSampleEach; ++e) {
        if (keys_[e] > most) {
          most = keys_[e];
          first = static_cast<uint32_t>(first_token(tile) + e);
        }
        if (counting && keys_[e] > least()) atomicAdd(&board_.members[first_digit(keys_[e])], 1u);
      }
    }
    const Key own = most;
    most = static_cast<Key>(
        block_join(most, board_, [](uint64_t a, uint64_t b) { return a > b ? a : b; }));
    if (options_.temperature == 0) {
      first = static_cast<uint32_t>(block_join(
          own == most ? first : ~0u, board_, [](uint64_t a, uint64_t b) { return a < b ? a : b; }));
    }
    if (threadIdx.x == 0) {
      scratch_.parts[part_] = {most, first};
      if (part_ == 0) *scratch_.arrived = 0;
    }
    if (counting) {
      store_pack(scratch_.counts + int64_t{part_} * kSampleBins, threadIdx.x,
                 take_bins(board_.members));
    }
  }

  // False where the row has its answer already.
  SIMT_FN bool weigh() {
    most_ = scratch_.parts[0].most;
    for (int p = 1; p < parts_; ++p) {
      const Key other = scratch_.parts[p].most;
      most_ = other > most_ ? other : most_;
    }
    answer_ = -1;
    if (most_ == least() || most_ >= key_of(infinity<A>())) return false;
    if (options_.temperature == 0) {
      answer_ = INT64_MAX;
      for (int p = 0; p < parts_; ++p) {
        const int64_t first = scratch_.parts[p].first;
        if (scratch_.parts[p].most == most_ && first < answer_) answer_ = first;
      }
      return false;
    }
    floor_ = least() + 1;
    if (options_.top_k > 0) count_down();
    filtered_ = cut_short_ || options_.top_p < 1;
    for (int tile = part_; tile < tiles_; tile += parts_) {
      if (tile != held_) hold(tile);
      if (filtered_) {
        list(tile);
      } else {
        add_up(tile);
      }
    }
    return true;
  }

  SIMT_FN int64_t answer() const { return answer_; }

  // One block, after all parts have weighed.
  SIMT_FN int64_t draw() {
    if (filtered_) {
      if (cut_short_ && left_ < inside_) {
        keep(true, floor_, kKeyBits - kSampleDigit, left_);
      }
      if (options_.top_p < 1) {
        // The bits that the largest key and the floor share, all between them share.
        keep(false, most_, bit_width(most_ ^ floor_), 0);
      }
      weigh_tiles();
    }
    return invert();
  }

 private:
  SIMT_FN static Key least() { return key_of(-infinity<A>()); }
  // Of falling keys the digits rise.
  SIMT_FN static uint32_t first_digit(Key key) {
    return static_cast<uint32_t>(~key >> (kKeyBits - kSampleDigit));
  }

  SIMT_FN static void clear(uint32_t* bins) {
    store_pack(bins, threadIdx.x, Pack<uint32_t, kBinsEach>{});
  }
  // Of this thread, in a tile.
  SIMT_FN static int64_t first_token(int tile) {
    return int64_t{tile} * kSampleTile + threadIdx.x * kSampleEach;
  }

  // A part of one tile reads it once: its keys stay in registers from scan to weigh.
  SIMT_FN void hold(int tile) {
    logits_.keys(first_token(tile), keys_);
    held_ = tile;
  }

  // Where the k-th key must be: floor_, and how many of that bin stay.
  SIMT_FN void count_down() {
    uint32_t members[kBinsEach] = {};
    uint64_t weights[kBinsEach];
    for (int p = 0; p < parts_; ++p) {
      const auto counts =
          load_pack<kBinsEach>(scratch_.counts + int64_t{p} * kSampleBins, threadIdx.x, 1);
#pragma unroll
      for (int b = 0; b < kBinsEach; ++b) members[b] += counts.v[b];
    }
#pragma unroll
    for (int b = 0; b < kBinsEach; ++b) weights[b] = members[b];
    const uint64_t k = static_cast<uint64_t>(options_.top_k);
    pick_bin(members, weights, board_, [&](uint64_t total) {
      cut_short_ = k < total;
      return k;
    });
    if (!cut_short_) return;
    floor_ = static_cast<Key>(~static_cast<Key>(board_.chosen) << (kKeyBits - kSampleDigit));
    left_ = k - board_.before;
    inside_ = board_.inside;
  }

  // mass = exp((l - max) / T) * 2^bits, rounded to an integer by adding 2^52; 0 for -infinity.
  template <int N>
  SIMT_FN void weigh_keys(const Key (&keys)[N], uint64_t (&masses)[N]) const {
    const double most = static_cast<double>(logit_of(most_));
    const double scale = static_cast<double>(uint64_t{1} << options_.bits);
    double x[N];
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = static_cast<double>(logit_of(keys[e])) - most;
    if (options_.temperature != 1) {
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] = __ddiv_rn(x[e], options_.temperature);
    }
    exp_below_zero(x);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const double rounded = __dadd_rn(__dmul_rn(x[e], scale), 0x1p52);
      masses[e] = static_cast<uint64_t>(__double_as_longlong(rounded)) & ((uint64_t{1} << 52) - 1);
    }
  }

  // Without filters: what each thread's tokens weigh together, and the tile.
  SIMT_FN void add_up(int tile) {
    // Four at a time: enough that their chains fill the pipe of 64-bit arithmetic, and eight take
    // more than the 128 registers there are.
    constexpr int kTogether = 4;
    uint64_t own = 0;
#pragma unroll
    for (int first = 0; first < kSampleEach; first += kTogether) {
      Key keys[kTogether];
      uint64_t masses[kTogether];
#pragma unroll
      for (int e = 0; e < kTogether; ++e) keys[e] = keys_[first + e];
      weigh_keys(keys, masses);
#pragma unroll
      for (int e = 0; e < kTogether; ++e) own += masses[e];
    }
    scratch_.mass[tile * kSampleTile + static_cast<int>(threadIdx.x)] = own;
    const uint64_t total = block_join(own, board_, [](uint64_t a, uint64_t b) { return a + b; });
    if (threadIdx.x == 0) scratch_.tiles[tile].mass = total;
  }

  // With filters: the tile's tokens from floor_ on. Masses are computed once the few that top-k
  // leaves have been put together: spread over the warps they would cost as much as all.
  SIMT_FN void list(int tile) {
    const int64_t i = first_token(tile);
    const int base = tile * kSampleTile;
    const Key edge_end = floor_ + edge_keys();
    uint64_t own = 0, both;  // two counts in one: what is left, and above it the edge
#pragma unroll
    for (int e = 0; e < kSampleEach; ++e) {
      if (keys_[e] >= floor_) own += keys_[e] < edge_end ? uint64_t{1} << 32 | 1 : 1;
    }
    const uint64_t before = block_scan(own, board_, both);
    int at = base + static_cast<int>(before & 0xffffffffu);
    int edge_at = base + static_cast<int>(before >> 32);
#pragma unroll
    for (int e = 0; e < kSampleEach; ++e) {
      if (keys_[e] < floor_) continue;
      scratch_.left.keys[at] = keys_[e];
      scratch_.left.ids[at++] = static_cast<uint32_t>(i + e);
      if (keys_[e] < edge_end) {
        scratch_.edge.keys[edge_at] = keys_[e];
        scratch_.edge.ids[edge_at++] = static_cast<uint32_t>(i + e);
      }
    }
    const int count = static_cast<int>(both & 0xffffffffu);
    if (threadIdx.x == 0) {
      scratch_.tiles[tile].left = static_cast<uint32_t>(count);
      scratch_.tiles[tile].edge = static_cast<uint32_t>(both >> 32);
    }
    __syncthreads();
    // Two at a time, so that one thread's chain of additions does not wait for itself.
    for (int j = static_cast<int>(threadIdx.x); j < count; j += 2 * kSampleThreads) {
      const bool second = j + kSampleThreads < count;
      const Key pair[2] = {scratch_.left.keys[base + j],
                           second ? scratch_.left.keys[base + j + kSampleThreads] : least()};
      uint64_t masses[2];
      weigh_keys(pair, masses);
      scratch_.mass[base + j] = masses[0];
      if (second) scratch_.mass[base + j + kSampleThreads] = masses[1];
    }
  }
  // How many keys begin with the k-th one's digit; none where top-k cuts nothing.
  SIMT_FN Key edge_keys() const { return cut_short_ ? Key{1} << (kKeyBits - kSampleDigit) : 0; }

  SIMT_FN bool stays(const SampleList<Key>& list, Key key, int place) const {
    return key > floor_ || (key == floor_ && (last_id_ == ~0u || list.ids[place] <= last_id_));
  }

  SIMT_FN const SampleList<Key>& list_of(bool edge) const {
    return edge ? scratch_.edge : scratch_.left;
  }

  // visit(key, place, mass) for every token that stays of a list, each by one thread: as many warps
  // to a tile as there are, or several tiles to a warp. A thread asks for four places before it
  // waits for the first. On the edge a mass is 0.
  template <class Visit>
  SIMT_FN void for_list(bool edge, const Visit& visit) const {
    const SampleList<Key>& list = list_of(edge);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int ways = tiles_ < kSampleWarps ? kSampleWarps / tiles_ : 1;
    for (int unit = warp; unit < tiles_ * ways; unit += kSampleWarps) {
      const int tile = unit / ways, base = tile * kSampleTile;
      const SampleTile& filled = scratch_.tiles[tile];
      const int end = base + static_cast<int>(edge ? filled.edge : filled.left);
      for (int at = base + unit % ways * 32 + lane; at < end; at += kAhead * ways * 32) {
        Key keys[kAhead] = {};
        uint64_t mass[kAhead] = {};
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int place = at + a * ways * 32;
          if (place < end) {
            keys[a] = list.keys[place];
            if (!edge) mass[a] = scratch_.mass[place];
          }
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int place = at + a * ways * 32;
          if (stays(list, keys[a], place)) visit(keys[a], place, mass[a]);
        }
      }
    }
  }

  // Adds up a list's weights, ones on the edge and else masses, by digit_of(key, place) where it is
  // a digit; then pick_bin.
  template <class Digit, class Goal>
  SIMT_FN void choose_digit(bool edge, const Digit& digit_of, const Goal& goal) {
    for_list(edge, [&](Key key, int place, uint64_t mass) {
      const uint32_t digit = digit_of(key, place);
      if (digit >= kSampleBins) return;
      atomicAdd(&board_.members[digit], 1u);
      if (edge) return;
      const uint32_t low = static_cast<uint32_t>(mass);
      const uint32_t carry = atomicAdd(&board_.low[digit], low) + low < low;
      const uint32_t high = static_cast<uint32_t>(mass >> 32) + carry;
      if (high != 0) atomicAdd(&board_.high[digit], high);
    });
    __syncthreads();
    const auto members = take_bins(board_.members);
    const auto low = take_bins(board_.low), high = take_bins(board_.high);
    uint64_t weights[kBinsEach];
#pragma unroll
    for (int b = 0; b < kBinsEach; ++b) {
      weights[b] = edge ? members.v[b] : uint64_t{high.v[b]} << 32 | low.v[b];
    }
    pick_bin(members.v, weights, board_, goal);
  }

  // Keeps of a list the shortest prefix, in the order of falling logits and rising ids, whose
  // weight reaches the target: on the edge so many, else the share top_p of all masses. Equal
  // logits have equal weights, so of the last logit as many ids stay as the rest of the target
  // needs. The last `unknown` bits of that logit's key are to be found; `prefix` has the others.
  SIMT_FN void keep(bool edge, Key prefix, int unknown, uint64_t target) {
    constexpr uint32_t kNone = kSampleBins;
    bool fresh = !edge;
    const auto goal = [&](uint64_t total) {
      if (fresh) {
        // Not above the total: the largest share below 1 takes a whole step of double away.
        const double wanted = std::ceil(__dmul_rn(options_.top_p, static_cast<double>(total)));
        target = wanted < 1 ? 1 : static_cast<uint64_t>(wanted);
        fresh = false;
      }
      return target;
    };
    Key known = unknown < kKeyBits ? static_cast<Key>(~Key{0} << unknown) : 0;
    prefix &= known;
    uint32_t last = ~0u;
    bool all = false;  // of the chosen bin stays
    while (unknown > 0 && !all) {
      const int width = unknown < kSampleDigit ? unknown : kSampleDigit;
      unknown -= width;
      const uint32_t digits = (1u << width) - 1;
      choose_digit(
          edge,
          [&](Key key, int) {
            if ((key & known) != prefix) return kNone;
            return static_cast<uint32_t>(~key >> unknown) & digits;
          },
          goal);
      target -= board_.before;
      all = target == board_.inside || board_.chosen_members == 1;
      prefix |= static_cast<Key>(~board_.chosen & digits) << unknown;
      known |= static_cast<Key>(digits) << unknown;
    }
    uint32_t id = 0, id_known = 0;
    int shift = 0;
    while ((logits_.vocab - 1) >> shift >= kSampleBins) shift += kSampleDigit;
    for (; shift >= 0 && !all; shift -= kSampleDigit) {
      choose_digit(
          edge,
          [&](Key key, int place) {
            if (key != prefix) return kNone;
            const uint32_t own = list_of(edge).ids[place];
            return (own & id_known) == id ? own >> shift & (kSampleBins - 1) : kNone;
          },
          goal);
      target -= board_.before;
      all = target == board_.inside || board_.chosen_members == 1;
      id |= board_.chosen << shift;
      id_known |= static_cast<uint32_t>(kSampleBins - 1) << shift;
      last = id | ((1u << shift) - 1);
    }
    // An earlier filter may have ended further up.
    if (prefix > floor_ || (prefix == floor_ && last < last_id_)) last_id_ = last;
    if (prefix > floor_) floor_ = prefix;
  }

  // What is left of each tile's mass, a warp a tile.
  SIMT_FN void weigh_tiles() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int tile = static_cast<int>(threadIdx.x / 32); tile < tiles_; tile += kSampleWarps) {
      uint64_t own = 0;
      const int count = static_cast<int>(scratch_.tiles[tile].left);
#pragma unroll 4
      for (int j = lane; j < count; j += 32) own += mass_left(tile, j, count);
      own = warp_sum(own);
      if (lane == 0) scratch_.tiles[tile].mass = own;
    }
    __syncthreads();
  }
  SIMT_FN uint64_t mass_left(int tile, int j, int count) const {
    if (j >= count) return 0;
    const int place = tile * kSampleTile + j;
    const uint64_t mass = scratch_.mass[place];
    return stays(scratch_.left, scratch_.left.keys[place], place) ? mass : 0;
  }

  // The first id, in the order of the vocabulary, where the running mass exceeds u * total, u = (2
  // word + 1) / 2^33: its tile, the thread's share of the tile, the token.
  SIMT_FN int64_t invert() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    uint64_t total = 0;
    for (int t = lane; t < tiles_; t += 32) total += scratch_.tiles[t].mass;
    total = warp_sum(total);
    const uint64_t u = 2 * uint64_t{options_.word} + 1;
    uint64_t rest = __umul64hi(u, total) << 31 | u * total >> 33;
    int tile = 0;
    for (uint64_t mass; rest >= (mass = scratch_.tiles[tile].mass); ++tile) rest -= mass;
    // A thread's share is its eight tokens, or as much of the list.
    const int count = filtered_ ? static_cast<int>(scratch_.tiles[tile].left) : kSampleTile;
    const int each = (count + kSampleThreads - 1) / kSampleThreads;
    const int begin = static_cast<int>(threadIdx.x) * each;
    uint64_t own = 0;
    if (filtered_) {
      for (int j = begin; j < begin + each; ++j) own += mass_left(tile, j, count);
    } else {
      own = scratch_.mass[tile * kSampleTile + static_cast<int>(threadIdx.x)];
    }
    uint64_t before = block_scan(own, board_, total);
    if (before <= rest && rest < before + own) {
      board_.chosen = threadIdx.x;
      board_.before = before;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const int j = static_cast<int>(board_.chosen) * each + lane;
      const int place = tile * kSampleTile + j;
      uint64_t mass[1] = {0};
      if (filtered_) {
        if (lane < each) mass[0] = mass_left(tile, j, count);
      } else {
        const bool there = lane < each && place < logits_.vocab;
        const Key key[1] = {there ? logits_.key(place) : least()};
        weigh_keys(key, mass);
      }
      uint64_t sum = mass[0];
#pragma unroll
      for (int distance = 1; distance < kSampleEach; distance *= 2) {
        const uint64_t below = __shfl_up_sync(0xffffffffu, sum, distance);
        sum += lane >= distance ? below : 0;
      }
      sum += board_.before;
      if (sum - mass[0] <= rest && rest < sum) {
        board_.inside = filtered_ ? scratch_.left.ids[place] : static_cast<uint64_t>(place);
      }
    }
    __syncthreads();
    return static_cast<int64_t>(board_.inside);
  }

  const Logits logits_;
  const SampleOptions& options_;
  const SampleScratch<Key> scratch_;
  const int part_, parts_, tiles_;
  SampleBoard& board_;
  Key keys_[kSampleEach];  // of tile held_
  int held_ = -1;
  Key most_ = 0;
  Key floor_ = 0;  // keys below it are out; of those equal to it, ids above last_id_
  uint32_t last_id_ = ~0u;
  bool cut_short_ = false;          // there are more tokens than top-k
  bool filtered_ = false;           // there is a list
  uint64_t left_ = 0, inside_ = 0;  // tokens with floor_'s digit that stay, and all of them
  int64_t answer_ = -1;
};

}  // namespace synergen::cuda
