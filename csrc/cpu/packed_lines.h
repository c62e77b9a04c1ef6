// A line of a packed matrix (engine/matrix.h) in registers, and the sums of 16 rows that it adds
// to.
#pragma once

#include "cpu/vec.h"
#include "engine/params.h"

namespace synergen::cpu::SYNERGEN_ISA {

// 16 floats, one for each row of a panel.
struct Lanes {
  static constexpr int kParts = engine::kPanel / VecF::N;
  VecF v[kParts];

  template <class T>
  static Lanes load(const T* p) {
    Lanes x;
    for (int i = 0; i < kParts; ++i) x.v[i] = VecF::load(p + i * VecF::N);
    return x;
  }
  void store(float* p) const {
    for (int i = 0; i < kParts; ++i) v[i].store(p + i * VecF::N);
  }
};
inline Lanes operator+(const Lanes& a, const Lanes& b) {
  Lanes c;
  for (int i = 0; i < Lanes::kParts; ++i) c.v[i] = a.v[i] + b.v[i];
  return c;
}
inline Lanes operator*(const Lanes& a, VecF b) {
  Lanes c;
  for (int i = 0; i < Lanes::kParts; ++i) c.v[i] = a.v[i] * b;
  return c;
}
template <class B>
inline Lanes fma(const Lanes& a, const B& b, const Lanes& c) {
  Lanes d;
  for (int i = 0; i < Lanes::kParts; ++i) {
    if constexpr (std::is_same_v<B, Lanes>) {
      d.v[i] = fma(a.v[i], b.v[i], c.v[i]);
    } else {
      d.v[i] = fma(a.v[i], b, c.v[i]);
    }
  }
  return d;
}

// Each format's Line holds kSteps steps; a step meets one number of x, or some neighbours: a pair
// of bfloat16, four integers (XUnit). kColumns: of a line.
struct FloatLine {
  static constexpr int kSteps = 1, kColumns = 1;
  Lanes step[kSteps];
  static FloatLine load(const char* p) {
    return {{Lanes::load(reinterpret_cast<const float*>(p))}};
  }
};

struct HalfLine {
  static constexpr int kSteps = 2, kColumns = 2;
  Lanes step[kSteps];
  static HalfLine load(const char* p) {
    HalfLine line;
#if defined(__AVX512F__)
    const __m512i pairs = _mm512_loadu_si512(p);
    line.step[0].v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    line.step[1].v[0] = _mm512_castsi512_ps(
        _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
      line.step[0].v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      line.step[1].v[i] = _mm256_castsi256_ps(
          _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
#else
    bf16 pairs[2 * engine::kPanel];
    std::memcpy(pairs, p, sizeof(pairs));
    for (int i = 0; i < engine::kPanel; ++i) {
      for (int s = 0; s < 2; ++s)
        line.step[s].v[i / VecF::N].v[i % VecF::N] = to_float(pairs[2 * i + s]);
    }
#endif
    return line;
  }
};

#if defined(__AVX512BF16__)

// The same line beside x in bfloat16: both products of a pair in one instruction.
struct PairLine {
  static constexpr int kSteps = 1, kColumns = 2;
  struct Pairs {
    __m512i v;
  };
  Pairs step[kSteps];
  static PairLine load(const char* p) { return {{{_mm512_loadu_si512(p)}}}; }
};
struct XPair {
  uint32_t bits;
};
inline PairLine::Pairs broadcast(XPair x) { return {_mm512_set1_epi32(static_cast<int>(x.bits))}; }
inline Lanes fma(PairLine::Pairs w, PairLine::Pairs x, Lanes sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v[0].v) : "v"(w.v), "v"(x.v));
  return sum;
}

#endif

inline VecF broadcast(float x) { return VecF(x); }

// Four integers of x for each row of 64 weights without a sign (Quads), and 16 sums of such
// products (Sums), exact. With VNNI one instruction multiplies and adds all 64; without, numbers
// are widened to 16 bits and each sum stands in two halves until floats().
#if defined(__AVX512VNNI__)

using XUnit = int32_t;
inline XUnit x_unit(const int32_t (&x)[4]) {
  uint32_t unit = 0;
  for (int i = 0; i < 4; ++i) unit |= static_cast<uint32_t>(x[i] & 255) << (8 * i);
  return static_cast<XUnit>(unit);
}
// As round_group in packed_linear.cpp, for 16 columns at a time.
inline int32_t round_sixteen(const float* from, int64_t n, int64_t group, float by, XUnit* to,
                             int64_t step) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < group; k += 16, to += 4 * step) {
    const int64_t left = n - k, most = group - k < 16 ? group - k : 16;
    const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    const __m512 x = _mm512_maskz_loadu_ps(there, from + k);
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(by)));
    sum = _mm512_add_epi32(sum, q);
    alignas(16) XUnit units[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(units), _mm512_cvtepi32_epi8(q));
    for (int64_t i = 0; i < most / 4; ++i) to[i * step] = units[i];
  }
  return _mm512_reduce_add_epi32(sum);
}
using Quads = __m512i;
inline Quads bytes_of(const char* p) { return _mm512_loadu_si512(p); }
inline void nibbles_of(const char* p, Quads& low, Quads& high) {
  const __m512i v = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  low = _mm512_and_si512(v, mask);
  high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
}
struct Sums {
  __m512i v;
  Sums() = default;
  explicit Sums(int32_t start) : v(_mm512_set1_epi32(start)) {}
  void add(const Quads& w, XUnit x) {
    // As an intrinsic GCC 12 copies the sum before and after each product: 190 products a
    // nanosecond for 64 rows of 8 bits, 300 so (Zen 5, one core).
    asm("vpdpbusd %2, %1, %0" : "+v"(v) : "v"(w), "v"(_mm512_set1_epi32(x)));
  }
  Lanes floats() const { return {{_mm512_cvtepi32_ps(v)}}; }
};

