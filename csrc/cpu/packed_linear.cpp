// packed_linear on the CPU. Rows of x are laid out for the multiplication first, in
// blocks of up to 12; then threads share the pairs of panels, and each pair meets all blocks while
// it is in the caches.
#include "common/dispatch.h"
#include "cpu/packed_lines.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vec_math.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

using engine::Format;
using engine::kLine;
using engine::kPanel;
using engine::Matrix;

template <class W>
constexpr bool kInteger = std::is_same_v<W, ByteLine> || std::is_same_v<W, NibbleLine>;
template <class W>
struct XOfLine {
  using type = std::conditional_t<kInteger<W>, XUnit, float>;
};
#if defined(__AVX512BF16__)
template <>
struct XOfLine<PairLine> {
  using type = XPair;
};
#endif
template <class W>
using XOf = typename XOfLine<W>::type;

// Rows of a block, at most: its sums of two panels stay in registers. Two panels at a time give two
// chains of additions to a row, and a row alone still reads memory as fast as it comes.
template <class W>
constexpr int kMostRows =
#if defined(__AVX512VNNI__)
    12;
#elif defined(__AVX512F__)
    kInteger<W> ? 4 : 12;
#elif defined(__AVX2__)
    kInteger<W> ? 2 : 6;
#else
    2;
#endif
template <class W, int M>
constexpr int kPanelsAtOnce =
#if defined(__AVX512F__)
    2;
#elif defined(__AVX2__)
    M <= 2 && !kInteger<W> ? 2 : 1;
#else
    1;
#endif

// Columns that are added one after another before they join the rest: see kChain in cpu/gemm.h.
constexpr int64_t kChain = 128;

constexpr int64_t kPair = 2 * kPanel;

// Products below which one thread does all. A picture of the shipped model takes 12 ms so, 16 and
// 17 with 4 and 16 times as many, 17 on one thread (Zen 5, 2 cores; its floats are in the caches).
constexpr int64_t kAlone = 65536;
// Weights that a thread takes at once: many lines of memory in a row, and still some shares of
// every matrix for each thread (the smallest of the paper's, with 4 bits, are 2.4 MB).
constexpr int64_t kShareBytes = 256 << 10;

// Bytes between a line and the one that is asked for beside it, at the size of the head's matrices.
// Without asking, the time of reading and that of multiplying add up: 2 rows of bfloat16 read at 79
// % of the speed of plain reading, of 8 bits at 82 %; 1 KB ahead 90 and 80, 2 KB 98 and 94, 4 KB
// 102 and 86, 8 KB 116 and 85 (one core of two, beside other work).
constexpr int64_t kAhead = 4096;

// Rows begin .. begin + rows of x, laid out: x[step of depth][rows], and of integers scale and
// start[group][rows]. start is what the integers that stand for 0 add to a sum, with its sign
// turned.
template <class X>
struct Block {
  int64_t begin;
  int rows;
  X* x;
  float* scale;
  int32_t* start;
};

// The same line of P panels that lie `step` bytes apart.
template <class W, int P>
inline void load_lines(const char* data, int64_t step, W (&line)[P]) {
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p) {
    __builtin_prefetch(data + p * step + kAhead, 0, 2);
    line[p] = W::load(data + p * step);
  }
}

template <class W, int M, int P, class X>
inline void multiply(const Matrix& w, int64_t panel, const Block<X>& block, float (*out)[kPair]) {
  constexpr int64_t kUnits = kChain / W::kColumns;
  const int64_t units = w.units();
  const char* data = static_cast<const char*>(w.data) + panel * units * kLine;
  const X* x = block.x;
  for (int64_t begin = 0; begin < units; begin += kUnits) {
    const int64_t end = begin + kUnits < units ? begin + kUnits : units;
    Lanes sum[M][P];
    for (int64_t u = begin; u < end; ++u) {
      W line[P];
      load_lines(data + u * kLine, units * kLine, line);
#pragma GCC unroll 2
      for (int s = 0; s < W::kSteps; ++s) {
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const auto left = broadcast(*x++);
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p) sum[m][p] = fma(line[p].step[s], left, sum[m][p]);
        }
      }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        float* to = out[m] + p * kPanel;
        (begin ? Lanes::load(to) + sum[m][p] : sum[m][p]).store(to);
      }
    }
  }
}

