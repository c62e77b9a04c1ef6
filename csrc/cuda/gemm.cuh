// Matrix products on tensor cores: sums[m, n] = sum_k a[m, k] b[n, k] for one block, 128 x 256 of
// the result, 16-bit operands, float sums. What is multiplied is said by two operands, which turn
// rows into addresses; what happens to the sums, by a function over runs of eight columns:
//
//   using G = gemm::TensorCores<bf16>;
//   SIMT_DYNAMIC_SHARED(shared);                              // G::kSharedBytes of it
//   auto a = G::rows(depth, [&](int m) -> const bf16* { ... });     // null: a row of zeros
//   auto b = G::columns(depth, [&](int n) -> const bf16* { ... });
//   typename G::Sums sums;
//   G::multiply(shared, a, b, depth, sums);                   // every thread of the block
//   G::each_run(sums, b, [&](int m, int n, const float (&left)[8], const float (&right)[8]) {
//     ...                                  // columns n .. n + 7 and n + 32 .. n + 39 of row m
//   });
//
// An operand comes in one of two ways: `rows` / `columns`, where each row m (or column n) is
// contiguous along the depth; or `rows_across` / `columns_across`, where the m (or n) of one depth
// are contiguous. The second takes something that says where each depth k lies: see Affine.
//
// Addresses must be 16-byte aligned, and counts that run along memory (depth, or the rows or
// columns of an operand across) multiples of 8: gemm_plain.cuh does everything else.
//
// The arithmetic, for an A100 (mma.sync: 16x8x16 in 8 cycles of a quarter of an SM) and a depth of
// 16, 512 cycles of tensor cores a block: 8 warps of 64 x 64 read 8 x 8 matrices-of-four, 256
// cycles of shared memory (warps of 64 x 32 would need 384), and 12 KiB arrive, 96 cycles: 69 %.
// From L2 come 24 bytes a cycle and SM of the 47 there are (128 x 128 would need 32; an H100, whose
// mma.sync is a quarter faster, has room for about 30). A warp issues 32 mma, 8 ldmatrix, 3 copies
// and some 30 other instructions in the 256 cycles that its mma take. 128 sums and 40 words of
// operands a thread leave no room for a second block in the registers. A stage is 24 KiB; four are
// 96 KiB, of the 99 KiB that a block may have on sm_120.
#pragma once

#include "cuda/access.cuh"

namespace synergen::cuda::gemm {

constexpr int kThreads = 256;
constexpr int kColumns = 256;  // of the result, a block; 64 a warp
constexpr int kDepth = 32;     // of a stage, two steps of mma

// A quarter of a warp's columns is a thread's: 8 in each half of 64, in one run, so that results
// leave in 16 bytes. mma gives a thread columns 2 q, 2 q + 1 of each 8; so where slots can be
// filled in any order, slot s of 32 holds column column_in_slot(s).
SIMT_FN int column_in_slot(int slot) {
  return (slot & ~31) + slot % 8 / 2 * 8 + slot % 32 / 8 * 2 + slot % 2;
}

// Elements that need not be neighbours, in bytes: what gemm_plain.cuh has for an address.
struct Strided {
  const char* data;
  int64_t step;
  SIMT_FN Strided operator+(int64_t bytes) const { return {data + bytes, step}; }
};
template <class T>
using Place = std::conditional_t<std::is_same_v<T, char>, Strided, const T*>;

// Depth k of an operand across lies at data + k * stride.
template <class T>
struct Affine {
  Place<T> data;
  int64_t stride;
  using Handle = int64_t;
  // Called a stage before `at`, so that what says where a depth lies may itself be read from
  // memory.
  SIMT_FN int64_t handle(int64_t k) const { return k; }
  SIMT_FN Place<T> at(int64_t k) const { return data + k * stride; }
};

// Depth k lies at data + rows[k] * stride.
template <class T>
struct Gathered {
  Place<T> data;
  int64_t stride;
  const int32_t* rows;
  using Handle = int32_t;
  SIMT_FN int32_t handle(int64_t k) const { return rows[k]; }
  SIMT_FN Place<T> at(int32_t row) const { return data + row * stride; }
};

// Depths below `first` lie in one place, the others in another.
template <class T>
struct Joined {
  Place<T> data, then;
  int64_t stride, then_stride, first;
  using Handle = int64_t;
  SIMT_FN int64_t handle(int64_t k) const { return k; }
  SIMT_FN Place<T> at(int64_t k) const {
    const bool late = k >= first;  // choices, where a branch would part the warp
    return (late ? then : data) + (late ? k - first : k) * (late ? then_stride : stride);
  }
};

template <class T>
struct TensorCores {
  using Element = T;
  using Sum = float;
  static constexpr int kRows = 128;  // of the result, a block; 64 a warp
  static constexpr int kStages = 4;
  static constexpr int kAhead = 2;  // stages on their way while two are read
  static constexpr int kStageBytes = (kRows + kColumns) * kDepth * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  struct Sums {
    float d[4][8][4];  // [16 rows][8 columns][of a thread]
  };

