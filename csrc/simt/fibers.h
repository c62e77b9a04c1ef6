// Stacks of our own and the switch between them: what it takes to hold thousands of CUDA threads,
// each stopped in the middle of a kernel, in one thread of the CPU.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace synergen::simt {

// Where a fiber, or the thread that launched it, left off.
struct Context {
#ifdef SIMT_UCONTEXT
  ucontext_t saved;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;  // the launching thread's is known once a fiber has run
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// One mapping with room for `count` stacks. A page below each is out of bounds, so that an overflow
// ends in a fault.
class Stacks {
 public:
  explicit Stacks(size_t count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // The next switch to `context` calls `entry` on stack i.
  void prepare(size_t i, Context& context, void (*entry)()) const;
  bool hold(const void* p) const;

 private:
  char* base_;
  size_t bytes_;
};

// `ends`: nobody will switch back to `from`.
void switch_context(Context& from, Context& to, bool ends);
// The first act of a fiber's entry.
void enter_fiber(Context& launching);

}  // namespace synergen::simt
