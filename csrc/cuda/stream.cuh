// Products of few rows (1 to 64) with a weight matrix that is read once, from global memory
// straight into registers. A warp takes 16 rows of the matrix (output columns) and a run of their
// elements:
//
//   Operands<T, W, NT> in{...};             // this lane's rows
//   Acc<T> sum[NT][4] = {};
//   multiply<kPacked>(in, begin, end, sum); // all 32 lanes; begin and end multiples of kChunk<W>,
//                                           // or end = in.k
//
// adds to sum[i][2 h + b] the product of weight row in.w[h] and row 8 i + 2 t + b of the
// activations, where g = lane / 4 and t = lane % 4: lanes of one g name the same weight rows, and
// in.x[i] is row 8 i + g of the activations. So warps that share 16 columns split the depth between
// them and add their sums afterwards, in order; see join(). Activations lie in global or shared
// memory. No barrier, no shared memory, no atomics; the order of every sum is fixed.
//
// T and W    | arithmetic
// 16-bit, T  | tensor cores, mma m16n8k16: weights are operand A, 8 activation rows operand B
// 16-bit, 8- and 4-bit | the same: weights become T exactly, scales multiply sums in float
// all other  | fused multiply-add in float, or double for double: NT = 1, 8 rows in one pass; the
// next 8
//            | rows read the weights again, from a cache
//
// Why tensor cores from one row on. H100: 3.35 TB/s / 132 multiprocessors / 1.75 GHz = 14.5 bytes a
// cycle, so 1 KiB, what a warp reads with two loads, passes in 71 cycles = 283 issue slots. Weights
// in bfloat16, R rows: FMA takes 16 conversions and 16 R products a KiB: 32 slots at R = 1, 144 at
// 8, 272 at 16. mma takes 18.5 as compiled up to 8 rows: 3 loads, 2 mma, 11 moves that bring
// registers together; 8-bit weights take 106 and 4-bit ones, in groups of 32, 201. 32 rows take 8
// mma, 16 of the 71 cycles of the tensor cores. Others:
//
//            | bytes / cycle / SM | slots a KiB | FMA crossover in bf16 | bytes in flight wanted /
//            SM
// A100 80 GB | 2.0 TB/s: 13.4     | 306 (FMA: 153) | R = 8              | 19 GB/s x 0.6 us = 11 KB
// H100       | 14.5               | 283         | R = 16                | 25 GB/s x 0.7 us = 18 KB
// RTX 4090   | 1.0 TB/s: 3.1      | 1310        | R = 80                | 8 GB/s x 0.6 us = 5 KB
// B200       | 8 TB/s: 29         | 141         | R = 7                 | 54 GB/s x 0.8 us = 43 KB
//
// 4 chunks of 1 KiB are under way for each warp: 16 warps on a multiprocessor make 64 KB.
#pragma once

#include <cstring>

#include "cuda/access.cuh"

