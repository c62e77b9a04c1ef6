// gemm.cuh without tensor cores: the same interface for every dtype, mixed ones included, and every
// stride. Sums in float or double. A block makes 64 x 256, a thread 4 x 16, in the same runs.
//
// Addresses count bytes (see `steps`) and come with the step to the next element: see Strided.
//
// A depth of 8 is read from memory one ahead and kept in shared memory in the type of the sums. For
// one depth a thread reads 80 bytes for 64 multiply-adds; a block of floats then has 8 warps x (4
// x 2 + 1) = 72 cycles of shared memory for 128 (H100) or 256 cycles (A100) of arithmetic.
#pragma once

#include <cmath>

#include "cuda/gemm.cuh"

namespace synergen::cuda::gemm {

SYNERGEN_HD constexpr int bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// One element of a dtype known at run time: a branch that all threads take alike.
template <class A>
SIMT_FN A read(DType dtype, const void* p) {
  if constexpr (std::is_same_v<A, double>) {
    return *static_cast<const double*>(p);
  } else {
    if (dtype == DType::kBFloat16) return simt::widen(*static_cast<const bf16*>(p));
    if (dtype == DType::kFloat16) return simt::widen(*static_cast<const f16*>(p));
    return *static_cast<const float*>(p);
  }
}
template <class A>
SIMT_FN A read(DType dtype, const Strided& p, int64_t i) {
  return read<A>(dtype, p.data + i * p.step);
}
template <class A>
SIMT_FN void write(DType dtype, void* p, A value) {
  if constexpr (std::is_same_v<A, double>) {
    *static_cast<double*>(p) = value;
  } else {
    if (dtype == DType::kBFloat16) {
      *static_cast<bf16*>(p) = simt::narrow<bf16>(value);
    } else if (dtype == DType::kFloat16) {
      *static_cast<f16*>(p) = simt::narrow<f16>(value);
    } else {
      *static_cast<float*>(p) = value;
    }
  }
}

template <class A>
struct PlainFma {
  using Element = char;
  using Sum = A;
  static constexpr int kRows = 64;
  static constexpr int kDepth = 8;
  static constexpr int kLeft = kRows + 4, kRight = kColumns + 4;  // 4: other banks for each depth
  static constexpr int kSharedBytes = 2 * kDepth * (kLeft + kRight) * static_cast<int>(sizeof(A));

  SYNERGEN_HD static int64_t steps(DType dtype, int64_t elements) {
    return elements * bytes_of(dtype);
  }

  SIMT_FN static Strided place(const char* p, int64_t step) { return {p, step}; }

  struct Sums {
    A d[4][16];
  };

  // Column n where thread n / 64 * 4 + n / 8 % 4 of 16 finds it: neighbours read neighbours.
  SIMT_FN static int slot_of(int n) {
    return (n / 32 % 2 * 2 + n / 4 % 2) * 64 + (n / 64 * 4 + n / 8 % 4) * 4 + n % 4;
  }

  template <int R, bool kIsRight>
  class Along {
    static constexpr int kPasses = R / 32;
    Strided rows_[kPasses];
    A values_[kPasses];
    int64_t depth_;
    DType dtype_;
    int k_, slot_;

