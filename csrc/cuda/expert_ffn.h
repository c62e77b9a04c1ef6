// What the launchers of expert_ffn, forward and backward, share: rows sorted by expert, and the
// scratch memory.
#pragma once

#include "cuda/route_tokens.h"

namespace synergen::cuda {

// The rows of one expert that a block takes: from `begin`, at most as many as its tile is high.
struct RowTile {
  int32_t expert;  // negative: there is no such tile
  int32_t begin;
};

// Rows are the pairs (token, j) that have an expert, sorted by it. Pairs are numbered token * top_k
// + j, in 32 bits: with as many, x would be gigabytes for every column.
struct Experts {
  bool tensor_cores;        // or plain multiply-adds
  DType inner;              // of what passes from launch to launch: as x, or the type of the sums
  int64_t pairs;            // tokens * top_k
  int64_t tiles;            // an upper bound: how many there are, the host does not know
  Router router;            // where the caller brings no routing
  const int32_t* order;     // [pairs]: the pair of each row
  const int32_t* offsets;   // [experts + 1]: rows of expert e are offsets[e] .. offsets[e + 1]
  const int32_t* token_of;  // [pairs]: the token of each row, so that no product divides
  int32_t* divided;         // the memory of token_of; not where top_k is 1, whose pairs are tokens
  RowTile* row_tiles;       // [tiles]
};

struct Forward : ExpertFfnParams, Experts {
  void* activations;  // [rows, hidden]: silu(gate x) * up x; or null: not wanted
  void* pair_rows;    // [pairs, dim], where top_k > 1
};

// `aligned`: what a backward pass has besides is contiguous along rows, in 16-byte pieces.
Experts prepare_experts(const ExpertFfnParams& p, bool aligned);
void carve_routing(Carver& carver, const ExpertFfnParams& p, Experts& e);

// Sorts the pairs, unless the caller has, and lists the tiles.
void route(const char* op, const Forward& p, void* stream);
// gate_pre, up_pre and activations, those that are not null.
void gate_up(const char* op, const Forward& p, void* stream);
// y from pair_rows where top_k > 1; tokens, and rows of gate_pre and up_pre, without an expert.
void finish_tokens(const char* op, const Forward& p, void* stream);

// expert_ffn_stream.cu: few pairs, whose weights are read as fast as memory gives them.
bool streams(const ExpertFfnParams& p);
int64_t expert_ffn_stream_scratch(const ExpertFfnParams& p);
void expert_ffn_stream(const ExpertFfnParams& p, void* stream);

}  // namespace synergen::cuda
