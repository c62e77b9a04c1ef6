#include "engine/session.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "common/check.h"
#include "kernels.h"

namespace synergen::engine {
namespace {

float* allocate(int64_t count) {
  // Pages that no token reaches are never touched, and so never real.
  void* memory = std::aligned_alloc(
      64, static_cast<size_t>(whole(std::max<int64_t>(count, 1) * int64_t{sizeof(float)}, 64)));
  if (!memory) throw std::bad_alloc();
  return static_cast<float*>(memory);
}

// cosines and sines [positions, head_dim / 2], computed in double as the op rope does.
void fill_angles(const Sizes& s, int64_t positions, Floats& cosines, Floats& sines) {
  const int64_t half = s.head_dim / 2;
  cosines.resize(static_cast<size_t>(positions * half));
  sines.resize(cosines.size());
  for (int64_t i = 0; i < half; ++i) {
    const double frequency =
        std::pow(s.theta, -2.0 * static_cast<double>(i) / static_cast<double>(s.head_dim));
    for (int64_t p = 0; p < positions; ++p) {
      const double angle = static_cast<double>(p) * frequency;
      cosines[p * half + i] = static_cast<float>(std::cos(angle));
      sines[p * half + i] = static_cast<float>(std::sin(angle));
    }
  }
}

void gelu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * static_cast<float>(M_SQRT1_2)));
  }
}

}  // namespace

void Place::clear() {
  sequences.clear();
  positions.clear();
  of_text.clear();
  of_image.clear();
}

void Place::add(int64_t sequence, int64_t position, bool image) {
  (image ? of_image : of_text).push_back(rows());
  sequences.push_back(sequence);
  positions.push_back(position);
}

Cache::Cache(const Sizes& s, int64_t layers, int64_t sequences, int64_t capacity)
    : sequences(sequences),
      capacity(capacity),
      sequence_step(capacity * s.keys()),
      lengths(static_cast<size_t>(sequences), 0),
      layer_step_(sequences * sequence_step),
      keys_(allocate(layers * layer_step_), std::free),
      values_(allocate(layers * layer_step_), std::free) {}

Session::Session(Weights& weights, int64_t sequences, int64_t capacity, int64_t rows)
    : cache(weights.sizes, weights.sizes.layers, sequences, capacity),
      w_(weights),
      s_(weights.sizes) {
  w_.bind();
  fill_angles(s_, capacity, cosines_, sines_);
  fill_angles(s_, s_.window(), head_cosines_, head_sines_);
  reserve(rows);
}

void Session::linear(const Matrix& weight, const float* bias, int64_t rows, const float* x,
                     int64_t x_step, float* out, int64_t out_step, Epilogue epilogue,
                     const int64_t* x_index, const int64_t* out_index) {
  if (rows == 0) return;
  PackedLinearParams p{weight, epilogue, rows,     x,         x_step,   x_index,
                       bias,   out,      out_step, out_index, short_x_, nullptr};
  p.scratch = laid_out_.fit(scratch_bytes(p));
  cpu::packed_linear(p);
}

void Session::reserve(int64_t rows) {
  const auto fit = [rows](Floats& v, int64_t columns) {
    if (static_cast<int64_t>(v.size()) < rows * columns)
      v.resize(static_cast<size_t>(rows * columns));
  };
  fit(x_, s_.dim);
  fit(normed_, s_.dim);
  fit(qkv_, s_.queries() + 2 * s_.keys());
  fit(mixed_, s_.queries());
  fit(hidden_, s_.padded_hidden());
}

void Session::normalise(const float* x, const float* weight, int64_t rows, float* out) const {
  RmsNormParams p{};
  p.dtype = p.weight_dtype = DType::kFloat32;
  p.rows = rows;
  p.dim = s_.dim;
  p.eps = s_.eps;
  p.x = x;
  p.x_rows.dims = 1;
  p.x_rows.sizes[0] = rows;
  p.x_rows.strides[0] = s_.dim;
  p.x_stride = p.weight_stride = 1;
  p.weight = weight;
  p.y = out;
  cpu::rms_norm(p);
}

