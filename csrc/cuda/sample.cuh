// Sampling: one row by one block or by several, in three steps with a barrier between them.
// sample_tokens.cu puts them together; a kernel that already has the whole grid can too.
//
//   scan   every part of the row, its own tiles: each warp's largest logit, and for top-k how many
//          keys have each first digit. A barrier over the row's parts.
//   weigh  every part, its own tiles: masses. Without filters a sum for each thread's eight tokens;
//          with filters a list of what may survive, in the order of the ids. For top-k that is what
//          has the first digit of the k-th logit or a larger one: k tokens and part of one bin.
//          A barrier, or the last part to arrive goes on alone.
//   draw   one block: the filters' exact ends, that of top-k among the tokens of its first digit,
//          that of top-p by one histogram of the list unless logits are very alike, then what is in
//          the bin of the end, put in order; and the draw, by one warp.
//
// Logits are read once from memory: by scan into registers, and again by weigh where a part has
// several tiles, when the first-level cache holds them: a tile is 8 to 64 KB.
#pragma once

#include "common/philox.h"
#include "cuda/sample_board.cuh"
#include "cuda/sample_masses.cuh"

namespace synergen::cuda {

// A tile of 4,096 makes 8 blocks of a row of 32,768 tokens, 128 of 16 rows, for the 132
// multiprocessors of an H100, where the 39 operations in double of each mass then take 2,500
// cycles: the whole row on one would take 20,000.
constexpr int kSampleTile = kSampleThreads * kSampleEach;
// A warp's part of a tile. Chunks are numbered through the row, 16 to a tile.
constexpr int kSampleChunk = 32 * kSampleEach;

// What a warp knows after scan: the largest key, and where it is first met, for temperature 0.
template <class Key>
struct SamplePart {
  Key most;
  uint32_t first;
};

// And what is known of a tile after weigh: the mass of each chunk, and the filled places of the
// list.
struct SampleTile {
  uint64_t sums[kSampleWarps];
  int filled;
};

// Memory of one row, or of all of them one after the other. The list is what the filters may leave,
// in the order of the ids, tile by tile.
template <class Key>
struct SampleScratch {
  SamplePart<Key>* parts;  // [parts, warps]
  uint32_t* counts;        // [parts, bins] how many keys have a first digit, falling
  uint32_t* arrived;       // [1] parts that are done with their masses; zero after scan
  SampleTile* tiles;       // [tiles]
  Key* keys;               // [tiles, 4096] of the list
  uint32_t* ids;           // [tiles, 4096]
  uint64_t* mass;          // [tiles, 4096]; without filters sums, the first 32 of each chunk

  SIMT_FN SampleScratch row(int64_t r, int tiles_each) const {
    const int64_t before = r * tiles_each, places = before * kSampleTile;
    return {parts + before * kSampleWarps,
            counts + before * kSampleBins,
            arrived + r,
            tiles + before,
            keys + places,
            ids + places,
            mass + places};
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
  take(s.parts, rows * tiles * kSampleWarps);
  take(s.counts, rows * tiles * kSampleBins);
  take(s.arrived, rows);
  take(s.tiles, rows * tiles);
  take(s.keys, rows * tiles * kSampleTile);
  take(s.ids, rows * tiles * kSampleTile);
  take(s.mass, rows * tiles * kSampleTile);
  return bytes;
}

// kAtOnce: places of the list that a thread holds. With all eight of its chunk a warp that has one
// chunk reads it once.
template <class Logits, int kAtOnce = kSampleEach>
class RowSampler {
  using A = typename Logits::A;
  using Key = KeyOf<A>;
  static constexpr int kKeyBits = 8 * static_cast<int>(sizeof(Key));
  static constexpr int kAllPlaces = INT32_MAX;

 public:
  // Asks for the first tile's logits.
  SIMT_FN RowSampler(const Logits& logits, const SampleScratch<Key>& scratch, int part, int parts,
                     SampleBoard& board)
      : logits_(logits),
        options_(board.options),
        scratch_(scratch),
        part_(part),
        parts_(parts),
        tiles_(static_cast<int>(ceil_div(logits.vocab, kSampleTile))),
        board_(board) {
    hold(part);
  }

