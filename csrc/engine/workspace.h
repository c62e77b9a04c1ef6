// Memory that is kept from call to call and grows when it must: fresh pages for every product took
// a quarter of a prefill's time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "engine/matrix.h"

namespace synergen::engine {

class Workspace {
 public:
  void* fit(int64_t bytes) {
    if (bytes > bytes_) {
      memory_.reset(std::aligned_alloc(64, static_cast<size_t>(whole(bytes, 64))));
      bytes_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<void, void (*)(void*)> memory_{nullptr, std::free};
  int64_t bytes_ = 0;
};

}  // namespace synergen::engine
