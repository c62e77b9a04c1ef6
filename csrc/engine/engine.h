// The native inference engine: ids in, ids out. The loops of generation/oracle.py, in one process,
// over packed weights, with every sequence at its own length.
#pragma once

#include <functional>
#include <stdexcept>

#include "engine/weights.h"

namespace synergen::engine {

using Ids = std::vector<int64_t>;

struct Sampling {
  double temperature = 1.0;
  int64_t top_k = 0;
  double top_p = 1.0;
};

// Pictures of one size, [count, rows, columns] image ids.
struct Pictures {
  const int64_t* ids = nullptr;
  int64_t count = 0, rows = 0, columns = 0;
};

struct Prompts {
  std::vector<Ids> ids;
  Pictures pictures;  // of all prompts, in reading order
};

// A caller's function told the engine to stop.
struct Cancelled : std::runtime_error {
  Cancelled() : std::runtime_error("cancelled") {}
};
// Logits that are not finite.
struct NotFinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Keys and values of every layer, for sequences of their own lengths.
class Cache {
 public:
  Cache(const Sizes& sizes, int64_t layers, int64_t sequences, int64_t capacity);

  float* keys(int64_t layer) const { return keys_.get() + layer * layer_step_; }
  float* values(int64_t layer) const { return values_.get() + layer * layer_step_; }

  const int64_t sequences, capacity;
  const int64_t sequence_step;  // elements from one sequence to the next
  std::vector<int64_t> lengths;

 private:
  int64_t layer_step_;
  std::unique_ptr<float, void (*)(void*)> keys_, values_;
};

// Where each row of a step belongs. Positions of a sequence rise by one from row to row.
struct Place {
  std::vector<int64_t> sequences, positions;
  std::vector<int64_t> of_text, of_image;  // rows by the FFN that they take
  bool prompt = false;  // rows of one sequence lie together; otherwise each has one row
  void clear();
  void add(int64_t sequence, int64_t position, bool image);
  int64_t rows() const { return static_cast<int64_t>(sequences.size()); }
};

// done and total count patches (or tokens of text); ids are those of the pictures so far, -1 where
// nothing is painted yet, or null. False stops.
using Progress = std::function<bool(int64_t done, int64_t total, const int64_t* ids)>;

struct Segment {
  Ids words;    // or
  Ids picture;  // [grid_rows, grid_columns]
};

class Engine {
 public:
  explicit Engine(const Sizes& sizes) : weights(sizes) {}
  Weights weights;

  // The continuation of each prompt, until a stop id (left out) or max_new_tokens.
  std::vector<Ids> generate_text(const Prompts& prompts, int64_t max_new_tokens,
                                 const Ids& stop_ids, const Sampling& sampling, const Ids& seeds,
                                 const std::function<bool(int64_t row, int64_t id)>& on_token);

  // ids [prompts, rows, columns] of one picture a prompt. `unconditional` may be empty: no
  // guidance.
  void paint(const std::vector<Ids>& prompts, const Ids& unconditional, const Ids& seeds,
             double guidance, const Sampling& sampling, int64_t rows, int64_t columns,
             const Progress& progress, int64_t* ids);

  // Text and pictures, as the model chooses.
  std::vector<Segment> generate_interleaved(const Prompts& prompt, const Ids& unconditional,
                                            int64_t max_new_tokens, const Ids& stop_ids,
                                            int64_t seed, double guidance, const Sampling& text,
                                            const Sampling& image, const Progress& progress);

  // Final states [T, dim] of one sequence; its logits; and of the head, given the true ids.
  void states(const Prompts& prompt, float* out);
  void text_logits(const float* states, int64_t rows, float* out);  // [rows, vocab + specials]
  void head_logits(const float* states, const int64_t* ids, int64_t rows,
                   float* out);  // [rows, window, codebook]
};

}  // namespace synergen::engine
