// Splits rows over OpenMP threads. Lies in the namespace of the instruction set it is compiled for,
// as vec.h does.
#pragma once

#include <omp.h>

#include <cstdint>

namespace synergen::cpu::SYNERGEN_ISA {

// f(begin, end) over [0, n) in contiguous pieces of at least `grain`, one per thread. Inside
// another parallel region it runs in the calling thread. f must not throw.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t most = grain > 1 ? (n + grain - 1) / grain : n;
  int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  if (threads > most) threads = most;
  if (threads <= 1) return f(int64_t{0}, n);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t k = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t begin = n * i / k, end = n * (i + 1) / k;
    if (begin < end) f(begin, end);
  }
}

// Every worker takes the next task until none is left, for tasks of different lengths. Which thread
// runs a task must not change its result. worker(claim) calls claim() until it returns n or more.
template <class F>
inline void parallel_tasks(int64_t n, const F& worker) {
  int64_t next = 0;
  parallel_for(n < omp_get_max_threads() ? n : omp_get_max_threads(), 1, [&](int64_t, int64_t) {
    worker([&] { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); });
  });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