// mixed_ = attention of qkv_'s queries over the cache, each row up to its own position. Rows of
// sequences one after another lie a sequence apart: one call.
void Session::attend(Cache& cache, int64_t layer, const Place& place) {
  const int64_t rows = place.rows(), qkv = s_.queries() + 2 * s_.keys();
  lengths_.resize(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) lengths_[r] = place.positions[r] + 1;
  for (int64_t begin = 0; begin < rows;) {
    const int64_t first = place.sequences[begin];
    int64_t end = begin + 1;
    while (end < rows && place.sequences[end] == first + end - begin) ++end;
    DecodeAttentionParams p{};
    p.dtype = DType::kFloat32;
    p.batch = end - begin;
    p.heads = s_.heads;
    p.kv_heads = s_.kv_heads;
    p.keys = cache.capacity;
    p.dim = s_.head_dim;
    p.scale = 1 / std::sqrt(static_cast<double>(s_.head_dim));
    p.q = qkv_.data() + begin * qkv;
    p.q_strides[0] = qkv;
    p.q_strides[1] = s_.head_dim;
    p.q_strides[2] = 1;
    p.k = cache.keys(layer) + first * cache.sequence_step;
    p.v = cache.values(layer) + first * cache.sequence_step;
    const int64_t strides[4] = {cache.sequence_step, s_.keys(), s_.head_dim, 1};
    std::copy_n(strides, 4, p.k_strides);
    std::copy_n(strides, 4, p.v_strides);
    p.lengths = {lengths_.data() + begin, 1};
    p.out = mixed_.data() + begin * s_.queries();
    cpu::decode_attention(p);
    begin = end;
  }
}

// The same for rows that lie together by sequence, positions rising by one.
void Session::attend_prompt(Cache& cache, int64_t layer, const Place& place) {
  const int64_t rows = place.rows(), qkv = s_.queries() + 2 * s_.keys();
  for (int64_t begin = 0; begin < rows;) {
    const int64_t sequence = place.sequences[begin];
    int64_t end = begin + 1;
    while (end < rows && place.sequences[end] == sequence) ++end;
    const float scale = 1 / std::sqrt(static_cast<float>(s_.head_dim));
    cpu::prefill_attention({end - begin, place.positions[begin], s_.heads, s_.kv_heads, s_.head_dim,
                            scale, qkv_.data() + begin * qkv,
                            cache.keys(layer) + sequence * cache.sequence_step,
                            cache.values(layer) + sequence * cache.sequence_step,
                            mixed_.data() + begin * s_.queries()});
    begin = end;
  }
}

// x += ffn(normed_) of one expert, for the rows that take it, or for all.
void Session::ffn(const Layer& layer, int expert, const std::vector<int64_t>* rows, int64_t count,
                  float* x) {
  const int64_t hidden = s_.padded_hidden();
  const int64_t* index = rows ? rows->data() : nullptr;
  linear(layer.gate_up[expert], nullptr, count, normed_.data(), s_.dim, hidden_.data(), hidden,
         Epilogue::kSwiglu, index);
  linear(layer.down[expert], nullptr, count, hidden_.data(), hidden, x, s_.dim, Epilogue::kAdd,
         nullptr, index);
}

// x [rows, dim] through all layers of the backbone or of the head, without the last norm.
void Session::layers(const Stack& stack, Cache& cache, const Place& place, float* x) {
  const bool backbone = &stack == &w_.backbone;
  const int64_t rows = place.rows(), qkv = s_.queries() + 2 * s_.keys();
  for (size_t l = 0; l < stack.layers.size(); ++l) {
    const Layer& layer = stack.layers[l];
    normalise(x, layer.attention_norm, rows, normed_.data());
    linear(layer.qkv, layer.qkv_bias, rows, normed_.data(), s_.dim, qkv_.data(), qkv);
    cpu::append_keys({rows, s_.heads, s_.kv_heads, s_.head_dim, qkv_.data(),
                      (backbone ? cosines_ : head_cosines_).data(),
                      (backbone ? sines_ : head_sines_).data(), place.positions.data(),
                      place.sequences.data(), cache.keys(static_cast<int64_t>(l)),
                      cache.values(static_cast<int64_t>(l)), cache.sequence_step});
    if (place.prompt) {
      attend_prompt(cache, static_cast<int64_t>(l), place);
    } else {
      attend(cache, static_cast<int64_t>(l), place);
    }
    linear(layer.out, nullptr, rows, mixed_.data(), s_.queries(), x, s_.dim, Epilogue::kAdd);
    normalise(x, layer.ffn_norm, rows, normed_.data());
    if (!backbone) {
      ffn(layer, 0, nullptr, rows, x);
    } else {  // FFN-MMoE, section 3.2
      ffn(layer, 0, &place.of_text, static_cast<int64_t>(place.of_text.size()), x);
      ffn(layer, 1, &place.of_image, static_cast<int64_t>(place.of_image.size()), x);
    }
  }
}

