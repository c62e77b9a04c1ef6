#include "engine/engine.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "common/check.h"
#include "engine/session.h"

namespace synergen::engine {
namespace {

std::vector<int64_t> count_up(int64_t n) {
  std::vector<int64_t> all(static_cast<size_t>(n));
  std::iota(all.begin(), all.end(), int64_t{0});
  return all;
}

int64_t longest_of(const std::vector<Ids>& prompts) {
  size_t most = 0;
  for (const Ids& ids : prompts) most = std::max(most, ids.size());
  return static_cast<int64_t>(most);
}

void check_room(const Sizes& s, int64_t prompt, int64_t more) {
  if (prompt > s.max_positions || more > s.max_positions - prompt) {
    refuse("engine: prompt and new tokens must fit ", s.max_positions, " positions, got ", prompt,
           " and ", more);
  }
}

void check_grid(const Sizes& s, int64_t rows, int64_t columns) {
  if (rows < 1 || columns < 1 || rows % s.fold_rows || columns % s.fold_columns ||
      rows > s.grid_rows || columns > s.grid_columns) {
    refuse("engine: image tokens must be multiples of ", s.fold_rows, " x ", s.fold_columns,
           " up to ", s.grid_rows, " x ", s.grid_columns, ", got ", rows, " x ", columns);
  }
}

// Every id known, every prompt with something in it, and as many places as the pictures have.
void check_prompts(const Sizes& s, const Prompts& prompts, const char* what) {
  const Pictures& p = prompts.pictures;
  int64_t places = 0, wanted = 0;
  for (const Ids& ids : prompts.ids) {
    if (ids.empty()) refuse("engine: ", what, " must hold at least one id each, got an empty one");
    for (int64_t id : ids) {
      if (id < 0 || id > s.image_id()) {
        refuse("engine: ids must be in [0, ", s.image_id() + 1, "), got ", id);
      }
      places += id == s.image_id();
    }
  }
  if (p.count) {
    check_grid(s, p.rows, p.columns);
    for (int64_t i = 0; i < p.count * p.rows * p.columns; ++i) {
      if (p.ids[i] < 0 || p.ids[i] >= s.codebook) {
        refuse("engine: image ids must be in [0, ", s.codebook, "), got ", p.ids[i]);
      }
    }
    wanted = p.count * (p.rows / s.fold_rows) * (p.columns / s.fold_columns);
  }
  if (places != wanted) {
    refuse("engine: prompts must hold ", wanted, " image positions for ", p.count,
           " pictures, got ", places);
  }
}

void check_seeds(size_t prompts, const Ids& seeds) {
  if (seeds.size() != prompts) {
    refuse("engine: seeds must be ", prompts, ", one a prompt, got ", seeds.size());
  }
}

void check_sampling(const Sampling& s) {
  if (!(s.temperature >= 0)) refuse("engine: temperature must be >= 0, got ", s.temperature);
  if (!(s.top_p > 0 && s.top_p <= 1)) refuse("engine: top_p must be in (0, 1], got ", s.top_p);
  if (s.top_k < 0) refuse("engine: top_k must be >= 0, got ", s.top_k);
}

// Paints one picture for each seed into ids [n, rows, columns]. Sequences are those of the
// conditional rows and, if guided, of the unconditional ones after them; states are theirs, and are
// those of the last patch afterwards if `whole_picture`, which a picture that nothing follows does
// not need.
void paint_rows(const Sizes& s, Session& session, const std::vector<int64_t>& sequences,
                Floats& states, const Ids& seeds, double guidance, const Sampling& sampling,
                int64_t rows, int64_t columns, bool whole_picture, const Progress& progress,
                int64_t* ids) {
  const int64_t n = static_cast<int64_t>(seeds.size()), window = s.window();
  const int64_t copies = static_cast<int64_t>(sequences.size()) / n;
  const int64_t across = columns / s.fold_columns, patches = across * (rows / s.fold_rows);
  Ids drawn(static_cast<size_t>(n * window));
  Floats x(static_cast<size_t>(copies * n * s.dim));
  std::fill_n(ids, n * rows * columns, int64_t{-1});
  for (int64_t patch = 0; patch < patches; ++patch) {
    session.unfold(states.data(), n, copies, seeds, patch, guidance, sampling, drawn.data());
    const int64_t top = patch / across * s.fold_rows, left = patch % across * s.fold_columns;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < window; ++j) {
        ids[(i * rows + top + j / s.fold_columns) * columns + left + j % s.fold_columns] =
            drawn[i * window + j];
      }
    }
    if (progress && !progress(patch + 1, patches, ids)) throw Cancelled();
    if (patch + 1 == patches && !whole_picture) break;
    session.embed_windows(drawn, Ids(seeds.size(), patch), columns, x.data());
    for (int64_t c = 1; c < copies; ++c) std::copy_n(x.data(), n * s.dim, x.data() + c * n * s.dim);
    session.push(sequences, x.data(), true, states.data());
  }
}

}  // namespace

