// unfold_head on the GPU: the stages of head.cuh, as one launch each, or all of them as one
// launch of as many blocks as fit the GPU at once, with a barrier of the grid between two stages.
// Neither waits for the host, so a CUDA graph may capture either.
//
// Static bound, not measured, for the paper's head (4 layers, D = 2048, 16 query and 8 kv heads of
// 128, F = 8192, V = 32768, W = 16), bfloat16, 2 rows, on an H100 (3.35 TB/s, 132 multiprocessors,
// 25.4 KB a microsecond each):
//
//   bytes      layer 4 x 125.8 MB + classifier 134.2 MB = 637.5 MB a step: 190.3 us; all else (keys
//              and values, activations, logits) is below 2 MB and stays in the second cache
//   waves      every product is 2,048 warps of 16 rows of weights and their part of the depth: 128
//              blocks of 16 warps, one wave, 97 % of 132 multiprocessors. While one stage's 128
//              stream, DRAM is the limit (128 x 64 KB under way is 3.5 times latency x bandwidth)
//   launches   5 a layer, and embed, classify, sample: 23 a step. At 1.3 us each (within a graph)
//              30 us, plus about 1 us to fill the pipeline in each of the 17 that stream, and 8 us
//              of sampling: 190 + 30 + 17 + 8 = 245 us, 1.29 x the bytes: 3.9 ms a patch
//   barriers   5 a layer, and embed, classify, scan: 23 a step at 1.2 to 1.7 us. The ring keeps 12
//              chunks a warp, 192 KB a multiprocessor, on their way meanwhile: 7.6 us of streaming.
//              The longest stop is qkv - barrier - attend - barrier - out, 2 x 1.5 us + 1.5 us:
//              hidden. classify - barrier - scan, weigh - arrival - draw, embed - barrier: 12 us,
//              of which 4.4 us are not. 190 + 5 = 195 us, and 3 % where less than the whole GPU
//              streams at a stage's end: 201 us, 1.06 x: 3.2 ms a patch
//
// From machine code, every barrier counted whole, `synergen bench --suite cuda-bound` says 1.34 x
// and 1.17 x. So the single launch is worth having, and is the default once a GPU has measured
// both.
#include "cuda/angle.cuh"
#include "cuda/head.cuh"

