// unfold_head on the CPU: every position of the head's sequence in turn, all rows together. Each
// matrix is read once a position, block by block; a block of 64 rows of bfloat16 stays in the
// second-level cache while the rows of the batch pass, 8 at a time. Everything between matrices is
// float (double for double).
#include <cmath>

#include "common/dispatch.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

template <class T>
class UnfoldHead {
  using A = Acc<T>;
  using V = VecOf<T>;
  static constexpr int64_t N = V::N;
  static constexpr int64_t kBlock = 64;  // columns of a task

 public:
  explicit UnfoldHead(const UnfoldHeadParams& p)
      : p_(p),
        queries_(p.heads * p.head_dim),
        keys_(p.kv_heads * p.head_dim),
        dim_(round_up(p.dim, N)),
        head_(round_up(p.head_dim, N)),
        mixed_step_(round_up(queries_, N)),
        hidden_step_(round_up(p.hidden, N)),
        x_(p.rows * dim_),
        normed_(p.rows * dim_),
        q_(p.rows * queries_),
        k_(p.rows * keys_),
        v_(p.rows * keys_),
        mixed_(p.rows * mixed_step_),
        gate_(p.rows * hidden_step_),
        up_(p.rows * hidden_step_),
        added_(p.rows * p.dim),
        logits_(p.rows * p.vocab),
        cache_(2 * p.layers * p.rows * p.kv_heads * p.window * head_),
        cosines_(p.window * p.head_dim),
        sines_(p.window * p.head_dim) {
    fill_zero(normed_.data(), p.rows * dim_);  // past the end of a row as well
    fill_zero(mixed_.data(), p.rows * mixed_step_);
    fill_zero(gate_.data(), p.rows * hidden_step_);
    fill_zero(cache_.data(), 2 * p.layers * p.rows * p.kv_heads * p.window * head_);
    for (int64_t j = 0; j < p.window; ++j) {
      for (int64_t i = 0; i < p.head_dim / 2; ++i) {
        const double share = static_cast<double>(2 * i) / static_cast<double>(p.head_dim);
        const double angle = static_cast<double>(j) * std::pow(p.theta, -share);
        cosines_[j * p.head_dim + i] = static_cast<A>(std::cos(angle));
        sines_[j * p.head_dim + i] = static_cast<A>(std::sin(angle));
      }
    }
  }

  void run() {
    for (int64_t n = 0; n < p_.pictures; ++n) p_.valid[n] = true;
    for (int64_t j = 0; j < p_.window; ++j) {
      embed(j);
      for (int64_t l = 0; l < p_.layers; ++l) {
        const UnfoldHeadLayer& w = p_.layer[l];
        norm(w.attention_norm);
        linear(normed_.data(), dim_, p_.dim, w.q, w.q_bias, queries_, q_.data(), queries_);
        linear(normed_.data(), dim_, p_.dim, w.k, w.k_bias, keys_, k_.data(), keys_);
        linear(normed_.data(), dim_, p_.dim, w.v, w.v_bias, keys_, v_.data(), keys_);
        attend(l, j);
        linear(mixed_.data(), mixed_step_, queries_, w.o, nullptr, p_.dim, added_.data(), p_.dim);
        add();
        norm(w.ffn_norm);
        linear(normed_.data(), dim_, p_.dim, w.gate, nullptr, p_.hidden, gate_.data(),
               hidden_step_);
        linear(normed_.data(), dim_, p_.dim, w.up, nullptr, p_.hidden, up_.data(), hidden_step_);
        swiglu();
        linear(gate_.data(), hidden_step_, p_.hidden, w.down, nullptr, p_.dim, added_.data(),
               p_.dim);
        add();
      }
      norm(p_.norm);
      linear(normed_.data(), dim_, p_.dim, p_.classifier, nullptr, p_.vocab, logits_.data(),
             p_.vocab);
      sample(j);
    }
  }

 private:
  void embed(int64_t j) {
    Scratch<A> position(dim_);
    load_row(static_cast<const T*>(p_.positions) + j * p_.dim, 1, p_.dim, position.data());
    for (int64_t r = 0; r < p_.rows; ++r) {
      A* x = x_.data() + r * dim_;
      if (j == 0) {
        const T* state = static_cast<const T*>(p_.states) + r * p_.states_strides[0];
        load_row(state, p_.states_strides[1], p_.dim, x);
      } else {
        const int64_t id = p_.ids[r % p_.pictures * p_.window + j - 1];
        load_row(static_cast<const T*>(p_.tokens) + id * p_.dim, 1, p_.dim, x);
      }
      for (int64_t i = 0; i < p_.dim; ++i) x[i] += position[i];
    }
  }

