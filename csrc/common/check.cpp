#include "common/check.h"

namespace synergen {

const char* name_of(DType dtype) {
  static const char* const names[] = {"float64", "float32", "bfloat16",     "float16",
                                      "int64",   "bool",    "int32",        "int16",
                                      "int8",    "uint8",   "another dtype"};
  return names[static_cast<int>(dtype)];
}

std::string to_string(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

std::string to_string(const Device& device) {
  return device.cuda ? "cuda:" + std::to_string(device.index) : "cpu";
}

void check_shape(const char* op, const char* name, const Tensor& t, const char* form,
                 const Sizes& wanted) {
  if (t.sizes != wanted) {
    refuse(op, ": ", name, " must be ", form, " = ", to_string(wanted), ", got ",
           to_string(t.sizes));
  }
}

void check_dims(const char* op, const char* name, const Tensor& t, const char* form, int64_t dims) {
  if (t.dim() != dims) refuse(op, ": ", name, " must be ", form, ", got ", to_string(t.sizes));
}

void check_min_dims(const char* op, const char* name, const Tensor& t, const char* form,
                    int64_t dims) {
  if (t.dim() < dims) refuse(op, ": ", name, " must be ", form, ", got ", to_string(t.sizes));
}

void check_dtype(const char* op, const char* name, const Tensor& t,
                 std::initializer_list<DType> wanted) {
  std::string list;
  size_t i = 0;
  for (DType dtype : wanted) {
    if (t.dtype == dtype) return;
    list += i == 0 ? "" : i + 1 == wanted.size() ? " or " : ", ";
    list += name_of(dtype);
    ++i;
  }
  refuse(op, ": ", name, " must be ", list, ", got ", name_of(t.dtype));
}

void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* other_name,
                      const Tensor& other) {
  if (t.dtype != other.dtype) {
    refuse(op, ": ", name, " must be ", name_of(other.dtype), " like ", other_name, ", got ",
           name_of(t.dtype));
  }
}

void check_same_device(const char* op, const char* name, const Tensor& t, const Call& call) {
  if (t.device != call.device) {
    refuse(op, ": ", name, " must be on ", to_string(call.device), ", got ", to_string(t.device));
  }
}

}  // namespace synergen
