#include "simt/fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(SIMT_ASAN)
#define SIMT_ASAN
#endif
#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace synergen::simt {
namespace {

#ifdef SIMT_ASAN
constexpr size_t kStackBytes = 256 << 10;  // red zones make frames larger
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kPage = 4096;
// A guard page is a mapping of its own, and Linux allows 65530 of them.
constexpr size_t kMostGuarded = 16384;

void forget_poison([[maybe_unused]] char* stack, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(stack, bytes);
#endif
}

}  // namespace

Stacks::Stacks(size_t count) : bytes_(count * kStackBytes) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);
  for (size_t i = 0; i < count && count <= kMostGuarded; ++i) {
    mprotect(base_ + i * kStackBytes, kPage, PROT_NONE);
  }
}

Stacks::~Stacks() {
  forget_poison(base_, bytes_);
  munmap(base_, bytes_);
}

bool Stacks::hold(const void* p) const {
  const char* at = static_cast<const char*>(p);
  return at >= base_ && at < base_ + bytes_;
}

#ifdef SIMT_UCONTEXT

void Stacks::prepare(size_t i, Context& context, void (*entry)()) const {
  char* stack = base_ + i * kStackBytes;
  forget_poison(stack, kStackBytes);
  context = {};
  context.stack = stack;
  context.stack_bytes = kStackBytes;
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = kStackBytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}

static void swap_stacks(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

#else

// Pushes what a callee must preserve, exchanges stacks, and pops what the other side pushed.
extern "C" void simt_swap_stacks(void** from, void* to);
asm(R"(
.text
.type simt_swap_stacks, @function
simt_swap_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_swap_stacks, . - simt_swap_stacks
)");

// The stack of a fiber that was about to return to `entry`, which has no caller.
void Stacks::prepare(size_t i, Context& context, void (*entry)()) const {
  char* stack = base_ + i * kStackBytes;
  forget_poison(stack, kStackBytes);
  constexpr int kPreserved = 6;
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int r = 0; r < kPreserved; ++r) *--top = nullptr;
  context = {};
  context.stack = stack;
  context.stack_bytes = kStackBytes;
  context.stack_pointer = top;
}

static void swap_stacks(Context& from, Context& to) {
  simt_swap_stacks(&from.stack_pointer, to.stack_pointer);
}

#endif

void switch_context(Context& from, Context& to, [[maybe_unused]] bool ends) {
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
  swap_stacks(from, to);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void enter_fiber([[maybe_unused]] Context& launching) {
#ifdef SIMT_ASAN
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (launching.stack == nullptr) {  // the launching thread runs the first fiber
    launching.stack = stack;
    launching.stack_bytes = bytes;
  }
#endif
}

}  // namespace synergen::simt