// TokenFold(TokenEmbed(I) + PE) and its MLP (eq. 1).
void Session::embed_windows(const Ids& ids, const Ids& patches, int64_t columns, float* out) {
  const int64_t n = static_cast<int64_t>(patches.size());
  const int64_t across = columns / s_.fold_columns, size = s_.window() * s_.token_dim;
  folded_.assign(static_cast<size_t>(n * size), 0.f);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t top = patches[i] / across * s_.fold_rows;
    const int64_t left = patches[i] % across * s_.fold_columns;
    for (int64_t j = 0; j < s_.window(); ++j) {
      float* to = folded_.data() + i * size + j * s_.token_dim;
      const int64_t row = top + j / s_.fold_columns, column = left + j % s_.fold_columns;
      w_.image_tokens.add_to(ids[i * s_.window() + j], to);
      w_.image_positions.add_to(row * s_.grid_columns + column, to);
    }
  }
  wide_.resize(static_cast<size_t>(n * s_.dim));
  linear(w_.proj_in, w_.proj_in_bias, n, folded_.data(), size, wide_.data(), s_.dim);
  gelu(wide_.data(), n * s_.dim);
  linear(w_.proj_out, w_.proj_out_bias, n, wide_.data(), s_.dim, out, s_.dim);
}

// Embeddings of n ids of a prompt; `window` counts the windows of all pictures so far.
void Session::embed(const Ids& ids, size_t from, size_t n, const Pictures& pictures,
                    int64_t& window, float* out) {
  const int64_t across = pictures.columns / s_.fold_columns;
  const int64_t of_picture = across * (pictures.rows / s_.fold_rows);
  Ids patches, tokens, places;
  std::fill_n(out, static_cast<int64_t>(n) * s_.dim, 0.f);
  for (size_t i = 0; i < n; ++i) {
    float* to = out + static_cast<int64_t>(i) * s_.dim;
    const int64_t id = ids[from + i];
    if (id < s_.vocab) {
      w_.tokens.add_to(id, to);
    } else if (id < s_.image_id()) {
      w_.specials.add_to(id - s_.vocab, to);
    } else {
      const int64_t patch = window % of_picture;
      const int64_t* picture =
          pictures.ids + window / of_picture * pictures.rows * pictures.columns;
      const int64_t top = patch / across * s_.fold_rows, left = patch % across * s_.fold_columns;
      for (int64_t j = 0; j < s_.window(); ++j) {
        tokens.push_back(
            picture[(top + j / s_.fold_columns) * pictures.columns + left + j % s_.fold_columns]);
      }
      patches.push_back(patch);
      places.push_back(static_cast<int64_t>(i));
      ++window;
    }
  }
  if (places.empty()) return;
  Floats embedded(places.size() * static_cast<size_t>(s_.dim));
  embed_windows(tokens, patches, pictures.columns, embedded.data());
  for (size_t i = 0; i < places.size(); ++i) {
    std::copy_n(embedded.data() + static_cast<int64_t>(i) * s_.dim, s_.dim,
                out + places[i] * s_.dim);
  }
}

void Session::prefill(const std::vector<int64_t>& sequences, const Prompts& prompts, float* last,
                      float* all) {
  struct Piece {
    size_t prompt, from, n;
  };
  std::vector<Piece> pieces;
  Place place;
  place.prompt = true;
  int64_t window = 0, done = 0;
  const auto run = [&] {
    const int64_t rows = place.rows();
    short_x_ = s_.short_prompts;
    layers(w_.backbone, cache, place, x_.data());
    short_x_ = false;
    int64_t row = 0;
    for (const Piece& piece : pieces) {
      row += static_cast<int64_t>(piece.n);
      if (piece.from + piece.n == prompts.ids[piece.prompt].size() && last) {
        normalise(x_.data() + (row - 1) * s_.dim, w_.backbone.norm, 1,
                  last + static_cast<int64_t>(piece.prompt) * s_.dim);
      }
    }
    if (all) normalise(x_.data(), w_.backbone.norm, rows, all + done * s_.dim);
    done += rows;
    pieces.clear();
    place.clear();
  };
  for (size_t p = 0; p < prompts.ids.size(); ++p) {
    const Ids& ids = prompts.ids[p];
    int64_t& length = cache.lengths[static_cast<size_t>(sequences[p])];
    for (size_t from = 0; from < ids.size();) {
      const size_t n = std::min(ids.size() - from, static_cast<size_t>(kMostRows - place.rows()));
      reserve(place.rows() + static_cast<int64_t>(n));
      embed(ids, from, n, prompts.pictures, window, x_.data() + place.rows() * s_.dim);
      for (size_t i = 0; i < n; ++i) {
        place.add(sequences[p], length++, ids[from + i] == s_.image_id());
      }
      pieces.push_back({p, from, n});
      from += n;
      if (place.rows() == kMostRows) run();
    }
  }
  if (place.rows()) run();
}

