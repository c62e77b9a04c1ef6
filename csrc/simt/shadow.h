// What the race detector knows of memory: a cell for each four bytes that a kernel touched.
#pragma once

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace synergen::simt {

// A line of source, or, with no file, the address after an instruction.
struct Site {
  const char* file = nullptr;
  uintptr_t line = 0;
  auto operator<=>(const Site&) const = default;
};

// An access: who, at which time of its own clock, to which bytes of the cell.
struct Epoch {
  uint32_t thread = 0, time = 0;
  uint8_t bytes = 0;
  bool write = false, atomic = false, in_flight = false;
  Site site;
};

struct Cell {
  Epoch write;                // the last
  std::vector<Epoch> others;  // reads since, and writes to other bytes
  uint8_t undefined = 0, outside = 0;
};

class Shadow {
 public:
  void clear() {
    pages_.clear();
    last_cells_ = nullptr;
  }

  // f(cell, the bits of its bytes that lie in the range)
  template <class F>
  void for_cells(const void* p, size_t bytes, F&& f) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(p), end = first + bytes;
    for (uintptr_t at = first / kCellBytes * kCellBytes; at < end; at += kCellBytes) {
      const uintptr_t from = std::max(at, first) - at;
      const uintptr_t to = std::min(at + kCellBytes, end) - at;
      f(cell_at(at), static_cast<uint8_t>((1u << to) - (1u << from)));
    }
  }

 private:
  static constexpr uintptr_t kCellBytes = 4;
  static constexpr uintptr_t kPageCells = 512;

  Cell& cell_at(uintptr_t address) {
    const uintptr_t page = address / (kCellBytes * kPageCells);
    if (page != last_page_ || last_cells_ == nullptr) {
      std::unique_ptr<Cell[]>& cells = pages_[page];
      if (cells == nullptr) cells = std::make_unique<Cell[]>(kPageCells);
      last_page_ = page;
      last_cells_ = cells.get();
    }
    return last_cells_[address / kCellBytes % kPageCells];
  }

  std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages_;
  uintptr_t last_page_ = 0;
  Cell* last_cells_ = nullptr;
};

}  // namespace synergen::simt
