// The life of a launch: blocks start in an order of the policy's choice, run until their last
// thread exits, and make room for the next.
#include "simt/emulator.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "simt/machine.h"

namespace synergen::simt {

Machine* machine = nullptr;
Thread* current = nullptr;
Options options;
Stats counts;
RaceDetector* race_detector = nullptr;

namespace {

std::mutex one_launch;
std::string last_races;

uint3 unflatten(uint64_t i, const dim3& size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

// CUDA promises no order of blocks.
std::vector<uint32_t> block_order(size_t blocks) {
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (options.policy == kLifo) std::reverse(order.begin(), order.end());
  if (options.policy != kRandom) return order;
  for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  return order;
}

// A lane that others wait for in a warp operation, or a thread that a barrier counts on, must not
// exit.
void check_nobody_waits_for(const Thread& me) {
  for (const Thread* other : me.warp->lanes) {
    if (other == nullptr || other->state != State::kWarpOp) continue;
    if ((other->mask >> me.lane & 1) == 0) continue;
    fail("exits while lane ", other->lane, " waits for it in ", other->doing, " at ", other->where);
  }
  for (const Barrier& barrier : me.block->barriers) {
    if (barrier.waiting.empty() || me.block->alive >= barrier.expected) continue;
    fail("exits while ", barrier.waiting.size(), " threads of its block wait at ", barrier.where);
  }
  if (!machine->at_grid_sync.empty()) {
    fail("exits while ", machine->at_grid_sync.size(), " threads wait in grid_sync at ",
         machine->at_grid_sync.front()->where);
  }
}

void check_copies_are_done(const Thread& me) {
  if (!me.open.empty()) {
    fail("exits with cp.async not committed, from ", me.open.front().where);
  }
  for (const std::vector<Copy>& group : me.groups) {
    if (group.empty()) continue;
    fail("exits with cp.async in flight, from ", group.front().where);
  }
}

// A finished block is cleared away by the launching thread: its last fiber still stands on its
// stack.
void leave() {
  Thread& me = *current;
  --me.block->alive;
  check_copies_are_done(me);
  check_nobody_waits_for(me);
  me.state = State::kExited;
  me.warp->exited |= 1u << me.lane;
  machine->fruitless_spins = 0;
  if (race_detector != nullptr) race_detector->exit(me.id);
  if (me.block->alive > 0) give_way();
  machine->finished = me.block;
  switch_context(me.context, machine->launching, true);
}

void thread_main() {
  enter_fiber(machine->launching);
  machine->body();
  leave();
  std::abort();
}

// Why a launch cannot be, or nothing.
std::string refusal(const Launch& launch) {
  const size_t threads = size_of(launch.block);
  if (threads == 0 || size_of(launch.grid) == 0) return "the grid or the block is empty";
  if (threads > kMostThreads) {
    return text_of("a block may have ", kMostThreads, " threads, got ", threads);
  }
  if (launch.dynamic_shared_bytes > kMostDynamicShared) {
    return text_of("a block may have ", kMostDynamicShared, " bytes of shared memory, got ",
                   launch.dynamic_shared_bytes);
  }
  return "";
}

size_t resident(const Launch& launch) {
  const size_t blocks = size_of(launch.grid);
  const size_t wanted = static_cast<size_t>(std::max(options.resident_blocks, 1));
  return launch.cooperative ? blocks : std::min(blocks, wanted);
}

std::string run_checked(const Launch& launch, const std::function<void()>& body) {
  std::string report = refusal(launch);
  if (!report.empty()) return report;
  seed_draws(options.seed);
  Machine running(launch, body, resident(launch));
  running.run();
  last_races = race_detector != nullptr ? race_detector->report() : "";
  report = running.error;
  if (!report.empty() && !last_races.empty()) report += "\n";
  return report + last_races;
}

}  // namespace

Machine::Machine(const Launch& launch, const std::function<void()>& body, size_t resident)
    : launch(launch),
      body(body),
      blocks_left(size_of(launch.grid)),
      order(block_order(blocks_left)),
      stacks(resident * size_of(launch.block)),
      threads(resident * size_of(launch.block)),
      slots(resident) {
  const size_t per_block = size_of(launch.block);
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i].stack = i;
    slots[i / per_block].threads.push_back(&threads[i]);
  }
  machine = this;
}

Machine::~Machine() {
  for (Block& block : slots) destroy_shared(block);
  machine = nullptr;
  current = nullptr;
}

void Machine::run() {
  if (race_detector != nullptr) race_detector->begin(launch);
  if (!error.empty()) return;
  for (Block& block : slots) start(block);
  while (running_slots > 0) {
    current = ready.pop();
    if (current == nullptr) error = deadlock_report();
    if (!error.empty()) return;
    ++counts.switches;
    switch_context(launching, current->context, false);
    current = nullptr;
    if (!error.empty()) return;
    finish(*finished);
  }
}

void Machine::start(Block& block) {
  block.id = order[order.size() - blocks_left--];
  block.index = unflatten(block.id, launch.grid);
  block.alive = static_cast<int>(block.threads.size());
  block.warps.assign((block.threads.size() + kLanes - 1) / kLanes, Warp());
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  create_dynamic_shared(block);
  ++running_slots;
  for (Warp& warp : block.warps) ready.redraw(warp);
  for (unsigned rank = 0; rank < block.threads.size(); ++rank) {
    start(*block.threads[rank], block, rank);
  }
}

void Machine::start(Thread& thread, Block& block, unsigned rank) {
  thread.block = &block;
  thread.warp = &block.warps[rank / kLanes];
  thread.index = unflatten(rank, launch.block);
  thread.rank = rank;
  thread.lane = rank % kLanes;
  thread.id = static_cast<uint32_t>(block.id * block.threads.size() + rank);
  thread.doing = "start";
  thread.where = Where();
  thread.groups.clear();
  thread.warp->lanes[thread.lane] = &thread;
  thread.warp->exists |= 1u << thread.lane;
  stacks.prepare(thread.stack, thread.context, thread_main);
  if (race_detector != nullptr) race_detector->start(thread.id);
  wake(thread);
}

void Machine::finish(Block& block) {
  error = destroy_shared(block);
  if (!error.empty()) error = text_of("block ", block.index, " ", error);
  --running_slots;
  finished = nullptr;
  if (error.empty() && blocks_left > 0) start(block);
}

void run_grid(const Launch& launch, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  ++counts.launches;
  last_races.clear();
  const std::string report = run_checked(launch, thread);
  if (!report.empty()) throw std::runtime_error(text_of(launch.op, ": emulator: ", report));
}

void set_options(const Options& wanted) {
  const std::lock_guard<std::mutex> lock(one_launch);
  options = wanted;
  counts = {};
}
const Stats& stats() { return counts; }
std::string race_report() { return last_races; }

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
dim3 block_size() { return machine->launch.block; }
dim3 grid_size() { return machine->launch.grid; }

void stop(std::string report) {
  machine->error.swap(report);
  switch_context(current->context, machine->launching, true);
  std::abort();
}

}  // namespace synergen::simt

// For ctypes.
extern "C" {
#define SIMT_EXPORT __attribute__((visibility("default")))
SIMT_EXPORT void simt_set_options(int policy, uint64_t seed, int resident_blocks) {
  synergen::simt::set_options({policy, seed, resident_blocks});
}
SIMT_EXPORT const synergen::simt::Stats* simt_stats() { return &synergen::simt::stats(); }
SIMT_EXPORT const char* simt_race_report() { return synergen::simt::last_races.c_str(); }
}
