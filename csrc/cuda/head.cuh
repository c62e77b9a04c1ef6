// The stages of unfold_head on the GPU, each by all blocks of a launch; unfold_head.cu puts them
// together, one launch a stage or one launch for all.
//
//   embed     x = state or embedding + position; and what every stage that adds to x leaves behind:
//             x times the weight of the norm that follows, in T, and the squares of x, summed over
//             16 columns. A norm is then one factor a row, applied to sums.
//   qkv       a tile is 8 pairs of columns e, e + head_dim / 2 of one head: the rotation is in the
//             registers of the thread that has the sums. Keys and values go to the cache.
//   attend    a warp to a query head of a row, over at most 32 positions
//   out       x += o mixed
//   hidden    a tile is 8 rows of gate and 8 of up: SwiGLU in registers
//   down      x += down inner
//   classify  logits, float (double for double)
//
// Weights are read once, by cp.async, into a ring of 1 KiB chunks that each warp has in shared
// memory. A lane copies the 32 bytes that it will multiply itself, so a chunk needs no barrier,
// only the lane's own wait. What the ring reads next depends on nothing that is computed: the ring
// of the single launch runs ahead across stages and grid barriers.
#pragma once

#include <cmath>

#include "cuda/sample.cuh"
#include "cuda/stream.cuh"
#include "kernels.h"

namespace synergen::cuda::head {

constexpr int kThreads = kSampleThreads, kWarps = kThreads / 32;
constexpr int kMostLayers = 16;  // whose pointers travel with the single launch
constexpr int kMostRows = 32;    // of a pass
constexpr int kMostWindow = 32;  // a lane to a position
constexpr unsigned kAll = 0xffffffffu;

enum Kind : int { kQkv, kOut, kHidden, kDown, kClassify, kKinds };

// Columns of a tile of 16 rows of weights: two halves that make one column, or 16.
SYNERGEN_HD constexpr int tile_columns(int kind) {
  return kind == kQkv || kind == kHidden ? 8 : 16;
}

struct Shape {
  int k, columns, tiles;  // columns: of pairs where kQkv
  int split;              // warps to a tile
};

template <class T>
struct Launch {
  int rows, pictures, dim, layers, heads, kv_heads, head_dim, hidden, window, vocab;
  double eps;
  const void* states;
  int64_t states_strides[2], second;  // of rows from `pictures` on, the first is `second` away
  const void *tokens, *positions, *norm, *classifier;
  PerRow<int64_t> seed, position, top_k;
  PerRow<double> guidance, temperature, top_p;
  int64_t* ids;
  bool* valid;
  Shape shape[kKinds];
  int slots;  // of the ring
  // A launch for one stage has its layer in layer[0], and what follows it.
  int step, at_layer, kind;
  const void* next_norm;
  UnfoldHeadLayer layer[kMostLayers];
  // Scratch; A is float, or double for double.
  void* x;        // A [rows, dim]
  void* scaled;   // T [rows, dim]: x times the weight of the next norm
  void* squares;  // A [dim / 16, rows]
  void* q;        // A [rows, heads, head_dim]
  void* keys;     // T [layers, rows, kv_heads, window, head_dim]
  void* values;   // the same
  void* mixed;    // T [rows, heads, head_dim]
  void* inner;    // T [rows, hidden]
  void* logits;   // A [rows, logits_step]
  int logits_step;
  void* turns;  // A [window, head_dim / 2, 2]: cosine, sine
  // Of single stages: what sample_tokens reads and writes, [window, pictures] each.
  int64_t *draws, *drawn;
  bool* drawn_valid;
  void* sample_scratch;
  SampleScratch<KeyOf<Acc<T>>> sample;
  int sample_parts;  // blocks to a picture
  int mass_bits;
};

// ---- Weights

// The two rows of weights of lanes g in a tile; some row where the tile has fewer.
template <class T>
SIMT_FN void rows_of(const Launch<T>& p, int kind, const UnfoldHeadLayer& w, int tile, int g,
                     const T* (&rows)[2]) {
  const Shape& shape = p.shape[kind];
  const int64_t k = shape.k;
  const int column = min(tile * tile_columns(kind) + g, shape.columns - 1);
  if (kind == kQkv) {
    const int half = p.head_dim / 2, head = column / half, of_kv = head - p.heads;
    const void* matrix = of_kv < 0 ? w.q : of_kv < p.kv_heads ? w.k : w.v;
    const int own = of_kv < 0 ? head : of_kv % p.kv_heads;
    rows[0] = static_cast<const T*>(matrix) + (own * p.head_dim + column % half) * k;
    rows[1] = rows[0] + half * k;
  } else if (kind == kHidden) {
    rows[0] = static_cast<const T*>(w.gate) + column * k;
    rows[1] = static_cast<const T*>(w.up) + column * k;
  } else {
    const void* matrix = kind == kOut ? w.o : kind == kDown ? w.down : p.classifier;
    rows[0] = static_cast<const T*>(matrix) + column * k;
    rows[1] = static_cast<const T*>(matrix) + min(column + 8, shape.columns - 1) * k;
  }
}

// The products of a launch in their order.
template <class T>
struct OneStage {
  const Launch<T>& p;
  SIMT_FN int count() const { return 1; }
  SIMT_FN int kind(int) const { return p.kind; }
  SIMT_FN const UnfoldHeadLayer& layer(int) const { return p.layer[0]; }
};
template <class T>
struct AllStages {
  const Launch<T>& p;
  SIMT_FN int a_step() const { return p.layers * kClassify + 1; }
  SIMT_FN int count() const { return p.window * a_step(); }
  SIMT_FN int kind(int i) const {
    const int within = i % a_step();
    return within == p.layers * kClassify ? static_cast<int>(kClassify) : within % kClassify;
  }
  // The classifier has no layer, and looks at none.
  SIMT_FN const UnfoldHeadLayer& layer(int i) const {
    const int l = i % a_step() / kClassify;
    return p.layer[l < p.layers ? l : 0];
  }
};

// The part of a tile that a warp has in round `round` of a stage; begin = end where it has none.
template <class T>
struct Part {
  int tile, begin, end;
  SIMT_FN Part(const Shape& shape, int round) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    tile = round * (kWarps / shape.split) + warp / shape.split;
    const bool there = tile < shape.tiles;
    begin = there ? stream::part_begin<T>(shape.k, warp % shape.split, shape.split) : 0;
    end = there ? stream::part_begin<T>(shape.k, warp % shape.split + 1, shape.split) : 0;
  }
};
SIMT_FN int rounds_of(const Shape& shape) {
  return static_cast<int>(ceil_div(shape.tiles, kWarps / shape.split));
}

