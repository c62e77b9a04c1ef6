// prefill_attention on the CPU: a task takes a key-value head and a block of queries, all heads of
// which share it, and passes over the keys 64 at a time, with a running maximum. Both products are
// those of gemm.h. A row meets its keys in the same tiles and the same order whatever rows stand
// beside it.
#include <cmath>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "engine/params.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

constexpr int64_t kKeys = 64;  // of a tile: packed keys and values of 128 numbers are 64 KB
constexpr int64_t kMost = 96;  // rows of a block, a row being a query and a head
constexpr int64_t kLane = kLanes<float>;

class Block {
 public:
  explicit Block(const PrefillAttentionParams& p)
      : p_(p),
        group_(p.heads / p.kv_heads),
        queries_(kMost / group_ > 0 ? kMost / group_ : 1),
        rows_(round_up(queries_ * group_, kRows)),
        panels_(ceil_div(p.dim, kLane)),
        depths_(ceil_div(p.dim, kDepth)),
        q_(depths_ * rows_ * kDepth),
        weights_(rows_ * kDepth),
        packed_(round_up(p.dim, kDepth) * round_up(kKeys, kLane) + panels_ * kLane * kDepth),
        scores_(round_up(kKeys, kLane) * rows_),
        sums_(panels_ * kLane * rows_),
        peak_(rows_),
        total_(rows_) {}

  int64_t queries() const { return queries_; }

  // Queries from .. from + n of one key-value head.
  void answer(int64_t kv_head, int64_t from, int64_t n) {
    const int64_t rows = n * group_, blocks = ceil_div(rows, kRows), dim = p_.dim;
    const int64_t step = (p_.heads + 2 * p_.kv_heads) * dim;
    const float* base = p_.q + from * step + kv_head * group_ * dim;
    fill_zero(q_.data(), depths_ * rows_ * kDepth);
    for (int64_t r = 0; r < rows; ++r) {
      const float* from_row = base + r / group_ * step + r % group_ * dim;
      for (int64_t d = 0; d < dim; ++d) {
        q_[(d / kDepth * rows_ + r) * kDepth + d % kDepth] = from_row[d] * p_.scale;
      }
    }
    fill_zero(sums_.data(), panels_ * kLane * rows_);
    for (int64_t r = 0; r < rows_; ++r) {
      peak_[r] = -INFINITY;
      total_[r] = 0;
    }
    const int64_t keys = p_.first + from + n;  // the last query sees so many
    for (int64_t key = 0; key < keys; key += kKeys) {
      const int64_t count = keys - key < kKeys ? keys - key : kKeys;
      score(kv_head, key, count, blocks);
      for (int64_t r = 0; r < blocks * kRows; ++r) {
        const int64_t seen = r < rows ? p_.first + from + r / group_ + 1 - key : 0;
        weigh(r, seen < count ? seen : count, count, blocks);
      }
      add_values(kv_head, key, count, blocks);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* out = p_.out + ((from + r / group_) * p_.heads + kv_head * group_ + r % group_) * dim;
      for (int64_t d = 0; d < dim; ++d) {
        out[d] = sums_[(d / kLane * blocks * kRows + r) * kLane + d % kLane] / total_[r];
      }
    }
  }

 private:
  RowsOf rows_of(const float* data, int64_t kv_head) const {
    return {DType::kFloat32, data + kv_head * p_.dim, p_.kv_heads * p_.dim, 1};
  }

  // scores_[panel of keys][row][kLane] = q . k
  void score(int64_t kv_head, int64_t key, int64_t count, int64_t blocks) {
    const RowsOf keys = rows_of(p_.keys, kv_head);
    const int64_t step = round_up(p_.dim, kDepth) * kLane;
    for (int64_t done = 0; done < count; done += kLane) {
      const int64_t n = count - done < kLane ? count - done : kLane;
      pack_panel(keys, key + done, n, p_.dim, packed_.data() + done / kLane * step);
    }
    multiply<Order::kByRow>(
        p_.dim, blocks, count, step, false,
        [&](int64_t k0, int64_t) { return packed_.data() + k0 * kLane; },
        [&](int64_t k0, int64_t, int64_t block) {
          return q_.data() + (k0 / kDepth * rows_ + block * kRows) * kDepth;
        },
        NothingAhead(), scores_.data());
  }

  // Row r's weights e^(score - peak) of its first `seen` keys, 0 for the others; what was summed
  // under a lower peak shrinks.
  void weigh(int64_t r, int64_t seen, int64_t count, int64_t blocks) {
    using V = VecF;
    float* w = weights_.data() + r * kDepth;
    for (int64_t j = 0; j < count; ++j) {
      w[j] = j < seen ? scores_[(j / kLane * blocks * kRows + r) * kLane + j % kLane] : -INFINITY;
    }
    if (seen <= 0) {
      for (int64_t j = 0; j < count; ++j) w[j] = 0;
      return;
    }
    for (int64_t j = count; j % V::N != 0; ++j) w[j] = -INFINITY;
    float peak = peak_[r];
    for (int64_t j = 0; j < seen; ++j) peak = w[j] > peak ? w[j] : peak;
    const float shrink = std::exp(peak_[r] - peak);
    if (shrink != 1) {
      for (int64_t panel = 0; panel < panels_; ++panel) {
        float* sums = sums_.data() + (panel * blocks * kRows + r) * kLane;
        for (int64_t i = 0; i < kLane; ++i) sums[i] *= shrink;
      }
    }
    float sum = 0;
    for (int64_t j = 0; j < count; j += V::N) {
      const V e = exp(V::load(w + j) - V(peak));
      e.store(w + j);
    }
    for (int64_t j = 0; j < seen; ++j) sum += w[j];
    total_[r] = total_[r] * shrink + sum;
    peak_[r] = peak;
  }

  // sums_[panel of dim][row][kLane] += weights v
  void add_values(int64_t kv_head, int64_t key, int64_t count, int64_t blocks) {
    const RowsOf values = rows_of(p_.values, kv_head);
    for (int64_t d = 0; d < p_.dim; d += kMostPacked / kLane * kLane) {
      const int64_t left = p_.dim - d, most = kMostPacked / kLane * kLane;
      pack_lanes(values, key, count, 0, count, d, left < most ? left : most,
                 packed_.data() + d * kDepth);
    }
    multiply<Order::kByRow>(
        count, blocks, p_.dim, kDepth * kLane, true,
        [&](int64_t, int64_t) { return packed_.data(); },
        [&](int64_t, int64_t, int64_t block) { return weights_.data() + block * kRows * kDepth; },
        NothingAhead(), sums_.data());
  }

  const PrefillAttentionParams& p_;
  const int64_t group_, queries_, rows_, panels_, depths_;
  Scratch<float> q_, weights_, packed_, scores_, sums_, peak_, total_;
};

}  // namespace

void prefill_attention(const PrefillAttentionParams& p) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t queries = kMost / group > 0 ? kMost / group : 1;
  const int64_t blocks = ceil_div(p.rows, queries);
  // Later queries see more keys: tasks are taken one by one, the longest first.
  parallel_tasks(blocks * p.kv_heads, [&](const auto& claim) {
    Block block(p);
    for (int64_t task; (task = claim()) < blocks * p.kv_heads;) {
      const int64_t from = (blocks - 1 - task / p.kv_heads) * queries;
      const int64_t left = p.rows - from;
      block.answer(task % p.kv_heads, from, left < queries ? left : queries);
    }
  });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
