// What threads do together. Lanes of a warp wait with their operands until the last of the mask
// comes; it runs the operation for all of them. Barriers count threads.
#include <algorithm>
#include <bit>
#include <string_view>

#include "simt/machine.h"

namespace synergen::simt {
namespace {

// ---- Warps

void check_mask(const Thread& me) {
  if ((me.mask >> me.lane & 1) == 0) {
    fail(me.doing, " at ", me.where, ": lane ", me.lane, " is not in its mask 0x", std::hex,
         me.mask);
  }
  if (const unsigned absent = me.mask & ~me.warp->exists) {
    fail(me.doing, " at ", me.where, ": lane ", std::countr_zero(absent),
         " of its mask does not exist");
  }
  if (const unsigned exited = me.mask & me.warp->exited) {
    fail(me.doing, " at ", me.where, ": lane ", std::countr_zero(exited),
         " of its mask has exited");
  }
}

bool same_operation(const Thread& a, const Thread& b) {
  return a.body == b.body && a.mask == b.mask && a.where.line() == b.where.line() &&
         std::string_view(a.where.file_name()) == b.where.file_name();
}

// Lanes of my mask that wait already must have come for the same operation. They agree with each
// other, so one speaks for all.
void check_agreement(const Thread& me) {
  const unsigned others = me.mask & me.warp->waiting;
  if (others == 0) return;
  const Thread& other = *me.warp->lanes[std::countr_zero(others)];
  if (same_operation(me, other)) return;
  fail("divergent warp: lane ", me.lane, " in ", me.doing, " at ", me.where, " with mask 0x",
       std::hex, me.mask, std::dec, ", lane ", other.lane, " in ", other.doing, " at ", other.where,
       " with mask 0x", std::hex, other.mask);
}

void join_lanes(const Thread& me) {
  if (race_detector == nullptr) return;
  std::vector<uint32_t> ids;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (me.mask >> lane & 1) ids.push_back(me.warp->lanes[lane]->id);
  }
  race_detector->join(ids);
}

void run_for_warp(const Thread& me) {
  Operand* lanes[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (me.mask >> lane & 1) lanes[lane] = me.warp->lanes[lane]->operand;
  }
  me.body(lanes);
}

void wake_lanes(const Thread& me) {
  const unsigned mask = me.mask;
  me.warp->waiting &= ~mask;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) wake(*me.warp->lanes[lane]);
  }
}

// ---- Bodies

int source_lane(const Operand& operand, int lane) {
  const int first = lane & ~(operand.width - 1);
  const int last = first + operand.width - 1;
  int source = lane;
  switch (operand.mode) {
    case Shuffle::kIndex:
      return first | (operand.source & (operand.width - 1));
    case Shuffle::kUp:
      source = lane - operand.source;
      return source < first ? lane : source;
    case Shuffle::kDown:
      source = lane + operand.source;
      return source > last ? lane : source;
    case Shuffle::kXor:
      source = lane ^ operand.source;
      return source > last ? lane : source;
  }
  return lane;
}

void shuffle_body(Operand* const* lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane] == nullptr) continue;
    const int source = source_lane(*lanes[lane], lane);
    if (source < 0 || source >= kLanes || lanes[source] == nullptr) {
      fail("shuffle at ", current->where, ": lane ", lane, " reads lane ", source,
           ", which is not in the mask");
    }
    lanes[lane]->result = lanes[source]->value;
  }
}

void ballot_body(Operand* const* lanes) {
  uint64_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane] != nullptr) result |= lanes[lane]->value << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane] != nullptr) lanes[lane]->result = result;
  }
}

void match_body(Operand* const* lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane] == nullptr) continue;
    for (int other = 0; other < kLanes; ++other) {
      if (lanes[other] == nullptr || lanes[other]->value != lanes[lane]->value) continue;
      lanes[lane]->result |= uint64_t{1} << other;
    }
  }
}

void add_body(Operand* const* lanes) {
  uint64_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane] != nullptr) sum += lanes[lane]->value;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane] != nullptr) lanes[lane]->result = sum;
  }
}

void most_body(Operand* const* lanes) {
  uint64_t most = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane] != nullptr) most = std::max(most, lanes[lane]->value);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane] != nullptr) lanes[lane]->result = most;
  }
}

void no_body(Operand* const*) {}

// ---- Barriers

int votes_result(Vote vote, int votes, int threads) {
  if (vote == Vote::kAny) return votes > 0;
  if (vote == Vote::kAll) return votes == threads;
  return votes;
}

void check_barrier(const Barrier& barrier, int threads, Where where) {
  const Block& block = *current->block;
  if (block.alive < threads) {
    fail("waits at ", where, " for ", threads, " threads, but ", block.alive,
         " of the block are left: the others exited early");
  }
  if (barrier.waiting.empty()) return;
  if (barrier.expected != threads) {
    fail("divergent barrier: ", where, " expects ", threads, " threads, ", barrier.where,
         " expects ", barrier.expected);
  }
}

// The whole block must come to one barrier in one line. Parts of it may meet from different lines,
// as where one warp produces what another consumes.
void check_same_line(const Barrier& barrier, Where where) {
  if (barrier.waiting.empty() || barrier.where.line() == where.line()) return;
  fail("divergent barrier: ", where, " meets ", barrier.where);
}

void release(Barrier& barrier, Vote vote) {
  std::vector<Thread*> threads;
  threads.swap(barrier.waiting);
  const auto by_rank = [](const Thread* a, const Thread* b) { return a->rank < b->rank; };
  std::sort(threads.begin(), threads.end(), by_rank);
  barrier.result = votes_result(vote, barrier.votes, barrier.expected);
  barrier.votes = 0;
  if (race_detector != nullptr) {
    std::vector<uint32_t> ids;
    for (const Thread* thread : threads) ids.push_back(thread->id);
    race_detector->join(ids);
  }
  for (Warp& warp : current->block->warps) machine->ready.redraw(warp);
  for (Thread* thread : threads) wake(*thread);
}