template <class T, bool kPacked, class Stages>
class Ring {
  static constexpr int kEach = stream::kEach<T>, kChunk = stream::kChunk<T>;
  static constexpr int kSlotBytes = 1024;

 public:
  // Fills all slots.
  SIMT_FN Ring(const Launch<T>& p, const Stages& stages, unsigned char* shared)
      : p_(p), stages_(stages), round_(static_cast<int>(blockIdx.x)), w_{nullptr, nullptr} {
    const int lane = static_cast<int>(threadIdx.x % 32);
    own_ = shared + threadIdx.x / 32 * p.slots * kSlotBytes + lane * 16;
    begin_round();
    for (int i = 0; i < p.slots; ++i) fill();
  }

  // This lane's part of the next chunk: 16 bytes of either row. `fill` must follow before the next.
  SIMT_FN void take(simt::Words (&words)[2]) const {
    if (p_.slots == kManySlots) {
      simt::cp_async_wait<kManySlots - 1>();
    } else {
      simt::cp_async_wait<kFewSlots - 1>();
    }
    words[0] = simt::load16(own_ + slot_ * kSlotBytes);
    words[1] = simt::load16(own_ + slot_ * kSlotBytes + kSlotBytes / 2);
  }

  // Asks for the chunk after all that were asked for, into the slot taken last; a group of copies
  // even where there is none, so that take can count groups.
  SIMT_FN void fill() {
    while (at_ >= end_ && stage_ < stages_.count()) {
      round_ += static_cast<int>(gridDim.x);
      begin_round();
    }
    if (at_ < end_) {
      const int from = at_ + static_cast<int>(threadIdx.x % 4) * kEach;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        unsigned char* to = own_ + slot_ * kSlotBytes + h * (kSlotBytes / 2);
        if constexpr (kPacked) {
          const bool there = from < end_;
          simt::cp_async16(to, w_[h] + (there ? from : at_), there);
        } else {
          *reinterpret_cast<simt::Words*>(to) = stream::gather_weights(w_[h], 1, from, end_);
        }
      }
      at_ += kChunk;
    }
    simt::cp_async_commit();
    slot_ = slot_ + 1 == p_.slots ? 0 : slot_ + 1;
  }

  static constexpr int kFewSlots = 4, kManySlots = 12;

 private:
  // Goes on to the first stage that has this round.
  SIMT_FN void begin_round() {
    while (stage_ < stages_.count() && round_ >= rounds_of(p_.shape[stages_.kind(stage_)])) {
      ++stage_;
      round_ = static_cast<int>(blockIdx.x);
    }
    if (stage_ == stages_.count()) return;
    const int kind = stages_.kind(stage_);
    const Part<T> part(p_.shape[kind], round_);
    at_ = part.begin;
    end_ = part.end;
    rows_of(p_, kind, stages_.layer(stage_), part.tile, static_cast<int>(threadIdx.x % 32 / 4), w_);
  }

  const Launch<T>& p_;
  const Stages stages_;
  unsigned char* own_;
  int stage_ = 0, round_, at_ = 0, end_ = 0, slot_ = 0;
  const T* w_[2];
};

