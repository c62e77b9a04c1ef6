// Products of packed blocks, the one inner loop of every matrix product on the CPU.
//
// A block multiplies `p` (m rows of depth k, one number at a time, broadcast) by `v` (k rows of
// kLanes numbers, as vectors): acc[panel][m][kLanes] (+)= sum_k p[m][k] * v[panel][k][kLanes]. Sums
// run over k in ascending order, kDepth at a time, whatever the block sizes: results do not depend
// on how the work is cut or on the number of threads.
//
// Packing copies operands of any dtype and any strides to float or double, so that a product is
// right for all of them, and each packed number is used some 100 times. Where both operands are
// bfloat16 and the CPU multiplies it, they are packed as pairs (pairs.h), and depth counts pairs. P
// is the packed number, A = Acc<P> that of sums.
#pragma once

#include "cpu/pairs.h"
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
template <class P>
constexpr int kLanes = kVecs * VecOf<P>::N;
// Depth of a packed block: a panel of v (256 x 32 floats or pairs, 32 KiB) stays in the first-level
// cache while all of p passes.
constexpr int64_t kDepth = 256;
// Products that are added one after another in a register before they join the rest in memory. The
// rounding error of a chain grows with its length: with 256 the root mean square was 1.35 times
// that of MKL, with 128 it is equal, at 2 % of the time. Against the rounding of bfloat16 it is
// nothing.
template <class P>
constexpr int64_t kChain = kPerPacked<P> == 2 ? kDepth : 128;

enum class Order {
  kByRow,
  kByDepth
};  // p as [row block][kRows][kDepth], or as [row block][kDepth][kRows]

// Steps of depth between two calls of ahead(k), which may ask for memory: the floats or pairs of a
// cache line.
constexpr int64_t kStride = 16;

template <class P, int Vecs, Order order, class Ahead>
inline void multiply_tile(const P* p, const P* v, int64_t depth, bool add, const Ahead& ahead,
                          Acc<P>* acc) {
  using X = VecOf<P>;
  using V = VecOf<Acc<P>>;
  for (int64_t begin = 0; begin < depth; begin += kChain<P>) {
    const int64_t end = begin + kChain<P> < depth ? begin + kChain<P> : depth;
    V sum[kRows][Vecs];
    for (int64_t k = begin; k < end;) {
      ahead(k);
      for (const int64_t stop = k + kStride < end ? k + kStride : end; k < stop; ++k) {
        X right[Vecs];
#pragma GCC unroll 2
        for (int j = 0; j < Vecs; ++j) right[j] = X::load(v + k * kLanes<P> + j * X::N);
#pragma GCC unroll 12
        for (int m = 0; m < kRows; ++m) {
          const X left(order == Order::kByRow ? p[m * kDepth + k] : p[k * kRows + m]);
#pragma GCC unroll 2
          for (int j = 0; j < Vecs; ++j) sum[m][j] = fma(left, right[j], sum[m][j]);
        }
      }
    }
    const bool more = add || begin > 0;
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < Vecs; ++j) {
        Acc<P>* out = acc + m * kLanes<P> + j * V::N;
        (more ? V::load(out) + sum[m][j] : sum[m][j]).store(out);
      }
    }
  }
}

inline constexpr int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

template <class A>
inline void fill_zero(A* p, int64_t n) {
  std::memset(p, 0, n * sizeof(A));
}