#elif defined(__AVX2__)

using XUnit = int64_t;
inline XUnit x_unit(const int32_t (&x)[4]) {
  uint64_t unit = 0;
  for (int i = 0; i < 4; ++i) unit |= static_cast<uint64_t>(x[i] & 0xffff) << (16 * i);
  return static_cast<XUnit>(unit);
}

#if defined(__AVX512F__)
struct Quads {
  __m512i v[2];
};
inline Quads widen(__m512i bytes) {
  return {{_mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes)),
           _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(bytes, 1))}};
}
inline Quads bytes_of(const char* p) { return widen(_mm512_loadu_si512(p)); }
inline void nibbles_of(const char* p, Quads& low, Quads& high) {
  const __m512i v = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  low = widen(_mm512_and_si512(v, mask));
  high = widen(_mm512_and_si512(_mm512_srli_epi16(v, 4), mask));
}
struct Sums {
  __m512i v[2];
  Sums() = default;
  explicit Sums(int32_t start) {
    for (__m512i& each : v) each = _mm512_set1_epi64(static_cast<uint32_t>(start));
  }
  void add(const Quads& w, XUnit x) {
    const __m512i four = _mm512_set1_epi64(x);
    for (int i = 0; i < 2; ++i) v[i] = _mm512_add_epi32(v[i], _mm512_madd_epi16(w.v[i], four));
  }
  Lanes floats() const {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {{_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(v[0], even, v[1]),
                                                 _mm512_permutex2var_epi32(v[0], odd, v[1])))}};
  }
};
#else
struct Quads {
  __m256i v[4];
};
inline Quads widen(__m256i first, __m256i second) {
  return {{_mm256_cvtepu8_epi16(_mm256_castsi256_si128(first)),
           _mm256_cvtepu8_epi16(_mm256_extracti128_si256(first, 1)),
           _mm256_cvtepu8_epi16(_mm256_castsi256_si128(second)),
           _mm256_cvtepu8_epi16(_mm256_extracti128_si256(second, 1))}};
}
inline Quads bytes_of(const char* p) {
  const __m256i* v = reinterpret_cast<const __m256i*>(p);
  return widen(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1));
}
inline void nibbles_of(const char* p, Quads& low, Quads& high) {
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1);
  low = widen(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
  high = widen(_mm256_and_si256(_mm256_srli_epi16(a, 4), mask),
               _mm256_and_si256(_mm256_srli_epi16(b, 4), mask));
}
struct Sums {
  __m256i v[4];
  Sums() = default;
  explicit Sums(int32_t start) {
    for (__m256i& each : v) each = _mm256_set1_epi64x(static_cast<uint32_t>(start));
  }
  void add(const Quads& w, XUnit x) {
    const __m256i four = _mm256_set1_epi64x(x);
    for (int i = 0; i < 4; ++i) v[i] = _mm256_add_epi32(v[i], _mm256_madd_epi16(w.v[i], four));
  }
  Lanes floats() const {
    Lanes out;
    for (int i = 0; i < 2; ++i) {
      const __m256i sums = _mm256_hadd_epi32(v[2 * i], v[2 * i + 1]);  // rows 0 1 4 5 2 3 6 7
      out.v[i] = _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(sums, 0xd8));
    }
    return out;
  }
};
#endif