// ---- Products

// sum[i][2 h + b] += the product of weight row h of this lane's g and activation row 8 i + 2 t + b,
// as in stream.cuh. x: [rows, k].
template <class T, int NT, bool kPacked, class R>
SIMT_FN void product(R& ring, const Part<T>& part, const T* x, int k, int rows,
                     Acc<T> (&sum)[NT][4]) {
  using A = Acc<T>;
  constexpr int kEach = stream::kEach<T>, kChunk = stream::kChunk<T>;
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  simt::Words words[2];
  if constexpr (stream::kTensor<T, T>) {
    const T* first = x + g * k;  // row g; the others are 8 rows apart
#pragma unroll 1
    for (int at = part.begin + t * kEach; at - t * kEach < part.end; at += kChunk) {
      ring.take(words);
      const uint32_t (&low)[4] = words[0].v, (&high)[4] = words[1].v;
      const uint32_t a[2][4] = {{low[0], high[0], low[1], high[1]},
                                {low[2], high[2], low[3], high[3]}};
#pragma unroll
      for (int i = 0; i < NT; ++i) {
        if (8 * i >= rows) break;
        // A row past the last is zeros.
        const int end = 8 * i + g < rows ? part.end : 0;
        const auto pack = stream::load_activations<8, kPacked>(first + 8 * i * k, 1, at, end);
        simt::Words b;
        memcpy(&b, &pack, sizeof(b));
        stream::mma<T>(sum[i], a[0], b.v[0], b.v[1]);
        stream::mma<T>(sum[i], a[1], b.v[2], b.v[3]);
      }
      ring.fill();
    }
  } else {
    A own[2][8] = {};
#pragma unroll 1
    for (int at = part.begin + t * kEach; at - t * kEach < part.end; at += kChunk) {
      ring.take(words);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        if (r >= rows) break;
        const auto pack = stream::load_activations<kEach, kPacked>(x + r * k, 1, at, part.end);
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            own[h][r] += stream::value_of<A, T>(words[h], e) * pack.v[e];
          }
        }
      }
      ring.fill();
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        A total = own[h][r] + __shfl_xor_sync(kAll, own[h][r], 1);
        total += __shfl_xor_sync(kAll, total, 2);
        if (r / 2 == t) sum[0][2 * h + r % 2] = total;
      }
    }
  }
}

// The first of `split` neighbouring warps gets the sums of all, 8 rows after 8: `shared` is
// [kWarps, 4, 32].
template <class A, int NT>
SIMT_FN void join(A (&sum)[NT][4], int rows, int split, A* shared) {
  if (split == 1) return;
#pragma unroll
  for (int i = 0; i < NT; ++i) {
    if (8 * i >= rows) break;
    A one[1][4] = {{sum[i][0], sum[i][1], sum[i][2], sum[i][3]}};
    stream::join(one, split, shared);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[i][e] = one[0][e];
    __syncthreads();  // shared may be written again
  }
}

// 1 / sqrt(mean(x^2) + eps) of every row, in scales; every block finds all.
template <class T>
SIMT_FN void find_scales(const Launch<T>& p, Acc<T>* scales) {
  using A = Acc<T>;
  const int lane = static_cast<int>(threadIdx.x % 32), tiles = (p.dim + 15) / 16;
  for (int row = static_cast<int>(threadIdx.x / 32); row < p.rows; row += kWarps) {
    A sum = 0;
    for (int tile = lane; tile < tiles; tile += 32) {
      sum += static_cast<const A*>(p.squares)[tile * p.rows + row];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      scales[row] = A(1) / std::sqrt(sum / static_cast<A>(p.dim) + static_cast<A>(p.eps));
    }
  }
  __syncthreads();
}

