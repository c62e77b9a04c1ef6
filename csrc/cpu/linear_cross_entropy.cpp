// linear_cross_entropy on the CPU: blocks of logits are summed as they are made. A task takes 192
// rows and a group of columns, and keeps the largest logit of each row and the sum of
// exp(logit - largest); groups are joined in order afterwards. Memory: 8 bytes a row and group, and
// what a worker holds (see Logits).
#include "cpu/linear_cross_entropy.h"

#include <cmath>
#include <limits>

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

template <class A>
class Forward {
  using V = VecOf<A>;
  using Block = Logits<A>;
  static constexpr int64_t kTall = Block::kRowsAtOnce, kWide = Block::kColumnsAtOnce;
  // Columns of a task. Packing its rows anew for each group costs a few thousandths; 21 groups make
  // the tasks of one row chunk of the largest vocabulary enough for as many threads.
  static constexpr int64_t kGroup = 48 * kWide;

 public:
  explicit Forward(const LinearCrossEntropyParams& p)
      : p_(p),
        counted_(p),
        logits_(p, counted_),
        rows_(counted_.count),
        groups_(ceil_div(p.vocab, kGroup)),
        largest_(groups_ * rows_),
        sums_(groups_ * rows_),
        wanted_(rows_) {}

  void run() const {
    const int64_t chunks = ceil_div(rows_, kTall), tasks = chunks * groups_;
    parallel_tasks(tasks, [&](const auto& claim) {
      typename Block::Work work(logits_);
      for (int64_t task; (task = claim()) < tasks;) {
        sum_group(task % chunks * kTall, task / chunks, work);
      }
    });
    join();
  }

 private:
  void sum_group(int64_t row, int64_t group, typename Block::Work& work) const {
    const int64_t rows = rows_ - row < kTall ? rows_ - row : kTall;
    alignas(64) A largest[kTall], sum[kTall];
    for (int64_t i = 0; i < kTall; ++i) {
      largest[i] = std::numeric_limits<A>::lowest();  // -infinity minus it is not NaN
      sum[i] = 0;
    }
    logits_.take_rows(work, row, rows);
    const int64_t end = (group + 1) * kGroup < p_.vocab ? (group + 1) * kGroup : p_.vocab;
    for (int64_t from = group * kGroup; from < end; from += kWide) {
      const int64_t columns = end - from < kWide ? end - from : kWide;
      logits_.each_vector(work, from, columns, [&](int64_t lane, const A* logits) {
        const V before = V::load(largest + lane);
        V most = before;
        for (int64_t m = 0; m < columns; ++m) {
          most = max(most, V::load(logits + m * kLanes<A>));
        }
        V part;  // apart from the sum before: a chain of thousands would round too often
        for (int64_t m = 0; m < columns; ++m) {
          part = part + exp(V::load(logits + m * kLanes<A>) - most);
        }
        most.store(largest + lane);
        fma(V::load(sum + lane), exp(before - most), part).store(sum + lane);
        for (int64_t i = lane; i < lane + V::N && i < rows; ++i) {
          const int64_t m = counted_.targets[row + i] - from;
          if (m >= 0 && m < columns) wanted_[row + i] = logits[m * kLanes<A> + i - lane];
        }
      });
    }
    std::memcpy(largest_.data() + group * rows_ + row, largest, rows * sizeof(A));
    std::memcpy(sums_.data() + group * rows_ + row, sum, rows * sizeof(A));
  }

  void join() const {
    A* loss = static_cast<A*>(p_.loss);
    fill_zero(loss, p_.rows);
    fill_zero(p_.lse, p_.rows);
    parallel_for(rows_, ceil_div(8192, groups_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        A most = largest_[i], total = 0;
        for (int64_t g = 1; g < groups_; ++g) {
          most = largest_[g * rows_ + i] > most ? largest_[g * rows_ + i] : most;
        }
        for (int64_t g = 0; g < groups_; ++g) {
          total += sums_[g * rows_ + i] * std::exp(largest_[g * rows_ + i] - most);
        }
        const double lse = most + std::log(static_cast<double>(total));
        p_.lse[counted_.index[i]] = lse;
        loss[counted_.index[i]] = static_cast<A>(lse - wanted_[i]);
      }
    });
  }

  const LinearCrossEntropyParams& p_;
  const CountedRows counted_;
  const Block logits_;
  const int64_t rows_, groups_;
  Scratch<A> largest_, sums_;  // [groups, rows]
  Scratch<A> wanted_;          // [rows]: the target's logit
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyParams& p) {
  if (p.dtype == DType::kFloat64) {
    Forward<double>(p).run();
  } else {
    Forward<float>(p).run();
  }
}

}  // namespace synergen::cpu::SYNERGEN_ISA