std::vector<Ids> Engine::generate_text(const Prompts& prompts, int64_t max_new_tokens,
                                       const Ids& stop_ids, const Sampling& sampling,
                                       const Ids& seeds,
                                       const std::function<bool(int64_t, int64_t)>& on_token) {
  const Sizes& s = weights.sizes;
  check_prompts(s, prompts, "prompts");
  check_seeds(prompts.ids.size(), seeds);
  check_sampling(sampling);
  const int64_t n = static_cast<int64_t>(prompts.ids.size());
  std::vector<Ids> out(prompts.ids.size());
  if (n == 0 || max_new_tokens < 1) return out;
  const int64_t longest = longest_of(prompts.ids);
  check_room(s, longest, max_new_tokens);
  Session session(weights, n, longest + max_new_tokens, n);
  const std::vector<int64_t> all = count_up(n);
  Floats states(static_cast<size_t>(n * s.dim)), logits(static_cast<size_t>(n * s.vocab));
  session.prefill(all, prompts, states.data());

  // Rows that go on, and their states and seeds, one after another.
  std::vector<int64_t> open = all;
  Ids open_seeds = seeds, ids(static_cast<size_t>(n));
  for (int64_t step = 0; step < max_new_tokens && !open.empty(); ++step) {
    const int64_t rows = static_cast<int64_t>(open.size());
    session.linear(weights.output, nullptr, rows, states.data(), s.dim, logits.data(), s.vocab);
    session.draw(logits.data(), nullptr, rows, s.vocab, open_seeds, step, 1.0, sampling,
                 ids.data());
    size_t left = 0;
    for (size_t r = 0; r < open.size(); ++r) {
      if (std::find(stop_ids.begin(), stop_ids.end(), ids[r]) != stop_ids.end()) continue;
      out[static_cast<size_t>(open[r])].push_back(ids[r]);
      if (on_token && !on_token(open[r], ids[r])) throw Cancelled();
      open[left] = open[r];
      open_seeds[left] = open_seeds[r];
      ids[left++] = ids[r];
    }
    open.resize(left);
    open_seeds.resize(left);
    if (left && step + 1 < max_new_tokens) session.push_ids(open, ids.data(), states.data());
  }
  return out;
}

void Engine::paint(const std::vector<Ids>& prompts, const Ids& unconditional, const Ids& seeds,
                   double guidance, const Sampling& sampling, int64_t rows, int64_t columns,
                   const Progress& progress, int64_t* ids) {
  const Sizes& s = weights.sizes;
  const int64_t n = static_cast<int64_t>(prompts.size());
  Prompts all{prompts, {}};
  const bool guided = !unconditional.empty();
  if (guided) all.ids.insert(all.ids.end(), prompts.size(), unconditional);
  check_prompts(s, all, "prompts");
  check_seeds(prompts.size(), seeds);
  check_sampling(sampling);
  check_grid(s, rows, columns);
  if (n == 0) return;
  const int64_t patches = rows / s.fold_rows * (columns / s.fold_columns);
  check_room(s, longest_of(all.ids), patches);
  const int64_t capacity = longest_of(all.ids) + patches;
  const std::vector<int64_t> sequences = count_up(static_cast<int64_t>(all.ids.size()));
  Session session(weights, static_cast<int64_t>(all.ids.size()), capacity,
                  static_cast<int64_t>(all.ids.size()));
  Floats states(all.ids.size() * static_cast<size_t>(s.dim));
  session.prefill(sequences, all, states.data());
  paint_rows(s, session, sequences, states, seeds, guidance, sampling, rows, columns, false,
             progress, ids);
}