namespace synergen::cuda::stream {

// Two weights of 4 bits, each stored as its value + 8. In every run of 8 columns (4 bytes, the
// lowest nibble first) lie columns 0, 2, 4, 6, 1, 3, 5, 7: one shift and one mask give two
// neighbours.
struct Nibbles {
  uint8_t bits;
};

template <class W>
constexpr int kBits = std::is_same_v<W, Nibbles> ? 4 : 8 * static_cast<int>(sizeof(W));
template <class W>
constexpr bool kQuantised = std::is_same_v<W, int8_t> || std::is_same_v<W, Nibbles>;
template <class W>
constexpr int kEach = 128 / kBits<W>;  // weights in 16 bytes, which one lane reads
template <class W>
constexpr int kChunk = 4 * kEach<W>;  // which the four lanes of a row read together
template <class T, class W>
constexpr bool kTensor = sizeof(T) == 2 && !std::is_same_v<W, float>;

constexpr int kRing = 4;  // chunks under way
// The most tiles of 8 rows that a thread's registers hold; more rows are more passes. 16-bit
// weights at 4 tiles want more than 255 (8 to 16 bytes of stack); 4-bit weights take sums since the
// last scale besides the totals, and registers to unpack.
template <class T, class W>
constexpr int kMostTiles = !kTensor<T, W>              ? 1
                           : std::is_same_v<W, int8_t> ? 4
                                                       : 2;
constexpr unsigned kAll = 0xffffffffu;

template <class T, class W, int NT>
struct Operands {
  int k;              // elements of a row, of weights and activations
  const T* x[NT];     // rows g, 8 + g, ...; each must be readable, its product need not be wanted
  const W* w[2];      // two rows; again readable, wanted or not
  const T* scale[2];  // quantised weights: of each group of the row
  int group_log2;  // a group is a power of two of at least 32 elements (64 for int8_t), or, where
                   // this is 31, the row
  int64_t x_step;  // between stored elements; not used where packed
  int64_t w_step[2], scale_step[2];
};

// Packed rows begin at 16 bytes and hold whole accesses of 16 bytes, weights and activations; their
// elements and scales are neighbours. Rows that are not packed are read one stored element at a
// time.

// 16 bytes that begin with element `at` of a row; zeros from `end` on.
template <class W>
SIMT_FN simt::Words gather_weights(const W* row, int64_t step, int at, int end) {
  constexpr int kStored = 16 / static_cast<int>(sizeof(W));
  const int64_t first = static_cast<int64_t>(at) * kStored / kEach<W>;
  const int64_t last = static_cast<int64_t>(end) * kStored / kEach<W>;
  Pack<W, kStored> pack{};
#pragma unroll
  for (int i = 0; i < kStored; ++i) {
    if (first + i < last) pack.v[i] = row[(first + i) * step];
  }
  simt::Words words;
  memcpy(&words, &pack, sizeof(words));
  return words;
}

// Elements at .. at + N of a row; zeros from `end` on.
template <int N, bool kPacked, class T>
SIMT_FN Pack<T, N> load_activations(const T* row, int64_t step, int at, int end) {
  Pack<T, N> pack{};
  if constexpr (kPacked) {
    if (at < end) pack = *reinterpret_cast<const Pack<T, N>*>(row + at);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (at + i < end) pack.v[i] = row[(at + i) * step];
    }
  }
  return pack;
}

template <bool kPacked, class T, class W, int NT>
SIMT_FN T load_scale(const Operands<T, W, NT>& in, int h, int at) {
  return in.scale[h][(at >> in.group_log2) * (kPacked ? 1 : in.scale_step[h])];
}

// ---- Tensor cores

// Integers become T without a conversion: as the low bits of 128 (bf16, 7 bits) or 1024 (f16, 10)
// they are that much more than themselves, which an addition takes away again, exactly.
template <class T>
SIMT_FN uint32_t add_pair(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    return simt::add_bf16x2(a, b);
  } else {
    return simt::add_f16x2(a, b);
  }
}

// Eight neighbours as pairs of T. `step` of them to the 16 bytes: 1, 2 (int8_t) or 4 (Nibbles).
// 8 bits to bf16 take 4 instructions a pair, to f16 2.5; 4 bits to either 2 and 3/4 of a shift.
template <class T, class W>
SIMT_FN void eight_of(const simt::Words& words, int step, uint32_t (&pairs)[4]) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (std::is_same_v<W, int8_t>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words.v[2 * step + i / 2];
      const uint32_t which = i % 2 == 0 ? 0x4140u : 0x4342u;  // two bytes, each under one of b
      if constexpr (kBf16) {  // 128 + 7 bits, less 128, or 256 where the sign bit is set
        const uint32_t pair = __byte_perm(word, 0x43434343u, which);
        pairs[i] = add_pair<T>(pair & 0xFF7FFF7Fu, simt::and_or(pair, 0x43804380u, 0x80008000u));
      } else {  // 1024 + 128 + the value, less 1152
        pairs[i] = add_pair<T>(__byte_perm(word ^ 0x80808080u, 0x64646464u, which), 0xE480E480u);
      }
    }
  } else if constexpr (std::is_same_v<W, Nibbles>) {
    const uint32_t word = words.v[step];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair =
          simt::and_or(word >> 4 * i, 0x000F000Fu, kBf16 ? 0x43004300u : 0x64006400u);
      pairs[i] = add_pair<T>(pair, kBf16 ? 0xC308C308u : 0xE408E408u);  // less 128 + 8, 1024 + 8
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = words.v[i];
  }
}