// What follows a new value of x: 16 columns of a row become one number.
template <class T>
SIMT_FN void store_x(const Launch<T>& p, const void* next_norm, int row, int column, Acc<T> value) {
  const Acc<T> weight = simt::widen(static_cast<const T*>(next_norm)[column]);
  static_cast<Acc<T>*>(p.x)[row * p.dim + column] = value;
  static_cast<T*>(p.scaled)[row * p.dim + column] = simt::narrow<T>(value * weight);
}

template <class T>
SIMT_FN void finish_qkv(const Launch<T>& p, const UnfoldHeadLayer& w, int at_layer, int step,
                        int pair, int row, Acc<T> a, Acc<T> b) {
  using A = Acc<T>;
  const int half = p.head_dim / 2, head = pair / half, e = pair % half;
  const int of_kv = head - p.heads;
  const void* bias = of_kv < 0 ? w.q_bias : of_kv < p.kv_heads ? w.k_bias : w.v_bias;
  const int own = of_kv < 0 ? head : of_kv % p.kv_heads;
  if (bias != nullptr) {
    a += simt::widen(static_cast<const T*>(bias)[own * p.head_dim + e]);
    b += simt::widen(static_cast<const T*>(bias)[own * p.head_dim + half + e]);
  }
  if (of_kv < p.kv_heads) {
    const A* turn = static_cast<const A*>(p.turns) + (step * half + e) * 2;
    const A turned = a * turn[0] - b * turn[1];
    b = b * turn[0] + a * turn[1];
    a = turned;
  }
  if (of_kv < 0) {
    A* q = static_cast<A*>(p.q) + (row * p.heads + own) * p.head_dim + e;
    q[0] = a;
    q[half] = b;
  } else {
    const int64_t head_at = (int64_t{at_layer} * p.rows + row) * p.kv_heads + own;
    T* cache = static_cast<T*>(of_kv < p.kv_heads ? p.keys : p.values);
    cache += (head_at * p.window + step) * p.head_dim + e;
    cache[0] = simt::narrow<T>(a);
    cache[half] = simt::narrow<T>(b);
  }
}

// One product of all rows with one matrix, or a pair of them. `sums` is [kWarps, 4, 32], scales
// [rows].
template <class T, int NT, bool kPacked, class R>
SIMT_FN void linear(const Launch<T>& p, R& ring, int kind, const UnfoldHeadLayer& w, int at_layer,
                    int step, const void* next_norm, Acc<T>* sums, Acc<T>* scales) {
  using A = Acc<T>;
  const Shape& shape = p.shape[kind];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int g = lane / 4, t = lane % 4;
  const bool adds = kind == kOut || kind == kDown;
  const void* x = kind == kOut ? p.mixed : kind == kDown ? p.inner : p.scaled;
  if (!adds) find_scales(p, scales);
  const int rounds = rounds_of(shape);
  for (int round = static_cast<int>(blockIdx.x); round < rounds;
       round += static_cast<int>(gridDim.x)) {
    const Part<T> part(shape, round);
    A sum[NT][4] = {};
    product<T, NT, kPacked>(ring, part, static_cast<const T*>(x), shape.k, p.rows, sum);
    join(sum, p.rows, shape.split, sums);
    if (warp % shape.split != 0 || part.tile >= shape.tiles) continue;
    const int column = part.tile * tile_columns(kind) + g;
#pragma unroll
    for (int i = 0; i < NT; ++i) {
      if (8 * i >= p.rows) break;
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int row = 8 * i + 2 * t + b;
        const bool wanted = row < p.rows;
        const A low = sum[i][b], high = sum[i][2 + b];
        if (adds) {
          A square = 0;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (!wanted || column + 8 * h >= p.dim) continue;
            const A before = static_cast<const A*>(p.x)[row * p.dim + column + 8 * h];
            const A value = before + (h == 0 ? low : high);
            store_x(p, next_norm, row, column + 8 * h, value);
            square += value * value;
          }
#pragma unroll
          for (int distance = 4; distance < 32; distance *= 2) {
            square += __shfl_xor_sync(kAll, square, distance);
          }
          if (wanted && g == 0) static_cast<A*>(p.squares)[part.tile * p.rows + row] = square;
        } else if (wanted) {
          const A scale = scales[row];
          if (kind == kQkv && column < shape.columns) {
            finish_qkv(p, w, at_layer, step, column, row, low * scale, high * scale);
          } else if (kind == kHidden && column < shape.columns) {
            const A gate = low * scale, up = high * scale;
            static_cast<T*>(p.inner)[static_cast<int64_t>(row) * p.hidden + column] =
                simt::narrow<T>(gate / (1 + std::exp(-gate)) * up);
          } else if (kind == kClassify) {
            A* logits = static_cast<A*>(p.logits) + static_cast<int64_t>(row) * p.logits_step;
            if (column < p.vocab) logits[column] = low * scale;
            if (column + 8 < p.vocab) logits[column + 8] = high * scale;
          }
        }
      }
    }
  }
}