  // Options must be on the board, of one thread's writing.
  SIMT_FN void scan() {
    store_pack(board_.members, threadIdx.x, Pack<uint32_t, kBinsEach>{});
    board_.low[threadIdx.x] = 0;
    board_.high[threadIdx.x] = 0;
    __syncthreads();
    const bool counting = options_.temperature != 0 && options_.top_k > 0;
    Key most = least();
    uint32_t first = 0;
    for (int tile = part_;;) {
#pragma unroll
      for (int e = 0; e < kSampleEach; ++e) {
        if (keys_[e] > most) {
          most = keys_[e];
          first = static_cast<uint32_t>(first_token(tile) + e);
        }
        if (counting && keys_[e] > least())
          atomicAdd(&board_.members[FirstDigit<Key>::of(keys_[e])], 1u);
      }
      tile += parts_;
      if (tile >= tiles_) break;
      hold(tile);
    }
    const Key own = most;
    most = lanes_most(most);
    if (options_.temperature == 0) first = lanes_least(own == most ? first : ~0u);
    if (lane() == 0) scratch_.parts[part_ * kSampleWarps + warp()] = {most, first};
    if (threadIdx.x == 0 && part_ == 0) *scratch_.arrived = 0;
    if (counting) {
      __syncthreads();
      store_pack(scratch_.counts + int64_t{part_} * kSampleBins, threadIdx.x,
                 take_bins<kBinsEach>(board_.members));
    }
  }

  // False where the row has its answer already.
  SIMT_FN bool weigh() {
    most_ = least();
    const int known = parts_ * kSampleWarps;
#pragma unroll 4
    for (int i = lane(); i < known; i += 32) {
      const Key other = scratch_.parts[i].most;
      most_ = other > most_ ? other : most_;
    }
    most_ = lanes_most(most_);
    answer_ = -1;
    if (most_ == least() || most_ >= key_of(infinity<A>())) return false;
    if (options_.temperature == 0) {
      uint32_t first = ~0u;
      for (int i = lane(); i < known; i += 32) {
        const SamplePart<Key> other = scratch_.parts[i];
        if (other.most == most_ && other.first < first) first = other.first;
      }
      answer_ = static_cast<int>(lanes_least(first));
      return false;
    }
    floor_ = least() + 1;
    filtered_ = options_.top_p < 1;
    if (options_.top_k > 0) count_down();
    if (filtered_) {
      for (int tile = part_; tile < tiles_; tile += parts_) list(tile);
    } else {
      for (int tile = part_; tile < tiles_; tile += parts_) add_up(tile);
    }
    return true;
  }

  SIMT_FN int64_t answer() const { return answer_; }

  // One block, after all parts have weighed.
  SIMT_FN int64_t draw() {
    if (filtered_) {
      held_ = -1;  // from here on a place in the list
      if (left_ > 0) keep<false>();
      if (options_.top_p < 1) keep<true>();
      walk([&](int chunk, int begin, int end) {
        uint64_t own = 0;
        for_chunk(begin, end,
                  [&](int e, int place) { own += stays(keys_[e], place) ? masses_[e] : 0; });
        own = lanes_sum(own);
        if (lane() == 0) sum_of(chunk) = own;
      });
      __syncthreads();
    }
    if (threadIdx.x < 32) invert();
    __syncthreads();
    return static_cast<int64_t>(board_.inside);
  }

 private:
  // Keys from `top` down, or of this key alone places in the list from `first` up: the next digit
  // to be found is that of the distance.
  struct Range {
    Key top;
    int first, shift;
    bool places;
  };

  SIMT_FN static int lane() { return static_cast<int>(threadIdx.x % 32); }
  SIMT_FN static int warp() { return static_cast<int>(threadIdx.x / 32); }
  SIMT_FN static Key least() { return key_of(-infinity<A>()); }

  // Of this thread, in a tile.
  SIMT_FN static int64_t first_token(int tile) {
    return int64_t{tile} * kSampleTile + threadIdx.x * kSampleEach;
  }

