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

void Session::head_input(const float* states, const int64_t* ids, int64_t rows, int64_t n,
                         int64_t j, float* x) const {
  if (j == 0) {
    std::copy_n(states, rows * s_.dim, x);
  } else {
    std::fill_n(x, rows * s_.dim, 0.f);
    for (int64_t r = 0; r < rows; ++r) {
      w_.head_tokens.add_to(ids[r % n * s_.window() + j - 1], x + r * s_.dim);
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
    head_input(states, ids, rows, n, j, wide_.data());
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
