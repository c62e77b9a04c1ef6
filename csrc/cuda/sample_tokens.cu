// sample_tokens on the GPU: as many blocks to a row as fit the GPU at once, one a tile of 4,096
// tokens at most. The steps are those of sample.cuh.
//
// One launch. Between scan and weigh the grid waits for itself, a cooperative launch: about 1.5 us,
// where a second launch is 1.3 in a graph and 3 outside, and a barrier of the row's blocks alone
// would need counters that a launch before has set to zero. draw belongs to the row's last block.
// With one block a row nobody waits.
#include "cuda/sample.cuh"
#include "kernels.h"

namespace synergen::cuda {
namespace {

template <class Key>
struct SampleLaunch {
  SampleTokensParams p;
  SampleScratch<Key> scratch;  // of all rows
  unsigned parts;              // blocks to a row
  int tiles;                   // of a row
  int bits;
};

// 128 registers, one block to a multiprocessor: at 64 the keys that stay in registers and four
// masses at a time would spill.
template <class T, int N>
__global__ void __launch_bounds__(kSampleThreads, 1)
    sample_tokens_kernel(SampleLaunch<KeyOf<Acc<T>>> launch) {
  SIMT_SHARED(SampleBoard, board, [1]);
  const SampleTokensParams& p = launch.p;
  const int64_t r = blockIdx.x;
  const int part = static_cast<int>(blockIdx.y);
  // All of a row is asked for before anything is waited for: options and logits are one way to
  // memory and back, 0.7 us.
  const double guidance = p.guidance.at(r, 1.0);
  const SampleOptions asked{p.temperature.at(r, 1.0), p.top_p.at(r, 1.0), p.top_k.at(r, int64_t{0}),
                            0, launch.bits};
  const int64_t seed = p.seed.at(r, int64_t{0}), position = p.position.at(r, int64_t{0});
  const T* uncond = static_cast<const T*>(p.uncond);
  const RowLogits<T, N> logits{static_cast<const T*>(p.logits) + r * p.logits_strides[0],
                               uncond ? uncond + r * p.uncond_strides[0] : nullptr,
                               p.logits_strides[1],
                               p.uncond_strides[1],
                               p.vocab,
                               static_cast<Acc<T>>(guidance)};
  const SampleScratch<KeyOf<Acc<T>>> scratch = launch.scratch.row(r, launch.tiles);
  RowSampler<RowLogits<T, N>> row(logits, scratch, part, static_cast<int>(launch.parts), board[0]);
  if (threadIdx.x == 0) {
    board[0].options = asked;
    board[0].options.temperature =
        meant_temperature(guidance, asked.temperature, asked.top_p, asked.top_k);
    board[0].options.word =
        philox_word(static_cast<uint64_t>(seed), static_cast<uint64_t>(position));
  }
  row.scan();
  if (launch.parts > 1) {
    simt::grid_sync();
  } else {
    __syncthreads();
  }
  int64_t id = -1;
  bool writes = part == 0;
  if (board[0].options.temperature >= 0) {
    if (row.weigh()) {
      writes = last_to_arrive(scratch.arrived, launch.parts, board[0]);
      if (writes) id = row.draw();
    } else {
      id = row.answer();
    }
  }
  if (writes && threadIdx.x == 0) {
    p.ids[r] = id < 0 ? 0 : id;
    p.valid[r] = id >= 0;
  }
}

template <class T, int N>
void sample(const SampleTokensParams& p, void* stream) {
  const char* op = "sample_tokens";
  SampleLaunch<KeyOf<Acc<T>>> launch{
      p, {}, 1, static_cast<int>(ceil_div(p.vocab, kSampleTile)), mass_bits(p.vocab)};
  lay_out(launch.scratch, p.scratch, p.rows, launch.tiles);
  const auto kernel = sample_tokens_kernel<T, N>;
  const dim3 threads(kSampleThreads);
  const int64_t blocks = launch.tiles > 1 ? simt::resident_blocks(op, kernel, threads, 0) : 1;
  if (blocks >= 2 * p.rows) {
    // No more blocks than shorten the longest part.
    const int64_t most = blocks / p.rows < launch.tiles ? blocks / p.rows : launch.tiles;
    launch.parts = static_cast<unsigned>(ceil_div(launch.tiles, ceil_div(launch.tiles, most)));
    dim3 grid = blocks_for(op, p.rows, 1);
    grid.y = launch.parts;
    simt::launch_cooperative(op, kernel, grid, threads, 0, stream, launch);
  } else {
    simt::launch(op, kernel, blocks_for(op, p.rows, 1), threads, 0, stream, launch);
  }
}

}  // namespace

int64_t scratch_bytes(const SampleTokensParams& p) {
  const int64_t tiles = ceil_div(p.vocab, kSampleTile);
  if (p.dtype == DType::kFloat64) {
    SampleScratch<uint64_t> scratch;
    return lay_out(scratch, nullptr, p.rows, tiles);
  }
  SampleScratch<uint32_t> scratch;
  return lay_out(scratch, nullptr, p.rows, tiles);
}

void sample_tokens(const SampleTokensParams& p, void* stream) {
  if (p.vocab > INT32_MAX - kSampleTile) {  // places in a list are 32-bit
    throw std::invalid_argument("sample_tokens: V must be below 2^31 - 4096");
  }
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed =
        packs<T>(p.logits, p.logits_strides[1], p.logits_strides, 1) &&
        (p.uncond == nullptr || packs<T>(p.uncond, p.uncond_strides[1], p.uncond_strides, 1));
    if (packed) {
      sample<T, kPack<T>>(p, stream);
    } else {
      sample<T, 1>(p, stream);
    }
  });
}

}  // namespace synergen::cuda