  SIMT_FN uint64_t& sum_of(int chunk) const {
    return scratch_.tiles[chunk / kSampleWarps].sums[chunk % kSampleWarps];
  }

  // A part of one tile reads it once: its keys stay in registers from scan to weigh.
  SIMT_FN void hold(int tile) {
    logits_.keys(first_token(tile), keys_);
    held_ = tile;
  }

  // Where the k-th key must be: floor_, and how many of that bin stay.
  SIMT_FN void count_down() {
    uint32_t members[kBinsEach] = {};
#pragma unroll 8
    for (int p = 0; p < parts_; ++p) {
      const auto counts =
          load_pack<kBinsEach>(scratch_.counts + int64_t{p} * kSampleBins, threadIdx.x, 1);
#pragma unroll
      for (int b = 0; b < kBinsEach; ++b) members[b] += counts.v[b];
    }
    const uint64_t k = static_cast<uint64_t>(options_.top_k);
    bool cut_short = false;  // there are more tokens than top-k
    pick_bin(members, members, board_, [&](uint32_t total) {
      cut_short = k < total;
      return k;
    });
    if (!cut_short) return;
    filtered_ = true;
    const Key bin = FirstDigit<Key>::least(board_.chosen);
    floor_ = bin > floor_ ? bin : floor_;
    const uint64_t left = k - board_.before;
    left_ = left < board_.inside ? static_cast<uint32_t>(left) : 0;
    bin_ = board_.chosen;
    in_bin_ = board_.chosen_members;
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

  // Without filters: what each thread's tokens weigh together, and each warp's, a chunk.
  SIMT_FN void add_up(int tile) {
    if (tile != held_) {
      hold(tile);
    }
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
    const int chunk = tile * kSampleWarps + warp();
    scratch_.mass[chunk * kSampleChunk + lane()] = own;
    own = lanes_sum(own);
    if (lane() == 0) sum_of(chunk) = own;
  }

  // With filters: the tile's tokens from floor_ on. Masses are computed once the few that top-k
  // leaves have been put together: spread over the warps they would cost as much as all.
  SIMT_FN void list(int tile) {
    if (tile != held_) {
      hold(tile);
    }
    const uint32_t i = static_cast<uint32_t>(first_token(tile));
    const int base = tile * kSampleTile;
    uint32_t own = 0, total;
#pragma unroll
    for (int e = 0; e < kSampleEach; ++e) own += keys_[e] >= floor_;
    int at = base + static_cast<int>(block_scan(own, board_, total));
#pragma unroll
    for (int e = 0; e < kSampleEach; ++e) {
      if (keys_[e] < floor_) continue;
      scratch_.keys[at] = keys_[e];
      scratch_.ids[at++] = i + e;
    }
    const int end = base + static_cast<int>(total);
    if (threadIdx.x == 0) scratch_.tiles[tile].filled = static_cast<int>(total);
    if (threadIdx.x < kSampleWarps) scratch_.tiles[tile].sums[threadIdx.x] = 0;
    __syncthreads();
    // One at a time: of four warps on each quarter of a multiprocessor one is always ready.
#pragma unroll 1
    for (int j = base + static_cast<int>(threadIdx.x); j < end; j += kSampleThreads) {
      const Key key[1] = {scratch_.keys[j]};
      uint64_t mass[1];
      weigh_keys(key, mass);
      scratch_.mass[j] = mass[0];
    }
  }

  SIMT_FN bool stays(Key key, int place) const {
    return key > floor_ || (key == floor_ && place <= last_place_);
  }
  // The end of the list, of what stays up to now: later filters only come earlier.
  SIMT_FN void end_at(Key key, int place) {
    floor_ = key;
    last_place_ = place;
  }

  static_assert(kSampleWarps == 1 << 4);
  // Warps to a tile of the list: as many as there are, by a power of two.
  SIMT_FN int ways_bits() const {
    return tiles_ < kSampleWarps ? 4 - bit_width(static_cast<uint32_t>(tiles_ - 1)) : 0;
  }
  // Places of a thread in a chunk of a tile of which so many places are filled: as few as will do,
  // so that all warps have their share.
  SIMT_FN int each_of(int filled) const {
    const int bits = 5 + ways_bits(), most = (filled + (1 << bits) - 1) >> bits;
    return most < kSampleEach ? most : kSampleEach;
  }

  // kAtOnce of this thread's places of a chunk, from `begin` on; past the end keys that never stay.
  SIMT_FN void fetch(int begin, int end) {
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      if (begin + e * 32 >= end) break;
      const int place = begin + e * 32 + lane();
      keys_[e] = place < end ? scratch_.keys[place] : 0;
      masses_[e] = place < end ? scratch_.mass[place] : 0;
    }
    held_ = begin;
  }

