// What a host function sees of an array, whichever framework it came from: sizes, strides in
// elements, a pointer.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/types.h"

namespace synergen {

using Sizes = std::vector<int64_t>;

struct Device {
  bool cuda = false;
  int32_t index = 0;
  bool operator==(const Device&) const = default;
};

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  Sizes sizes;
  Sizes strides;
  std::shared_ptr<void> owner;  // the framework's own handle, kept alive as long as this view

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }
  int64_t size(int64_t d) const { return sizes[d < 0 ? d + dim() : d]; }
  int64_t stride(int64_t d) const { return strides[d < 0 ? d + dim() : d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : sizes) n *= s;
    return n;
  }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

// One call of an op: where its outputs come from, and on which stream it runs. torch calls and
// plain calls differ in this and nothing else, so each op has one host function.
class Call {
 public:
  virtual ~Call() = default;
  virtual Tensor empty(const char* name, const Sizes& sizes, DType dtype) = 0;
  // Device memory that lives as long as the work queued on the stream until now needs it.
  virtual void* scratch(int64_t bytes) = 0;
  Device device;
  void* stream = nullptr;
};

// All dimensions of `t` but the last `inner`, merged where memory allows.
Rows leading_rows(const Tensor& t, int64_t inner);
// Product of all dimensions but the last `inner`.
int64_t leading_count(const Tensor& t, int64_t inner);

}  // namespace synergen
