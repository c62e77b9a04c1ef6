// ldmatrix and mma, for a whole warp at once. Lane 4 g + t has row g and columns 2 t and 2 t + 1 of
// an 8x8 matrix.
#include <algorithm>

#include "simt/machine.h"

namespace synergen::simt {
namespace {

const uint16_t* matrix_row(Operand* const* lanes, int matrix, int row) {
  return static_cast<const uint16_t*>(lanes[8 * matrix + row]->row);
}

uint32_t pair_of(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

template <bool kTransposed>
void read_matrix(Operand* const* lanes, int matrix) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const uint16_t* row = matrix_row(lanes, matrix, g);
    const uint16_t* upper = matrix_row(lanes, matrix, 2 * t);
    const uint16_t* lower = matrix_row(lanes, matrix, 2 * t + 1);
    lanes[lane]->rows[matrix] =
        kTransposed ? pair_of(upper[g], lower[g]) : pair_of(row[2 * t], row[2 * t + 1]);
  }
}

// Different rows in the same 16 of the 128 bytes that a wavefront reads wait for each other.
int wavefronts(Operand* const* lanes, int matrix) {
  int most = 0;
  int at_banks[8] = {};
  for (int i = 0; i < 8; ++i) {
    const uint16_t* row = matrix_row(lanes, matrix, i);
    bool seen = false;
    for (int j = 0; j < i; ++j) seen |= matrix_row(lanes, matrix, j) == row;
    if (seen) continue;
    most = std::max(most, ++at_banks[reinterpret_cast<uintptr_t>(row) / 16 % 8]);
  }
  return most;
}

template <bool kTransposed>
void ldmatrix_body(Operand* const* lanes) {
  ++counts.ldmatrix;
  for (int matrix = 0; matrix < 4; ++matrix) {
    counts.ldmatrix_wavefronts += static_cast<uint64_t>(wavefronts(lanes, matrix));
    read_matrix<kTransposed>(lanes, matrix);
  }
}

void ldmatrix(uint32_t* rows, const void* row, WarpBody body, Where where) {
  check_shared(row, "ldmatrix", where);
  if (race_detector != nullptr) race_detector->access(row, kCopyBytes, false, where);
  Operand operand;
  operand.row = row;
  operand.rows = rows;
  warp_op("ldmatrix", 0xFFFFFFFFu, operand, body, where);
}

template <class T>
void unpack(uint32_t pair, float* to) {
  to[0] = widen(T{static_cast<uint16_t>(pair)});
  to[1] = widen(T{static_cast<uint16_t>(pair >> 16)});
}

// a is [16, 16] in four quarters, row quarter first; b is [16, 8], held as b[n][k], in two halves.
template <class T>
void mma_body(Operand* const* lanes) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) unpack<T>(lanes[lane]->a[r], &a[g + r % 2 * 8][2 * t + r / 2 * 8]);
    for (int r = 0; r < 2; ++r) unpack<T>(lanes[lane]->b[r], &b[g][2 * t + r * 8]);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      lanes[lane]->d[r] += sum;
    }
  }
  ++counts.mma;
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, WarpBody body, Where where) {
  const uint32_t b[2] = {b0, b1};
  Operand operand;
  operand.d = d;
  operand.a = a;
  operand.b = b;
  warp_op("mma", 0xFFFFFFFFu, operand, body, where);
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row, Where where) {
  ldmatrix(r, row, ldmatrix_body<false>, where);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Where where) {
  ldmatrix(r, row, ldmatrix_body<true>, where);
}
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where) {
  mma(d, a, b0, b1, mma_body<bf16>, where);
}
void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where) {
  mma(d, a, b0, b1, mma_body<f16>, where);
}

}  // namespace synergen::simt