namespace synergen::cuda {
namespace head {
namespace {

constexpr const char* kOp = "unfold_head";
constexpr int kTables = 256;  // pairs of a head in one launch of setup, as their frequencies travel

// [kWarps, 4, 32] sums of warps that share a tile; of the single launch also what sampling wants.
template <class A>
constexpr size_t kSums = kWarps * 4 * 32 * sizeof(A);

SYNERGEN_HD constexpr size_t ring_bytes(int slots) {
  return static_cast<size_t>(slots) * kWarps * 1024;
}

// What no stage changes: the rotations' cosines and sines, and the number of each draw.
struct Setup {
  int window, half, first, pairs, pictures;
  PerRow<int64_t> position;
  int64_t* draws;
  void* turns;
  double frequency[kTables];
};
template <class A>
__global__ void __launch_bounds__(256) setup_kernel(Setup p) {
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (at < p.window * p.pairs) {
    const int j = at / p.pairs, i = at % p.pairs;
    double sine, cosine;
    sine_cosine(j * p.frequency[i], sine, cosine);
    A* turn = static_cast<A*>(p.turns) + (j * p.half + p.first + i) * 2;
    turn[0] = static_cast<A>(cosine);
    turn[1] = static_cast<A>(sine);
  }
  if (at < p.window * p.pictures) {
    p.draws[at] = p.position.at(at % p.pictures, int64_t{0}) + at / p.pictures;
  }
}

template <class T>
SIMT_FN int64_t id_before(const Launch<T>& p, int row) {
  return p.step == 0 ? 0 : p.drawn[int64_t{p.step - 1} * p.pictures + row % p.pictures];
}
template <class T>
__global__ void __launch_bounds__(kThreads, 1) embed_kernel(const __grid_constant__ Launch<T> p) {
  const int groups = (p.dim + 31) / 32;
  const int item = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x / 32);
  if (item < p.rows * groups)
    embed<T>(p, p.step, id_before<T>(p, item / groups), item / groups, item % groups);
}

// A warp to a block: 32 heads on 32 multiprocessors wait for memory alone, 1.3 us, where 16 warps
// on one want 2.0 of its issue slots (static bound).
template <class T, bool kPacked>
__global__ void __launch_bounds__(32) attend_kernel(const __grid_constant__ Launch<T> p) {
  attend<T, kPacked>(p, p.at_layer, p.step, static_cast<int>(blockIdx.x),
                     static_cast<int>(gridDim.x));
}

template <class T, int NT, bool kPacked>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(const __grid_constant__ Launch<T> p) {
  using A = Acc<T>;
  SIMT_DYNAMIC_SHARED(shared);
  A* sums = reinterpret_cast<A*>(shared + ring_bytes(p.slots));
  Ring<T, kPacked, OneStage<T>> ring(p, OneStage<T>{p}, shared);
  linear<T, NT, kPacked>(p, ring, p.kind, p.layer[0], p.at_layer, p.step, p.next_norm, sums,
                         sums + kWarps * 4 * 32);
}

template <class T>
__global__ void __launch_bounds__(256) collect_kernel(const __grid_constant__ Launch<T> p) {
  const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (n >= p.pictures) return;
  bool valid = true;
  for (int j = 0; j < p.window; ++j) {
    const int64_t at = int64_t{j} * p.pictures + n;
    p.ids[int64_t{n} * p.window + j] = p.drawn[at];
    valid = valid && p.drawn_valid[at];
  }
  p.valid[n] = valid;
}

// ---- One launch for all

// Draws the ids of a step, and embeds them: whoever draws an id has it, and every other block has
// read what embed overwrites. A grid barrier must stand before and after.
template <class T>
SIMT_FN void draw_ids(const Launch<T>& p, int step, SampleBoard& board) {
  using A = Acc<T>;
  using Logits = RowLogits<A, kPack<A>>;
  const int parts = p.sample_parts;
  const int first = static_cast<int>(blockIdx.x) / parts,
            part = static_cast<int>(blockIdx.x) % parts;
  const int stride = parts > 1 ? p.pictures : static_cast<int>(gridDim.x);
  const A* logits = static_cast<const A*>(p.logits);
  const int tiles = static_cast<int>(ceil_div(p.vocab, kSampleTile));
  // With several blocks a picture there is one turn, the same for all blocks, idle ones as well.
  for (int n = first; n < p.pictures || (parts > 1 && n == first); n += stride) {
    const bool there = n < p.pictures;
    const int picture = there ? n : 0;
    const double guidance = p.guidance.at(picture, 1.0);
    if (threadIdx.x == 0) {
      const double top_p = p.top_p.at(picture, 1.0);
      const int64_t top_k = p.top_k.at(picture, int64_t{0});
      board.options = {
          meant_temperature(guidance, p.temperature.at(picture, 1.0), top_p, top_k), top_p, top_k,
          philox_word(static_cast<uint64_t>(p.seed.at(picture, int64_t{0})),
                      static_cast<uint64_t>(p.draws[int64_t{step} * p.pictures + picture])),
          p.mass_bits};
    }
    const A* own = logits + int64_t{picture} * p.logits_step;
    const A* other = p.rows > p.pictures ? own + int64_t{p.pictures} * p.logits_step : nullptr;
    const Logits row_logits{own, other, 1, 1, p.vocab, static_cast<A>(guidance)};
    const auto scratch = p.sample.row(picture, tiles);
    RowSampler<Logits, 2> row(row_logits, scratch, part, parts, board);
    if (there) row.scan();
    if (parts > 1) {
      simt::grid_sync();
    } else {
      __syncthreads();
    }
    int64_t id = -1;
    bool writes = there && part == 0;
    if (there && board.options.temperature >= 0) {
      if (row.weigh()) {
        writes = last_to_arrive(scratch.arrived, static_cast<uint32_t>(parts), board);
        if (writes) id = row.draw();
      } else {
        id = row.answer();
      }
    }
    if (writes) {
      const int64_t drawn = id < 0 ? 0 : id;
      if (threadIdx.x == 0) {
        p.ids[int64_t{picture} * p.window + step] = drawn;
        p.valid[picture] = id >= 0 && (step == 0 || p.valid[picture]);
      }
      const int groups = (p.dim + 31) / 32;
      for (int row_at = picture; step + 1 < p.window && row_at < p.rows; row_at += p.pictures) {
        for (int group = static_cast<int>(threadIdx.x / 32); group < groups; group += kWarps) {
          embed<T>(p, step + 1, drawn, row_at, group);
        }
      }
    }
    __syncthreads();  // the board may be written again
  }
}

template <class T, int NT, bool kPacked>
__global__ void __launch_bounds__(kThreads, 1) all_kernel(const __grid_constant__ Launch<T> p) {
  using A = Acc<T>;
  using Stages = AllStages<T>;
  SIMT_DYNAMIC_SHARED(shared);
  unsigned char* rest = shared + ring_bytes(p.slots);
  A* sums = reinterpret_cast<A*>(rest);
  SampleBoard& board = *reinterpret_cast<SampleBoard*>(rest);  // never while sums are wanted
  A* scales = reinterpret_cast<A*>(rest + sizeof(SampleBoard));
  const int warps = static_cast<int>(gridDim.x) * kWarps;
  const int from = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x / 32);
  Ring<T, kPacked, Stages> ring(p, Stages{p}, shared);
  const int groups = (p.dim + 31) / 32;
  for (int item = from; item < p.rows * groups; item += warps) {
    embed<T>(p, 0, 0, item / groups, item % groups);
  }
  simt::grid_sync();
  for (int step = 0; step < p.window; ++step) {
    for (int stage = 0; stage < p.layers * kClassify + 1; ++stage) {
      const int l = stage / kClassify,
                kind = l < p.layers ? stage % kClassify : static_cast<int>(kClassify);
      const UnfoldHeadLayer& w = p.layer[l < p.layers ? l : 0];
      const void* next_norm = kind == kOut       ? w.ffn_norm
                              : l + 1 < p.layers ? p.layer[l + 1].attention_norm
                                                 : p.norm;
      linear<T, NT, kPacked>(p, ring, kind, w, l, step, next_norm, sums, scales);
      simt::grid_sync();
      if (kind == kQkv) {
        attend<T, kPacked>(p, l, step, from, warps);
        simt::grid_sync();
      }
    }
    draw_ids<T>(p, step, board);
    if (step + 1 < p.window) simt::grid_sync();
  }
}

// ---- Launches

// Warps to a tile: enough for 128 multiprocessors of 16, as long as each has four chunks. The same
// for both forms and every GPU, so that sums are too.
template <class T>
Shape shape_of(int kind, int64_t k, int64_t columns) {
  const int64_t tiles = ceil_div(columns, tile_columns(kind));
  int split = 1;
  while (split < kWarps && tiles * split < 128 * kWarps &&
         ceil_div(k, stream::kChunk<T>) >= 8 * split) {
    split *= 2;
  }
  return {static_cast<int>(k), static_cast<int>(columns), static_cast<int>(tiles), split};
}

template <class T>
bool packs_all(const UnfoldHeadParams& p) {
  bool fits = true;
  for (int64_t k : {p.dim, p.heads * p.head_dim, p.hidden, p.head_dim})
    fits = fits && k % kPack<T> == 0;
  const auto aligned = [&](const void* data) { fits = fits && packs<T>(data, 1, nullptr, 0); };
  aligned(p.classifier);
  for (int64_t l = 0; l < p.layers; ++l) {
    const UnfoldHeadLayer& w = p.layer[l];
    for (const void* data : {w.q, w.k, w.v, w.o, w.gate, w.up, w.down}) aligned(data);
  }
  return fits;
}

// Rows that pass at once. Every block reads the activations of its part of the depth from the
// second cache, rows / 16 of its bytes of weights: 64 rows in one pass would be 1 + 4 units of what
// a pass of few rows reads, in two passes they are 2 x (1 + 2), and 16 sums a thread fewer do not
// spill.
template <class T>
int64_t most_rows(const UnfoldHeadParams& p) {
  return stream::kTensor<T, T> && packs_all<T>(p) ? kMostRows : 8;
}
template <class T>
int64_t most_pictures(const UnfoldHeadParams& p) {
  const int64_t most = most_rows<T>(p) * p.pictures / p.rows;
  return p.pictures < most ? p.pictures : most;
}

// Where everything lies in scratch for `pictures` pictures; returns the bytes.
template <class T>
int64_t lay_out(Launch<T>& q, const UnfoldHeadParams& p, int64_t pictures, void* base) {
  using A = Acc<T>;
  constexpr auto kA = static_cast<int64_t>(sizeof(A)), kT = static_cast<int64_t>(sizeof(T));
  const int64_t rows = p.rows / p.pictures * pictures, queries = p.heads * p.head_dim;
  const int64_t cache = p.layers * rows * p.kv_heads * p.window * p.head_dim;
  q.logits_step = static_cast<int>(ceil_div(p.vocab, kPack<A>) * kPack<A>);
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const auto at = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(bytes);
    bytes += ceil_div(size, 256) * 256;
    return reinterpret_cast<void*>(at);
  };
  q.x = take(rows * p.dim * kA);
  q.scaled = take(rows * p.dim * kT);
  q.squares = take(rows * ceil_div(p.dim, 16) * kA);
  q.turns = take(p.window * p.head_dim * kA);
  q.q = take(rows * queries * kA);
  q.keys = take(cache * kT);
  q.values = take(cache * kT);
  q.mixed = take(rows * queries * kT);
  q.inner = take(rows * p.hidden * kT);
  q.logits = take(rows * q.logits_step * kA);
  q.draws = static_cast<int64_t*>(take(p.window * pictures * 8));
  q.drawn = static_cast<int64_t*>(take(p.window * pictures * 8));
  q.drawn_valid = static_cast<bool*>(take(p.window * pictures));
  q.sample_scratch = take(0);
  return bytes +
         cuda::lay_out(q.sample, q.sample_scratch, pictures, ceil_div(p.vocab, kSampleTile));
}