template <class W, int M, int P>
inline void multiply(const Matrix& w, int64_t panel, const Block<XUnit>& block,
                     float (*out)[kPair]) {
  const int64_t units = w.units(), groups = w.groups(), of_group = units / (groups ? groups : 1);
  const char* data = static_cast<const char*>(w.data) + panel * units * kLine;
  const bf16* scales = w.scales + panel * groups * kPanel;
  const XUnit* x = block.x;
  for (int64_t g = 0; g < groups; ++g) {
    Sums sum[M][P];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sum[m][p] = Sums(block.start[g * M + m]);
    }
    for (int64_t u = g * of_group; u < (g + 1) * of_group; ++u) {
      W line[P];
      load_lines(data + u * kLine, units * kLine, line);
#pragma GCC unroll 2
      for (int s = 0; s < W::kSteps; ++s) {
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const XUnit left = *x++;
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p) sum[m][p].add(line[p].step[s], left);
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const Lanes scale = Lanes::load(scales + (p * groups + g) * kPanel);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        float* to = out[m] + p * kPanel;
        const Lanes by = scale * VecF(block.scale[g * M + m]), sums = sum[m][p].floats();
        (g ? fma(sums, by, Lanes::load(to)) : fma(sums, by, Lanes{})).store(to);
      }
    }
  }
}

// ---- x ------------------------------------------------------------------------------------------

const float* row_of_x(const PackedLinearParams& p, int64_t row) {
  return p.x + (p.x_index ? p.x_index[row] : row) * p.x_step;
}

inline float shortened(float x) {
  bf16 y;
  from_float(x, y);
  return to_float(y);
}

template <class W>
void lay_out(const PackedLinearParams& p, const Block<float>& block) {
  const int64_t depth = p.weight.depth();
  const bool shorten = p.short_x && std::is_same_v<W, HalfLine>;
  for (int m = 0; m < block.rows; ++m) {
    const float* from = row_of_x(p, block.begin + m);
    float* to = block.x + m;
    for (int64_t k = 0; k < p.weight.columns; ++k) {
      to[k * block.rows] = shorten ? shortened(from[k]) : from[k];
    }
    for (int64_t k = p.weight.columns; k < depth; ++k) to[k * block.rows] = 0;
  }
}

#if defined(__AVX512BF16__)
template <class W>
void lay_out(const PackedLinearParams& p, const Block<XPair>& block) {
  const int64_t n = p.weight.columns;
  for (int m = 0; m < block.rows; ++m) {
    const float* from = row_of_x(p, block.begin + m);
    for (int64_t k = 0; k < n; k += 32) {
      bf16 part[32] = {};
      const int64_t left = n - k < 32 ? n - k : 32;
      int64_t i = 0;
      for (; i + VecF::N <= left; i += VecF::N) VecF::load(from + k + i).store(part + i);
      for (; i < left; ++i) from_float(from[k + i], part[i]);
      for (i = 0; i < left; i += 2) {
        std::memcpy(&block.x[(k + i) / 2 * block.rows + m], part + i, sizeof(XPair));
      }
    }
  }
}
#endif

// The integers of one group of a row, n numbers and then zeros, into units that lie `step` apart;
// their sum.
int32_t round_group(const float* from, int64_t n, int64_t group, float by, XUnit* to,
                    int64_t step) {
#if defined(__AVX512VNNI__)
  return round_sixteen(from, n, group, by, to, step);
#else
  int32_t sum = 0;
  for (int64_t k = 0; k < group; k += 4, to += step) {
    int32_t four[4];
    for (int i = 0; i < 4; ++i) {
      four[i] = k + i < n ? static_cast<int32_t>(nearest(from[k + i] * by)) : 0;
      sum += four[i];
    }
    *to = x_unit(four);
  }
  return sum;
#endif
}

template <class W>
void lay_out(const PackedLinearParams& p, const Block<XUnit>& block) {
  const int64_t group = p.weight.group, groups = p.weight.groups(), rows = block.rows;
  for (int m = 0; m < block.rows; ++m) {
    const float* from = row_of_x(p, block.begin + m);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group, left = p.weight.columns - begin;
      const float most = largest(from + begin, left < group ? left : group);
      // Without a scale, or with NaN in its place, which must not become a number: zeros.
      const int64_t n = most > 0 ? (left < group ? left : group) : 0;
      block.scale[g * rows + m] = most / 127;
      block.start[g * rows + m] = -W::kZero * round_group(from + begin, n, group, 127 / most,
                                                          block.x + begin / 4 * rows + m, rows);
    }
  }
}

// ---- results ------------------------------------------------------------------------------------

