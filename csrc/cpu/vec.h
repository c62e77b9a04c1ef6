// Vectors of float and double, the same code for every instruction set: VecF and VecD have N lanes,
// load from any storage type, compute in float or double, store to any storage type. Partial
// vectors (the last n < N elements) go through a zero-filled buffer.
//
// The file is compiled once per instruction set (SYNERGEN_ISA), each in its own namespace: two
// copies of one inline function with different instructions must never share a name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dispatch.h"
#include "common/types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace synergen::cpu::SYNERGEN_ISA {

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift the exponent and mantissa into place, then scale by 2^112: subnormals come out right
  // without a branch.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &rest, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (rest >= (0x7c00u << 13)) bits |= 0xffu << 23;  // infinity and NaN keep their exponent
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

// Round to nearest even, NaN stays NaN.
inline void from_float(float x, float& out) { out = x; }
inline void from_float(double x, double& out) { out = x; }

inline void from_float(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_float(float x, f16& out) {
#if defined(__F16C__)
  out.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t rest = bits & 0x7fffffffu, half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x47800000u) {  // 65536 and above
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below the smallest normal: the float adder rounds for us
    float f;
    std::memcpy(&f, &rest, 4);
    f += 0.5f;
    std::memcpy(&half, &f, 4);
    half -= 0x3f000000u;
  } else {
    rest += 0xfffu + ((rest >> 13) & 1u);
    half = (rest - (112u << 23)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

#if defined(__AVX512F__)

struct VecF {
  static constexpr int N = 16;
  using Scalar = float;
  __m512 v;
  VecF() : v(_mm512_setzero_ps()) {}
  VecF(__m512 v) : v(v) {}
  explicit VecF(float x) : v(_mm512_set1_ps(x)) {}
  static VecF load(const float* p) { return _mm512_loadu_ps(p); }
  static VecF load(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static VecF load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
  }
  void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }
};
inline VecF operator+(VecF a, VecF b) { return _mm512_add_ps(a.v, b.v); }
inline VecF operator-(VecF a, VecF b) { return _mm512_sub_ps(a.v, b.v); }
inline VecF operator*(VecF a, VecF b) { return _mm512_mul_ps(a.v, b.v); }
inline VecF operator/(VecF a, VecF b) { return _mm512_div_ps(a.v, b.v); }
inline VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline VecF max(VecF a, VecF b) { return _mm512_max_ps(a.v, b.v); }

struct VecD {
  static constexpr int N = 8;
  using Scalar = double;
  __m512d v;
  VecD() : v(_mm512_setzero_pd()) {}
  VecD(__m512d v) : v(v) {}
  explicit VecD(double x) : v(_mm512_set1_pd(x)) {}
  static VecD load(const double* p) { return _mm512_loadu_pd(p); }
  static VecD load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  double sum() const { return _mm512_reduce_add_pd(v); }
  double max() const { return _mm512_reduce_max_pd(v); }
};
inline VecD operator+(VecD a, VecD b) { return _mm512_add_pd(a.v, b.v); }
inline VecD operator-(VecD a, VecD b) { return _mm512_sub_pd(a.v, b.v); }
inline VecD operator*(VecD a, VecD b) { return _mm512_mul_pd(a.v, b.v); }
inline VecD operator/(VecD a, VecD b) { return _mm512_div_pd(a.v, b.v); }
inline VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
inline VecD max(VecD a, VecD b) { return _mm512_max_pd(a.v, b.v); }

#elif defined(__AVX2__)

struct VecF {
  static constexpr int N = 8;
  using Scalar = float;
  __m256 v;
  VecF() : v(_mm256_setzero_ps()) {}
  VecF(__m256 v) : v(v) {}
  explicit VecF(float x) : v(_mm256_set1_ps(x)) {}
  static VecF load(const float* p) { return _mm256_loadu_ps(p); }
  static VecF load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static VecF load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};
inline VecF operator+(VecF a, VecF b) { return _mm256_add_ps(a.v, b.v); }
inline VecF operator-(VecF a, VecF b) { return _mm256_sub_ps(a.v, b.v); }
inline VecF operator*(VecF a, VecF b) { return _mm256_mul_ps(a.v, b.v); }
inline VecF operator/(VecF a, VecF b) { return _mm256_div_ps(a.v, b.v); }
inline VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline VecF max(VecF a, VecF b) { return _mm256_max_ps(a.v, b.v); }

struct VecD {
  static constexpr int N = 4;
  using Scalar = double;
  __m256d v;
  VecD() : v(_mm256_setzero_pd()) {}
  VecD(__m256d v) : v(v) {}
  explicit VecD(double x) : v(_mm256_set1_pd(x)) {}
  static VecD load(const double* p) { return _mm256_loadu_pd(p); }
  static VecD load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  double sum() const {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
  double max() const {
    const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
  }
};
inline VecD operator+(VecD a, VecD b) { return _mm256_add_pd(a.v, b.v); }
inline VecD operator-(VecD a, VecD b) { return _mm256_sub_pd(a.v, b.v); }
inline VecD operator*(VecD a, VecD b) { return _mm256_mul_pd(a.v, b.v); }
inline VecD operator/(VecD a, VecD b) { return _mm256_div_pd(a.v, b.v); }
inline VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
inline VecD max(VecD a, VecD b) { return _mm256_max_pd(a.v, b.v); }

#else

// Plain C++: fixed-size loops that any compiler turns into whatever vectors the target has.
template <class S, int Lanes>
struct PlainVec {
  static constexpr int N = Lanes;
  using Scalar = S;
  S v[N];
  PlainVec() : PlainVec(S{0}) {}
  explicit PlainVec(S x) {
    for (int i = 0; i < N; ++i) v[i] = x;
  }
  template <class T>
  static PlainVec load(const T* p) {
    PlainVec r;
    for (int i = 0; i < N; ++i) r.v[i] = static_cast<S>(to_float(p[i]));
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < N; ++i) from_float(v[i], p[i]);
  }
  S sum() const {
    S s = 0;
    for (int i = 0; i < N; ++i) s += v[i];
    return s;
  }
  S max() const {
    S s = v[0];
    for (int i = 1; i < N; ++i) s = v[i] > s ? v[i] : s;
    return s;
  }
};
#define SYNERGEN_PLAIN(name, expr)                                               \
  template <class S, int N>                                                      \
  inline PlainVec<S, N> name(const PlainVec<S, N>& a, const PlainVec<S, N>& b) { \
    PlainVec<S, N> r;                                                            \
    for (int i = 0; i < N; ++i) r.v[i] = expr;                                   \
    return r;                                                                    \
  }
SYNERGEN_PLAIN(operator+, a.v[i] + b.v[i])
SYNERGEN_PLAIN(operator-, a.v[i] - b.v[i])
SYNERGEN_PLAIN(operator*, a.v[i] * b.v[i])
SYNERGEN_PLAIN(operator/, a.v[i] / b.v[i])
SYNERGEN_PLAIN(max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
#undef SYNERGEN_PLAIN
template <class S, int N>
inline PlainVec<S, N> fma(const PlainVec<S, N>& a, const PlainVec<S, N>& b,
                          const PlainVec<S, N>& c) {
  return a * b + c;
}
using VecF = PlainVec<float, 8>;
using VecD = PlainVec<double, 4>;

#endif

// The vector that computes for storage type T.
template <class T>
struct VecOfType {
  using type = VecF;
};
template <>
struct VecOfType<double> {
  using type = VecD;
};
template <class T>
using VecOf = typename VecOfType<T>::type;

// The first n < V::N elements; the other lanes are zero on load and not written on store.
template <class V, class T>
inline V load_part(const T* p, int64_t n) {
  T buffer[V::N] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return V::load(buffer);
}
template <class V, class T>
inline void store_part(V v, T* p, int64_t n) {
  T buffer[V::N];
  v.store(buffer);
  std::memcpy(p, buffer, n * sizeof(T));
}

// out[i] = (float or double) p[i * stride]: a row of any storage and any stride as a dense row to
// compute on.
template <class A, class T>
inline void load_row(const T* p, int64_t stride, int64_t n, A* out) {
  using V = std::conditional_t<std::is_same_v<A, double>, VecD, VecF>;
  if constexpr (std::is_same_v<A, float> || std::is_same_v<T, double> || std::is_same_v<T, float>) {
    if (stride == 1) {
      int64_t i = 0;
      for (; i + V::N <= n; i += V::N) V::load(p + i).store(out + i);
      if (i < n) store_part(load_part<V>(p + i, n - i), out + i, n - i);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(to_float(p[i * stride]));
}

// As load_row, for a storage type known only at run time.
template <class A>
inline void load_row(DType dtype, const void* p, int64_t stride, int64_t n, A* out) {
  switch (dtype) {
    case DType::kFloat64:
      if constexpr (std::is_same_v<A, double>)
        load_row(static_cast<const double*>(p), stride, n, out);
      return;
    case DType::kFloat32:
      return load_row(static_cast<const float*>(p), stride, n, out);
    case DType::kBFloat16:
      return load_row(static_cast<const bf16*>(p), stride, n, out);
    case DType::kFloat16:
      return load_row(static_cast<const f16*>(p), stride, n, out);
    default:
      return;
  }
}

// p[i] = in[i], rounded to the storage type.
template <class A, class T>
inline void store_row(const A* in, int64_t n, T* p) {
  if constexpr (std::is_same_v<A, float> || std::is_same_v<T, A>) {
    using V = std::conditional_t<std::is_same_v<A, double>, VecD, VecF>;
    int64_t i = 0;
    for (; i + V::N <= n; i += V::N) V::load(in + i).store(p + i);
    if (i < n) store_part(load_part<V>(in + i, n - i), p + i, n - i);
  } else {
    for (int64_t i = 0; i < n; ++i) from_float(static_cast<float>(in[i]), p[i]);
  }
}
template <class A>
inline void store_row(const A* in, int64_t n, DType dtype, void* p) {
  switch (dtype) {
    case DType::kFloat64:
      if constexpr (std::is_same_v<A, double>) store_row(in, n, static_cast<double*>(p));
      return;
    case DType::kFloat32:
      return store_row(in, n, static_cast<float*>(p));
    case DType::kBFloat16:
      return store_row(in, n, static_cast<bf16*>(p));
    case DType::kFloat16:
      return store_row(in, n, static_cast<f16*>(p));
    default:
      return;
  }
}

}  // namespace synergen::cpu::SYNERGEN_ISA