// A whole product, acc[lanes / kLanes][row_blocks * kRows][kLanes], depth block by depth block.
// pack_v(k0, n) gives the packed v, panels `v_step` apart; lanes beyond `lanes` in the last panel
// may be left out. pack_p(k0, n, block) gives one packed block of rows, asked for when the first
// panel meets it, in ascending order. ahead(k0, block, k) asks for a cache line a row of what
// pack_p will read at k0 + k; it is called one block before, from k0 = depth on for what comes
// after the product. Asking for more at once fails: rows that lie a power of two apart share a few
// sets of the caches and drive one another out.
template <Order order, class A, class PackV, class PackP, class Ahead>
inline void multiply(int64_t depth, int64_t row_blocks, int64_t lanes, int64_t v_step, bool add,
                     const PackV& pack_v, const PackP& pack_p, const Ahead& ahead, A* acc) {
  using P = std::remove_cv_t<std::remove_pointer_t<decltype(pack_v(0, 0))>>;
  constexpr int64_t L = kLanes<P>;
  const int64_t lines = ceil_div(kStride * L * sizeof(P), 64 * row_blocks);
  if (depth == 0 && !add) fill_zero(acc, row_blocks * kRows * round_up(lanes, L));
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int64_t n = depth - k0 < kDepth ? depth - k0 : kDepth;
    const P* first = pack_v(k0, n);
    const P* rows = nullptr;  // the first block's
    A* out = acc;
    for (int64_t done = 0; done < lanes; done += L) {
      const P* v = first + done / L * v_step;
      const bool last = done + L >= lanes, half = kVecs > 1 && lanes - done <= VecOf<P>::N;
      const P* next = last ? first + n * L : v + v_step;  // a guess where v is not one piece
      for (int64_t b = 0; b < row_blocks; ++b, out += kRows * L) {
        const P* p = done == 0 ? pack_p(k0, n, b) : rows + b * kRows * kDepth;
        if (b == 0) rows = p;
        // Each tile asks for its share of the next panel.
        const P* share = next + b * n / row_blocks * L;
        const auto prefetch = [&](int64_t k) {
          if (done == 0 && b + 1 < row_blocks) {
            ahead(k0, b + 1, k);
          } else if (last && b + 1 == row_blocks) {
            ahead(k0 + n, 0, k);
          }
          for (int64_t i = 0; i < lines; ++i, share += 64 / sizeof(P)) {
            __builtin_prefetch(share, 0, 2);
          }
        };
        if (half) {
          multiply_tile<P, 1, order>(p, v, n, add || k0 > 0, prefetch, out);
        } else {
          multiply_tile<P, kVecs, order>(p, v, n, add || k0 > 0, prefetch, out);
        }
      }
    }
  }
}

// For operands that lie in a cache.
struct NothingAhead {
  void operator()(int64_t, int64_t, int64_t) const {}
};

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
  // n packed numbers from the packed number `from` on.
  template <class P>
  void load(int64_t row, int64_t from, int64_t n, P* out) const {
    load_row(dtype, at(row, from * kPerPacked<P>), stride, n, out);
  }
  // Asks for the cache line of a packed number in each of kRows rows, of a matrix without an index.
  // Never faults, wherever it points.
  template <class P>
  void prefetch(int64_t row, int64_t from) const {
    if (stride != 1) return;
    const char* p = at(row, from * kPerPacked<P>);
    const int64_t step = row_stride * size_of(dtype);
    for (int m = 0; m < kRows; ++m, p += step) __builtin_prefetch(p, 0, 2);
    asm volatile("");  // GCC 12 drops calls of functions that do nothing but prefetch
  }
};

// Most lanes, or rows, that one call of pack_lanes or pack_columns takes.
constexpr int64_t kMostPacked = 192;

// A step of depth, whose numbers lie in a row each, or in two where they are packed in pairs:
// out[i] = from[row][from0 + i], from[row + 1][from0 + i]. The second counts as zero where `left`,
// the number of rows from here on, is 1.
template <class P>
inline void load_step(const RowsOf& from, int64_t row, int64_t left, int64_t from0, int64_t n,
                      P* out) {
  if constexpr (kPerPacked<P> == 1) {
    from.load(row, from0, n, out);
  } else {
    bf16 copies[2][kMostPacked];
    const bf16* rows[2];
    for (int i = 0; i < 2; ++i) {
      if (i < left && from.stride == 1) {
        rows[i] = reinterpret_cast<const bf16*>(from.at(row + i, from0));
        continue;
      }
      rows[i] = copies[i];
      if (i < left) {
        load_row(reinterpret_cast<const bf16*>(from.at(row + i, from0)), from.stride, n, copies[i]);
      } else {
        std::memset(copies[i], 0, n * sizeof(bf16));
      }
    }
    interleave_rows(rows[0], rows[1], n, out);
  }
}

// out[lanes / kLanes][kDepth][kLanes] = from[row0 + k0 + k][lane0 + lane]: rows of the matrix run
// along the lanes; `rows` of them, from row0 on, are the whole depth.
template <class P>
inline void pack_lanes(const RowsOf& from, int64_t row0, int64_t rows, int64_t k0, int64_t depth,
                       int64_t lane0, int64_t lanes, P* out) {
  using X = VecOf<P>;
  constexpr int kPer = kPerPacked<P>;
  alignas(64) P row[kMostPacked] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at = (k0 + k) * kPer;
    if constexpr (kPer == 2) {
      if (from.stride == 1 && lanes % kLanes<P> == 0 && rows - at >= kPer) {
        const bf16* first = reinterpret_cast<const bf16*>(from.at(row0 + at, lane0));
        const bf16* second = reinterpret_cast<const bf16*>(from.at(row0 + at + 1, lane0));
        // Pieces of rows: the hardware sees no stream. 16 rows ahead.
        const bf16* ahead = from.index ? first : first + 16 * from.row_stride;
        for (int64_t done = 0; done < lanes; done += kLanes<P>) {
          __builtin_prefetch(ahead + done, 0, 2);
          __builtin_prefetch(ahead + from.row_stride + done, 0, 2);
          interleave_rows(first + done, second + done, kLanes<P>,
                          out + done * kDepth + k * kLanes<P>);
        }
        continue;
      }
    }
    load_step(from, row0 + at, rows - at, lane0, lanes, row);
    for (int64_t done = 0; done < lanes; done += kLanes<P>) {
      P* to = out + done * kDepth + k * kLanes<P>;
      for (int j = 0; j < kVecs; ++j) X::load(row + done + j * X::N).store(to + j * X::N);
    }
  }
}