void Session::push(const std::vector<int64_t>& sequences, const float* x, bool image,
                   float* states) {
  const int64_t n = static_cast<int64_t>(sequences.size());
  reserve(n);
  Place place;
  for (int64_t sequence : sequences) {
    place.add(sequence, cache.lengths[static_cast<size_t>(sequence)]++, image);
  }
  std::copy_n(x, n * s_.dim, x_.data());
  layers(w_.backbone, cache, place, x_.data());
  normalise(x_.data(), w_.backbone.norm, n, states);
}

void Session::push_ids(const std::vector<int64_t>& sequences, const int64_t* ids, float* states) {
  Floats x(sequences.size() * static_cast<size_t>(s_.dim), 0.f);
  for (size_t i = 0; i < sequences.size(); ++i) {
    float* to = x.data() + static_cast<int64_t>(i) * s_.dim;
    if (ids[i] < s_.vocab) {
      w_.tokens.add_to(ids[i], to);
    } else {
      w_.specials.add_to(ids[i] - s_.vocab, to);
    }
  }
  push(sequences, x.data(), false, states);
}

// x [rows, dim] of step j: the states, or the embeddings of the ids before, and the position's.
// Row r takes the ids of row r % n.
void Session::head_input(const float* states, const int64_t* ids, int64_t rows, int64_t n,
                         int64_t j, int64_t ids_step, float* x) const {
  if (j == 0) {
    std::copy_n(states, rows * s_.dim, x);
  } else {
    std::fill_n(x, rows * s_.dim, 0.f);
    for (int64_t r = 0; r < rows; ++r) {
      w_.head_tokens.add_to(ids[r % n * ids_step + j - 1], x + r * s_.dim);
    }
  }
  for (int64_t r = 0; r < rows; ++r) w_.head_positions.add_to(j, x + r * s_.dim);
}

void Session::head_step(const float* x, int64_t rows, int64_t j, float* logits) {
  if (!head_cache_ || head_cache_->sequences < rows) {
    head_cache_ = std::make_unique<Cache>(s_, s_.head_layers, rows, s_.window());
  }
  reserve(rows);
  Place place;
  for (int64_t r = 0; r < rows; ++r) place.add(r, j, true);
  std::copy_n(x, rows * s_.dim, x_.data());
  layers(w_.head, *head_cache_, place, x_.data());
  normalise(x_.data(), w_.head.norm, rows, normed_.data());
  linear(w_.classifier, nullptr, rows, normed_.data(), s_.dim, logits, s_.codebook);
}

void Session::unfold(const float* states, int64_t n, int64_t copies, const Ids& seeds,
                     int64_t patch, double guidance, const Sampling& sampling, int64_t* ids) {
  const int64_t rows = copies * n, window = s_.window();
  wide_.resize(static_cast<size_t>(rows * s_.dim));
  logits_.resize(static_cast<size_t>(rows * s_.codebook));
  Ids drawn(static_cast<size_t>(n));
  for (int64_t j = 0; j < window; ++j) {
    head_input(states, ids, rows, n, j, window, wide_.data());
    head_step(wide_.data(), rows, j, logits_.data());
    draw(logits_.data(), copies == 2 ? logits_.data() + n * s_.codebook : nullptr, n, s_.codebook,
         seeds, patch * window + j, guidance, sampling, drawn.data());
    for (int64_t i = 0; i < n; ++i) ids[i * window + j] = drawn[i];
  }
}

void Session::text_logits(const float* states, int64_t rows, float* out) {
  const int64_t columns = s_.vocab + s_.specials;
  linear(w_.output, nullptr, rows, states, s_.dim, out, columns);
  linear(w_.special_output, nullptr, rows, states, s_.dim, out + s_.vocab, columns);
}

void Session::draw(const float* logits, const float* uncond, int64_t rows, int64_t vocab,
                   const Ids& seeds, int64_t position, double guidance, const Sampling& sampling,
                   int64_t* ids) const {
  std::unique_ptr<bool[]> valid(new bool[static_cast<size_t>(rows)]);
  SampleTokensParams p{};
  p.dtype = DType::kFloat32;
  p.rows = rows;
  p.vocab = vocab;
  p.logits = logits;
  p.uncond = uncond;
  p.logits_strides[0] = p.uncond_strides[0] = vocab;
  p.logits_strides[1] = p.uncond_strides[1] = 1;
  p.seed = {seeds.data(), 1};
  p.position = {&position, 0};
  p.top_k = {&sampling.top_k, 0};
  p.guidance = {&guidance, 0};
  p.temperature = {&sampling.temperature, 0};
  p.top_p = {&sampling.top_p, 0};
  p.ids = ids;
  p.valid = valid.get();
  cpu::sample_tokens(p);
  for (int64_t r = 0; r < rows; ++r) {
    if (!valid[r]) {
      throw NotFinite("engine: the model's logits are not finite in row " + std::to_string(r));
    }
  }
}

}  // namespace synergen::engine
