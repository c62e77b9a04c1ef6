// pack_matrix on the CPU: threads share the panels.
#include "cpu/packed_lines.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

using engine::Format;
using engine::kLine;
using engine::kPanel;
using engine::Matrix;

void pack_integers(const Matrix& to, int most, const float* row, int64_t r, char* data,
                   bf16* scales) {
  for (int64_t g = 0; g < to.groups(); ++g) {
    const float* from = row + g * to.group;
    bf16& scale = scales[g * kPanel + r];
    from_float(largest(from, to.group) / static_cast<float>(most), scale);
    if (to_float(scale) == 0) from_float(1.f, scale);  // zeros, or too small for any scale
    const float unit = to_float(scale);
    for (int64_t k = 0; k < to.group; ++k) {
      float q = unit == unit ? nearest(from[k] / unit) : 0;  // NaN stays in the scale
      q = q > static_cast<float>(most) ? static_cast<float>(most) : q;
      q = q < static_cast<float>(-most) ? static_cast<float>(-most) : q;
      const int value = static_cast<int>(q) + most + 1;
      const int64_t column = g * to.group + k, of = engine::columns_of_unit(to.format);
      char& byte = data[column / of * kLine + r * 4 + column % 4];
      if (of == 4) {
        byte = static_cast<char>(value);
      } else {
        byte = static_cast<char>(column % 8 < 4 ? value : static_cast<uint8_t>(byte) | value << 4);
      }
    }
  }
}

// One row of floats of the whole depth into its place in a panel.
void pack_row(const Matrix& to, const float* row, int64_t r, char* data, bf16* scales) {
  const int64_t depth = to.depth();
  if (to.format == Format::kFloat32) {
    for (int64_t k = 0; k < depth; ++k) std::memcpy(data + k * kLine + r * 4, row + k, 4);
  } else if (to.format == Format::kBFloat16) {
    for (int64_t k = 0; k < depth; ++k) {
      bf16 value;
      from_float(row[k], value);
      std::memcpy(data + k / 2 * kLine + r * 4 + k % 2 * 2, &value, 2);
    }
  } else {
    pack_integers(to, to.format == Format::kInt8 ? 127 : 7, row, r, data, scales);
  }
}

}  // namespace

void pack_matrix(const PackMatrixParams& p) {
  const Matrix& to = p.to;
  const int64_t depth = to.depth(), panel_bytes = to.units() * kLine;
  parallel_for(to.panels(), 1, [&](int64_t begin, int64_t end) {
    Scratch<float> row(depth);
    for (int64_t panel = begin; panel < end; ++panel) {
      char* data = static_cast<char*>(p.data) + panel * panel_bytes;
      for (int64_t r = 0; r < kPanel; ++r) {
        const int64_t i = panel * kPanel + r;
        for (int64_t k = i < to.rows ? to.columns : 0; k < depth; ++k) row[k] = 0;
        if (i < to.rows) {
          const int64_t size = p.dtype == DType::kFloat32 ? 4 : 2;
          const char* from = static_cast<const char*>(p.from) + i * p.strides[0] * size;
          load_row(p.dtype, from, p.strides[1], to.columns, row.data());
        }
        pack_row(to, row.data(), r, data, p.scales + panel * to.groups() * kPanel);
      }
    }
  });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
