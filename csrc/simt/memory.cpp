// Shared memory, atomics and asynchronous copies.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simt/machine.h"

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN
#endif
#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#endif
#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace synergen::simt {
namespace {

constexpr size_t kAlignment = 128;
constexpr unsigned char kUndefined = 0xFF;  // NaN in every float format
constexpr unsigned char kGuardByte = 0xA5;
#ifdef SIMT_ASAN
constexpr size_t kGuard = 0;  // red zones lie there
#else
constexpr size_t kGuard = 256;
#endif

// ---- Shared memory

// Of its exact size: the byte after it is not ours.
SharedArray create_shared(Block& block, const void* key, size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, bytes + 2 * kGuard) != 0) throw std::bad_alloc();
  unsigned char* start = static_cast<unsigned char*>(memory);
  const SharedArray array{key, start, start + kGuard, bytes};
  std::memset(start, kGuardByte, bytes + 2 * kGuard);
  std::memset(array.data, kUndefined, bytes);
  block.shared.push_back(array);
  if (race_detector != nullptr) race_detector->shared_begins(array, kGuard);
  return array;
}

std::string guard_report(const SharedArray& array) {
  const char* name = array.key == nullptr ? "the dynamic shared array" : "a static shared array";
  for (size_t i = 0; i < kGuard; ++i) {
    if (array.data[array.bytes + i] != kGuardByte) {
      return text_of("wrote ", i, " bytes after ", name, " of ", array.bytes, " bytes");
    }
    if (array.memory[i] != kGuardByte) {
      return text_of("wrote ", kGuard - i, " bytes before ", name, " of ", array.bytes, " bytes");
    }
  }
  return "";
}

void check_global(const void* p, Where where) {
  if (reinterpret_cast<uintptr_t>(p) % kCopyBytes != 0) {
    fail("cp.async at ", where, ": the global address is not a multiple of 16 bytes");
  }
#ifdef SIMT_ASAN
  if (__asan_region_is_poisoned(const_cast<void*>(p), kCopyBytes) != nullptr) {
    fail("cp.async at ", where, ": reads outside its array");
  }
#endif
}

// ---- Atomics

template <class T>
T combined(Atomic op, T old, T value, T expected) {
  switch (op) {
    case Atomic::kAdd:
      return old + value;
    case Atomic::kMax:
      return std::max(old, value);
    case Atomic::kMin:
      return std::min(old, value);
    case Atomic::kExchange:
      return value;
    case Atomic::kCompareSwap:
      return old == expected ? value : old;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) return op == Atomic::kOr ? old | value : old & value;
  fail("atomicOr and atomicAnd are for integers");
}

// Another thread may come first: always the same one would hide what depends on the order.
void maybe_give_way(Where where) {
  if (options.policy != kRandom || draw() % 4 != 0) return;
  wait_as(State::kRunnable, "atomic", where);
  machine->ready.push(*current);
  give_way();
}

void before_atomic(const void* p, size_t bytes, bool write, Order order, Where where) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail("atomic at ", where, ": the address is not a multiple of ", bytes, " bytes");
  }
  ++counts.atomics;
  if (write) {
    maybe_give_way(where);
    machine->fruitless_spins = 0;
  }
  if (race_detector != nullptr) race_detector->atomic(p, bytes, write, order, where);
}

// ---- Asynchronous copies

void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  if (copy.from != nullptr) {
    std::memcpy(copy.to, copy.from, kCopyBytes);
  } else {
    std::memset(copy.to, 0, kCopyBytes);
  }
}

bool lands_at_once() {
  if (options.policy == kRandom) return draw() % 2 == 0;
  return options.policy == kLifo;
}

}  // namespace

void check_shared(const void* p, const char* what, Where where) {
  const unsigned char* at = static_cast<const unsigned char*>(p);
  bool inside = false;
  for (const SharedArray& array : current->block->shared) {
    inside |= at >= array.data && at + kCopyBytes <= array.data + array.bytes;
  }
  if (!inside) fail(what, " at ", where, ": 16 bytes outside the shared memory of the block");
  if (reinterpret_cast<uintptr_t>(p) % kCopyBytes != 0) {
    fail(what, " at ", where, ": the shared address is not a multiple of 16 bytes");
  }
}

void create_dynamic_shared(Block& block) {
  create_shared(block, nullptr, machine->launch.dynamic_shared_bytes);
}

std::string destroy_shared(Block& block) {
  std::string report;
  for (const SharedArray& array : block.shared) {
    if (report.empty()) report = guard_report(array);
    if (race_detector != nullptr) race_detector->shared_ends(array, kGuard);
    std::free(array.memory);
  }
  block.shared.clear();
  return report;
}

unsigned char* dynamic_shared() { return current->block->shared.front().data; }

void* static_shared(const void* key, size_t bytes) {
  size_t total = bytes;
  for (const SharedArray& array : current->block->shared) {
    if (array.key == key) return array.data;
    if (array.key != nullptr) total += array.bytes;
  }
  if (total > kMostStaticShared) {
    fail("declares ", total, " bytes of static shared memory; a block may have ",
         kMostStaticShared);
  }
  return create_shared(*current->block, key, bytes).data;
}

template <class T>
T atomic_update(Atomic op, T* p, T value, T expected, Order order, Where where) {
  before_atomic(p, sizeof(T), true, order, where);
  const T old = *p;
  *p = combined(op, old, value, expected);
  return old;
}
#define SIMT_ATOMIC(T) template T atomic_update(Atomic, T*, T, T, Order, Where);
SIMT_ATOMIC(int)
SIMT_ATOMIC(unsigned)
SIMT_ATOMIC(unsigned long long)
SIMT_ATOMIC(float)
SIMT_ATOMIC(double)
#undef SIMT_ATOMIC

uint32_t load_acquire(const uint32_t* p, Where where) {
  before_atomic(p, sizeof(*p), false, Order::kAcquire, where);
  return *p;
}

void store_release(uint32_t* p, uint32_t value, Where where) {
  atomic_update(Atomic::kExchange, p, value, 0u, Order::kRelease, where);
}

void fence() {
  if (race_detector != nullptr) race_detector->fence();
}

void cp_async16(void* shared, const void* global, bool valid, Where where) {
  check_shared(shared, "cp.async", where);
  if (valid) check_global(global, where);
  if (race_detector != nullptr) {
    if (valid) race_detector->access(global, kCopyBytes, false, where);
    race_detector->copy_issued(shared, where);
  }
  ++counts.cp_async;
  const char* from = valid ? static_cast<const char*>(global) : nullptr;
  Copy copy{static_cast<char*>(shared), from, false, where};
  if (lands_at_once()) land(copy);
  current->open.push_back(copy);
}

void cp_async_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void wait_for_copies(int groups_left) {
  while (current->groups.size() > static_cast<size_t>(groups_left)) {
    for (Copy& copy : current->groups.front()) {
      land(copy);
      if (race_detector != nullptr) race_detector->copy_landed(copy.to, copy.where);
    }
    current->groups.erase(current->groups.begin());
  }
}

}  // namespace synergen::simt