template <class T>
void set_up(const UnfoldHeadParams& p, const Launch<T>& q, void* stream) {
  Setup s{q.window, q.head_dim / 2, 0, 0, q.pictures, q.position, q.draws, q.turns, {}};
  do {
    s.pairs = s.half - s.first < kTables ? s.half - s.first : kTables;
    for (int i = 0; i < s.pairs; ++i) {
      s.frequency[i] = std::pow(p.theta, -2.0 * (s.first + i) / q.head_dim);
    }
    const int64_t items = int64_t{q.window} * (s.pairs > q.pictures ? s.pairs : q.pictures);
    simt::launch(kOp, setup_kernel<Acc<T>>, blocks_for(kOp, items, 256), dim3(256), 0, stream, s);
    s.first += s.pairs;
  } while (s.first < s.half);
}

template <class T, int NT, bool kPacked>
void run_in_stages(const UnfoldHeadParams& p, Launch<T> q, void* stream) {
  using A = Acc<T>;
  q.slots = Ring<T, kPacked, OneStage<T>>::kFewSlots;
  const dim3 threads(kThreads);
  const size_t shared = ring_bytes(q.slots) + kSums<A> + kMostRows * sizeof(A);
  const auto linear = [&](int kind, const void* next_norm) {
    q.kind = kind;
    q.next_norm = next_norm;
    const Shape& shape = q.shape[kind];
    simt::launch(kOp, linear_kernel<T, NT, kPacked>,
                 blocks_for(kOp, shape.tiles, kWarps / shape.split), threads, shared, stream, q);
  };
  SampleTokensParams s{};
  s.dtype = std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;
  s.rows = q.pictures;
  s.vocab = q.vocab;
  s.logits = q.logits;
  s.logits_strides[0] = s.uncond_strides[0] = q.logits_step;
  s.logits_strides[1] = s.uncond_strides[1] = 1;
  if (q.rows > q.pictures) {
    s.uncond = static_cast<const A*>(q.logits) + int64_t{q.pictures} * q.logits_step;
  }
  s.seed = q.seed;
  s.top_k = q.top_k;
  s.guidance = q.guidance;
  s.temperature = q.temperature;
  s.top_p = q.top_p;
  s.scratch = q.sample_scratch;
  for (q.step = 0; q.step < q.window; ++q.step) {
    q.layer[0] = p.layers > 0 ? p.layer[0] : UnfoldHeadLayer{};
    simt::launch(kOp, embed_kernel<T>,
                 blocks_for(kOp, int64_t{q.rows} * ceil_div(q.dim, 32), kWarps), threads, 0, stream,
                 q);
    for (int l = 0; l < q.layers; ++l) {
      q.layer[0] = p.layer[l];
      q.at_layer = l;
      linear(kQkv, nullptr);
      simt::launch(kOp, attend_kernel<T, kPacked>, blocks_for(kOp, int64_t{q.rows} * q.heads, 1),
                   dim3(32), 0, stream, q);
      linear(kOut, p.layer[l].ffn_norm);
      linear(kHidden, nullptr);
      linear(kDown, l + 1 < q.layers ? p.layer[l + 1].attention_norm : p.norm);
    }
    linear(kClassify, nullptr);
    s.position = {q.draws + int64_t{q.step} * q.pictures, 1};
    s.ids = q.drawn + int64_t{q.step} * q.pictures;
    s.valid = q.drawn_valid + int64_t{q.step} * q.pictures;
    sample_tokens(s, stream);
  }
  simt::launch(kOp, collect_kernel<T>, blocks_for(kOp, q.pictures, 256), dim3(256), 0, stream, q);
}

