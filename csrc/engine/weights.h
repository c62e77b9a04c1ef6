// What the engine knows of a model: sizes, packed matrices, vectors of floats and tables of rows,
// each under a name. Names and shapes are those of synergen_ext/engine/weights.py.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/tensor.h"
#include "engine/matrix.h"

namespace synergen::engine {

struct Sizes {
  int64_t dim, hidden, layers, heads, kv_heads, head_dim, max_positions;
  int64_t vocab, specials;  // text ids; <boi>, <eoi> and <UNCOND> follow them
  int64_t codebook, fold_rows, fold_columns, grid_rows, grid_columns, token_dim, head_layers;
  double eps, theta;
  bool short_prompts;  // activations of prompts are bfloat16 beside weights in bfloat16

  int64_t window() const { return fold_rows * fold_columns; }
  int64_t queries() const { return heads * head_dim; }
  int64_t keys() const { return kv_heads * head_dim; }
  int64_t padded_hidden() const { return whole(hidden, kPanel); }
  int64_t image_id() const { return vocab + specials; }  // stands for a folded image token
};

// Rows of a table of embeddings, contiguous, in any of three dtypes.
struct Table {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, columns = 0;
  const void* data = nullptr;

  void add_to(int64_t row, float* out) const;  // out += row
};

// One layer of the backbone, with an expert for text and one for pictures; or of the unfolding
// head, with one expert.
struct Layer {
  const float *attention_norm, *ffn_norm;
  Matrix qkv, out;
  const float* qkv_bias;  // or null
  Matrix gate_up[2], down[2];
};

struct Stack {
  std::vector<Layer> layers;
  const float* norm;
};

// A packed matrix with its memory.
struct Packed {
  Matrix matrix;
  std::shared_ptr<void> owner;
};

// Packs a matrix [rows, columns] of float32, bfloat16 or float16 on the CPU.
Packed pack(const std::string& name, const Tensor& from, Format format, int64_t group);
// A packed matrix over bytes that exist: of a file, say.
Packed packed_view(const std::string& name, Format format, int64_t rows, int64_t columns,
                   int64_t group, const Tensor& data, const std::optional<Tensor>& scales);

class Weights {
 public:
  explicit Weights(const Sizes& sizes) : sizes(sizes) {}

  void put(const std::string& name, Packed packed);
  void put_vector(const std::string& name, const Tensor& vector);
  void put_table(const std::string& name, const Tensor& table);

  // Looks every weight up, once; refuses what is missing or of another shape.
  void bind();

  const Sizes sizes;
  std::map<std::string, Packed> matrices;

  // After bind():
  Stack backbone, head;
  Table tokens, specials, image_tokens, image_positions, head_tokens, head_positions;
  Matrix proj_in, proj_out, output, special_output, classifier;
  const float *proj_in_bias, *proj_out_bias;

 private:
  const Matrix& matrix(const std::string& name, int64_t rows, int64_t columns) const;
  const float* vector(const std::string& name, int64_t size) const;
  const Table& table(const std::string& name, int64_t rows, int64_t columns) const;
  Layer layer(const std::string& name, int experts) const;

  std::map<std::string, std::vector<float>> vectors_;
  std::map<std::string, Table> tables_;
  std::map<std::string, std::shared_ptr<void>> owners_;
  bool bound_ = false;
};

}  // namespace synergen::engine
