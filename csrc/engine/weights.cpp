#include "engine/weights.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "common/check.h"
#include "engine/params.h"

namespace synergen::engine {
namespace {

// Aligned to huge pages where that is worth it: a walk over 2 GB touches half a million small ones.
std::shared_ptr<void> allocate(int64_t bytes) {
  constexpr int64_t kHuge = int64_t{2} << 20;
  const int64_t alignment = bytes >= kHuge ? kHuge : 64;
  void* memory = std::aligned_alloc(static_cast<size_t>(alignment),
                                    static_cast<size_t>(whole(bytes > 0 ? bytes : 1, alignment)));
  if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == kHuge) {
    madvise(memory, static_cast<size_t>(whole(bytes, kHuge)), MADV_HUGEPAGE);
  }
#endif
  return std::shared_ptr<void>(memory, std::free);
}

void check_group(const std::string& name, Format format, int64_t group) {
  if (is_integer(format) && (group < 32 || group > 4096 || group % 8)) {
    refuse("engine: ", name, ": group must be a multiple of 8 in [32, 4096], got ", group);
  }
}

void check_plain(const std::string& name, const Tensor& t, const char* form, int64_t dims) {
  const std::string who = "engine";
  check_dims(who.c_str(), name.c_str(), t, form, dims);
  check_dtype(who.c_str(), name.c_str(), t, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  if (t.device.cuda) refuse("engine: ", name, " must be on the CPU");
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

float element(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  if (dtype == DType::kFloat16) {
    // Exponent and mantissa into place, then 2^112 times as large: subnormals come out right.
    wide = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    std::memcpy(&value, &wide, 4);
    value *= 0x1p112f;
    if ((bits & 0x7c00u) == 0x7c00u) {
      wide |= 0x7f800000u;
      std::memcpy(&value, &wide, 4);
    }
    return bits & 0x8000u ? -value : value;
  }
  std::memcpy(&value, &wide, 4);
  return value;
}

}  // namespace

void Table::add_to(int64_t row, float* out) const {
  const char* from = static_cast<const char*>(data) + row * columns * size_of(dtype);
  for (int64_t i = 0; i < columns; ++i) out[i] += element(dtype, from, i);
}

Packed pack(const std::string& name, const Tensor& from, Format format, int64_t group) {
  check_plain(name, from, "[rows, columns]", 2);
  check_group(name, format, group);
  if (from.numel() == 0) refuse("engine: ", name, " must not be empty");
  PackMatrixParams p{};
  p.dtype = from.dtype;
  p.from = from.data;
  p.strides[0] = from.stride(0);
  p.strides[1] = from.stride(1);
  p.to = {format, from.size(0), from.size(1), is_integer(format) ? group : 0};
  const int64_t data_bytes = whole(p.to.data_bytes(), 64);
  Packed packed{p.to, allocate(data_bytes + p.to.scale_count() * int64_t{sizeof(bf16)})};
  p.data = packed.owner.get();
  p.scales = reinterpret_cast<bf16*>(static_cast<char*>(p.data) + data_bytes);
  cpu::pack_matrix(p);
  for (int64_t i = 0; i < p.to.scale_count(); ++i) {
    if ((p.scales[i].bits & 0x7f80u) == 0x7f80u) refuse("engine: ", name, " must be finite");
  }
  packed.matrix.data = p.data;
  packed.matrix.scales = p.to.groups() ? p.scales : nullptr;
  return packed;
}

Packed packed_view(const std::string& name, Format format, int64_t rows, int64_t columns,
                   int64_t group, const Tensor& data, const std::optional<Tensor>& scales) {
  check_group(name, format, group);
  if (rows < 1 || columns < 1 || rows > int64_t{1} << 40 || columns > int64_t{1} << 30 ||
      rows > (int64_t{1} << 50) / columns) {
    refuse("engine: ", name, " must be [rows, columns] of a matrix, got [", rows, ", ", columns,
           "]");
  }
  Matrix m{format, rows, columns, is_integer(format) ? group : 0};
  const auto bytes = [&](const char* what, const Tensor& t, int64_t wanted) {
    if (t.dtype != DType::kUInt8 || t.dim() != 1 || t.size(0) != wanted ||
        (wanted > 1 && t.stride(0) != 1)) {
      refuse("engine: ", name, ": ", what, " must be ", wanted, " bytes in a row, got ",
             name_of(t.dtype), " ", to_string(t.sizes));
    }
  };
  bytes("data", data, m.data_bytes());
  m.data = data.data;
  auto owners = std::make_shared<std::vector<std::shared_ptr<void>>>();
  owners->push_back(data.owner);
  if (is_integer(format)) {
    if (!scales) refuse("engine: ", name, ": scales must be given beside integers");
    bytes("scales", *scales, m.scale_count() * int64_t{sizeof(bf16)});
    if (reinterpret_cast<uintptr_t>(scales->data) % alignof(bf16)) {
      refuse("engine: ", name, ": scales must begin at an even address");
    }
    m.scales = static_cast<const bf16*>(scales->data);
    owners->push_back(scales->owner);
  }
  return {m, owners};
}

void Weights::put(const std::string& name, Packed packed) {
  matrices.insert_or_assign(name, std::move(packed));
  bound_ = false;
}

void Weights::put_vector(const std::string& name, const Tensor& vector) {
  check_plain(name, vector, "[n]", 1);
  std::vector<float> values(static_cast<size_t>(vector.size(0)));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = element(vector.dtype, vector.data, static_cast<int64_t>(i) * vector.stride(0));
  }
  vectors_.insert_or_assign(name, std::move(values));
  bound_ = false;
}

// Kept as it is: the caller's array lives as long as the engine.
void Weights::put_table(const std::string& name, const Tensor& table) {
  check_plain(name, table, "[rows, columns]", 2);
  if (table.size(1) > 1 && table.stride(1) != 1) {
    refuse("engine: ", name, " must have rows without gaps, got strides ",
           to_string(table.strides));
  }
  if (table.size(0) > 1 && table.stride(0) != table.size(1)) {
    refuse("engine: ", name, " must be contiguous, got strides ", to_string(table.strides));
  }
  tables_.insert_or_assign(name, Table{table.dtype, table.size(0), table.size(1), table.data});
  owners_.insert_or_assign(name, table.owner);
  bound_ = false;
}

const Matrix& Weights::matrix(const std::string& name, int64_t rows, int64_t columns) const {
  const auto found = matrices.find(name);
  if (found == matrices.end()) refuse("engine: the weight ", name, " is missing");
  const Matrix& m = found->second.matrix;
  if (m.rows != rows || m.columns != columns) {
    refuse("engine: ", name, " must be [", rows, ", ", columns, "], got [", m.rows, ", ", m.columns,
           "]");
  }
  return m;
}

const float* Weights::vector(const std::string& name, int64_t size) const {
  const auto found = vectors_.find(name);
  if (found == vectors_.end()) refuse("engine: the weight ", name, " is missing");
  if (static_cast<int64_t>(found->second.size()) != size) {
    refuse("engine: ", name, " must be [", size, "], got [", found->second.size(), "]");
  }
  return found->second.data();
}

const Table& Weights::table(const std::string& name, int64_t rows, int64_t columns) const {
  const auto found = tables_.find(name);
  if (found == tables_.end()) refuse("engine: the weight ", name, " is missing");
  const Table& t = found->second;
  if (t.rows != rows || t.columns != columns) {
    refuse("engine: ", name, " must be [", rows, ", ", columns, "], got [", t.rows, ", ", t.columns,
           "]");
  }
  return t;
}

Layer Weights::layer(const std::string& name, int experts) const {
  const Sizes& s = sizes;
  const int64_t qkv = s.queries() + 2 * s.keys(), hidden = s.padded_hidden();
  Layer to{};
  to.attention_norm = vector(name + ".attention_norm", s.dim);
  to.ffn_norm = vector(name + ".ffn_norm", s.dim);
  to.qkv = matrix(name + ".qkv", qkv, s.dim);
  to.qkv_bias = vectors_.count(name + ".qkv_bias") ? vector(name + ".qkv_bias", qkv) : nullptr;
  to.out = matrix(name + ".out", s.dim, s.queries());
  const char* const names[2][2] = {{".text", ".vision"}, {"", ""}};
  for (int e = 0; e < experts; ++e) {
    const std::string expert = name + names[experts == 1][e];
    to.gate_up[e] = matrix(expert + ".gate_up", 2 * hidden, s.dim);
    to.down[e] = matrix(expert + ".down", s.dim, hidden);
  }
  return to;
}

void Weights::bind() {
  if (bound_) return;
  const Sizes& s = sizes;
  backbone.layers.clear();
  head.layers.clear();
  for (int64_t l = 0; l < s.layers; ++l) {
    backbone.layers.push_back(layer("layers." + std::to_string(l), 2));
  }
  for (int64_t l = 0; l < s.head_layers; ++l) {
    head.layers.push_back(layer("head.layers." + std::to_string(l), 1));
  }
  backbone.norm = vector("norm", s.dim);
  head.norm = vector("head.norm", s.dim);
  tokens = table("tokens", s.vocab, s.dim);
  specials = table("specials", s.specials, s.dim);
  image_tokens = table("image.tokens", s.codebook, s.token_dim);
  image_positions = table("image.positions", s.grid_rows * s.grid_columns, s.token_dim);
  head_tokens = table("head.tokens", s.codebook, s.dim);
  head_positions = table("head.positions", s.window(), s.dim);
  proj_in = matrix("image.proj_in", s.dim, s.window() * s.token_dim);
  proj_out = matrix("image.proj_out", s.dim, s.dim);
  proj_in_bias = vector("image.proj_in_bias", s.dim);
  proj_out_bias = vector("image.proj_out_bias", s.dim);
  output = matrix("output", s.vocab, s.dim);
  special_output = matrix("special_output", s.specials, s.dim);
  classifier = matrix("head.classifier", s.codebook, s.dim);
  bound_ = true;
}

}  // namespace synergen::engine
