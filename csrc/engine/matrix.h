// A weight matrix as the engine reads it: panels of 16 rows, in lines of 64 bytes that hold 4 bytes
// of each row. A line is one load, its lanes are 16 results, and a product needs no sum across
// lanes; a thread reads its panels from front to back, one stream of memory.
//
//   data    [panel][unit][row of panel][4 bytes]: a unit is 1 float, 2 bfloat16, 4 numbers of 8
//           bits or 8 of 4 bits, neighbours in a row
//   scales  [panel][group][row of panel] in bfloat16, of the integers alone
//
// An integer q stands for q * scale of its row and group. 8 bits hold q + 128; of the 4 bits a byte
// i of a unit holds q + 8 of column i in its low half and of column 4 + i in its high half. Rows
// are filled up to whole panels and columns to whole units, or groups, with zeros. No part depends
// on the machine that packed it.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace synergen::engine {

enum class Format : int32_t { kFloat32, kBFloat16, kInt8, kInt4 };

constexpr int64_t kPanel = 16;                  // rows
constexpr int64_t kUnitBytes = 4;               // of a row
constexpr int64_t kLine = kPanel * kUnitBytes;  // bytes

constexpr bool is_integer(Format f) { return f == Format::kInt8 || f == Format::kInt4; }
constexpr int64_t columns_of_unit(Format f) {
  return f == Format::kFloat32 ? 1 : f == Format::kBFloat16 ? 2 : f == Format::kInt8 ? 4 : 8;
}
constexpr int64_t whole(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

struct Matrix {
  Format format = Format::kFloat32;
  int64_t rows = 0, columns = 0;
  int64_t group = 0;  // columns that share a scale, a multiple of 8; integers alone
  const void* data = nullptr;
  const bf16* scales = nullptr;

  int64_t panels() const { return ceil_div(rows, kPanel); }
  int64_t groups() const { return is_integer(format) ? ceil_div(columns, group) : 0; }
  // Columns with what fills them up.
  int64_t depth() const {
    return is_integer(format) ? whole(columns, group) : whole(columns, columns_of_unit(format));
  }
  int64_t units() const { return depth() / columns_of_unit(format); }
  int64_t data_bytes() const { return panels() * units() * kLine; }
  int64_t scale_count() const { return panels() * groups() * kPanel; }
  int64_t bytes() const { return data_bytes() + scale_count() * int64_t{sizeof(bf16)}; }
};

}  // namespace synergen::engine
