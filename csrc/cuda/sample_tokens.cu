// sample_tokens on the GPU: a block takes a row. The integers are those of the CPU kernel: the mass
// of a token is exp((l - max) / T) in units of 2^-bits, computed in double and without fused
// multiply-add. Integer sums have no rounding and no order, so both give the same id to the bit.
//
// Guided logits and masses stay in scratch memory, 12 bytes a token, which the second-level cache
// holds. Thresholds are found by radix selection, 8 bits a pass, counted in shared memory.
#include <cmath>

#include "common/philox.h"
#include "cuda/access.cuh"
#include "kernels.h"

namespace synergen::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 256;
constexpr unsigned kAll = 0xffffffffu;

struct SampleLaunch {
  SampleTokensParams p;
  int bits;  // vocab * 2^bits <= 2^62
};

// What the threads of a block tell each other.
struct Board {
  uint64_t words[32];
  uint64_t bins[kBins];
  uint64_t reached;  // weight of everything before the chosen digit
  uint64_t inside;   // and in it
  uint32_t digit;
};

// Unsigned integers in the order of the numbers; -0 and 0 are one.
SIMT_FN uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f), sign = 1u << 31;
  return bits & sign ? ~bits : bits | sign;
}
SIMT_FN uint64_t key_of(double x) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x + 0.0));
  const uint64_t sign = uint64_t{1} << 63;
  return bits & sign ? ~bits : bits | sign;
}

SIMT_FN float mix(float c, float u, float scale) { return __fadd_rn(u, __fmul_rn(scale, c - u)); }
SIMT_FN double mix(double c, double u, double scale) {
  return __dadd_rn(u, __dmul_rn(scale, c - u));
}