// out of rows of a block, for the columns of a pair of panels (or of the last one alone).
void finish(const PackedLinearParams& p, int64_t panel, int64_t begin, int rows,
            float (*sums)[kPair]) {
  using V = VecF;
  const int64_t first = panel * kPanel, left = p.weight.rows - first;
  const int64_t n = left < kPair ? left : kPair;
  for (int m = 0; m < rows; ++m) {
    const int64_t row = p.out_index ? p.out_index[begin + m] : begin + m;
    float* out = p.out + row * p.out_step;
    if (p.bias) {
      for (int64_t i = 0; i < n; ++i) sums[m][i] += p.bias[first + i];
    }
    if (p.epilogue == Epilogue::kSwiglu) {
      for (int64_t i = 0; i < kPanel; i += V::N) {
        const V gate = V::load(sums[m] + i);
        (gate * sigmoid(gate) * V::load(sums[m] + kPanel + i)).store(out + first / 2 + i);
      }
    } else if (p.epilogue == Epilogue::kAdd) {
      for (int64_t i = 0; i < n; ++i) out[first + i] += sums[m][i];
    } else {
      std::memcpy(out + first, sums[m], n * sizeof(float));
    }
  }
}

template <class W, int M>
void run_block(const PackedLinearParams& p, int64_t panel, const Block<XOf<W>>& block) {
  alignas(64) float sums[M][kPair];
  const int64_t panels = p.weight.panels() - panel < 2 ? 1 : 2;
  constexpr int P = kPanelsAtOnce<W, M>;
  if (P == 2 && panels == 2) {
    multiply<W, M, P>(p.weight, panel, block, sums);
  } else {
    for (int64_t i = 0; i < panels; ++i) {
      multiply<W, M, 1>(p.weight, panel + i, block,
                        reinterpret_cast<float (*)[kPair]>(sums[0] + i * kPanel));
    }
  }
  finish(p, panel, block.begin, M, sums);
}

constexpr int kRowCounts[] = {12, 8, 6, 4, 3, 2, 1};

template <class W, int I = 0>
void run_block_of(const PackedLinearParams& p, int64_t panel, const Block<XOf<W>>& block) {
  constexpr int M = kRowCounts[I];
  if constexpr (M <= kMostRows<W>) {
    if (block.rows == M) return run_block<W, M>(p, panel, block);
  }
  if constexpr (M > 1) run_block_of<W, I + 1>(p, panel, block);
}

template <class W>
void run(const PackedLinearParams& p) {
  using X = XOf<W>;
  const int64_t steps = p.weight.units() * W::kSteps;
  const int64_t groups = p.weight.groups();
  // In this order, so that each is aligned.
  Block<X>* blocks = static_cast<Block<X>*>(p.scratch);
  X* x = reinterpret_cast<X*>(blocks + p.rows);
  float* scale = reinterpret_cast<float*>(x + p.rows * steps);
  int32_t* start = reinterpret_cast<int32_t*>(scale + p.rows * groups);
  int64_t count = 0;
  for (int64_t done = 0; done < p.rows;) {
    int rows = 1;
    for (int m : kRowCounts) {
      if (m <= kMostRows<W> && m <= p.rows - done) {
        rows = m;
        break;
      }
    }
    blocks[count++] = {done, rows, x + done * steps, scale + done * groups, start + done * groups};
    done += rows;
  }
  // Laying out 4,096 columns takes some 2 us; less is not worth waking a thread.
  const int64_t columns = kMostRows<W> * p.weight.depth();
  parallel_for(count, ceil_div(32768, columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      lay_out<W>(p, blocks[b]);
    }
  });
  const int64_t pairs = ceil_div(p.weight.panels(), 2);
  const auto multiply_pairs = [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      for (int64_t b = 0; b < count; ++b) run_block_of<W>(p, 2 * pair, blocks[b]);
    }
  };
  if (p.weight.depth() * kPair * p.rows * pairs < kAlone) return multiply_pairs(0, pairs);
  // Shares are taken one by one: a thread whose core does other work too takes fewer.
  const int64_t share = ceil_div(kShareBytes, 2 * p.weight.units() * kLine);
  const int64_t shares = ceil_div(pairs, share);
  parallel_tasks(shares, [&](const auto& claim) {
    for (int64_t i; (i = claim()) < shares;) {
      const int64_t end = (i + 1) * share;
      multiply_pairs(i * share, end < pairs ? end : pairs);
    }
  });
}

}  // namespace

void packed_linear(const PackedLinearParams& p) {
  switch (p.weight.format) {
    case Format::kFloat32:
      return run<FloatLine>(p);
    case Format::kBFloat16:
#if defined(__AVX512BF16__)
      if (p.short_x) return run<PairLine>(p);
#endif
      return run<HalfLine>(p);
    case Format::kInt8:
      return run<ByteLine>(p);
    case Format::kInt4:
      return run<NibbleLine>(p);
  }
}

}  // namespace synergen::cpu::SYNERGEN_ISA