// Of the four lanes of a row, those a distance of 1 or 2 apart: word i + distance of the lower one
// and word i of the upper one change places.
template <int kDistance>
SIMT_FN void exchange_at(simt::Words& words, int t) {
  const bool upper = (t & kDistance) != 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((i & kDistance) != 0) continue;
    uint32_t &low = words.v[i], &high = words.v[i + kDistance];
    const uint32_t got = __shfl_xor_sync(kAll, upper ? low : high, kDistance);
    low = upper ? got : low;
    high = upper ? high : got;
  }
}

// Word j of lane t becomes word t of lane j, among the four lanes of a row. A chunk of 4-bit
// weights is 128 columns, and a scale may belong to 32 of them: afterwards word j of all four is
// one such run.
SIMT_FN void exchange(simt::Words& words, int t) {
  exchange_at<1>(words, t);
  exchange_at<2>(words, t);
}

template <class T>
SIMT_FN void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    simt::mma_bf16(sum, a, b0, b1);
  } else {
    simt::mma_f16(sum, a, b0, b1);
  }
}

template <bool kPacked, class T, class W, int NT>
SIMT_FN void multiply_on_tensor_cores(const Operands<T, W, NT>& in, int begin, int end,
                                      float (&sum)[NT][4]) {
  constexpr bool kNibbles = std::is_same_v<W, Nibbles>;
  constexpr int kSteps = kEach<W> / 8, kSlots = kPacked ? kRing : 1;
  constexpr int kRingSize = kSlots * kChunk<W>;
  // A step reads 8 elements of each row: those of the four lanes are 32 neighbours, or, where an
  // access of 16 bytes holds 16, every second run of 8.
  constexpr int kStride = kNibbles ? 32 : 8;
  const int lane = static_cast<int>(threadIdx.x % 32), t = lane % 4;
  const int own = t * kEach<W>, own_x = kNibbles ? 8 * t : own;
  const int group_mask = static_cast<int>((1u << in.group_log2) - 1);
  simt::Words ring[kSlots][2];
  T scales[kSlots][2] = {};
  float part[NT][4] = {};  // since the last scale
  float scale[2] = {};
  // Where this lane reads in the first chunk of the ring: the others are at constant distances.
  int base = begin;
  const char* w[2];
  const T* x[NT];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    w[h] =
        reinterpret_cast<const char*>(in.w[h]) + static_cast<int64_t>(begin + own) * kBits<W> / 8;
  }
#pragma unroll
  for (int i = 0; i < NT; ++i) x[i] = in.x[i] + begin + own_x;

  // Into slot % kSlots, the chunk that is number `slot` from base on.
  const auto fetch = [&](auto guarded, int slot) {
    const int at = base + slot * kChunk<W> + own;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      simt::Words words{};
      if constexpr (!kPacked) {
        words = gather_weights(in.w[h], in.w_step[h], at, end);
      } else if (!decltype(guarded)::value || at < end) {
        words = simt::load16_once(w[h] + slot * kChunk<W> * kBits<W> / 8);
      }
      ring[slot % kSlots][h] = words;
      if constexpr (kQuantised<W>) {
        scales[slot % kSlots][h] = load_scale<kPacked>(in, h, min(at, end - 1));
      }
    }
  };
  const auto flush = [&] {
#pragma unroll
    for (int i = 0; i < NT; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[i][j] += scale[j / 2] * part[i][j];
        part[i][j] = 0;
      }
    }
  };
  const auto consume = [&](auto guarded, int slot) {
    if constexpr (kNibbles) {
      exchange(ring[slot][0], t);
      exchange(ring[slot][1], t);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t low[4], high[4];
      eight_of<T, W>(ring[slot][0], step, low);
      eight_of<T, W>(ring[slot][1], step, high);
      // Which element of a run of 16 has which place in the mma does not matter, as long as both
      // operands agree: a lane's first four values make one, its last four another.
      const uint32_t a[2][4] = {{low[0], high[0], low[1], high[1]},
                                {low[2], high[2], low[3], high[3]}};
      const int offset = slot * kChunk<W> + step * kStride, at = base + own_x + offset;
#pragma unroll
      for (int i = 0; i < NT; ++i) {
        simt::Words b{};
        if constexpr (!kPacked) {
          const Pack<T, 8> pack = load_activations<8, false>(in.x[i], in.x_step, at, end);
          memcpy(&b, &pack, sizeof(b));
        } else if (!decltype(guarded)::value || at < end) {
          b = simt::load16(x[i] + offset);
        }
        float (&to)[4] = kQuantised<W> ? part[i] : sum[i];
        mma<T>(to, a[0], b.v[0], b.v[1]);
        mma<T>(to, a[1], b.v[2], b.v[3]);
      }
      if constexpr (kNibbles) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scale[h] = __shfl_sync(kAll, simt::widen(scales[slot][h]), (lane & ~3) | step);
        }
        if (((base + offset + kStride) & group_mask) == 0) flush();
      }
    }
    if constexpr (std::is_same_v<W, int8_t>) {
      scale[0] = simt::widen(scales[slot][0]);
      scale[1] = simt::widen(scales[slot][1]);
      if (((base + (slot + 1) * kChunk<W>)&group_mask) == 0) flush();
    }
  };
  const auto advance = [&] {
    base += kRingSize;
    w[0] += kRingSize * kBits<W> / 8;
    w[1] += kRingSize * kBits<W> / 8;
#pragma unroll
    for (int i = 0; i < NT; ++i) x[i] += kRingSize;
  };

  // Whole rings first. Nothing is guarded there: 2 + NT loads and 2 NT mma to the KiB.
  if constexpr (kPacked) {
    if (base + kRingSize <= end) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) fetch(std::false_type{}, slot);
    }