// join(words of all threads) in every thread; join must not care for order.
template <class Join>
SIMT_FN uint64_t block_join(uint64_t x, Board& board, const Join& join) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = join(x, __shfl_xor_sync(kAll, x, distance));
  }
  if (lane == 0) board.words[warp] = x;
  __syncthreads();
  x = board.words[lane];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = join(x, __shfl_xor_sync(kAll, x, distance));
  }
  __syncthreads();  // the words may be written again
  return x;
}
SIMT_FN uint64_t block_total(uint64_t x, Board& board) {
  return block_join(x, board, [](uint64_t a, uint64_t b) { return a + b; });
}
SIMT_FN uint64_t block_most(uint64_t x, Board& board) {
  return block_join(x, board, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

// e^x for x <= 0, the arithmetic of the CPU kernel step by step; below -64 as at -64: no mass.
SIMT_FN double exp_below_zero(double x) {
  x = x > -64.0 ? x : -64.0;
  constexpr double kRound = 0x1.8p52 + 1023;  // leaves the rounded integer as an exponent field
  const double t = __dadd_rn(__dmul_rn(x, 1.4426950408889634074), kRound);
  const double n = __dsub_rn(t, kRound);
  double r = __dsub_rn(x, __dmul_rn(n, 0x1.62e42fee00000p-1));
  r = __dsub_rn(r, __dmul_rn(n, 0x1.a39ef35793c76p-33));
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
  double sum = 1.0 / 6227020800;
#pragma unroll
  for (double term : kTerms) sum = __dadd_rn(__dmul_rn(sum, r), term);
  const uint64_t power = static_cast<uint64_t>(__double_as_longlong(t)) << 52;
  return __dmul_rn(sum, __longlong_as_double(static_cast<int64_t>(power)));
}

// Counts weight_of(i) in the bin of digit_of(i) for all i < n that fits(i), then finds the first
// bin, in rising order of digits, where the running weight reaches the target: its digit, the
// weight before it and the weight in it are on the board.
template <class Fits, class Digit, class Weight>
SIMT_FN void choose_digit(int64_t n, uint64_t target, Board& board, const Fits& fits,
                          const Digit& digit_of, const Weight& weight_of) {
  if (threadIdx.x < kBins) board.bins[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    if (fits(i)) {
      atomicAdd(reinterpret_cast<unsigned long long*>(&board.bins[digit_of(i)]),
                static_cast<unsigned long long>(weight_of(i)));
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    constexpr int kEach = kBins / 32;
    const int lane = static_cast<int>(threadIdx.x);
    uint64_t own = 0;
    for (int b = 0; b < kEach; ++b) own += board.bins[lane * kEach + b];
    uint64_t sum = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint64_t below = __shfl_up_sync(kAll, sum, distance);
      sum += lane >= distance ? below : 0;
    }
    const unsigned reached = __ballot_sync(kAll, sum >= target);
    if (lane == __ffs(static_cast<int>(reached)) - 1) {
      uint64_t before = sum - own;
      int bin = lane * kEach;
      while (before + board.bins[bin] < target) before += board.bins[bin++];
      board.digit = static_cast<uint32_t>(bin);
      board.reached = before;
      board.inside = board.bins[bin];
    }
  }
  __syncthreads();
}

template <class A>
class Row {
 public:
  SIMT_FN Row(const SampleLaunch& launch, int64_t r, Board& board)
      : p_(launch.p), bits_(launch.bits), row_(r), n_(launch.p.vocab), board_(board) {
    uint64_t* masses = static_cast<uint64_t*>(p_.scratch);
    mass_ = masses + r * n_;
    logits_ = reinterpret_cast<A*>(masses + p_.rows * n_) + r * n_;
  }

  // The id, or -1 where there is nothing to choose from or an argument cannot be meant.
  template <class T>
  SIMT_FN int64_t draw() {
    const double temperature = p_.temperature.at(row_, 1.0), top_p = p_.top_p.at(row_, 1.0);
    const int64_t k = p_.top_k.at(row_, int64_t{0});
    const double guidance = p_.guidance.at(row_, 1.0);
    const bool sound = load<T>(static_cast<A>(guidance));
    const bool meant = guidance - guidance == 0.0 && temperature - temperature == 0.0 &&
                       temperature >= 0 && k >= 0 && top_p >= 0 && top_p <= 1;
    if (!sound || !meant) return -1;
    if (temperature == 0) return argmax();
    if (k > 0 && static_cast<uint64_t>(k) < count_) {
      keep(static_cast<uint64_t>(k), [](int64_t) { return uint64_t{1}; });
    }
    uint64_t total = weigh(temperature);
    if (top_p < 1) {
      const double wanted = std::ceil(__dmul_rn(top_p, static_cast<double>(total)));
      const uint64_t target = wanted < 1 ? 1 : static_cast<uint64_t>(wanted);
      keep(target < total ? target : total, [&](int64_t i) { return mass_[i]; });
      total = drop_masses();
    }
    return invert(philox_word(static_cast<uint64_t>(p_.seed.at(row_, int64_t{0})),
                              static_cast<uint64_t>(p_.position.at(row_, int64_t{0}))),
                  total);
  }

 private:
  static constexpr int kKeyBits = 8 * static_cast<int>(sizeof(A));
  using Key = decltype(key_of(A{}));

  SIMT_FN static A infinity() { return static_cast<A>(__uint_as_float(0x7f800000u)); }

  // The guided logits, their largest and how many are not -infinity; false for NaN, +infinity, or
  // nothing finite.
  template <class T>
  SIMT_FN bool load(A scale) {
    const T* c = static_cast<const T*>(p_.logits) + row_ * p_.logits_strides[0];
    const T* u = static_cast<const T*>(p_.uncond) + (p_.uncond ? row_ * p_.uncond_strides[0] : 0);
    uint64_t bad = 0, count = 0;
    A most = -infinity();
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) {
      A x = simt::widen(c[i * p_.logits_strides[1]]);
      if (p_.uncond) {
        const A other = simt::widen(u[i * p_.uncond_strides[1]]);
        bad |= !(x == x) || !(other == other);
        const A mixed = scale == A(1) ? x : mix(x, other, scale);
        x = x == -infinity() || other == -infinity() ? -infinity() : mixed;
      }
      bad |= !(x < infinity());
      count += x > -infinity();
      most = x > most ? x : most;
      logits_[i] = x;
    }
    const uint64_t key = block_most(key_of(most), board_);
    bad = block_most(bad, board_);
    count_ = block_total(count, board_);
    most_ = from_key(static_cast<Key>(key));
    return !bad && count_ > 0;
  }
  SIMT_FN A from_key(Key key) const {
    constexpr Key kSign = Key{1} << (kKeyBits - 1);
    const Key bits = key & kSign ? key ^ kSign : ~key;
    if constexpr (sizeof(A) == 8) {
      return __longlong_as_double(static_cast<int64_t>(bits));
    } else {
      return __uint_as_float(bits);
    }
  }

  SIMT_FN int64_t argmax() {
    uint64_t first = ~uint64_t{0};
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) {
      if (logits_[i] == most_ && first == ~uint64_t{0}) first = static_cast<uint64_t>(i);
    }
    return static_cast<int64_t>(~block_most(~first, board_));
  }

  // Keeps the shortest prefix, in the order of falling logits and rising ids, whose weight reaches
  // the target; what falls out becomes -infinity. Equal logits have equal weights, so of the last
  // logit as many ids stay as the rest of the target needs.
  template <class Weight>
  SIMT_FN void keep(uint64_t target, const Weight& weight_of) {
    const auto in_race = [&](int64_t i) { return logits_[i] > -infinity(); };
    Key prefix = 0, mask = 0;
    for (int shift = kKeyBits - 8; shift >= 0; shift -= 8) {
      // Falling keys are rising digits of their complement.
      choose_digit(
          n_, target, board_,
          [&](int64_t i) { return in_race(i) && (key_of(logits_[i]) & mask) == prefix; },
          [&](int64_t i) { return ~(key_of(logits_[i]) >> shift) & (kBins - 1); }, weight_of);
      target -= board_.reached;
      prefix |= static_cast<Key>(~board_.digit & (kBins - 1)) << shift;
      mask |= static_cast<Key>(kBins - 1) << shift;
    }
    const auto last = [&](int64_t i) { return in_race(i) && key_of(logits_[i]) == prefix; };
    const uint64_t cutoff = last_id(target, board_.inside, last, weight_of);
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) {
      const Key key = key_of(logits_[i]);
      if (key < prefix || (key == prefix && static_cast<uint64_t>(i) > cutoff)) {
        logits_[i] = -infinity();
      }
    }
  }

  // The id with which the weight of last(id), in rising order, reaches the target.
  template <class Last, class Weight>
  SIMT_FN uint64_t last_id(uint64_t target, uint64_t inside, const Last& last,
                           const Weight& weight_of) {
    if (target == inside) return static_cast<uint64_t>(n_);  // all of them
    uint64_t prefix = 0, mask = 0;
    int shift = 0;
    while (n_ - 1 >> shift >= kBins) shift += 8;
    for (; shift >= 0; shift -= 8) {
      choose_digit(
          n_, target, board_,
          [&](int64_t i) { return last(i) && (static_cast<uint64_t>(i) & mask) == prefix; },
          [&](int64_t i) { return static_cast<uint64_t>(i) >> shift & (kBins - 1); }, weight_of);
      target -= board_.reached;
      prefix |= static_cast<uint64_t>(board_.digit) << shift;
      mask |= static_cast<uint64_t>(kBins - 1) << shift;
    }
    return prefix;
  }

  // mass = exp((l - max) / T) * 2^bits, rounded to an integer by adding 2^52; their total.
  SIMT_FN uint64_t weigh(double temperature) {
    const double scale = static_cast<double>(uint64_t{1} << bits_);
    uint64_t total = 0;
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) {
      uint64_t mass = 0;
      if (logits_[i] > -infinity()) {
        const double z =
            __ddiv_rn(static_cast<double>(logits_[i]) - static_cast<double>(most_), temperature);
        const double rounded = __dadd_rn(__dmul_rn(exp_below_zero(z), scale), 0x1p52);
        mass = static_cast<uint64_t>(__double_as_longlong(rounded)) & ((uint64_t{1} << 52) - 1);
      }
      mass_[i] = mass;
      total += mass;
    }
    return block_total(total, board_);
  }

  // Tokens that fell out have no mass any more; the total of the rest.
  SIMT_FN uint64_t drop_masses() {
    uint64_t total = 0;
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) {
      if (!(logits_[i] > -infinity())) mass_[i] = 0;
      total += mass_[i];
    }
    return block_total(total, board_);
  }

  // The first id, in the order of the vocabulary, where the running mass exceeds u * total, u = (2
  // word + 1) / 2^33. Each warp takes a run of ids; the one that holds the threshold walks its run.
  SIMT_FN int64_t invert(uint32_t word, uint64_t total) {
    const uint64_t u = 2 * uint64_t{word} + 1;
    const uint64_t threshold = __umul64hi(u, total) << 31 | u * total >> 33;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int64_t run = ceil_div(n_, 32), begin = warp * run;
    const int64_t end = begin + run < n_ ? begin + run : n_;
    uint64_t own = 0;
    for (int64_t i = begin + lane; i < end; i += 32) own += mass_[i];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      own += __shfl_xor_sync(kAll, own, distance);
    }
    if (lane == 0) board_.words[warp] = own;
    __syncthreads();
    uint64_t before = 0;
    for (int w = 0; w < warp; ++w) before += board_.words[w];
    if (before <= threshold && threshold < before + own) walk(begin, end, before, threshold);
    __syncthreads();
    return static_cast<int64_t>(board_.reached);
  }

  // One whole warp: the id goes to the board.
  SIMT_FN void walk(int64_t begin, int64_t end, uint64_t before, uint64_t threshold) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int64_t at = begin; at < end; at += 32) {
      const int64_t i = at + lane;
      uint64_t sum = i < end ? mass_[i] : 0;
      for (int distance = 1; distance < 32; distance *= 2) {
        const uint64_t below = __shfl_up_sync(kAll, sum, distance);
        sum += lane >= distance ? below : 0;
      }
      const unsigned past = __ballot_sync(kAll, before + sum > threshold);
      if (past != 0) {
        if (lane == 0)
          board_.reached = static_cast<uint64_t>(at + __ffs(static_cast<int>(past)) - 1);
        return;
      }
      before += __shfl_sync(kAll, sum, 31);
    }
  }

  const SampleTokensParams& p_;
  const int bits_;
  const int64_t row_, n_;
  Board& board_;
  uint64_t* mass_;
  A* logits_;
  A most_ = 0;
  uint64_t count_ = 0;
};

template <class T>
__global__ void __launch_bounds__(kThreads) sample_tokens_kernel(SampleLaunch launch) {
  SIMT_SHARED(Board, board, [1]);
  const int64_t r = blockIdx.x;
  Row<Acc<T>> row(launch, r, board[0]);
  const int64_t id = row.template draw<T>();
  if (threadIdx.x == 0) {
    launch.p.ids[r] = id < 0 ? 0 : id;
    launch.p.valid[r] = id >= 0;
  }
}

}  // namespace

int64_t scratch_bytes(const SampleTokensParams& p) {
  return p.rows * p.vocab * (p.dtype == DType::kFloat64 ? 16 : 12);
}

void sample_tokens(const SampleTokensParams& p, void* stream) {
  SampleLaunch launch{p, 50};
  while (launch.bits > 0 && p.vocab > int64_t{1} << (62 - launch.bits)) --launch.bits;
  dispatch_float(p.dtype, [&](auto tag) {
    simt::launch("sample_tokens", sample_tokens_kernel<typename decltype(tag)::type>,
                 blocks_for("sample_tokens", p.rows, 1), dim3(kThreads), 0, stream, launch);
  });
}

}  // namespace synergen::cuda
