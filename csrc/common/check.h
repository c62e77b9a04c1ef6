// Every refusal says the op, the argument, what was wanted and what came.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/tensor.h"

namespace synergen {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

const char* name_of(DType dtype);
std::string to_string(const Sizes& sizes);
std::string to_string(const Device& device);

constexpr std::initializer_list<DType> kFloats = {DType::kFloat64, DType::kFloat32,
                                                  DType::kBFloat16, DType::kFloat16};

// check_shape("rms_norm", "weight", weight, "[D]", {dim}): "rms_norm: weight must be [D] = [2048],
// got [1024]".
void check_shape(const char* op, const char* name, const Tensor& t, const char* form,
                 const Sizes& wanted);
// For arguments whose rank is known and whose sizes are not: "fold_tokens: ids must be [N, h, w],
// got [3]".
void check_dims(const char* op, const char* name, const Tensor& t, const char* form, int64_t dims);
void check_min_dims(const char* op, const char* name, const Tensor& t, const char* form,
                    int64_t dims);
void check_dtype(const char* op, const char* name, const Tensor& t,
                 std::initializer_list<DType> wanted);
void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                      const Tensor& other);
void check_same_device(const char* op, const char* name, const Tensor& t, const Call& call);

}  // namespace synergen