  // visit(e, place) for this thread's places of a chunk: keys_[e] and masses_[e] are theirs.
  template <class Visit>
  SIMT_FN void for_chunk(int begin, int end, const Visit& visit) {
#pragma unroll 1
    for (; begin < end; begin += kAtOnce * 32) {
      if (begin != held_) {
        fetch(begin, end);
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        if (begin + e * 32 >= end) break;
        visit(e, begin + e * 32 + lane());
      }
    }
  }

  // visit(chunk, begin, end) by one warp for every chunk of the list, with its places.
  template <class Visit>
  SIMT_FN void walk(const Visit& visit) {
    const int bits = ways_bits(), ways = 1 << bits;
    for (int tile = warp() >> bits; tile < tiles_; tile += kSampleWarps) {
      const int filled = scratch_.tiles[tile].filled, size = 32 * each_of(filled);
      const int base = tile * kSampleTile;
      for (int part = warp() & (ways - 1); part * size < filled; part += ways) {
        const int begin = part * size, next = begin + size;
        visit(tile * kSampleWarps + part, base + begin, base + (next < filled ? next : filled));
      }
    }
  }
  SIMT_FN uint64_t mass_left(int place, int end) const {
    return place < end && stays(scratch_.keys[place], place) ? scratch_.mass[place] : 0;
  }

  // visit(e, place, digit) for what stays and has a digit. Of a key above the range the distance
  // goes round: further than that of any key in it, so it counts after all of them or not at all.
  template <class Visit>
  SIMT_FN void walk_digits(const Range& range, const Visit& visit) {
    walk([&](int, int begin, int end) {
      if (range.places) {
        for_chunk(begin, end, [&](int e, int place) {
          const int digit = (place - range.first) >> range.shift;
          if (keys_[e] == range.top && place >= range.first && digit < kEndBins &&
              stays(keys_[e], place)) {
            visit(e, place, static_cast<uint32_t>(digit));
          }
        });
      } else {
        for_chunk(begin, end, [&](int e, int place) {
          const Key digit = static_cast<Key>(range.top - keys_[e]) >> range.shift;
          if (digit < kEndBins && stays(keys_[e], place)) {
            visit(e, place, static_cast<uint32_t>(digit));
          }
        });
      }
    });
  }

  // visit(e, place) for what stays of the first distances of a range, up to `last`.
  template <class Visit>
  SIMT_FN void walk_first(const Range& range, Key last, const Visit& visit) {
    walk([&](int, int begin, int end) {
      if (range.places) {
        for_chunk(begin, end, [&](int e, int place) {
          const bool inside = place >= range.first && static_cast<Key>(place - range.first) <= last;
          if (inside && keys_[e] == range.top && stays(keys_[e], place)) {
            visit(e, place);
          }
        });
      } else {
        for_chunk(begin, end, [&](int e, int place) {
          if (static_cast<Key>(range.top - keys_[e]) <= last && stays(keys_[e], place)) {
            visit(e, place);
          }
        });
      }
    });
  }

