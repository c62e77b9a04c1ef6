// CUDA's own names for what emulator.h declares. Included by it alone.
#pragma once

// The source line of the call.
#define SIMT_HERE synergen::simt::Where where = synergen::simt::Where::current()

// ---- Threads together

inline void __syncthreads(SIMT_HERE) { synergen::simt::sync_block(where); }
inline int __syncthreads_or(int predicate, SIMT_HERE) {
  return synergen::simt::vote_block(synergen::simt::Vote::kAny, predicate != 0, where);
}
inline int __syncthreads_and(int predicate, SIMT_HERE) {
  return synergen::simt::vote_block(synergen::simt::Vote::kAll, predicate != 0, where);
}
inline int __syncthreads_count(int predicate, SIMT_HERE) {
  return synergen::simt::vote_block(synergen::simt::Vote::kCount, predicate != 0, where);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, SIMT_HERE) {
  synergen::simt::sync_warp(mask, where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_HERE) {
  return synergen::simt::shuffle_as(synergen::simt::Shuffle::kIndex, mask, value, lane, width,
                                    where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32, SIMT_HERE) {
  return synergen::simt::shuffle_as(synergen::simt::Shuffle::kUp, mask, value, distance, width,
                                    where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32, SIMT_HERE) {
  return synergen::simt::shuffle_as(synergen::simt::Shuffle::kDown, mask, value, distance, width,
                                    where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_HERE) {
  return synergen::simt::shuffle_as(synergen::simt::Shuffle::kXor, mask, value, lanes, width,
                                    where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  return synergen::simt::ballot(mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return synergen::simt::ballot(mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return synergen::simt::ballot(mask, predicate != 0, where) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_HERE) {
  return synergen::simt::match_any(mask, std::bit_cast<synergen::simt::Bits<T>>(value), where);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_HERE) {
  return synergen::simt::reduce_add(mask, value, where);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_HERE) {
  return synergen::simt::reduce_max(mask, value, where);
}
inline int __reduce_add_sync(unsigned mask, int value, SIMT_HERE) {
  return static_cast<int>(synergen::simt::reduce_add(mask, static_cast<unsigned>(value), where));
}

// ---- Atomics: relaxed, as in CUDA. The pointer alone decides T.

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value, SIMT_HERE) {
  return synergen::simt::atomic_update(synergen::simt::Atomic::kAdd, p, value, T{},
                                       synergen::simt::Order::kRelaxed, where);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value, SIMT_HERE) {
  return synergen::simt::atomic_update(synergen::simt::Atomic::kMax, p, value, T{},
                                       synergen::simt::Order::kRelaxed, where);
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value, SIMT_HERE) {
  return synergen::simt::atomic_update(synergen::simt::Atomic::kMin, p, value, T{},
                                       synergen::simt::Order::kRelaxed, where);
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> value, SIMT_HERE) {
  return synergen::simt::atomic_update(synergen::simt::Atomic::kOr, p, value, T{},
                                       synergen::simt::Order::kRelaxed, where);
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> value, SIMT_HERE) {
  return synergen::simt::atomic_update(synergen::simt::Atomic::kAnd, p, value, T{},
                                       synergen::simt::Order::kRelaxed, where);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value, SIMT_HERE) {
  return synergen::simt::atomic_update(synergen::simt::Atomic::kExchange, p, value, T{},
                                       synergen::simt::Order::kRelaxed, where);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value, SIMT_HERE) {
  return synergen::simt::atomic_update(synergen::simt::Atomic::kCompareSwap, p, value, expected,
                                       synergen::simt::Order::kRelaxed, where);
}
inline void __threadfence() { synergen::simt::fence(); }
inline void __threadfence_block() { synergen::simt::fence(); }

// ---- Bits

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
// Bytes 0 to 3 are a's, 4 to 7 are b's; each digit of `which` names one.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (which >> 4 * i & 7u) & 0xFFu) << 8 * i;
  }
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// ---- One rounding each

inline double __dmul_rn(double a, double b) { return synergen::simt::rounded(a * b); }
inline double __dadd_rn(double a, double b) { return synergen::simt::rounded(a + b); }
inline double __dsub_rn(double a, double b) { return synergen::simt::rounded(a - b); }
inline double __ddiv_rn(double a, double b) { return synergen::simt::rounded(a / b); }
inline float __fmul_rn(float a, float b) { return synergen::simt::rounded(a * b); }
inline float __fadd_rn(float a, float b) { return synergen::simt::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return synergen::simt::rounded(a - b); }
inline float __fdiv_rn(float a, float b) { return synergen::simt::rounded(a / b); }

// Not in <cmath>.

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

#undef SIMT_HERE
