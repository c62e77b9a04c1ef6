// The host functions: one per op, called from torch and from plain arrays alike (see Call in common/tensor.h).
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "kernels.h"

namespace synergen {

Tensor rms_norm(Call& call, const Tensor& x, const Tensor& weight, double eps);

}  // namespace synergen
