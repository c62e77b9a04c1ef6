// One call's working memory, and the steps that all loops are made of.
#pragma once

#include "engine/engine.h"
#include "engine/params.h"
#include "engine/workspace.h"

namespace synergen::engine {

// Rows that go through the layers together in a prefill: their activations are some 50 MB at the
// paper's sizes, and weights are read once for all of them.
constexpr int64_t kMostRows = 512;

using Floats = std::vector<float>;

class Session {
 public:
  // `sequences` of up to `capacity` tokens; rows: of the widest step.
  Session(Weights& weights, int64_t sequences, int64_t capacity, int64_t rows);

  // Appends ids to sequences, from where they end; states of the last token of each, [n, dim], or
  // of all tokens.
  void prefill(const std::vector<int64_t>& sequences, const Prompts& prompts, float* last,
               float* all = nullptr);

  // Appends one embedding [dim] to each of the sequences; states [n, dim] may be x.
  void push(const std::vector<int64_t>& sequences, const float* x, bool image, float* states);
  void push_ids(const std::vector<int64_t>& sequences, const int64_t* ids, float* states);

  // Embeddings [n, dim] of windows, from their ids [n, window]; patches [n] are their numbers in
  // pictures that are `columns` wide.
  void embed_windows(const Ids& ids, const Ids& patches, int64_t columns, float* out);

  // Draws the ids [n, window] of one patch for n pictures from the states [n or 2 n, dim] of their
  // rows: the conditional ones and, if guided, the unconditional.
  void unfold(const float* states, int64_t n, int64_t copies, const Ids& seeds, int64_t patch,
              double guidance, const Sampling& sampling, int64_t* ids);

  // Step j of the head: its input x [rows, dim] from the states [rows, dim] or from ids [n,
  // window], of which row r takes those of r % n; and its logits [rows, codebook], after the steps
  // before.
  void head_input(const float* states, const int64_t* ids, int64_t rows, int64_t n, int64_t j,
                  float* x) const;
  void head_step(const float* x, int64_t rows, int64_t j, float* logits);

  // As PackedLinearParams says, with memory of this session's.
  void linear(const Matrix& weight, const float* bias, int64_t rows, const float* x, int64_t x_step,
              float* out, int64_t out_step, Epilogue epilogue = Epilogue::kStore,
              const int64_t* x_index = nullptr, const int64_t* out_index = nullptr);

  // Logits [rows, vocab + specials].
  void text_logits(const float* states, int64_t rows, float* out);

  // ids [rows] from logits [rows, vocab], one draw of each row's seed; throws NotFinite.
  void draw(const float* logits, const float* uncond, int64_t rows, int64_t vocab, const Ids& seeds,
            int64_t position, double guidance, const Sampling& sampling, int64_t* ids) const;

  Cache cache;

 private:
  void embed(const Ids& ids, size_t from, size_t n, const Pictures& pictures, int64_t& window,
             float* out);
  void layers(const Stack& stack, Cache& cache, const Place& place, float* x);
  void attend(Cache& cache, int64_t layer, const Place& place);
  void attend_prompt(Cache& cache, int64_t layer, const Place& place);
  void ffn(const Layer& layer, int expert, const std::vector<int64_t>* rows, int64_t count,
           float* x);
  void normalise(const float* x, const float* weight, int64_t rows, float* out) const;
  void reserve(int64_t rows);

  Weights& w_;
  const Sizes& s_;
  std::unique_ptr<Cache> head_cache_;
  Floats cosines_, sines_, head_cosines_, head_sines_;
  Floats normed_, qkv_, mixed_, hidden_, x_, folded_, wide_, logits_;
  std::vector<int64_t> lengths_;
  Workspace laid_out_;
  bool short_x_ = false;
};

}  // namespace synergen::engine