template <class T, int NT, bool kPacked>
void run_at_once(const UnfoldHeadParams& p, Launch<T> q, void* stream) {
  using R = Ring<T, kPacked, AllStages<T>>;
  if (p.layers > kMostLayers) {
    throw std::invalid_argument("unfold_head: layers must be at most " +
                                std::to_string(kMostLayers) + " where persistent, got " +
                                std::to_string(p.layers));
  }
  for (int64_t l = 0; l < p.layers; ++l) q.layer[l] = p.layer[l];
  const size_t rest = sizeof(SampleBoard) + kMostRows * sizeof(Acc<T>);
  const auto most = static_cast<size_t>(simt::most_shared(kOp));
  q.slots = ring_bytes(R::kManySlots) + rest <= most ? R::kManySlots : R::kFewSlots;
  const size_t shared = ring_bytes(q.slots) + rest;
  const auto kernel = all_kernel<T, NT, kPacked>;
  const int64_t blocks = simt::resident_blocks(kOp, kernel, dim3(kThreads), shared);
  if (blocks < 1) {
    throw std::invalid_argument("unfold_head: a block of the persistent kernel wants " +
                                std::to_string(shared) + " bytes of shared memory; this GPU has " +
                                std::to_string(most));
  }
  const int64_t tiles = ceil_div(q.vocab, kSampleTile), each = blocks / q.pictures;
  q.mass_bits = mass_bits(q.vocab);
  q.sample_parts = static_cast<int>(each < 2 ? 1 : each < tiles ? each : tiles);
  simt::launch_cooperative(kOp, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared,
                           stream, q);
}