  // Keeps of the list the shortest prefix, in the order of falling logits and rising ids, whose
  // weight reaches the target: so many of the first digit's bin, or the share top_p of all masses.
  // Equal logits have equal weights, so of the last logit as many ids stay as the rest of the
  // target needs.
  template <bool kByMass>
  SIMT_FN void keep() {
    Range range{most_, 0, 0, false};
    uint64_t target = kByMass ? 0 : left_;  // 0: not computed yet
    if (!kByMass && bin_ > 0) range.top = FirstDigit<Key>::least(bin_ - 1) - 1;
    Key last = range.top - floor_;
    int members = static_cast<int>(in_bin_);
    if (kByMass || in_bin_ > kSampleRanked) {
      if (!narrow<kByMass>(range, last, members, target)) return;
    }
    rank<kByMass>(range, last, members, target);
  }

  // Looks at a digit after the other, until few tokens are left of the range, up to `last` from its
  // top, or its end is the list's, when there is nothing more to do: false.
  template <bool kByMass>
  SIMT_FN bool narrow(Range& range, Key& last, int& members, uint64_t& target) {
    int unknown = bit_width(last);
    const auto goal = [&](uint64_t total) {
      if (kByMass && target == 0) {
        // Not above the total: the largest share below 1 takes a whole step of double away.
        const double wanted = std::ceil(__dmul_rn(options_.top_p, static_cast<double>(total)));
        target = wanted < 1 ? 1 : static_cast<uint64_t>(wanted);
      }
      return target;
    };
    while (true) {
      range.shift = unknown < kEndDigit ? 0 : unknown - kEndDigit;
      weigh_digits<kByMass>(range, goal);
      target -= board_.before;
      const Key begin = static_cast<Key>(board_.chosen) << range.shift;
      last = (Key{1} << range.shift) - 1;
      members = static_cast<int>(board_.chosen_members);
      if (range.places) {
        range.first += static_cast<int>(begin);
      } else {
        range.top -= begin;
      }
      if (target == board_.inside) {  // all of the bin stays
        if (range.places) {
          end_at(range.top, range.first + static_cast<int>(last));
        } else if (last < range.top - floor_) {
          end_at(range.top - last, kAllPlaces);
        }
        return false;
      }
      if (members <= kSampleRanked) return true;
      unknown = range.shift;
      if (unknown == 0) {  // one logit, of many tokens
        range.places = true;
        unknown = bit_width(static_cast<uint32_t>(tiles_ * kSampleTile - 1));
      }
    }
  }

  // Adds up weights, ones or masses, by digit, and picks the bin in which they reach the goal.
  template <bool kByMass, class Goal>
  SIMT_FN void weigh_digits(const Range& range, const Goal& goal) {
    walk_digits(range, [&](int e, int, uint32_t digit) {
      atomicAdd(&board_.members[digit], 1u);
      if constexpr (kByMass) {
        const uint32_t low = static_cast<uint32_t>(masses_[e]);
        const uint32_t carry = atomicAdd(&board_.low[digit], low) + low < low;
        const uint32_t high = static_cast<uint32_t>(masses_[e] >> 32) + carry;
        if (high != 0) atomicAdd(&board_.high[digit], high);
      }
    });
    __syncthreads();
    const auto members = take_bins<1>(board_.members);
    if constexpr (kByMass) {
      const uint64_t high = take_bins<1>(board_.high).v[0];
      const uint64_t weights[1] = {high << 32 | take_bins<1>(board_.low).v[0]};
      pick_bin(members.v, weights, board_, goal);
    } else {
      pick_bin(members.v, members.v, board_, goal);
    }
  }

  // Ends the list within the first distances of a range, which have few tokens: four threads to
  // each add up what comes before it.
  template <bool kByMass>
  SIMT_FN void rank(const Range& range, Key last, int members, uint64_t target) {
    walk_first(range, last, [&](int e, int place) {
      const uint32_t at = atomicAdd(&board_.ranked, 1u);
      board_.ranked_key[at] = keys_[e];
      board_.ranked_place[at] = static_cast<uint32_t>(place);
      board_.ranked_weight[at] = kByMass ? masses_[e] : 1;
    });
    __syncthreads();
    if (warp() * 8 < members) {
      const int own = static_cast<int>(threadIdx.x / 4);
      const int compared = own < members ? members : 0;
      const Key key = static_cast<Key>(compared ? board_.ranked_key[own] : 0);
      const uint32_t place = compared ? board_.ranked_place[own] : 0;
      uint64_t before = 0;
      for (int j = static_cast<int>(threadIdx.x % 4); j < compared; j += 4) {
        const Key other = static_cast<Key>(board_.ranked_key[j]);
        const bool earlier = other > key || (other == key && board_.ranked_place[j] < place);
        before += earlier ? board_.ranked_weight[j] : 0;
      }
      before += __shfl_xor_sync(0xffffffffu, before, 1);
      before += __shfl_xor_sync(0xffffffffu, before, 2);
      if (compared && threadIdx.x % 4 == 0 && before < target &&
          target <= before + board_.ranked_weight[own]) {
        board_.before = key;
        board_.chosen = place;
      }
    }
    __syncthreads();
    end_at(static_cast<Key>(board_.before), static_cast<int>(board_.chosen));
  }

