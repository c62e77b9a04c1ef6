// What sampling is about: logits, guided or not, as integers in their order, and their masses.
//
// The integers are those of the CPU kernel: the mass of a token is exp((l - max) / T) in units of
// 2^-bits, computed in double and without fused multiply-add. Integer sums have no rounding and no
// order, so every division of the work gives the same id to the bit.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/access.cuh"

namespace synergen::cuda {

// A thread takes 8 neighbours, 16 bytes of 16-bit logits.
constexpr int kSampleEach = 8;

// ---- Logits as integers in their order

// -0 and 0 are one. The largest key of all is kept for what has no place in the order.
SIMT_FN uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 1u << 31);
}
SIMT_FN uint64_t key_of(double x) {
  const int64_t bits = __double_as_longlong(x + 0.0);
  return static_cast<uint64_t>(bits ^ (bits >> 63 | INT64_MIN));
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

// The first digit of a key, rising as keys fall: 128 to each octave of 1/4 <= |logit| < 64 and
// sign; what is nearer to 0, or further away, has the digit of the end. Of 32,768 logits on a bell
// curve 30 have that of the 2,048th, few enough to be put in order, where a float's leading 11 bits
// hold 500.
template <class Key>
struct FirstDigit {
  static constexpr int kSignBit = 8 * static_cast<int>(sizeof(Key)) - 1;
  static constexpr int kMantissa = sizeof(Key) == 4 ? 23 : 52, kShift = kMantissa - 7;
  static constexpr int kEach = 1024;  // digits of a sign
  static constexpr Key kSign = Key{1} << kSignBit;
  static constexpr Key kFrom = static_cast<Key>((sizeof(Key) == 4 ? 127 : 1023) - 2) << kMantissa;

  SIMT_FN static uint32_t of(Key key) {
    using Signed = std::make_signed_t<Key>;
    const Signed x = static_cast<Signed>(key ^ kSign);
    const Signed negative = x >> kSignBit;  // -1 or 0
    const Signed above = ((x ^ negative) - static_cast<Signed>(kFrom)) >> kShift;
    const int bin = static_cast<int>(above < 0 ? 0 : above < kEach ? above : kEach - 1);
    return static_cast<uint32_t>(kEach - 1 - (bin ^ static_cast<int>(negative)));
  }

  // The least key that has it.
  SIMT_FN static Key least(uint32_t digit) {
    const int bin = static_cast<int>(digit) - kEach;
    if (bin < 0) return kSign | (bin < -1 ? kFrom + (static_cast<Key>(-1 - bin) << kShift) : 0);
    return bin < kEach - 1 ? ~(kSign | (kFrom + (static_cast<Key>(bin + 1) << kShift) - 1)) : 0;
  }
};

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
    // Sums that are neither -infinity nor NaN have no such term.
    const bool one_side = uncond == nullptr || scale == A(1);
    bool usual = true;
#pragma unroll
    for (int e = 0; e < kSampleEach; ++e) {
      if (uncond == nullptr) u[e] = c[e];
      const A mixed = one_side ? c[e] : mix(c[e], u[e], scale);
      usual = usual && c[e] + u[e] > -infinity<A>() && mixed == mixed;
      out[e] = key_of(mixed);
    }
    if (usual) return;
#pragma unroll
    for (int e = 0; e < kSampleEach; ++e) out[e] = guided(c[e], u[e]);
  }
  SIMT_FN KeyOf<A> key(int64_t i) const {
    const A c = simt::widen(logits[i * stride]);
    return guided(c, uncond ? simt::widen(uncond[i * uncond_stride]) : c);
  }

 private:
  // A token at -infinity on either side stays there. NaN, also behind such a one, is marked.
  SIMT_FN KeyOf<A> guided(A c, A u) const {
    const bool there = c > -infinity<A>() && u > -infinity<A>();  // nor NaN
    const A mixed = uncond == nullptr || scale == A(1) ? c : mix(c, u, scale);
    if (there && mixed == mixed) return key_of(mixed);
    return there || c != c || u != u ? ~KeyOf<A>{0} : key_of(-infinity<A>());
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

}  // namespace synergen::cuda
