// A vector clock: how far a thread knows each other thread to have come. Entries outside the range
// of those known are zero and take no memory, so threads that never met cost nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace synergen::simt {

class Clock {
 public:
  uint32_t operator[](uint32_t thread) const {
    const uint32_t i = thread - first_;  // wraps below first_
    return i < known_.size() ? known_[i] : 0;
  }

  bool empty() const { return known_.empty(); }

  void raise(uint32_t thread, uint32_t value) {
    cover(thread, thread + 1);
    uint32_t& entry = known_[thread - first_];
    entry = std::max(entry, value);
  }

  void merge(const Clock& other) {
    if (other.empty()) return;
    cover(other.first_, other.end());
    uint32_t* to = known_.data() + (other.first_ - first_);
    for (size_t i = 0; i < other.known_.size(); ++i) to[i] = std::max(to[i], other.known_[i]);
  }

  // Whether `other` knows nothing more.
  bool covers(const Clock& other) const {
    for (uint32_t t = other.first_; t < other.end(); ++t) {
      if (other[t] > (*this)[t]) return false;
    }
    return true;
  }

 private:
  uint32_t end() const { return first_ + static_cast<uint32_t>(known_.size()); }

  void cover(uint32_t first, uint32_t last) {
    if (known_.empty()) first_ = first;
    if (first < first_) {
      known_.insert(known_.begin(), first_ - first, 0);
      first_ = first;
    }
    if (last > end()) known_.resize(last - first_, 0);
  }

  uint32_t first_ = 0;
  std::vector<uint32_t> known_;
};

}  // namespace synergen::simt
