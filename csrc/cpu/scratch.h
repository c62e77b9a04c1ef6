// Working memory of a kernel: 64-byte aligned, freed on scope exit. std::vector would do, but its
// inline functions have one name in every instruction set's object.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace synergen::cpu::SYNERGEN_ISA {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (static_cast<size_t>(n) * sizeof(T) + 64) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace synergen::cpu::SYNERGEN_ISA