// ---- The rest

// 32 columns of a row, by a warp: x = state or embedding + position.
template <class T>
SIMT_FN void embed(const Launch<T>& p, int step, int64_t id, int row, int group) {
  using A = Acc<T>;
  const int lane = static_cast<int>(threadIdx.x % 32), column = group * 32 + lane;
  A value = 0;
  if (column < p.dim) {
    const T* from = step == 0
                        ? static_cast<const T*>(p.states) + row / p.pictures * p.second +
                              row % p.pictures * p.states_strides[0] + column * p.states_strides[1]
                        : static_cast<const T*>(p.tokens) + id * p.dim + column;
    value =
        simt::widen(*from) + simt::widen(static_cast<const T*>(p.positions)[step * p.dim + column]);
    store_x(p, p.layers > 0 ? p.layer[0].attention_norm : p.norm, row, column, value);
  }
  A square = value * value;
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) {
    square += __shfl_xor_sync(kAll, square, distance);
  }
  const int tile = column / 16;
  if (lane % 16 == 0 && column < p.dim) {
    static_cast<A*>(p.squares)[tile * p.rows + row] = square;
  }
}

// The query heads of all rows, a warp to each: warp number `from` takes every `stride`-th.
template <class T, bool kPacked>
SIMT_FN void attend(const Launch<T>& p, int at_layer, int step, int from, int stride) {
  using A = Acc<T>;
  constexpr int N = kPacked ? kPack<T> : 1;
  const int lane = static_cast<int>(threadIdx.x % 32), packs = p.head_dim / N;
  // Lanes that share a position: as many as 32 lanes have for positions 0 .. window - 1.
  int share = 32;
  while (share > 1 && (32 / share) < p.window) share /= 2;
  const A root = A(1) / std::sqrt(static_cast<A>(p.head_dim));
  for (int item = from; item < p.rows * p.heads; item += stride) {
    const int row = item / p.heads, head = item % p.heads;
    const int64_t kv =
        (int64_t{at_layer} * p.rows + row) * p.kv_heads + head / (p.heads / p.kv_heads);
    const T* keys = static_cast<const T*>(p.keys) + kv * p.window * p.head_dim;
    const T* values = static_cast<const T*>(p.values) + kv * p.window * p.head_dim;
    const A* q = static_cast<const A*>(p.q) + static_cast<int64_t>(item) * p.head_dim;
    const int position = lane / share;
    A score = 0;
    if (position <= step) {
      for (int i = lane % share; i < packs; i += share) {
        const Pack<T, N> key = load_pack<N>(keys + position * p.head_dim, i, 1);
#pragma unroll
        for (int e = 0; e < N; ++e) score += q[i * N + e] * simt::widen(key.v[e]);
      }
    }
    for (int distance = 1; distance < share; distance *= 2) {
      score += __shfl_xor_sync(kAll, score, distance);
    }
    score = position <= step ? score * root : -infinity<A>();
    A most = score;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const A other = __shfl_xor_sync(kAll, most, distance);
      most = other > most ? other : most;
    }
    const A mass = std::exp(score - most);
    const A total = warp_sum(lane % share == 0 ? mass : A(0));
    const A weight = mass / total;
    for (int first = 0; first < packs; first += 32) {
      const int i = first + lane;
      A sum[N] = {};
#pragma unroll 4
      for (int j = 0; j <= step; ++j) {
        const A part = __shfl_sync(kAll, weight, j * share);
        if (i >= packs) continue;
        const Pack<T, N> value = load_pack<N>(values + j * p.head_dim, i, 1);
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] += part * simt::widen(value.v[e]);
      }
      Pack<T, N> out;
#pragma unroll
      for (int e = 0; e < N; ++e) out.v[e] = simt::narrow<T>(sum[e]);
      T* mixed = static_cast<T*>(p.mixed) + static_cast<int64_t>(item) * p.head_dim;
      if (i < packs) store_pack(mixed, i, out);
    }
  }
}

}  // namespace synergen::cuda::head
