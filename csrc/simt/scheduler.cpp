// Who runs next, and how one thread gives way to another.
#include <bit>

#include "simt/machine.h"

namespace synergen::simt {
namespace {

// Priorities of warps that only wait count down from below all drawn ones.
constexpr uint64_t kDrawn = uint64_t{1} << 63;
constexpr uint64_t kRedrawOneIn = 1024;

uint64_t random_state = 1;

// The first runnable lane from `rotation` on.
unsigned next_lane(const Warp& warp) {
  const unsigned rotated = std::rotr(warp.runnable, static_cast<int>(warp.rotation));
  return (static_cast<unsigned>(std::countr_zero(rotated)) + warp.rotation) % kLanes;
}

void switch_to(Thread& next) {
  Thread& from = *current;
  current = &next;
  ++counts.switches;
  switch_context(from.context, next.context, from.state == State::kExited);
}

}  // namespace

// xorshift64* (Vigna, 2016).
uint64_t draw() {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545F4914F6CDD1Du >> 11;
}

void seed_draws(uint64_t seed) {
  random_state = seed * 0x9E3779B97F4A7C15u + 0x1234567u;
  for (int i = 0; i < 8; ++i) draw();
}

void ReadyQueue::push(Thread& thread) {
  if (options.policy != kRandom) return line_.push_back(&thread);
  Warp& warp = *thread.warp;
  if (warp.runnable == 0) ranked_.insert({warp.priority, &warp});
  warp.runnable |= 1u << thread.lane;
}

void ReadyQueue::push_last(Thread& thread) {
  if (options.policy == kLifo) return line_.push_front(&thread);
  if (options.policy == kRandom) rank(*thread.warp, --last_ % kDrawn);
  push(thread);
}

Thread* ReadyQueue::pop() {
  if (options.policy == kRandom) return pop_ranked();
  if (line_.empty()) return nullptr;
  Thread* next = options.policy == kLifo ? line_.back() : line_.front();
  options.policy == kLifo ? line_.pop_back() : line_.pop_front();
  return next;
}

// Fixed priorities between barriers let some warps run as far ahead as they can while others
// stall, which is what brings a missing barrier to light. If each step drew anew, all warps would
// keep one pace.
Thread* ReadyQueue::pop_ranked() {
  if (ranked_.empty()) return nullptr;
  Warp& warp = *ranked_.rbegin()->second;
  const unsigned lane = next_lane(warp);
  warp.runnable &= ~(1u << lane);
  if (warp.runnable == 0) ranked_.erase({warp.priority, &warp});
  if (draw() % kRedrawOneIn == 0) redraw(warp);
  return warp.lanes[lane];
}

void ReadyQueue::redraw(Warp& warp) {
  warp.rotation = static_cast<unsigned>(draw() % kLanes);
  rank(warp, kDrawn | draw());
}

void ReadyQueue::rank(Warp& warp, uint64_t priority) {
  const bool queued = warp.runnable != 0;
  if (queued) ranked_.erase({warp.priority, &warp});
  warp.priority = priority;
  if (queued) ranked_.insert({warp.priority, &warp});
}

void wait_as(State state, const char* doing, Where where) {
  current->state = state;
  current->doing = doing;
  current->where = where;
  machine->fruitless_spins = 0;
}

void wake(Thread& thread) {
  thread.state = State::kRunnable;
  machine->ready.push(thread);
}

void give_way() {
  Thread* next = machine->ready.pop();
  if (next == nullptr) stop(deadlock_report());
  if (next != current) switch_to(*next);
}

// Between spins of a thread any other runs; if for long nobody did anything but spin, nobody will.
void spin_pause(Where where) {
  constexpr uint64_t kEnough = 100000;
  const uint64_t spins = machine->fruitless_spins;
  wait_as(State::kRunnable, "spin_pause", where);
  machine->fruitless_spins = spins + 1;
  if (spins > kEnough + 64 * machine->threads.size()) {
    fail("livelock: spins at ", where, ", and no thread does anything else");
  }
  machine->ready.push_last(*current);
  give_way();
}

}  // namespace synergen::simt
