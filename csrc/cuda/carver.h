// Scratch memory of a launch, cut into pieces.
#pragma once

#include "common/types.h"

namespace synergen::cuda {

// Gives out pieces of one allocation; from null, only adds up their sizes.
class Carver {
 public:
  explicit Carver(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class P>
  void take(P*& pointer, int64_t bytes) {
    pointer = reinterpret_cast<P*>(base_ + static_cast<uintptr_t>(bytes_));
    bytes_ += ceil_div(bytes, 256) * 256;
  }
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  int64_t bytes_ = 0;
};

}  // namespace synergen::cuda