  void norm(const void* weight) {
    Scratch<A> w(dim_);
    load_row(static_cast<const T*>(weight), 1, p_.dim, w.data());
    for (int64_t r = 0; r < p_.rows; ++r) {
      const A* x = x_.data() + r * dim_;
      A* y = normed_.data() + r * dim_;
      V square;
      int64_t i = 0;
      for (; i + N <= p_.dim; i += N) square = fma(V::load(x + i), V::load(x + i), square);
      A sum = square.sum();
      for (; i < p_.dim; ++i) sum += x[i] * x[i];
      const A scale = 1 / std::sqrt(sum / static_cast<A>(p_.dim) + static_cast<A>(p_.eps));
      for (i = 0; i < p_.dim; ++i) y[i] = x[i] * scale * w[i];
    }
  }

  // out[r][n] = sum_k x[r][k] * weight[n][k] + bias[n]. Rows of x are padded with zeros.
  void linear(const A* x, int64_t x_step, int64_t depth, const void* weight, const void* bias,
              int64_t columns, A* out, int64_t out_step) const {
    const T* w = static_cast<const T*>(weight);
    // A task of 64 x 2048 products is 10 us: no need for fewer and larger ones.
    parallel_for(ceil_div(columns, kBlock), ceil_div(16384, depth * kBlock + 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t block = begin; block < end; ++block) {
                     const int64_t from = block * kBlock;
                     const int64_t n = columns - from < kBlock ? columns - from : kBlock;
                     for (int64_t r = 0; r < p_.rows;) {
                       r += some_rows(p_.rows - r, x + r * x_step, x_step, w + from * depth, n,
                                      depth, out + r * out_step + from, out_step);
                     }
                     if (bias)
                       add_bias(static_cast<const T*>(bias) + from, n, out + from, out_step);
                   }
                 });
  }
  int64_t some_rows(int64_t left, const A* x, int64_t x_step, const T* w, int64_t n, int64_t depth,
                    A* out, int64_t out_step) const {
    if (left >= 8) return dot_rows<8, A, T>(x, x_step, w, depth, n, depth, out, out_step), 8;
    if (left >= 4) return dot_rows<4, A, T>(x, x_step, w, depth, n, depth, out, out_step), 4;
    if (left >= 2) return dot_rows<2, A, T>(x, x_step, w, depth, n, depth, out, out_step), 2;
    return dot_rows<1, A, T>(x, x_step, w, depth, n, depth, out, out_step), 1;
  }
  void add_bias(const T* bias, int64_t n, A* out, int64_t out_step) const {
    for (int64_t r = 0; r < p_.rows; ++r) {
      for (int64_t i = 0; i < n; ++i) out[r * out_step + i] += static_cast<A>(to_float(bias[i]));
    }
  }

  void rotate(A* x, int64_t j) const {
    const A *c = cosines_.data() + j * p_.head_dim, *s = sines_.data() + j * p_.head_dim;
    const int64_t half = p_.head_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
      const A a = x[i], b = x[half + i];
      x[i] = a * c[i] - b * s[i];
      x[half + i] = b * c[i] + a * s[i];
    }
  }

  // Positions 0 .. j of a row's keys or values of one head, `head_` apart.
  A* cached(int64_t values, int64_t layer, int64_t row, int64_t kv_head) const {
    const int64_t at = ((values * p_.layers + layer) * p_.rows + row) * p_.kv_heads + kv_head;
    return cache_.data() + at * p_.window * head_;
  }

  void attend(int64_t layer, int64_t j) {
    parallel_for(p_.rows, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> query(head_), weights(p_.window), sum(head_);
      fill_zero(query.data(), head_);
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t h = 0; h < p_.kv_heads; ++h) {
          A* key = cached(0, layer, r, h) + j * head_;
          std::memcpy(key, k_.data() + r * keys_ + h * p_.head_dim, p_.head_dim * sizeof(A));
          rotate(key, j);
          std::memcpy(cached(1, layer, r, h) + j * head_, v_.data() + r * keys_ + h * p_.head_dim,
                      p_.head_dim * sizeof(A));
        }
        for (int64_t h = 0; h < p_.heads; ++h) {
          const int64_t kv = h / (p_.heads / p_.kv_heads);
          std::memcpy(query.data(), q_.data() + r * queries_ + h * p_.head_dim,
                      p_.head_dim * sizeof(A));
          rotate(query.data(), j);
          mix(query.data(), cached(0, layer, r, kv), cached(1, layer, r, kv), j + 1, weights.data(),
              sum.data());
          std::memcpy(mixed_.data() + r * mixed_step_ + h * p_.head_dim, sum.data(),
                      p_.head_dim * sizeof(A));
        }
      }
    });
  }

  // out = softmax(query keys / sqrt(head_dim)) values over `count` positions.
  void mix(const A* query, const A* keys, const A* values, int64_t count, A* weights,
           A* out) const {
    const A scale = 1 / std::sqrt(static_cast<A>(p_.head_dim));
    A most = 0, total = 0;
    for (int64_t i = 0; i < count; ++i) {
      V sum;
      for (int64_t e = 0; e < head_; e += N) {
        sum = fma(V::load(query + e), V::load(keys + i * head_ + e), sum);
      }
      weights[i] = sum.sum() * scale;
      most = i == 0 || weights[i] > most ? weights[i] : most;
    }
    for (int64_t i = 0; i < count; ++i) total += weights[i] = std::exp(weights[i] - most);
    for (int64_t e = 0; e < head_; e += N) {
      V sum;
      for (int64_t i = 0; i < count; ++i) {
        sum = fma(V(weights[i] / total), V::load(values + i * head_ + e), sum);
      }
      sum.store(out + e);
    }
  }

  void add() {
    for (int64_t r = 0; r < p_.rows; ++r) {
      for (int64_t i = 0; i < p_.dim; ++i) x_[r * dim_ + i] += added_[r * p_.dim + i];
    }
  }

  // gate = silu(gate) * up. Past the end of a row gate stays zero, as silu(0) is, and up is not
  // looked at.
  void swiglu() {
    for (int64_t r = 0; r < p_.rows; ++r) {
      A *gate = gate_.data() + r * hidden_step_, *up = up_.data() + r * hidden_step_;
      for (int64_t i = 0; i < p_.hidden; i += N) {
        const int64_t n = p_.hidden - i < N ? p_.hidden - i : N;
        const V g = load_part<V>(gate + i, n);
        store_part(g * sigmoid(g) * load_part<V>(up + i, n), gate + i, n);
      }
    }
  }

  void sample(int64_t j) {
    Scratch<int64_t> position(p_.pictures), ids(p_.pictures);
    Scratch<bool> valid(p_.pictures);
    for (int64_t n = 0; n < p_.pictures; ++n) position[n] = p_.position.at(n, int64_t{0}) + j;
    SampleTokensParams s{};
    s.dtype = std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;
    s.rows = p_.pictures;
    s.vocab = p_.vocab;
    s.logits = logits_.data();
    s.logits_strides[0] = p_.vocab;
    s.logits_strides[1] = 1;
    if (p_.rows > p_.pictures) {
      s.uncond = logits_.data() + p_.pictures * p_.vocab;
      s.uncond_strides[0] = p_.vocab;
      s.uncond_strides[1] = 1;
    }
    s.seed = p_.seed;
    s.position = {position.data(), 1};
    s.top_k = p_.top_k;
    s.guidance = p_.guidance;
    s.temperature = p_.temperature;
    s.top_p = p_.top_p;
    s.ids = ids.data();
    s.valid = valid.data();
    sample_tokens(s);
    for (int64_t n = 0; n < p_.pictures; ++n) {
      p_.ids[n * p_.window + j] = ids[n];
      p_.valid[n] = p_.valid[n] && valid[n];
    }
  }

  const UnfoldHeadParams& p_;
  const int64_t queries_, keys_;                         // columns
  const int64_t dim_, head_, mixed_step_, hidden_step_;  // whole vectors
  Scratch<A> x_, normed_, q_, k_, v_, mixed_, gate_, up_, added_, logits_;
  Scratch<A> cache_;  // [keys and values, layers, rows, kv_heads, window, head_]
  Scratch<A> cosines_, sines_;
};

}  // namespace

void unfold_head(const UnfoldHeadParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { UnfoldHead<typename decltype(tag)::type>(p).run(); });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
