// Products of packed blocks, the one inner loop of every matrix product on the CPU.
//
// A block multiplies `p` (m rows of depth k, one number at a time, broadcast) by `v` (k rows of
// kLanes numbers, as vectors): acc[panel][m][kLanes] (+)= sum_k p[m][k] * v[panel][k][kLanes]. Sums
// run over k in ascending order, kDepth at a time, whatever the block sizes: results do not depend
// on how the work is cut or on the number of threads.
//
// Packing copies operands of any dtype and any strides to float or double, so that a product is
// right for all of them, and each packed number is used some 100 times.
#pragma once

#include "cpu/scratch.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace synergen::cpu::SYNERGEN_ISA {

// A register block of kRows x kVecs vectors. The accumulators, one row of v and one broadcast fill
// the registers: 24 + 2 + 1 of 32 (AVX-512), 12 + 2 + 1 of 16 (AVX2). Plain vectors take two SSE
// registers each.
#if defined(__AVX512F__)
constexpr int kRows = 12, kVecs = 2;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVecs = 2;
#else
constexpr int kRows = 6, kVecs = 1;
#endif
template <class A>
constexpr int kLanes = kVecs * VecOf<A>::N;
// Depth of a packed block: a panel of v (256 x 32 floats, 32 KiB) stays in the first-level cache
// while all of p passes.
constexpr int64_t kDepth = 256;
// Products that are added one after another in a register before they join the rest in memory. The
// rounding error of a chain grows with its length: with 256 the root mean square was 1.35 times
// that of MKL, with 128 it is equal, at 2 % of the time.
constexpr int64_t kChain = 128;

enum class Order {
  kByRow,
  kByDepth
};  // p as [row block][kRows][kDepth], or as [row block][kDepth][kRows]

template <class A, int Vecs, Order order>
inline void multiply_tile(const A* p, const A* v, int64_t depth, bool add, A* acc) {
  using V = VecOf<A>;
  for (int64_t begin = 0; begin < depth; begin += kChain) {
    const int64_t end = begin + kChain < depth ? begin + kChain : depth;
    V sum[kRows][Vecs];
    for (int64_t k = begin; k < end; ++k) {
      V right[Vecs];
#pragma GCC unroll 2
      for (int j = 0; j < Vecs; ++j) right[j] = V::load(v + k * kLanes<A> + j * V::N);
#pragma GCC unroll 12
      for (int m = 0; m < kRows; ++m) {
        const V left(order == Order::kByRow ? p[m * kDepth + k] : p[k * kRows + m]);
#pragma GCC unroll 2
        for (int j = 0; j < Vecs; ++j) sum[m][j] = fma(left, right[j], sum[m][j]);
      }
    }
    const bool more = add || begin > 0;
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < Vecs; ++j) {
        A* out = acc + m * kLanes<A> + j * V::N;
        (more ? V::load(out) + sum[m][j] : sum[m][j]).store(out);
      }
    }
  }
}

// acc[lanes / kLanes][row_blocks * kRows][kLanes] for one depth block. Panels of v lie `v_step`
// apart. Lanes beyond `lanes` in the last panel may be left out.
template <Order order, class A>
inline void multiply_block(const A* p, int64_t row_blocks, const A* v, int64_t v_step,
                           int64_t lanes, int64_t depth, bool add, A* acc) {
  for (int64_t done = 0; done < lanes; done += kLanes<A>, v += v_step) {
    const bool half = kVecs > 1 && lanes - done <= VecOf<A>::N;
    for (int64_t b = 0; b < row_blocks; ++b, acc += kRows * kLanes<A>) {
      const A* rows = p + b * kRows * kDepth;
      if (half) {
        multiply_tile<A, 1, order>(rows, v, depth, add, acc);
      } else {
        multiply_tile<A, kVecs, order>(rows, v, depth, add, acc);
      }
    }
  }
}

inline constexpr int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

template <class A>
inline void fill_zero(A* p, int64_t n) {
  std::memset(p, 0, n * sizeof(A));
}

