// 16-bit floats to float and back by their bits: to nearest even, NaN stays NaN.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/types.h"

namespace synergen::simt {

inline float widen(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float widen(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u;
  const uint32_t fraction = x.bits & 0x3FFu;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24, exact in float
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | fraction << 13);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline bf16 narrow_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

inline f16 narrow_to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  constexpr uint32_t kOverflow = 0x477FF000u;  // 65520, halfway from the largest f16 to 2^16
  if (magnitude >= kOverflow) return {static_cast<uint16_t>(sign | 0x7C00u)};
  constexpr uint32_t kNormal = 0x38800000u;  // 2^-14
  if (magnitude < kNormal) {
    // Next to 0.5 floats lie 2^-24 apart, as subnormal f16 do: the addition rounds.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13)};
}

template <class T, class A>
inline T narrow(A x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return narrow_to_bf16(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, f16>) {
    return narrow_to_f16(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace synergen::simt
