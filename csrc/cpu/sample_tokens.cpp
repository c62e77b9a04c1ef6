// sample_tokens on the CPU: one row at a time, no sort. Probabilities are integers: the mass of a
// token is exp((l - max) / T) in units of 2^-bits, computed in double. Integer sums have no
// rounding and no order, so a draw depends on nothing but its row, and thresholds hold exactly.
//
// This file is compiled without fused multiply-add, and writes none: every instruction set gives
// the same bits.
#include <limits>

#include "common/philox.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vec_math.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

template <class A>
using KeyOf = std::conditional_t<std::is_same_v<A, double>, uint64_t, uint32_t>;

// Unsigned integers in the order of the numbers; -0 and 0 are one.
template <class A>
inline KeyOf<A> key_of(A x) {
  using Key = KeyOf<A>;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  x += A(0);
  Key bits;
  std::memcpy(&bits, &x, sizeof(Key));
  return bits & kSign ? ~bits : bits | kSign;
}

// Tokens still in the race, in ascending order of id.
template <class A>
struct Survivors {
  int64_t count = 0;
  Scratch<int64_t> ids;
  Scratch<A> logits;
  Scratch<uint64_t> mass;
  explicit Survivors(int64_t n) : ids(n), logits(n), mass(n + VecD::N) {}
};

template <class A>
class Row {
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();

 public:
  explicit Row(const SampleTokensParams& p)
      : p_(p), logits_(p.vocab), uncond_(p.uncond ? p.vocab : 0), left_(p.vocab) {
    // vocab * 2^bits <= 2^62
    while (bits_ > 0 && p.vocab > int64_t{1} << (62 - bits_)) --bits_;
  }

  // The id of row r, or -1 where there is nothing to choose from.
  int64_t draw(int64_t r) {
    if (!load(r)) return -1;
    const double temperature = p_.temperature.at(r, 1.0);
    if (temperature == 0) return argmax();
    collect();
    const int64_t k = p_.top_k.at(r, int64_t{0});
    if (k > 0 && k < left_.count) keep(false, static_cast<uint64_t>(k));
    weigh(temperature);
    const double top_p = p_.top_p.at(r, 1.0);
    if (top_p < 1) {
      const uint64_t total = total_mass();
      const double wanted = std::ceil(top_p * static_cast<double>(total));
      const uint64_t target = wanted < 1 ? 1 : static_cast<uint64_t>(wanted);
      keep(true, target < total ? target : total);
    }
    return invert(philox_word(p_.seed.at(r, int64_t{0}), p_.position.at(r, int64_t{0})));
  }

