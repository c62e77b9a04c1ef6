// decode_attention on the CPU: a thread takes a row and a key-value head, and answers all its query
// heads from one pass over the keys, 64 at a time. Keys and values are read where they lie, once.
#include <cmath>

#include "common/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

// Keys between two looks at the running maximum: their logits are 256 bytes a query head.
constexpr int64_t kTile = 64;

// Multiplications a thread takes at least: below that, waking it costs more than the work.
constexpr int64_t kGrain = 16384;

// sum of a[i] * row[i], row in any storage
template <class A, class T>
A dot(const A* a, const T* row, int64_t n) {
  using V = VecOf<A>;
  V s0, s1;
  int64_t i = 0;
  for (; i + 2 * V::N <= n; i += 2 * V::N) {
    s0 = fma(V::load(a + i), V::load(row + i), s0);
    s1 = fma(V::load(a + i + V::N), V::load(row + i + V::N), s1);
  }
  A sum = (s0 + s1).sum();
  for (; i < n; ++i) sum += a[i] * static_cast<A>(to_float(row[i]));
  return sum;
}

// out[i] += a * row[i]
template <class A, class T>
void add_scaled(A a, const T* row, int64_t n, A* out) {
  using V = VecOf<A>;
  int64_t i = 0;
  for (; i + V::N <= n; i += V::N) {
    fma(V(a), V::load(row + i), V::load(out + i)).store(out + i);
  }
  for (; i < n; ++i) out[i] += a * static_cast<A>(to_float(row[i]));
}

// One key-value head of one row: its query heads, and what they have summed so far.
template <class T>
class Group {
  using A = Acc<T>;
  using V = VecOf<T>;

 public:
  explicit Group(const DecodeAttentionParams& p)
      : p_(p),
        queries_(p.heads / p.kv_heads),
        q_(queries_ * p.dim),
        out_(queries_ * p.dim),
        weights_(queries_ * kTile),
        peak_(queries_),
        total_(queries_),
        row_(p.dim) {}

  void answer(int64_t row, int64_t kv_head) {
    const T* q = static_cast<const T*>(p_.q) + row * p_.q_strides[0];
    for (int64_t g = 0; g < queries_; ++g) {
      load_row(q + (kv_head * queries_ + g) * p_.q_strides[1], p_.q_strides[2], p_.dim,
               q_.data() + g * p_.dim);
      for (int64_t i = 0; i < p_.dim; ++i) out_[g * p_.dim + i] = 0;
      peak_[g] = -INFINITY;
      total_[g] = 0;
    }
    const int64_t end = p_.lengths.at(row, 0);
    for (int64_t key = p_.starts.at(row, 0); key < end; key += kTile) {
      const int64_t n = key + kTile < end ? kTile : end - key;
      for_rows(p_.k, p_.k_strides, row, kv_head, key, n, [&](int64_t j, const auto* k) {
        for (int64_t g = 0; g < queries_; ++g) {
          weights_[g * kTile + j] =
              dot(q_.data() + g * p_.dim, k, p_.dim) * static_cast<A>(p_.scale);
        }
      });
      for (int64_t g = 0; g < queries_; ++g) weigh(g, n);
      for_rows(p_.v, p_.v_strides, row, kv_head, key, n, [&](int64_t j, const auto* v) {
        for (int64_t g = 0; g < queries_; ++g) {
          add_scaled(weights_[g * kTile + j], v, p_.dim, out_.data() + g * p_.dim);
        }
      });
    }
    T* out = static_cast<T*>(p_.out) + (row * p_.heads + kv_head * queries_) * p_.dim;
    for (int64_t g = 0; g < queries_; ++g) {
      A* sums = out_.data() + g * p_.dim;
      if (total_[g] != 0) {
        for (int64_t i = 0; i < p_.dim; ++i) sums[i] /= total_[g];
      }
      store_row(sums, p_.dim, out + g * p_.dim);
    }
  }

 private:
  // f(j, row) for the keys or values of n places; strided ones are gathered first.
  template <class F>
  void for_rows(const void* base, const int64_t* strides, int64_t row, int64_t kv_head, int64_t key,
                int64_t n, const F& f) {
    const T* first = static_cast<const T*>(base) + row * strides[0] + kv_head * strides[2];
    for (int64_t j = 0; j < n; ++j) {
      const T* at = first + (key + j) * strides[1];
      if (strides[3] == 1) {
        f(j, at);
      } else {
        load_row(at, strides[3], p_.dim, row_.data());
        f(j, row_.data());
      }
    }
  }

  // n logits -> e^(logit - peak); what was summed under a lower peak shrinks.
  void weigh(int64_t g, int64_t n) {
    A* w = weights_.data() + g * kTile;
    A peak = peak_[g];
    for (int64_t j = 0; j < n; ++j) peak = w[j] > peak ? w[j] : peak;
    const A shrink = std::exp(peak_[g] - peak);
    if (shrink != 1) {
      for (int64_t i = 0; i < p_.dim; ++i) out_[g * p_.dim + i] *= shrink;
    }
    for (int64_t j = n; j % V::N != 0; ++j) w[j] = 0;
    for (int64_t j = 0; j < n; j += V::N) exp(V::load(w + j) - V(peak)).store(w + j);
    A sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += w[j];
    total_[g] = total_[g] * shrink + sum;
    peak_[g] = peak;
  }

  const DecodeAttentionParams& p_;
  const int64_t queries_;
  Scratch<A> q_, out_, weights_, peak_, total_, row_;
};

template <class T>
void decode(const DecodeAttentionParams& p) {
  const int64_t work = ceil_div(p.keys * p.dim * p.heads, p.kv_heads) + 1;
  parallel_for(p.batch * p.kv_heads, ceil_div(kGrain, work), [&](int64_t begin, int64_t end) {
    Group<T> group(p);
    for (int64_t i = begin; i < end; ++i) group.answer(i / p.kv_heads, i % p.kv_heads);
  });
}

}  // namespace

void decode_attention(const DecodeAttentionParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { decode<typename decltype(tag)::type>(p); });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
