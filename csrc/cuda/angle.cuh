// Sine and cosine of the angles of rotary positions.
#pragma once

#include <cmath>

#include "simt/simt.h"

namespace synergen::cuda {

// Angles are reduced in double, where the position is exact, to |r| <= pi / 4 and a quarter turn;
// CUDA's own sincos takes 40 bytes of local memory (nvcc 13.0, sm_90). The series leave out terms
// below 1e-18. Twice, because beyond 2^52 turns one step leaves more than a quarter.
SIMT_FN void sine_cosine(double angle, double& sine, double& cosine) {
  constexpr double kHigh = 0x1.921fb54442d18p0, kMiddle = 0x1.1a62633145c07p-54,
                   kLow = -0x1.f1976b7ed8fbcp-110;  // pi / 2 in three parts
  double r = angle;
  int quarter = 0;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const double turns = std::rint(r * 0x1.45f306dc9c883p-1);
    r = std::fma(-turns, kLow, std::fma(-turns, kMiddle, std::fma(-turns, kHigh, r)));
    quarter += static_cast<int>(turns - 4.0 * std::floor(0.25 * turns));
  }
  const double z = r * r;
  double s = -1.0 / 121645100408832000.0, c = 1.0 / 6402373705728000.0;  // 19!, 18!
  constexpr double kSine[] = {1.0 / 355687428096000.0,
                              -1.0 / 1307674368000.0,
                              1.0 / 6227020800.0,
                              -1.0 / 39916800.0,
                              1.0 / 362880.0,
                              -1.0 / 5040.0,
                              1.0 / 120.0,
                              -1.0 / 6.0,
                              1.0};
  constexpr double kCosine[] = {-1.0 / 20922789888000.0,
                                1.0 / 87178291200.0,
                                -1.0 / 479001600.0,
                                1.0 / 3628800.0,
                                -1.0 / 40320.0,
                                1.0 / 720.0,
                                -1.0 / 24.0,
                                0.5,
                                -1.0};
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    s = std::fma(s, z, kSine[i]);
    c = std::fma(c, z, kCosine[i]);
  }
  s *= r;
  c = -c;
  const bool swap = quarter & 1;
  sine = (swap ? c : s) * (quarter & 2 ? -1.0 : 1.0);
  cosine = (swap ? s : c) * ((quarter + 1) & 2 ? -1.0 : 1.0);
}

}  // namespace synergen::cuda