#else

struct XUnit {
  int16_t x[4];
};
inline XUnit x_unit(const int32_t (&x)[4]) {
  XUnit unit;
  for (int i = 0; i < 4; ++i) unit.x[i] = static_cast<int16_t>(x[i]);
  return unit;
}
struct Quads {
  int16_t w[4][engine::kPanel];
};
inline Quads bytes_of(const char* p) {
  Quads quads;
  for (int r = 0; r < engine::kPanel; ++r) {
    for (int i = 0; i < 4; ++i) quads.w[i][r] = static_cast<uint8_t>(p[4 * r + i]);
  }
  return quads;
}
inline void nibbles_of(const char* p, Quads& low, Quads& high) {
  for (int r = 0; r < engine::kPanel; ++r) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t both = static_cast<uint8_t>(p[4 * r + i]);
      low.w[i][r] = both & 15;
      high.w[i][r] = both >> 4;
    }
  }
}
struct Sums {
  int32_t v[engine::kPanel];
  Sums() = default;
  explicit Sums(int32_t start) {
    for (int32_t& each : v) each = start;
  }
  void add(const Quads& w, XUnit x) {
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < engine::kPanel; ++r) v[r] += w.w[i][r] * x.x[i];
    }
  }
  Lanes floats() const {
    float out[engine::kPanel];
    for (int r = 0; r < engine::kPanel; ++r) out[r] = static_cast<float>(v[r]);
    return Lanes::load(out);
  }
};

#endif

// To the nearest integer, ties to even, below 2^22.
inline float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// The largest magnitude; NaN where there is a NaN or an infinity.
inline float largest(const float* x, int64_t n) {
  VecF most, odd;
  for (int64_t i = 0; i < n; i += VecF::N) {
    const VecF v = n - i < VecF::N ? load_part<VecF>(x + i, n - i) : VecF::load(x + i);
    most = max(most, max(v, VecF(0.f) - v));
    odd = odd + v * VecF(0.f);
  }
  return most.max() + odd.sum();
}

struct ByteLine {
  static constexpr int kSteps = 1;
  static constexpr int32_t kZero = 128;  // stands for 0
  Quads step[kSteps];
  static ByteLine load(const char* p) { return {{bytes_of(p)}}; }
};

struct NibbleLine {
  static constexpr int kSteps = 2;
  static constexpr int32_t kZero = 8;
  Quads step[kSteps];
  static NibbleLine load(const char* p) {
    NibbleLine line;
    nibbles_of(p, line.step[0], line.step[1]);
    return line;
  }
};

}  // namespace synergen::cpu::SYNERGEN_ISA