// A whole product, depth block by depth block: pack_v(k0, n) and pack_p(k0, n) give the packed
// operands.
template <Order order, class A, class PackV, class PackP>
inline void multiply(int64_t depth, int64_t row_blocks, int64_t lanes, int64_t v_step, bool add,
                     const PackV& pack_v, const PackP& pack_p, A* acc) {
  if (depth == 0 && !add)
    fill_zero(acc, row_blocks * kRows * ceil_div(lanes, kLanes<A>) * kLanes<A>);
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int64_t n = depth - k0 < kDepth ? depth - k0 : kDepth;
    const A* v = pack_v(k0, n);
    const A* p = pack_p(k0, n);
    multiply_block<order>(p, row_blocks, v, v_step, lanes, n, add || k0 > 0, acc);
  }
}

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Rows of a matrix in memory: row i starts at data + index[i] * row_stride (or i * row_stride
// without an index).
struct RowsOf {
  DType dtype;
  const void* data;
  int64_t row_stride, stride;
  const int64_t* index = nullptr;

  const char* at(int64_t row, int64_t from) const {
    const int64_t element = (index ? index[row] : row) * row_stride + from * stride;
    return static_cast<const char*>(data) + element * size_of(dtype);
  }
  template <class A>
  void load(int64_t row, int64_t from, int64_t n, A* out) const {
    load_row(dtype, at(row, from), stride, n, out);
  }
  // Asks for memory that the next load will want. Never faults, wherever it points.
  void prefetch(int64_t row, int64_t from, int64_t n) const {
    if (stride != 1) return;
    const char* p = at(row, from);
    for (int64_t i = 0; i < n * size_of(dtype); i += 64) __builtin_prefetch(p + i, 0, 2);
  }
};

// Most lanes, or rows, that one call of pack_lanes or pack_columns takes.
constexpr int64_t kMostPacked = 128;

// out[lanes / kLanes][kDepth][kLanes] = from[k0 + k][lane0 + lane]: rows of the matrix run along
// the lanes.
template <class A>
inline void pack_lanes(const RowsOf& from, int64_t k0, int64_t depth, int64_t lane0, int64_t lanes,
                       A* out) {
  using V = VecOf<A>;
  alignas(64) A row[kMostPacked] = {};
  for (int64_t k = 0; k < depth; ++k) {
    from.load(k0 + k, lane0, lanes, row);
    for (int64_t done = 0; done < lanes; done += kLanes<A>) {
      A* to = out + done * kDepth + k * kLanes<A>;
      for (int j = 0; j < kVecs; ++j) V::load(row + done + j * V::N).store(to + j * V::N);
    }
  }
}

// out[depth][kLanes] = from[row0 + lane][k]: one panel whose lanes are the rows of the matrix.
template <class A>
inline void pack_panel(const RowsOf& from, int64_t row0, int64_t rows, int64_t depth, A* out) {
  using V = VecOf<A>;
  constexpr int N = V::N;
  alignas(64) A block[N][kDepth];
  for (int64_t lane = 0; lane < kLanes<A>; lane += N) {
    for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
      const int64_t n = depth - k0 < kDepth ? depth - k0 : kDepth;
      for (int64_t i = 0; i < N; ++i) {
        if (lane + i < rows) {
          from.load(row0 + lane + i, k0, n, block[i]);
        } else {
          fill_zero(block[i], n);
        }
      }
      for (int64_t k = 0; k < n; k += N) {
        V square[N];
        for (int i = 0; i < N; ++i) square[i] = V::load(block[i] + k);
        transpose(square);
        for (int i = 0; i < N && k + i < n; ++i)
          square[i].store(out + (k0 + k + i) * kLanes<A> + lane);
      }
    }
  }
}

// p by row: out[block][kRows][kDepth] = from[row0 + row][k0 + k], rows past the end zero.
template <class A>
inline void pack_rows(const RowsOf& from, int64_t row0, int64_t rows, int64_t k0, int64_t depth,
                      A* out) {
  for (int64_t row = 0; row < rows; ++row) {
    from.load(row0 + row, k0, depth, out + row * kDepth);
    from.prefetch(row0 + row, k0 + depth,
                  depth);  // the next block, wanted when this one has been multiplied
  }
  for (int64_t row = rows; row % kRows; ++row) fill_zero(out + row * kDepth, depth);
}

// p by depth: out[block][kDepth][kRows] = from[k0 + k][row0 + row], rows past the end zero.
template <class A>
inline void pack_columns(const RowsOf& from, int64_t k0, int64_t depth, int64_t row0, int64_t rows,
                         A* out) {
  alignas(64) A column[kMostPacked + kRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    from.load(k0 + k, row0, rows, column);
    for (int64_t done = 0; done < rows; done += kRows) {
      std::memcpy(out + done * kDepth + k * kRows, column + done, kRows * sizeof(A));
    }
  }
}

