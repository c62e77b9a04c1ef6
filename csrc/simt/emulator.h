// The emulator's side of simt.h: CUDA's built-ins and the wrappers of device.cuh for a plain C++
// compiler. One fiber is one CUDA thread; what needs other threads is in collectives.cpp, what
// touches shared memory or must be atomic in memory.cpp. Every such call knows its source line.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

#include "common/types.h"
#include "simt/convert.h"

#define SIMT_FN inline
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using std::max;
using std::min;

namespace synergen::simt {

using Where = std::source_location;

// ---- Control, for tests

enum Policy : int {
  kFifo = 0,    // threads take turns; copies land at their wait
  kLifo = 1,    // the last to stop goes on first, blocks run backwards; copies land at once
  kRandom = 2,  // warps have random priorities, drawn again at barriers; copies land either way
};

struct Options {
  int policy = kFifo;
  uint64_t seed = 0;
  int resident_blocks = 1;  // that run side by side; all of them in a cooperative launch
};

// Counts since the last set_options.
struct Stats {
  uint64_t launches, switches, barriers, grid_syncs, warp_ops, atomics;
  uint64_t cp_async, ldmatrix, ldmatrix_wavefronts, mma;
  uint64_t races, uninitialised;  // in a race build
};

void set_options(const Options& options);
const Stats& stats();
std::string race_report();  // of the last launch; empty without a race build

// ---- What kernels call through the names below

enum class Atomic { kAdd, kMax, kMin, kExchange, kCompareSwap, kOr, kAnd };
enum class Order { kRelaxed, kAcquire, kRelease };
enum class Shuffle { kIndex, kUp, kDown, kXor };
enum class Vote { kAny, kAll, kCount };

// These never change while a thread lives, so the compiler may keep what they return.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

unsigned char* dynamic_shared();
// `key` tells one declaration from another.
void* static_shared(const void* key, size_t bytes);

void sync_block(Where where);
int vote_block(Vote vote, bool predicate, Where where);
void sync_warp(unsigned mask, Where where);
uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t value, int operand, int width, Where where);
unsigned ballot(unsigned mask, bool predicate, Where where);
unsigned match_any(unsigned mask, uint64_t value, Where where);
unsigned reduce_add(unsigned mask, unsigned value, Where where);
unsigned reduce_max(unsigned mask, unsigned value, Where where);
template <class T>
T atomic_update(Atomic op, T* p, T value, T expected, Order order, Where where);
void fence();

template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
T shuffle_as(Shuffle mode, unsigned mask, T value, int operand, int width, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  const uint64_t got = shuffle(mode, mask, std::bit_cast<Bits<T>>(value), operand, width, where);
  return std::bit_cast<T>(static_cast<Bits<T>>(got));
}

// Keeps a rounded result from being contracted into a fused multiply-add.
template <class T>
T rounded(T x) {
  asm("" : "+m"(x));
  return x;
}

// ---- Wrappers, as in device.cuh

void named_barrier(int id, int threads, Where where = Where::current());
void grid_sync(Where where = Where::current());
uint32_t load_acquire(const uint32_t* p, Where where = Where::current());
void store_release(uint32_t* p, uint32_t value, Where where = Where::current());
inline void add_release(uint32_t* p, uint32_t value, Where where = Where::current()) {
  atomic_update(Atomic::kAdd, p, value, 0u, Order::kRelease, where);
}
void spin_pause(Where where = Where::current());

struct alignas(16) [[gnu::may_alias]] Words {
  uint32_t v[4];
};
SIMT_FN Words load16(const void* p) { return *static_cast<const Words*>(p); }
SIMT_FN Words load16_once(const void* p) { return *static_cast<const Words*>(p); }

void cp_async16(void* shared, const void* global, bool valid, Where where = Where::current());
void cp_async_commit();
void wait_for_copies(int groups_left);
template <int N>
void cp_async_wait() {
  wait_for_copies(N);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, Where where = Where::current());
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Where where = Where::current());
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
              Where where = Where::current());
void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
             Where where = Where::current());

SIMT_FN uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
template <class T>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (int half = 0; half < 32; half += 16) {
    const float x = widen(T{static_cast<uint16_t>(a >> half)});
    const float y = widen(T{static_cast<uint16_t>(b >> half)});
    sum |= uint32_t{narrow<T>(x + y).bits} << half;
  }
  return sum;
}
SIMT_FN uint32_t add_bf16x2(uint32_t a, uint32_t b) { return add_pairs<bf16>(a, b); }
SIMT_FN uint32_t add_f16x2(uint32_t a, uint32_t b) { return add_pairs<f16>(a, b); }

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_log(float x) { return std::log(x); }
inline float fast_divide(float a, float b) { return a / b; }
inline float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }
SIMT_FN double reciprocal_sqrt(double x) { return 1.0 / std::sqrt(x); }

// ---- Launches

struct Launch {
  const char* op;
  dim3 grid, block;
  size_t dynamic_shared_bytes;
  bool cooperative;
};

// Throws std::runtime_error, "<op>: emulator: <report>", on any finding.
void run_grid(const Launch& launch, const std::function<void()>& thread);

template <class P>
void launch(const char* op, void (*kernel)(P), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            void*, const P& params) {
  run_grid({op, grid, block, dynamic_shared_bytes, false}, [&] { kernel(params); });
}

template <class P>
void launch_cooperative(const char* op, void (*kernel)(P), dim3 grid, dim3 block,
                        size_t dynamic_shared_bytes, void*, const P& params) {
  run_grid({op, grid, block, dynamic_shared_bytes, true}, [&] { kernel(params); });
}

inline int64_t most_shared(const char*) { return 227 << 10; }  // as on sm_90

// Twelve, so that small launches are in several blocks and larger ones in more than fit.
template <class P>
int64_t resident_blocks(const char*, void (*)(P), dim3, size_t) {
  return 12;
}

}  // namespace synergen::simt

#define threadIdx (::synergen::simt::thread_index())
#define blockIdx (::synergen::simt::block_index())
#define blockDim (::synergen::simt::block_size())
#define gridDim (::synergen::simt::grid_size())

#define SIMT_DYNAMIC_SHARED(name) unsigned char* name = ::synergen::simt::dynamic_shared()
#define SIMT_SHARED(T, name, dims)                  \
  static const char name##_key = 0;                 \
  typedef T name##_array dims;                      \
  name##_array& name = *static_cast<name##_array*>( \
      ::synergen::simt::static_shared(&name##_key, sizeof(name##_array)))

#include "simt/builtins.h"
