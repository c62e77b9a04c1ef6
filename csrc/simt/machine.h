// Inside the emulator: the threads, warps and blocks of the launch that runs, and who may run next.
// One launch at a time; everything happens in the thread that launched.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "simt/emulator.h"
#include "simt/fibers.h"

namespace synergen::simt {

constexpr int kLanes = 32;
constexpr int kBarriers = 16;
constexpr size_t kCopyBytes = 16;                 // of cp.async, and of a row of ldmatrix
constexpr size_t kMostThreads = 1024;             // of a block
constexpr size_t kMostDynamicShared = 227 << 10;  // of a block, on sm_90
constexpr size_t kMostStaticShared = 48 << 10;

struct Barrier;
struct Block;
struct Warp;

// What a lane brings to a warp-wide operation, and what it takes away: each uses some of it.
struct Operand {
  uint64_t value = 0, result = 0;
  Shuffle mode = Shuffle::kIndex;
  int source = 0, width = kLanes;             // shuffle
  const void* row = nullptr;                  // ldmatrix
  uint32_t* rows = nullptr;                   // ldmatrix, 4
  float* d = nullptr;                         // mma, 4
  const uint32_t *a = nullptr, *b = nullptr;  // mma, 4 and 2
};

// Runs once for a warp; lanes[i] is null where i is not in the mask.
using WarpBody = void (*)(Operand* const* lanes);

enum class State { kRunnable, kWarpOp, kBarrier, kGridSync, kExited };

struct Copy {
  char* to;
  const char* from;  // null: zeros
  bool landed;
  Where where;
};

struct Thread {
  Context context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  size_t stack = 0;
  uint3 index{};
  unsigned rank = 0;  // in the block
  unsigned lane = 0;
  uint32_t id = 0;  // in the launch
  State state = State::kExited;
  const char* doing = "";  // what it waits for, and where
  Where where;
  const Barrier* barrier = nullptr;  // the last it came to
  unsigned mask = 0;
  WarpBody body = nullptr;
  Operand* operand = nullptr;
  std::vector<Copy> open;                 // cp.async not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  uint64_t priority = 0;
  unsigned rotation = 0;  // the lane that goes first
  // Of lanes, a bit each. `waiting`: in a warp operation.
  unsigned runnable = 0, exists = 0, exited = 0, waiting = 0;
  std::array<Thread*, kLanes> lanes{};  // null beyond the block's end
};

struct Barrier {
  int expected = 0;
  int votes = 0, result = 0;
  Where where;  // of the first to arrive
  std::vector<Thread*> waiting;
};

// A shared array, with guards on both sides where AddressSanitizer does not see to its ends.
struct SharedArray {
  const void* key;  // null: the dynamic one
  unsigned char* memory;
  unsigned char* data;
  size_t bytes;
};

struct Block {
  uint3 index{};
  uint64_t id = 0;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  int alive = 0;
  std::array<Barrier, kBarriers> barriers;
  std::vector<SharedArray> shared;
};

// Hooks of the race detector, which is linked in race builds only.
class RaceDetector {
 public:
  virtual ~RaceDetector() = default;
  virtual void begin(const Launch& launch) = 0;
  virtual void start(uint32_t thread) = 0;
  virtual void exit(uint32_t thread) = 0;
  virtual void join(const std::vector<uint32_t>& threads) = 0;  // all saw what each had done
  virtual void access(const void* p, size_t bytes, bool write, Where where) = 0;
  virtual void atomic(const void* p, size_t bytes, bool write, Order order, Where where) = 0;
  virtual void fence() = 0;
  virtual void copy_issued(const void* to, Where where) = 0;
  virtual void copy_landed(const void* to, Where where) = 0;
  virtual void shared_begins(const SharedArray& array, size_t guard) = 0;
  virtual void shared_ends(const SharedArray& array, size_t guard) = 0;
  virtual std::string report() = 0;
};
extern RaceDetector* race_detector;  // null: not a race build

// Threads that can run, in the order of the policy.
class ReadyQueue {
 public:
  void push(Thread& thread);
  void push_last(Thread& thread);  // for who only waits: all others first
  Thread* pop();                   // null: none
  void redraw(Warp& warp);         // a new priority

 private:
  void rank(Warp& warp, uint64_t priority);
  Thread* pop_ranked();
  std::deque<Thread*> line_;
  std::set<std::pair<uint64_t, Warp*>> ranked_;  // warps with a runnable lane
  uint64_t last_ = 0;
};

struct Machine {
  Machine(const Launch& launch, const std::function<void()>& body, size_t resident);
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  void run();

  const Launch& launch;
  const std::function<void()>& body;
  uint64_t blocks_left;
  std::vector<uint32_t> order;  // of blocks
  Stacks stacks;
  std::vector<Thread> threads;
  std::vector<Block> slots;
  ReadyQueue ready;
  Context launching;
  Block* finished = nullptr;
  size_t running_slots = 0;
  std::vector<Thread*> at_grid_sync;
  uint64_t fruitless_spins = 0;
  std::string error;

 private:
  void start(Block& block);
  void start(Thread& thread, Block& block, unsigned rank);
  void finish(Block& block);
};

extern Machine* machine;  // null: no launch
extern Thread* current;   // null: the launching thread runs
extern Options options;
extern Stats counts;

uint64_t draw();
void seed_draws(uint64_t seed);

inline size_t size_of(const dim3& d) { return size_t{d.x} * d.y * d.z; }

// ---- Scheduling

void wait_as(State state, const char* doing, Where where);  // notes it; then comes give_way
void give_way();
void wake(Thread& thread);

// One lane's part of `body`, which runs once for the warp.
void warp_op(const char* name, unsigned mask, Operand& operand, WarpBody body, Where where);

// ---- Shared memory

// Of 16 bytes, as cp.async and ldmatrix need them.
void check_shared(const void* p, const char* what, Where where);
void create_dynamic_shared(Block& block);
std::string destroy_shared(Block& block);  // what was wrong with it, or nothing
void land_copies(Thread& thread, size_t groups_left);

// ---- Reports

std::ostream& operator<<(std::ostream& out, const Where& where);  // emulator.cpp:12
std::ostream& operator<<(std::ostream& out, const uint3& index);

template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}
std::string file_name(const std::string& path);
std::string source_lines(uintptr_t address);  // of the instruction before it, inlined ones first
std::string deadlock_report();

// Ends the launch with this report. Fibers are abandoned where they stand, so no caller may own
// memory.
[[noreturn]] void stop(std::string report);

// The same, with the current block and thread first.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  stop(text_of("block ", current->block->index, " thread ", current->index, " ", parts...));
}

}  // namespace synergen::simt