std::vector<Segment> Engine::generate_interleaved(const Prompts& prompt, const Ids& unconditional,
                                                  int64_t max_new_tokens, const Ids& stop_ids,
                                                  int64_t seed, double guidance,
                                                  const Sampling& text, const Sampling& image,
                                                  const Progress& progress) {
  const Sizes& s = weights.sizes;
  check_prompts(s, prompt, "prompt");
  if (prompt.ids.size() != 1) refuse("engine: prompt must be one, got ", prompt.ids.size());
  check_sampling(text);
  check_sampling(image);
  const bool guided = !unconditional.empty();
  if (guided) check_prompts(s, {{unconditional}, {}}, "unconditional");
  const int64_t boi = s.vocab, eoi = s.vocab + 1, uncond = s.vocab + 2;
  const int64_t patches = s.grid_rows / s.fold_rows * (s.grid_columns / s.fold_columns);
  const int64_t length = static_cast<int64_t>(prompt.ids[0].size());
  if (max_new_tokens < 1) return {};
  check_room(s, length, max_new_tokens);
  // Each picture is followed by an <eoi> that is not counted.
  const int64_t more = max_new_tokens + max_new_tokens / (patches + 1) + 1;
  check_room(s, length, more);
  const int64_t capacity =
      std::max(length + more, static_cast<int64_t>(unconditional.size()) + patches);
  Session session(weights, guided ? 2 : 1, capacity, 2);
  Floats state(static_cast<size_t>(s.dim)), both(static_cast<size_t>(2 * s.dim));
  Floats logits(static_cast<size_t>(s.vocab + s.specials));
  session.prefill({0}, prompt, state.data());

  std::vector<Segment> out;
  Ids words;
  for (int64_t spent = 0; spent < max_new_tokens;) {
    session.text_logits(state.data(), 1, logits.data());
    // Never the model's to write here.
    logits[eoi] = logits[uncond] = -std::numeric_limits<float>::infinity();
    int64_t token = 0;
    session.draw(logits.data(), nullptr, 1, s.vocab + s.specials, {seed}, spent++, 1.0, text,
                 &token);
    const bool stop = std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end();
    if (stop || (token == boi && spent + patches > max_new_tokens)) break;
    session.push_ids({0}, &token, state.data());
    if (token != boi) {
      words.push_back(token);
      if (progress && !progress(spent, max_new_tokens, nullptr)) throw Cancelled();
      continue;
    }
    if (!words.empty()) out.push_back({std::move(words), {}});
    words.clear();
    std::vector<int64_t> sequences{0};
    std::copy(state.begin(), state.end(), both.begin());
    if (guided) {
      session.cache.lengths[1] = 0;
      sequences.push_back(1);
      session.prefill({1}, {{unconditional}, {}}, both.data() + s.dim);
    }
    Segment picture;
    picture.picture.resize(static_cast<size_t>(s.grid_rows * s.grid_columns));
    const Progress within = [&](int64_t done, int64_t, const int64_t* ids) {
      return !progress || progress(spent + done, max_new_tokens, ids);
    };
    // Each picture has draws of its own: the number of segments so far is part of its seed.
    paint_rows(s, session, sequences, both, {seed + static_cast<int64_t>(out.size())}, guidance,
               image, s.grid_rows, s.grid_columns, true, within, picture.picture.data());
    out.push_back(std::move(picture));
    session.push_ids({0}, &eoi, state.data());
    spent += patches;
  }
  if (!words.empty()) out.push_back({std::move(words), {}});
  return out;
}

void Engine::states(const Prompts& prompt, float* out) {
  const Sizes& s = weights.sizes;
  check_prompts(s, prompt, "prompt");
  check_room(s, longest_of(prompt.ids), 0);
  const int64_t n = static_cast<int64_t>(prompt.ids.size());
  Session session(weights, n, longest_of(prompt.ids), 1);
  session.prefill(count_up(n), prompt, nullptr, out);
}

void Engine::text_logits(const float* states, int64_t rows, float* out) {
  Session(weights, 1, 1, 1).text_logits(states, rows, out);
}

void Engine::head_logits(const float* states, const int64_t* ids, int64_t rows, float* out) {
  const Sizes& s = weights.sizes;
  const int64_t window = s.window();
  for (int64_t i = 0; i < rows * window; ++i) {
    if (ids[i] < 0 || ids[i] >= s.codebook) {
      refuse("engine: image ids must be in [0, ", s.codebook, "), got ", ids[i]);
    }
  }
  Session session(weights, 1, 1, kMostRows);
  Floats x, logits;
  for (int64_t begin = 0; begin < rows; begin += kMostRows) {
    const int64_t n = std::min(kMostRows, rows - begin);
    x.resize(static_cast<size_t>(n * s.dim));
    logits.resize(static_cast<size_t>(n * s.codebook));
    for (int64_t j = 0; j < window; ++j) {
      session.head_input(states + begin * s.dim, ids + begin * window, n, n, j, x.data());
      session.head_step(x.data(), n, j, logits.data());
      for (int64_t r = 0; r < n; ++r) {
        std::copy_n(logits.data() + r * s.codebook, s.codebook,
                    out + ((begin + r) * window + j) * s.codebook);
      }
    }
  }
}

}  // namespace synergen::engine
