// Pairs of bfloat16, neighbours in depth, as the packed number of a product: vdpbf16ps multiplies
// 16 pairs with 16 others and adds both products to float, twice the work of a float fma on half
// the memory (Zen 5, one core, registers alone: 490 against 244 GFLOP/s).
#pragma once

#include "common/dispatch.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace synergen::cpu::SYNERGEN_ISA {

struct Pair {
  bf16 first, second;
};

// How many numbers, neighbours in depth, a packed one holds.
template <class P>
constexpr int64_t kPerPacked = std::is_same_v<P, Pair> ? 2 : 1;

// What a packed number is made of.
template <class P>
using Element = std::conditional_t<std::is_same_v<P, Pair>, bf16, P>;

inline void load_row(const bf16* p, int64_t stride, int64_t n, bf16* out) {
  if (stride == 1) {
    std::memcpy(out, p, n * sizeof(bf16));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = p[i * stride];
  }
}

// n pairs of a row of bfloat16.
inline void load_row(DType, const void* p, int64_t stride, int64_t n, Pair* out) {
  const bf16* from = static_cast<const bf16*>(p);
  if (stride == 1) {
    std::memcpy(out, from, n * sizeof(Pair));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = {from[2 * i * stride], from[(2 * i + 1) * stride]};
  }
}

#if defined(__AVX512BF16__)

struct VecPair {
  static constexpr int N = 16;
  __m512i v;
  VecPair() : v(_mm512_setzero_si512()) {}
  VecPair(__m512i v) : v(v) {}
  explicit VecPair(Pair x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    v = _mm512_set1_epi32(bits);
  }
  static VecPair load(const Pair* p) { return _mm512_loadu_si512(p); }
  void store(Pair* p) const { _mm512_storeu_si512(p, v); }
};
template <>
struct VecOfType<Pair> {
  using type = VecPair;
};

inline VecF fma(VecPair a, VecPair b, VecF c) {
  return _mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v);
}

inline void interleave(VecPair a, VecPair b, VecPair& lo, VecPair& hi) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  lo = _mm512_permutex2var_epi32(a.v, first, b.v);
  hi = _mm512_permutex2var_epi32(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b.v);
}

// out[i] = (a[i], b[i]), rounded to nearest even.
inline void store_pairs(VecF a, VecF b, Pair* out) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a.v));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b.v));
  VecPair(_mm512_or_si512(low, _mm512_slli_epi32(high, 16))).store(out);
}

// out[i] = (a[i], b[i]) for n columns of two rows.
inline void interleave_rows(const bf16* a, const bf16* b, int64_t n, Pair* out) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i top = _mm512_loadu_si512(a + i), bottom = _mm512_loadu_si512(b + i);
    _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(top, first, bottom));
    _mm512_storeu_si512(out + i + 16, _mm512_permutex2var_epi16(top, second, bottom));
  }
  for (; i < n; ++i) out[i] = {a[i], b[i]};
}

#endif

}  // namespace synergen::cpu::SYNERGEN_ISA