  // R rows of 64 bytes, contiguous along the depth. Four chunks of 16 bytes lie at chunk ^ (row / 2
  // % 4), so that 8 rows of one chunk fill the 32 banks.
  template <int R, bool kRight>
  class Along {
    static constexpr int kPasses = R / 64;
    const T* rows_[kPasses];
    int64_t depth_;
    int from_, to_, fragment_;

   public:
    static constexpr bool kSlots = true;

    template <class F>
    SIMT_FN Along(int64_t depth, const F& row) : depth_(depth) {
      const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
      const int slot = thread / 4, chunk = thread % 4;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int at = slot + 64 * i;
        rows_[i] = row(kRight ? column_in_slot(at) : at);
      }
      from_ = chunk * 8;
      to_ = slot * 64 + (chunk ^ (slot / 2 % 4)) * 16;
      const int first =
          kRight ? warp % 4 * 64 + lane / 16 * 8 + lane % 8 : warp / 4 * 64 + lane % 16;
      const int half = kRight ? lane / 8 % 2 : lane / 16;
      fragment_ = first * 64 + (half ^ (first / 2 % 4)) * 16;
    }
    SIMT_FN void copy(unsigned char* stage, int64_t k0) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const bool valid = rows_[i] != nullptr && k0 + from_ < depth_;
        simt::cp_async16(stage + to_ + i * 64 * 64, valid ? rows_[i] + k0 + from_ : nullptr, valid);
      }
    }
    // 16 rows, step 0 or 1 of the depth: the words of mma's a, or of its b for 8 columns twice.
    SIMT_FN void load(uint32_t (&words)[4], const unsigned char* stage, int sixteen,
                      int step) const {
      simt::ldmatrix_x4(words, stage + ((fragment_ + sixteen * 16 * 64) ^ (step * 32)));
    }
  };

  // 32 depths of C elements each, contiguous. Chunk c of depth k lies at c ^ (k % 8).
  template <int C, bool kRight, class Where>
  class Across {
    static constexpr int kChunks = C / 8, kEach = kThreads / kChunks, kPasses = kDepth / kEach;
    Where where_;
    typename Where::Handle handles_[kPasses];
    int64_t depth_;
    int k_, from_, to_, fragment_;
    bool there_;

   public:
    static constexpr bool kSlots = false;

    SIMT_FN Across(int64_t depth, int64_t count, const Where& where)
        : where_(where), depth_(depth) {
      const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
      const int chunk = thread % kChunks;
      k_ = thread / kChunks;
      from_ = chunk * 8;
      there_ = from_ < count;
      to_ = k_ * C * 2 + (chunk ^ (k_ % 8)) * 16;
      const int k = (kRight ? lane / 8 % 2 : lane / 16) * 8 + lane % 8;
      const int first = kRight ? warp % 4 * 8 + lane / 16 : warp / 4 * 8 + lane / 8 % 2;
      fragment_ = k * C * 2 + (first ^ (k % 8)) * 16;
      look_ahead(0);
    }
    SIMT_FN void copy(unsigned char* stage, int64_t k0) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const bool valid = there_ && k0 + k_ + i * kEach < depth_;
        simt::cp_async16(stage + to_ + i * kEach * C * 2,
                         valid ? where_.at(handles_[i]) + from_ : nullptr, valid);
      }
      look_ahead(k0 + kDepth);
    }
    SIMT_FN void load(uint32_t (&words)[4], const unsigned char* stage, int sixteen,
                      int step) const {
      simt::ldmatrix_x4_trans(words, stage + ((fragment_ ^ (sixteen * 32)) + step * 16 * C * 2));
    }

   private:
    SIMT_FN void look_ahead(int64_t k0) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int64_t k = k0 + k_ + i * kEach;
        if (k < depth_) handles_[i] = where_.handle(k);
      }
    }
  };

  // row(m), column(n) -> the address of depth 0, or null. The dtype that
  // gemm_plain.cuh wants to know is known here.
  template <class F>
  SIMT_FN static Along<kRows, false> rows(int64_t depth, const F& row, DType = {}) {
    return {depth, row};
  }
  template <class F>
  SIMT_FN static Along<kColumns, true> columns(int64_t depth, const F& column, DType = {}) {
    return {depth, column};
  }
  // `count` rows or columns are there, those beyond are zeros.
  template <class Where>
  SIMT_FN static Across<kRows, false, Where> rows_across(int64_t depth, int64_t count,
                                                         const Where& where, DType = {}) {
    return {depth, count, where};
  }
  template <class Where>
  SIMT_FN static Across<kColumns, true, Where> columns_across(int64_t depth, int64_t count,
                                                              const Where& where, DType = {}) {
    return {depth, count, where};
  }

  template <class A, class B>
  SIMT_FN static void multiply(unsigned char* shared, A& a, B& b, int64_t depth, Sums& sums) {
    constexpr int kRight = kRows * kDepth * 2;  // where b begins in a stage
    const int64_t tiles = ceil_div(depth, kDepth);
    const auto fetch = [&](int64_t tile) {
      unsigned char* stage = shared + tile % kStages * kStageBytes;
      if (tile < tiles) {
        a.copy(stage, tile * kDepth);
        b.copy(stage + kRight, tile * kDepth);
      }
      simt::cp_async_commit();  // of nothing at the end, so that the count of groups stays
    };
    uint32_t left[2][4], right[2][4][4];
    const auto load_right = [&](int64_t tile, int step) {
      const unsigned char* stage = shared + tile % kStages * kStageBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) b.load(right[step][i], stage + kRight, i, step);
    };
    const auto load_left = [&](int64_t tile, int step, int sixteen) {
      a.load(left[sixteen % 2], shared + tile % kStages * kStageBytes, sixteen, step);
    };
    // 16 rows times 64 columns times a step of depth.
    const auto add = [&](int step, int i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t *words = right[step][j / 2], b0 = words[j % 2 * 2],
                       b1 = words[j % 2 * 2 + 1];
        if constexpr (std::is_same_v<T, bf16>) {
          simt::mma_bf16(sums.d[i][j], left[i % 2], b0, b1);
        } else {
          simt::mma_f16(sums.d[i][j], left[i % 2], b0, b1);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < 4 * 8 * 4; ++i) sums.d[i / 32][i / 4 % 8][i % 4] = 0;
    if (tiles == 0) return;  // all threads together

    for (int tile = 0; tile < kAhead; ++tile) fetch(tile);
    simt::cp_async_wait<kAhead - 1>();
    __syncthreads();  // tile 0 has come
    load_right(0, 0);
    load_left(0, 0, 0);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      fetch(tile + kAhead);  // in place of tile - 2: since the last barrier nobody reads it
      load_right(tile, 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_left(tile, i / 3, (i + 1) % 4);
        add(0, i);
      }
      simt::cp_async_wait<kAhead - 1>();
      __syncthreads();  // the next tile has come, and everybody is done with the one before this
      if (tile + 1 < tiles) load_right(tile + 1, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < 3) load_left(tile, 1, i + 1);
        if (i == 3 && tile + 1 < tiles) load_left(tile + 1, 0, 0);
        add(1, i);
      }
    }
  }

  // f(m, n, left, right) for each row of a thread: columns n + i and n + 32 + i.
  template <class B, class F>
  SIMT_FN static void each_run(const Sums& sums, const B&, const F& f) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float runs[2][8];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          runs[side][j] = sums.d[i / 2][side * 4 + j / 2][i % 2 * 2 + j % 2];
        }
        if constexpr (!B::kSlots) turn(runs[side]);
      }
      f(warp / 4 * 64 + i / 2 * 16 + i % 2 * 8 + lane / 4, warp % 4 * 64 + lane % 4 * 8, runs[0],
        runs[1]);
    }
  }

  // The sum of x over the four threads of a warp that hold a row, the same bits in each.
  SIMT_FN static float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  // Eight neighbours, 16-byte aligned. The dtype and how many are there matter in gemm_plain.cuh.
  SIMT_FN static void load_run(DType, const void* data, int64_t offset, int64_t, float (&run)[8]) {
    const Pack<T, 8> pack = load_pack<8>(static_cast<const T*>(data) + offset, 0, 1);
#pragma unroll
    for (int i = 0; i < 8; ++i) run[i] = simt::widen(pack.v[i]);
  }
  SIMT_FN static void store_run(DType, void* data, int64_t offset, int64_t, const float (&run)[8]) {
    Pack<T, 8> pack;
#pragma unroll
    for (int i = 0; i < 8; ++i) pack.v[i] = simt::narrow<T>(run[i]);
    store_pack(static_cast<T*>(data) + offset, 0, pack);
  }
  // Addresses count elements.
  SYNERGEN_HD static int64_t steps(DType, int64_t elements) { return elements; }
  SIMT_FN static const T* place(const T* p, int64_t) { return p; }

 private:
  // Four threads hold two columns of each of four eights; afterwards each holds one eight.
  SIMT_FN static void turn(float (&run)[8]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = lane & bit;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        if (pair & bit) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float &low = run[pair * 2 + e], &high = run[(pair + bit) * 2 + e];
          const float got = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
          (upper ? low : high) = got;
        }
      }
    }
  }
};

}  // namespace synergen::cuda::gemm