#pragma unroll 1
    for (; base + kRingSize <= end; advance()) {
      const bool more = base + 2 * kRingSize <= end;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        consume(std::false_type{}, slot);
        if (more) fetch(std::false_type{}, slot + kSlots);
      }
    }
  }
#pragma unroll 1
  for (; base < end; advance()) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (base + slot * kChunk<W> < end) fetch(std::true_type{}, slot);
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (base + slot * kChunk<W> < end) consume(std::true_type{}, slot);
    }
  }
  if constexpr (kQuantised<W>) flush();
}

// ---- Fused multiply-add

// Element i of the 16 bytes.
template <class A, class W>
SIMT_FN A value_of(const simt::Words& words, int i) {
  if constexpr (std::is_same_v<W, int8_t>) {
    return static_cast<A>(static_cast<int8_t>(words.v[i / 4] >> 8 * (i % 4)));
  } else if constexpr (std::is_same_v<W, Nibbles>) {
    const int nibble = i % 2 * 4 + i % 8 / 2;
    return static_cast<A>(static_cast<int>(words.v[i / 8] >> 4 * nibble & 15u) - 8);
  } else {
    Pack<W, kEach<W>> pack;
    memcpy(&pack, &words, sizeof(words));
    return static_cast<A>(pack.v[i]);
  }
}

template <bool kPacked, class T, class W>
SIMT_FN void multiply_by_fma(const Operands<T, W, 1>& in, int begin, int end, Acc<T> (&sum)[1][4]) {
  using A = Acc<T>;
  constexpr int kStep = kEach<W> < 4 ? kEach<W> : 4;  // elements at a time
  const int t = static_cast<int>(threadIdx.x % 4);
  const int chunks = static_cast<int>(ceil_div(end - begin, kChunk<W>));
  const T* x[8];
#pragma unroll
  for (int row = 0; row < 8; ++row) {
    const auto address = reinterpret_cast<unsigned long long>(in.x[0]);
    x[row] = reinterpret_cast<const T*>(__shfl_sync(kAll, address, 4 * row));
  }
  A part[2][8] = {};
  simt::Words ring[kRing][2];
  const auto fetch = [&](int slot, int chunk) {
    const int at = begin + chunk * kChunk<W> + t * kEach<W>;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      simt::Words words{};
      if constexpr (!kPacked) {
        words = gather_weights(in.w[h], in.w_step[h], at, end);
      } else if (at < end) {
        words = simt::load16_once(reinterpret_cast<const char*>(in.w[h]) +
                                  static_cast<int64_t>(at) * kBits<W> / 8);
      }
      ring[slot][h] = words;
    }
  };