// Hardware counts warps, so the threads of a barrier must be whole ones.
void check_whole_warps(const Barrier& barrier) {
  for (const Thread* thread : barrier.waiting) {
    for (const Thread* other : thread->warp->lanes) {
      if (other == nullptr) continue;
      if (other->state == State::kBarrier && other->barrier == &barrier) continue;
      fail("barrier at ", barrier.where, " is full with a part of the warp of thread ",
           thread->rank);
    }
  }
}

int barrier(int id, int threads, Vote vote, bool predicate, Where where) {
  Barrier& barrier = current->block->barriers[id];
  const bool whole_block = threads == static_cast<int>(current->block->threads.size());
  ++counts.barriers;
  check_barrier(barrier, threads, where);
  if (whole_block) check_same_line(barrier, where);
  wait_as(State::kBarrier, whole_block ? "__syncthreads" : "named_barrier", where);
  barrier.expected = threads;
  if (barrier.waiting.empty()) barrier.where = where;
  barrier.waiting.push_back(current);
  current->barrier = &barrier;
  barrier.votes += predicate;
  if (static_cast<int>(barrier.waiting.size()) == threads) {
    check_whole_warps(barrier);
    release(barrier, vote);
  }
  give_way();
  return barrier.result;
}

void release_grid() {
  machine->at_grid_sync.clear();
  if (race_detector != nullptr) {
    std::vector<uint32_t> ids;
    for (const Thread& thread : machine->threads) ids.push_back(thread.id);
    race_detector->join(ids);
  }
  for (Block& block : machine->slots) {
    for (Warp& warp : block.warps) machine->ready.redraw(warp);
  }
  for (Thread& thread : machine->threads) wake(thread);
}

}  // namespace

void warp_op(const char* name, unsigned mask, Operand& operand, WarpBody body, Where where) {
  Thread& me = *current;
  ++counts.warp_ops;
  wait_as(State::kWarpOp, name, where);
  me.mask = mask;
  me.operand = &operand;
  me.body = body;
  check_mask(me);
  check_agreement(me);
  me.warp->waiting |= 1u << me.lane;
  if ((mask & ~me.warp->waiting) == 0) {
    run_for_warp(me);
    if (body == no_body) join_lanes(me);  // __syncwarp alone orders memory
    wake_lanes(me);
  }
  give_way();
}

void sync_warp(unsigned mask, Where where) {
  Operand operand;
  warp_op("__syncwarp", mask, operand, no_body, where);
}

uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t value, int source, int width, Where where) {
  if (width <= 0 || width > kLanes || (width & (width - 1)) != 0) {
    fail("shuffle at ", where, ": width ", width, " is not a power of 2 up to 32");
  }
  Operand operand;
  operand.value = value;
  operand.mode = mode;
  operand.source = source;
  operand.width = width;
  warp_op("shuffle", mask, operand, shuffle_body, where);
  return operand.result;
}

unsigned ballot(unsigned mask, bool predicate, Where where) {
  Operand operand;
  operand.value = predicate;
  warp_op("vote", mask, operand, ballot_body, where);
  return static_cast<unsigned>(operand.result);
}

unsigned match_any(unsigned mask, uint64_t value, Where where) {
  Operand operand;
  operand.value = value;
  warp_op("match", mask, operand, match_body, where);
  return static_cast<unsigned>(operand.result);
}

unsigned reduce_add(unsigned mask, unsigned value, Where where) {
  Operand operand;
  operand.value = value;
  warp_op("reduce", mask, operand, add_body, where);
  return static_cast<unsigned>(operand.result);
}

unsigned reduce_max(unsigned mask, unsigned value, Where where) {
  Operand operand;
  operand.value = value;
  warp_op("reduce", mask, operand, most_body, where);
  return static_cast<unsigned>(operand.result);
}

void sync_block(Where where) { vote_block(Vote::kAny, false, where); }

int vote_block(Vote vote, bool predicate, Where where) {
  return barrier(0, static_cast<int>(current->block->threads.size()), vote, predicate, where);
}

void named_barrier(int id, int threads, Where where) {
  if (id < 0 || id >= kBarriers) fail("named_barrier at ", where, ": id ", id, " is not 0 to 15");
  const int most = static_cast<int>(current->block->threads.size());
  if (threads <= 0 || threads > most || threads % kLanes != 0) {
    fail("named_barrier at ", where, ": ", threads, " threads are not whole warps of a block of ",
         most);
  }
  barrier(id, threads, Vote::kAny, false, where);
}

void grid_sync(Where where) {
  if (!machine->launch.cooperative) fail("grid_sync at ", where, ": the launch is not cooperative");
  std::vector<Thread*>& waiting = machine->at_grid_sync;
  ++counts.grid_syncs;
  for (const Block& block : machine->slots) {
    if (block.alive < static_cast<int>(block.threads.size())) {
      fail("waits in grid_sync at ", where, ", but threads of block ", block.index,
           " exited early");
    }
  }
  if (!waiting.empty() && waiting.front()->where.line() != where.line()) {
    fail("divergent grid_sync: ", where, " meets ", waiting.front()->where);
  }
  wait_as(State::kGridSync, "grid_sync", where);
  waiting.push_back(current);
  if (waiting.size() == machine->threads.size()) release_grid();
  give_way();
}

}  // namespace synergen::simt