// out[lane][m], `out_step` apart, = acc[m][kLanes]: one panel of results turned so that each lane
// is a row. Writes whole vectors: out rows must have room for m rounded up to the vector size.
template <class A>
inline void turn_panel(const A* acc, int64_t m, int64_t lanes, A* out, int64_t out_step) {
  using V = VecOf<A>;
  constexpr int N = V::N;
  for (int64_t lane = 0; lane < lanes; lane += N) {
    for (int64_t i = 0; i < m; i += N) {
      V square[N];
      for (int r = 0; r < N; ++r)
        square[r] = i + r < m ? V::load(acc + (i + r) * kLanes<A> + lane) : V();
      transpose(square);
      for (int r = 0; r < N && lane + r < lanes; ++r)
        square[r].store(out + (lane + r) * out_step + i);
    }
  }
}

// out[i] = scale * row[i], converted to its dtype.
template <class A>
inline void store_row(DType dtype, void* base, int64_t offset, const A* row, A scale, int64_t n) {
  using V = VecOf<A>;
  const auto store = [&](auto* out) {
    out += offset;
    int64_t i = 0;
    for (; i + V::N <= n; i += V::N) (V::load(row + i) * V(scale)).store(out + i);
    if (i < n) store_part(load_part<V>(row + i, n - i) * V(scale), out + i, n - i);
  };
  if constexpr (std::is_same_v<A, double>) {
    if (dtype == DType::kFloat64) return store(static_cast<double*>(base));
    float* out = static_cast<float*>(base) + offset;  // weights may be float32 beside float64
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(row[i] * scale);
  } else if (dtype == DType::kFloat32) {
    store(static_cast<float*>(base));
  } else if (dtype == DType::kBFloat16) {
    store(static_cast<bf16*>(base));
  } else {
    store(static_cast<f16*>(base));
  }
}

// A few rows against many: out[r][n] = sum_k x[r][k] * w[n][k], each number of w read once,
// straight from memory. x is [rows][x_step] with x_step a multiple of the vector size and zeros
// past k.
template <int Rows, int Count, class A, class W>
inline void dot_tile(const A* x, int64_t x_step, const W* w, int64_t w_step, int64_t depth, A* out,
                     int64_t out_step) {
  using V = VecOf<A>;
  V sum[Rows][Count];
  int64_t k = 0;
  const auto step = [&](const auto& load) {
    V right[Count];
#pragma GCC unroll 8
    for (int n = 0; n < Count; ++n) {
      right[n] = load(w + n * w_step + k);
      // The next tile's line. Without it the hardware starts anew at each row: 9 instead of 20 GB/s
      // at 8 rows. One row alone is faster without (32 against 29).
      if constexpr (Rows > 1) __builtin_prefetch(w + (n + Count) * w_step + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const V left = V::load(x + r * x_step + k);
#pragma GCC unroll 8
      for (int n = 0; n < Count; ++n) sum[r][n] = fma(left, right[n], sum[r][n]);
    }
  };
  for (; k + V::N <= depth; k += V::N) step([](const W* p) { return V::load(p); });
  if (k < depth) step([&](const W* p) { return load_part<V>(p, depth - k); });
  for (int r = 0; r < Rows; ++r) {
    for (int n = 0; n < Count; ++n) out[r * out_step + n] = sum[r][n].sum();
  }
}

// How many rows of w go at once beside `rows` rows of x: enough chains to hide the latency of fma,
// few enough to stay in the registers.
constexpr int dot_count(int rows) {
#if defined(__AVX512F__)
  return rows == 1 ? 8 : rows == 2 ? 8 : rows == 4 ? 5 : 3;
#elif defined(__AVX2__)
  return rows == 1 ? 6 : rows == 2 ? 4 : rows == 4 ? 2 : 1;
#else
  return rows == 1 ? 3 : rows == 2 ? 2 : 1;
#endif
}

template <int Rows, class A, class W>
inline void dot_rows(const A* x, int64_t x_step, const W* w, int64_t w_step, int64_t n,
                     int64_t depth, A* out, int64_t out_step) {
  constexpr int kCount = dot_count(Rows);
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) {
    dot_tile<Rows, kCount>(x, x_step, w + i * w_step, w_step, depth, out + i, out_step);
  }
  for (; i < n; ++i) dot_tile<Rows, 1>(x, x_step, w + i * w_step, w_step, depth, out + i, out_step);
}

}  // namespace synergen::cpu::SYNERGEN_ISA