// out[depth][kLanes] = from[row0 + lane][k]: one panel whose lanes are the rows of the matrix.
template <class P>
inline void pack_panel(const RowsOf& from, int64_t row0, int64_t rows, int64_t depth, P* out) {
  using X = VecOf<P>;
  constexpr int N = X::N;
  alignas(64) P block[N][kDepth];
  for (int64_t lane = 0; lane < kLanes<P>; lane += N) {
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
        X square[N];
        for (int i = 0; i < N; ++i) square[i] = X::load(block[i] + k);
        transpose(square);
        for (int i = 0; i < N && k + i < n; ++i)
          square[i].store(out + (k0 + k + i) * kLanes<P> + lane);
      }
    }
  }
}

// p by row, one block of `rows` up to kRows: out[kRows][kDepth] = from[row0 + row][k0 + k], rows
// past the end zero.
template <class P>
inline void pack_rows(const RowsOf& from, int64_t row0, int64_t rows, int64_t k0, int64_t depth,
                      P* out) {
  for (int64_t row = 0; row < kRows; ++row) {
    if (row < rows) {
      from.load(row0 + row, k0, depth, out + row * kDepth);
    } else {
      fill_zero(out + row * kDepth, depth);
    }
  }
}

// p by depth: out[block][kDepth][kRows] = from[row0 + k0 + k][column0 + column], columns past the
// end zero; `rows` of the matrix, from row0 on, are the whole depth.
template <class P>
inline void pack_columns(const RowsOf& from, int64_t row0, int64_t rows, int64_t k0, int64_t depth,
                         int64_t column0, int64_t columns, P* out) {
  alignas(64) P column[kMostPacked + kRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at = (k0 + k) * kPerPacked<P>;
    load_step(from, row0 + at, rows - at, column0, columns, column);
    for (int64_t done = 0; done < columns; done += kRows) {
      std::memcpy(out + done * kDepth + k * kRows, column + done, kRows * sizeof(P));
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
template <int Rows, int Count, class P, class W>
inline void dot_tile(const P* x, int64_t x_step, const W* w, int64_t w_step, int64_t depth,
                     Acc<P>* out, int64_t out_step) {
  using X = VecOf<P>;
  VecOf<Acc<P>> sum[Rows][Count];
  int64_t k = 0;
  const auto step = [&](const auto& load) {
    X right[Count];
#pragma GCC unroll 8
    for (int n = 0; n < Count; ++n) {
      right[n] = load(w + n * w_step + k);
      // The next tile's line. Without it the hardware starts anew at each row: 9 instead of 20 GB/s
      // at 8 rows. One row alone is faster without (32 against 29). Into the second-level cache: at
      // 8 rows 5 to 10 % faster than into the first.
      if constexpr (Rows > 1) __builtin_prefetch(w + (n + Count) * w_step + k, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const X left = X::load(x + r * x_step + k);
#pragma GCC unroll 8
      for (int n = 0; n < Count; ++n) sum[r][n] = fma(left, right[n], sum[r][n]);
    }
  };
  for (; k + X::N <= depth; k += X::N) step([](const W* p) { return X::load(p); });
  if (k < depth) step([&](const W* p) { return load_part<X>(p, depth - k); });
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

template <int Rows, class P, class W>
inline void dot_rows(const P* x, int64_t x_step, const W* w, int64_t w_step, int64_t n,
                     int64_t depth, Acc<P>* out, int64_t out_step) {
  constexpr int kCount = dot_count(Rows);
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) {
    dot_tile<Rows, kCount>(x, x_step, w + i * w_step, w_step, depth, out + i, out_step);
  }
  for (; i < n; ++i) dot_tile<Rows, 1>(x, x_step, w + i * w_step, w_step, depth, out + i, out_step);
}

}  // namespace synergen::cpu::SYNERGEN_ISA