 private:
  // logits_ = the guided logits of row r, most_ the largest; false for NaN, for +infinity, or
  // without a finite one.
  bool load(int64_t r) {
    const int64_t n = p_.vocab;
    A* l = logits_.data();
    load_row(p_.dtype, row_of(p_.logits, p_.logits_strides, r), p_.logits_strides[1], n, l);
    bool good = true;
    A most = -kInfinity;
    if (p_.uncond) {
      A* u = uncond_.data();
      load_row(p_.dtype, row_of(p_.uncond, p_.uncond_strides, r), p_.uncond_strides[1], n, u);
      const A scale = static_cast<A>(p_.guidance.at(r, 1.0));
      for (int64_t i = 0; i < n; ++i) {
        const A c = l[i], b = u[i];
        good &= (c == c) & (b == b);
        const A mixed = scale == A(1) ? c : b + scale * (c - b);
        l[i] = (c == -kInfinity) | (b == -kInfinity) ? -kInfinity : mixed;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      good &= l[i] < kInfinity;
      most = l[i] > most ? l[i] : most;
    }
    most_ = most;
    return good && most > -kInfinity;
  }
  const char* row_of(const void* base, const int64_t (&strides)[2], int64_t r) const {
    const int64_t size = p_.dtype == DType::kFloat64 ? 8 : p_.dtype == DType::kFloat32 ? 4 : 2;
    return static_cast<const char*>(base) + r * strides[0] * size;
  }

  int64_t argmax() const {
    int64_t i = 0;
    while (logits_[i] != most_) ++i;
    return i;
  }

  void collect() {
    int64_t count = 0;
    for (int64_t i = 0; i < p_.vocab; ++i) {
      left_.ids[count] = i;
      left_.logits[count] = logits_[i];
      count += logits_[i] > -kInfinity;
    }
    left_.count = count;
  }

  // Keeps the shortest prefix, in the order of falling logits and rising ids, whose weight reaches
  // the target (at most the weight of all). The weight of a token is its mass, or 1. Radix select,
  // 11 bits a pass.
  void keep(bool by_mass, uint64_t target) {
    using Key = KeyOf<A>;
    constexpr int kBits = 8 * sizeof(Key);
    Key prefix = 0, mask = 0;
    uint64_t above = 0;  // weight of all keys above the prefix
    for (int shift = kBits; shift > 0;) {
      const int width = shift < 11 ? shift : 11;
      shift -= width;
      const Key digits = (Key{1} << width) - 1;
      std::memset(histogram_, 0, sizeof(histogram_));
      for (int64_t i = 0; i < left_.count; ++i) {
        const Key key = key_of(left_.logits[i]);
        if ((key & mask) == prefix)
          histogram_[(key >> shift) & digits] += by_mass ? left_.mass[i] : 1;
      }
      Key digit = digits;
      while (above + histogram_[digit] < target) above += histogram_[digit--];
      prefix |= digit << shift;
      mask |= digits << shift;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < left_.count; ++i) {
      const Key key = key_of(left_.logits[i]);
      bool stays = key > prefix;
      if (key == prefix && above < target) {
        stays = true;
        above += by_mass ? left_.mass[i] : 1;
      }
      left_.ids[count] = left_.ids[i];
      left_.logits[count] = left_.logits[i];
      if (by_mass) left_.mass[count] = left_.mass[i];
      count += stays;
    }
    left_.count = count;
  }

  // mass = exp((l - max) / T) * 2^bits, rounded to an integer by adding 2^52.
  void weigh(double temperature) {
    using V = VecD;
    constexpr double kInteger = 0x1p52;
    const V most(static_cast<double>(most_)), scale(std::ldexp(1.0, bits_)), t(temperature),
        integer(kInteger);
    uint64_t* mass = left_.mass.data();
    for (int64_t i = 0; i < left_.count; i += V::N) {
      const int64_t n = left_.count - i < V::N ? left_.count - i : V::N;
      const V l =
          n == V::N ? V::load(left_.logits.data() + i) : load_part<V>(left_.logits.data() + i, n);
      double rounded[V::N];
      (exp_below_zero((l - most) / t) * scale + integer).store(rounded);
      std::memcpy(mass + i, rounded, sizeof(rounded));
    }
    for (int64_t i = 0; i < left_.count; ++i) mass[i] &= (uint64_t{1} << 52) - 1;
  }

  // e^x for x <= 0; below -64 as at -64, which is no mass at all: 2^50 e^-64 rounds to 0.
  static VecD exp_below_zero(VecD x) {
    using V = VecD;
    x = max(V(-64.0), x);
    const V t = x * V(1.4426950408889634074) + V(kRoundBias<double>);
    const V n = t - V(kRoundBias<double>);
    const V r = (x - n * V(0x1.62e42fee00000p-1)) - n * V(0x1.a39ef35793c76p-33);
    constexpr double kTerms[] = {1.0 / 479001600,
                                 1.0 / 39916800,
                                 1.0 / 3628800,
                                 1.0 / 362880,
                                 1.0 / 40320,
                                 1.0 / 5040,
                                 1.0 / 720,
                                 1.0 / 120,
                                 1.0 / 24,
                                 1.0 / 6,
                                 0.5,
                                 1.0,
                                 1.0};
    V sum(1.0 / 6227020800);
    for (double term : kTerms) sum = sum * r + V(term);
    return sum * scale_of(t);
  }

  uint64_t total_mass() const {
    uint64_t total = 0;
    for (int64_t i = 0; i < left_.count; ++i) total += left_.mass[i];
    return total;
  }

  // The first id, in the order of the vocabulary, where the running mass exceeds u * total, u = (2
  // word + 1) / 2^33.
  int64_t invert(uint32_t word) const {
    const unsigned __int128 product =
        static_cast<unsigned __int128>(2 * uint64_t{word} + 1) * total_mass();
    const uint64_t threshold = static_cast<uint64_t>(product >> 33);
    uint64_t sum = left_.mass[0];
    int64_t i = 0;
    while (sum <= threshold) sum += left_.mass[++i];
    return left_.ids[i];
  }

  const SampleTokensParams& p_;
  Scratch<A> logits_, uncond_;
  Survivors<A> left_;
  A most_ = 0;
  int bits_ = 50;
  uint64_t histogram_[2048];
};

template <class A>
void sample(const SampleTokensParams& p) {
  // 8 k logits a thread: below that, starting a thread costs more than the work.
  parallel_for(p.rows, ceil_div(8192, p.vocab), [&](int64_t begin, int64_t end) {
    Row<A> row(p);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t id = row.draw(r);
      p.ids[r] = id < 0 ? 0 : id;
      p.valid[r] = id >= 0;
    }
  });
}

}  // namespace

void sample_tokens(const SampleTokensParams& p) {
  if (p.dtype == DType::kFloat64) {
    sample<double>(p);
  } else {
    sample<float>(p);
  }
}

}  // namespace synergen::cpu::SYNERGEN_ISA