#pragma unroll
  for (int slot = 0; slot < kRing; ++slot) {
    if (slot < chunks) fetch(slot, slot);
  }
  for (int first = 0; first < chunks; first += kRing) {
#pragma unroll
    for (int slot = 0; slot < kRing; ++slot) {
      if (first + slot >= chunks) break;
      const int at = begin + (first + slot) * kChunk<W> + t * kEach<W>;
      A scale[2] = {1, 1};
      if constexpr (kQuantised<W>) {
        const int safe = min(at, end - 1);
        scale[0] = simt::widen(load_scale<kPacked>(in, 0, safe));
        scale[1] = simt::widen(load_scale<kPacked>(in, 1, safe));
      }
      // A word at a time: all 16 bytes unrolled would want too many registers.
      constexpr int kWords = kQuantised<W> ? 4 : 1, kInWord = kEach<W> / kWords;
#pragma unroll 1
      for (int word = 0; word < kWords; ++word) {
#pragma unroll
        for (int e = 0; e < kInWord; e += kStep) {
          A w[2][kStep];
#pragma unroll
          for (int j = 0; j < kStep; ++j) {
            w[0][j] = value_of<A, W>(ring[slot][0], e + j) * scale[0];
            w[1][j] = value_of<A, W>(ring[slot][1], e + j) * scale[1];
          }
#pragma unroll
          for (int row = 0; row < 8; ++row) {
            const int from = at + word * kInWord + e;
            const auto pack = load_activations<kStep, kPacked>(x[row], in.x_step, from, end);
#pragma unroll
            for (int j = 0; j < kStep; ++j) {
              part[0][row] += w[0][j] * simt::widen(pack.v[j]);
              part[1][row] += w[1][j] * simt::widen(pack.v[j]);
            }
          }
        }
        if constexpr (kWords > 1) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t (&v)[4] = ring[slot][h].v;
            v[0] = v[1], v[1] = v[2], v[2] = v[3];
          }
        }
      }
      if (first + slot + kRing < chunks) fetch(slot, first + slot + kRing);
    }
  }
#pragma unroll
  for (int row = 0; row < 8; ++row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      A total = part[h][row] + __shfl_xor_sync(kAll, part[h][row], 1);
      total += __shfl_xor_sync(kAll, total, 2);
      if (row / 2 == t) sum[0][2 * h + row % 2] += total;
    }
  }
}

template <bool kPacked, class T, class W, int NT>
SIMT_FN void multiply(const Operands<T, W, NT>& in, int begin, int end, Acc<T> (&sum)[NT][4]) {
  if constexpr (kTensor<T, W>) {
    multiply_on_tensor_cores<kPacked>(in, begin, end, sum);
  } else {
    multiply_by_fma<kPacked>(in, begin, end, sum);
  }
}

// ---- Several warps

// Part i of n of a row of k elements: where it begins; part n begins at k. In whole rings where
// there are enough, so that only the last part has something left over.
template <class W>
SIMT_FN int part_begin(int k, int64_t i, int64_t n) {
  const int unit = k >= n * kRing * kChunk<W> ? kRing * kChunk<W> : kChunk<W>;
  const int64_t begin = ceil_div(k, unit) * i / n * unit;
  return static_cast<int>(begin < k ? begin : k);
}

// Warps 0 .. of the block hold sums of the same columns, `split` neighbours each: afterwards the
// first of them holds their total, added in order. `shared` is [warps * NT * 4 * 32]; every thread
// of the block comes here, and before it is written again there must be a barrier.
template <class A, int NT>
SIMT_FN void join(A (&sum)[NT][4], int split, A* shared) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  A* own = shared + warp * (NT * 4 * 32) + lane;
  if (warp % split != 0) {
#pragma unroll
    for (int i = 0; i < NT * 4; ++i) own[i * 32] = sum[i / 4][i % 4];
  }
  __syncthreads();
  if (warp % split == 0) {
    for (int other = 1; other < split; ++other) {
#pragma unroll
      for (int i = 0; i < NT * 4; ++i) sum[i / 4][i % 4] += own[(other * NT * 4 + i) * 32];
    }
  }
}

}  // namespace synergen::cuda::stream
