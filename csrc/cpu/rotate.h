// Turning one head by its position's angles: element i goes with i + half.
#pragma once

#include "cpu/vec.h"

namespace synergen::cpu::SYNERGEN_ISA {

// y = x turned, rounded to its storage type; y may be x.
template <class T, class A>
inline void rotate_head(const A* x, int64_t half, const A* cosines, const A* sines, T* y) {
  using V = VecOf<T>;
  int64_t i = 0;
  for (; i + V::N <= half; i += V::N) {
    const V a = V::load(x + i), b = V::load(x + half + i);
    const V c = V::load(cosines + i), s = V::load(sines + i);
    (a * c - b * s).store(y + i);
    (b * c + a * s).store(y + half + i);
  }
  for (; i < half; ++i) {
    const A a = x[i], b = x[half + i];
    from_float(a * cosines[i] - b * sines[i], y[i]);
    from_float(b * cosines[i] + a * sines[i], y[half + i]);
  }
}

}  // namespace synergen::cpu::SYNERGEN_ISA