  // The lane in whose own part of the running sum `rest` lies; takes away what comes before it.
  SIMT_FN static int find(uint64_t own, uint64_t& rest) {
    const uint64_t sum = warp_scan(own);
    const int found = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, sum > rest))) - 1;
    rest -= __shfl_sync(0xffffffffu, sum - own, found);
    return found;
  }

  // Puts the first id on the board, in the order of the vocabulary, where the running mass exceeds
  // u * total, u = (2 word + 1) / 2^33: its chunk, the thread's share of the chunk, the token. By
  // one warp.
  SIMT_FN void invert() {
    const int chunks = tiles_ * kSampleWarps, each = (chunks + 31) / 32;
    uint64_t own = 0;
#pragma unroll 4
    for (int j = lane() * each; j < (lane() + 1) * each; ++j) {
      own += j < chunks ? sum_of(j) : 0;
    }
    const uint64_t total = lanes_sum(own), u = 2 * uint64_t{options_.word} + 1;
    uint64_t rest = __umul64hi(u, total) << 31 | u * total >> 33;
    int chunk = find(own, rest) * each;
    for (uint64_t mass; rest >= (mass = sum_of(chunk)); ++chunk) rest -= mass;
    int begin = chunk * kSampleChunk, end = 0, places = kSampleEach;
    if (filtered_) {
      const int tile = chunk / kSampleWarps, filled = scratch_.tiles[tile].filled;
      places = each_of(filled);
      begin = tile * kSampleTile + chunk % kSampleWarps * 32 * places;
      end = tile * kSampleTile + filled;
      own = 0;
      const int first = begin + lane() * places;
      const Key* keys = scratch_.keys + first;
      const uint64_t* masses = scratch_.mass + first;
#pragma unroll
      for (int j = 0; j < kSampleEach; ++j) {
        if (j < places && first + j < end && stays(keys[j], first + j)) own += masses[j];
      }
    } else {
      own = scratch_.mass[begin + lane()];
    }
    const int place = begin + find(own, rest) * places + lane();
    uint64_t mass[1] = {0};
    if (lane() < places) {
      if (filtered_) {
        mass[0] = mass_left(place, end);
      } else if (place < logits_.vocab) {
        const Key key[1] = {logits_.key(place)};
        weigh_keys(key, mass);
      }
    }
    if (lane() == find(mass[0], rest)) {
      board_.inside = filtered_ ? scratch_.ids[place] : static_cast<uint64_t>(place);
    }
  }

  const Logits logits_;
  const SampleOptions& options_;
  const SampleScratch<Key> scratch_;
  const int part_, parts_, tiles_;
  SampleBoard& board_;
  Key keys_[kSampleEach];  // of tile held_, later of the list from place held_ on
  uint64_t masses_[kAtOnce];
  int held_ = -1;
  Key most_ = 0;
  Key floor_ = 0;  // keys below it are out; of those equal to it, places after last_place_
  int last_place_ = kAllPlaces;
  bool filtered_ = false;          // there is a list
  uint32_t left_ = 0;              // so many tokens with floor_'s digit stay, if not all
  uint32_t bin_ = 0, in_bin_ = 0;  // that digit, and how many tokens have it
  int answer_ = -1;
};

}  // namespace synergen::cuda
