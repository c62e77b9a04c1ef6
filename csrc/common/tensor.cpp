#include "common/tensor.h"

namespace synergen {

Rows leading_rows(const Tensor& t, int64_t inner) {
  Rows rows;
  for (int64_t d = 0; d < t.dim() - inner; ++d) {
    if (t.sizes[d] == 1) continue;
    const int32_t last = rows.dims - 1;
    if (last >= 0 && rows.strides[last] == t.strides[d] * t.sizes[d]) {
      rows.sizes[last] *= t.sizes[d];
      rows.strides[last] = t.strides[d];
    } else {
      rows.sizes[rows.dims] = t.sizes[d];
      rows.strides[rows.dims++] = t.strides[d];
    }
  }
  return rows;
}

int64_t leading_count(const Tensor& t, int64_t inner) {
  int64_t n = 1;
  for (int64_t d = 0; d < t.dim() - inner; ++d) n *= t.sizes[d];
  return n;
}

}  // namespace synergen