   public:
    template <class F>
    SIMT_FN Along(int64_t depth, const F& row, DType dtype) : depth_(depth), dtype_(dtype) {
      k_ = static_cast<int>(threadIdx.x) % kDepth;
      slot_ = static_cast<int>(threadIdx.x) / kDepth;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) rows_[i] = row(slot_ + 32 * i);
    }
    SIMT_FN void fetch(int64_t k0) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const bool valid = rows_[i].data != nullptr && k0 + k_ < depth_;
        values_[i] = valid ? read<A>(dtype_, rows_[i], k0 + k_) : A(0);
      }
    }
    SIMT_FN void put(A* buffer) const {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int r = slot_ + 32 * i;
        buffer[k_ * (R + 4) + (kIsRight ? slot_of(r) : r)] = values_[i];
      }
    }
  };

  template <int R, bool kIsRight, class Where>
  class Across {
    static constexpr int kEach = kThreads / R, kPasses = kDepth / kEach;
    Where where_;
    A values_[kPasses];
    int64_t depth_;
    DType dtype_;
    int k_, slot_;
    bool there_;

   public:
    SIMT_FN Across(int64_t depth, int64_t count, const Where& where, DType dtype)
        : where_(where), depth_(depth), dtype_(dtype) {
      k_ = static_cast<int>(threadIdx.x) / R;
      slot_ = static_cast<int>(threadIdx.x) % R;
      there_ = slot_ < count;
    }
    SIMT_FN void fetch(int64_t k0) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int64_t k = k0 + k_ + i * kEach;
        const bool valid = there_ && k < depth_;
        values_[i] = valid ? read<A>(dtype_, where_.at(where_.handle(k)), slot_) : A(0);
      }
    }
    SIMT_FN void put(A* buffer) const {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        buffer[(k_ + i * kEach) * (R + 4) + (kIsRight ? slot_of(slot_) : slot_)] = values_[i];
      }
    }
  };

  // As those of TensorCores, and the dtype of the operand.
  template <class F>
  SIMT_FN static Along<kRows, false> rows(int64_t depth, const F& row, DType dtype) {
    return {depth, row, dtype};
  }
  template <class F>
  SIMT_FN static Along<kColumns, true> columns(int64_t depth, const F& column, DType dtype) {
    return {depth, column, dtype};
  }
  template <class Where>
  SIMT_FN static Across<kRows, false, Where> rows_across(int64_t depth, int64_t count,
                                                         const Where& where, DType dtype) {
    return {depth, count, where, dtype};
  }
  template <class Where>
  SIMT_FN static Across<kColumns, true, Where> columns_across(int64_t depth, int64_t count,
                                                              const Where& where, DType dtype) {
    return {depth, count, where, dtype};
  }

  template <class L, class R>
  SIMT_FN static void multiply(unsigned char* shared, L& a, R& b, int64_t depth, Sums& sums) {
    const int64_t tiles = ceil_div(depth, kDepth);
    const int row = static_cast<int>(threadIdx.x) / 16 * 4,
              column = static_cast<int>(threadIdx.x) % 16 * 4;
    const auto buffer = [&](int64_t tile) {
      return reinterpret_cast<A*>(shared) + tile % 2 * kDepth * (kLeft + kRight);
    };
    const auto put = [&](int64_t tile) {
      a.put(buffer(tile));
      b.put(buffer(tile) + kDepth * kLeft);
    };
#pragma unroll
    for (int i = 0; i < 4 * 16; ++i) sums.d[i / 16][i % 16] = 0;
    if (tiles == 0) return;  // all threads together

    a.fetch(0);
    b.fetch(0);
    put(0);
    __syncthreads();  // tile 0 is there
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (tile + 1 < tiles) {
        a.fetch((tile + 1) * kDepth);
        b.fetch((tile + 1) * kDepth);
      }
      const A *left = buffer(tile) + row, *right = buffer(tile) + kDepth * kLeft + column;
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const Pack<A, 4> l = load_pack<4>(left + k * kLeft, 0, 1);
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
          const Pack<A, 4> r = load_pack<4>(right + k * kRight + chunk * 64, 0, 1);
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            A& sum = sums.d[i / 4][chunk * 4 + i % 4];
            sum = std::fma(l.v[i / 4], r.v[i % 4], sum);
          }
        }
      }
      if (tile + 1 < tiles) put(tile + 1);
      __syncthreads();  // the next tile is there, and everybody is done with this one
    }
  }

  template <class R, class F>
  SIMT_FN static void each_run(const Sums& sums, const R&, const F& f) {
    const int thread = static_cast<int>(threadIdx.x) / 16,
              quarter = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      A runs[2][8];
#pragma unroll
      for (int j = 0; j < 16; ++j) runs[j / 8][j % 8] = sums.d[i][j];
      f(thread * 4 + i, quarter / 4 * 64 + quarter % 4 * 8, runs[0], runs[1]);
    }
  }

  SIMT_FN static A sum_of_row(A x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  // Up to 8 neighbours, `count` of which are there.
  SIMT_FN static void load_run(DType dtype, const void* data, int64_t offset, int64_t count,
                               A (&run)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const char* p = static_cast<const char*>(data) + steps(dtype, offset + i);
      run[i] = i < count ? read<A>(dtype, p) : A(0);
    }
  }
  SIMT_FN static void store_run(DType dtype, void* data, int64_t offset, int64_t count,
                                const A (&run)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) write(dtype, static_cast<char*>(data) + steps(dtype, offset + i), run[i]);
    }
  }
};

}  // namespace synergen::cuda::gemm