template <class T, int NT, bool kPacked>
void run(const UnfoldHeadParams& p, const Launch<T>& q, void* stream) {
  set_up(p, q, stream);
  // Sampling in double beside the ring wants more than 128 registers: float64 takes its stages.
  if constexpr (!std::is_same_v<T, double>) {
    if (p.persistent) return run_at_once<T, NT, kPacked>(p, q, stream);
  }
  run_in_stages<T, NT, kPacked>(p, q, stream);
}

template <class T>
PerRow<T> after(const PerRow<T>& values, int64_t rows) {
  return {values.data ? values.data + rows * values.stride : nullptr, values.stride};
}

// Pictures first .. first + pictures: their rows are two runs of states where they are guided, so
// the second run's place is told by the stride between rows of one picture.
template <class T>
void run_pictures(const UnfoldHeadParams& p, int64_t first, int64_t pictures, void* stream) {
  Launch<T> q{};
  q.pictures = static_cast<int>(pictures);
  q.rows = static_cast<int>(p.rows / p.pictures * pictures);
  q.dim = static_cast<int>(p.dim);
  q.layers = static_cast<int>(p.layers);
  q.heads = static_cast<int>(p.heads);
  q.kv_heads = static_cast<int>(p.kv_heads);
  q.head_dim = static_cast<int>(p.head_dim);
  q.hidden = static_cast<int>(p.hidden);
  q.window = static_cast<int>(p.window);
  q.vocab = static_cast<int>(p.vocab);
  q.eps = p.eps;
  q.states = static_cast<const T*>(p.states) + first * p.states_strides[0];
  q.states_strides[0] = p.states_strides[0];
  q.states_strides[1] = p.states_strides[1];
  q.second = p.pictures * p.states_strides[0];
  q.tokens = p.tokens;
  q.positions = p.positions;
  q.norm = p.norm;
  q.classifier = p.classifier;
  q.seed = after(p.seed, first);
  q.position = after(p.position, first);
  q.top_k = after(p.top_k, first);
  q.guidance = after(p.guidance, first);
  q.temperature = after(p.temperature, first);
  q.top_p = after(p.top_p, first);
  q.ids = p.ids + first * p.window;
  q.valid = p.valid + first;
  const int64_t queries = p.heads * p.head_dim;
  q.shape[kQkv] = shape_of<T>(kQkv, p.dim, (p.heads + 2 * p.kv_heads) * p.head_dim / 2);
  q.shape[kOut] = shape_of<T>(kOut, queries, p.dim);
  q.shape[kHidden] = shape_of<T>(kHidden, p.dim, p.hidden);
  q.shape[kDown] = shape_of<T>(kDown, p.hidden, p.dim);
  q.shape[kClassify] = shape_of<T>(kClassify, p.dim, p.vocab);
  lay_out<T>(q, p, most_pictures<T>(p), p.scratch);
  if (!packs_all<T>(p)) {
    run<T, 1, false>(p, q, stream);
  } else if constexpr (stream::kTensor<T, T>) {
    q.rows <= 8 ? run<T, 1, true>(p, q, stream) : run<T, 4, true>(p, q, stream);
  } else {
    run<T, 1, true>(p, q, stream);
  }
}

}  // namespace
}  // namespace head

int64_t scratch_bytes(const UnfoldHeadParams& p) {
  int64_t bytes = 0;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    head::Launch<T> launch{};
    bytes = head::lay_out<T>(launch, p, head::most_pictures<T>(p), nullptr);
  });
  return bytes;
}

void unfold_head(const UnfoldHeadParams& p, void* stream) {
  if (p.window > head::kMostWindow) {
    throw std::invalid_argument("unfold_head: on CUDA positions may have " +
                                std::to_string(head::kMostWindow) + " rows, got " +
                                std::to_string(p.window));
  }
  constexpr int64_t kMost = 1 << 24;  // 32 rows of so many elements are numbered with 32 bits
  for (int64_t size : {p.dim, p.heads * p.head_dim, p.hidden, p.vocab}) {
    if (size > kMost) {
      throw std::invalid_argument("unfold_head: on CUDA sizes must be at most 2^24, got " +
                                  std::to_string(size));
    }
  }
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t most = head::most_pictures<T>(p);
    for (int64_t first = 0; first < p.pictures; first += most) {
      const int64_t left = p.pictures - first;
      head::run_pictures<T>(p, first, left < most ? left : most, stream);
    }
  });
}

}  // namespace synergen::cuda
