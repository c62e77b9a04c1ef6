// The race detector. Kernels compiled with -fsanitize=thread call __tsan_read4 and the like at each
// access; libtsan is not linked, these are here, and order follows CUDA's rules: barriers and
// __syncwarp order memory; shuffles, votes and matrix instructions do not; atomics are relaxed
// unless named otherwise or next to a fence; an asynchronous copy ends at its thread's wait.
#include <cstring>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>

#include "simt/clock.h"
#include "simt/machine.h"
#include "simt/shadow.h"

namespace synergen::simt {
namespace {

constexpr size_t kMostCooperative = 8192;  // threads: each may come to know all others
constexpr size_t kMostPlain = 1 << 20;
constexpr size_t kMostFindings = 8;
constexpr size_t kMostReaders = 16;  // remembered of a cell; beyond that one makes room

Site site_of(Where where) { return {where.file_name(), where.line()}; }

struct Progress {
  std::shared_ptr<const Clock> known;
  uint32_t time = 1;
  Clock pending;                        // what relaxed loads saw: known after a fence
  std::shared_ptr<const Clock> fenced;  // what relaxed stores publish
};

std::string lines_of(const Site& site) {
  if (site.file == nullptr) return source_lines(site.line);
  return text_of(file_name(site.file), ":", site.line);
}

class HappensBefore : public RaceDetector {
 public:
  void begin(const Launch& launch) override;
  void start(uint32_t thread) override { threads_[thread] = Progress(); }
  void exit(uint32_t thread) override { threads_[thread] = Progress(); }
  void join(const std::vector<uint32_t>& threads) override;
  void access(const void* p, size_t bytes, bool write, Where where) override {
    touch(p, bytes, {.write = write, .site = site_of(where)});
  }
  void atomic(const void* p, size_t bytes, bool write, Order order, Where where) override;
  void fence() override;
  void copy_issued(const void* to, Where where) override {
    touch(to, kCopyBytes, {.write = true, .in_flight = true, .site = site_of(where)});
  }
  void copy_landed(const void* to, Where where) override;
  void shared_begins(const SharedArray& array, size_t guard) override;
  void shared_ends(const SharedArray& array, size_t guard) override;
  std::string report() override;

  void touch(const void* p, size_t bytes, Epoch now);

 private:
  struct Finding {
    const char* kind;
    Epoch now, before;
  };

  void touch_cell(Cell& cell, const Epoch& now);
  void check_order(const Cell& cell, const Epoch& now);
  void remember_read(Cell& cell, const Epoch& now);
  void remember_write(Cell& cell, const Epoch& now);
  bool ordered(const Epoch& before) const;
  bool conflicts(const Epoch& before, const Epoch& now) const;
  void find(const char* kind, const Epoch& now, const Epoch& before);
  std::string place_of(const Epoch& epoch) const;
  void learn(Progress& me, const Clock& more);
  void publish(Progress& me, uint32_t id, Clock& to);
  Progress& mine() { return threads_[current->id]; }
  const Progress& mine() const { return threads_[current->id]; }

  size_t block_threads_ = 1;
  std::vector<Progress> threads_;
  std::unordered_map<const void*, Clock> words_;  // what an atomic publishes
  Shadow shadow_;
  std::set<std::tuple<const char*, Site, Site>> seen_;
  std::vector<Finding> findings_;
};

void HappensBefore::begin(const Launch& launch) {
  shadow_.clear();
  words_.clear();
  seen_.clear();
  findings_.clear();
  block_threads_ = size_of(launch.block);
  const size_t threads = size_of(launch.grid) * block_threads_;
  const size_t most = launch.cooperative ? kMostCooperative : kMostPlain;
  if (threads > most) {
    machine->error = text_of("the race detector takes ", most, " threads in a ",
                             launch.cooperative ? "cooperative " : "", "launch, got ", threads);
    return;
  }
  threads_.assign(threads, Progress());
}

// ---- Order

void HappensBefore::join(const std::vector<uint32_t>& threads) {
  auto merged = std::make_shared<Clock>();
  const Clock* last = nullptr;  // neighbours mostly share theirs
  for (uint32_t id : threads) {
    const Progress& thread = threads_[id];
    if (thread.known != nullptr && thread.known.get() != last) merged->merge(*thread.known);
    last = thread.known.get();
    merged->raise(id, thread.time);
  }
  for (uint32_t id : threads) {
    threads_[id].known = merged;
    ++threads_[id].time;
  }
}

void HappensBefore::learn(Progress& me, const Clock& more) {
  if (more.empty() || (me.known != nullptr && me.known->covers(more))) return;
  auto known = me.known == nullptr ? std::make_shared<Clock>() : std::make_shared<Clock>(*me.known);
  known->merge(more);
  me.known = known;
}

void HappensBefore::publish(Progress& me, uint32_t id, Clock& to) {
  if (me.known != nullptr) to.merge(*me.known);
  to.raise(id, me.time);
  ++me.time;
}

void HappensBefore::atomic(const void* p, size_t bytes, bool write, Order order, Where where) {
  touch(p, bytes, {.write = write, .atomic = true, .site = site_of(where)});
  Progress& me = mine();
  Clock& word = words_[p];
  if (order == Order::kAcquire) {
    learn(me, word);
  } else {
    me.pending.merge(word);
  }
  if (order == Order::kRelease) {
    publish(me, current->id, word);
  } else if (write && me.fenced != nullptr) {
    word.merge(*me.fenced);
  }
}

void HappensBefore::fence() {
  Progress& me = mine();
  learn(me, me.pending);
  auto fenced = std::make_shared<Clock>();
  publish(me, current->id, *fenced);
  me.fenced = fenced;
}

bool HappensBefore::ordered(const Epoch& before) const {
  if (before.thread == current->id) return true;
  const Progress& me = mine();
  return me.known != nullptr && before.time <= (*me.known)[before.thread];
}

bool HappensBefore::conflicts(const Epoch& before, const Epoch& now) const {
  if ((before.bytes & now.bytes) == 0) return false;
  if (!before.write && !now.write) return false;
  if (before.atomic && now.atomic) return false;
  return !ordered(before);
}

// ---- Cells

void HappensBefore::touch(const void* p, size_t bytes, Epoch now) {
  if (current == nullptr || machine->stacks.hold(p)) return;
  now.thread = current->id;
  now.time = mine().time;
  shadow_.for_cells(p, bytes, [&](Cell& cell, uint8_t of_cell) {
    now.bytes = of_cell;
    touch_cell(cell, now);
  });
}

void HappensBefore::touch_cell(Cell& cell, const Epoch& now) {
  if (cell.outside & now.bytes) find("access outside a shared array", now, {});
  if ((cell.undefined & now.bytes) && (!now.write || now.atomic)) {
    ++counts.uninitialised;
    find("read of shared memory that was not written", now, {});
  }
  cell.undefined &= static_cast<uint8_t>(~now.bytes);
  check_order(cell, now);
  now.write ? remember_write(cell, now) : remember_read(cell, now);
}

void HappensBefore::check_order(const Cell& cell, const Epoch& now) {
  if (cell.write.in_flight && (cell.write.bytes & now.bytes)) {
    find(now.write ? "write over cp.async in flight" : "read of cp.async in flight", now,
         cell.write);
    return;
  }
  if (conflicts(cell.write, now)) {
    find(now.write ? "race of two writes" : "race of a read with an earlier write", now,
         cell.write);
    return;
  }
  for (const Epoch& before : cell.others) {
    if (!conflicts(before, now)) continue;
    const char* kind = "race of a write with an earlier read";
    if (before.write) {
      kind = now.write ? "race of two writes" : "race of a read with an earlier write";
    }
    return find(kind, now, before);
  }
}

// What is ordered before this read need not be kept: who races with it races with this one too.
void HappensBefore::remember_read(Cell& cell, const Epoch& now) {
  const auto replaced = [&](const Epoch& e) {
    return !e.write && (e.bytes & ~now.bytes) == 0 && (!e.atomic || now.atomic) && ordered(e);
  };
  std::erase_if(cell.others, replaced);
  if (cell.others.size() < kMostReaders) {
    cell.others.push_back(now);
  } else {
    cell.others[now.thread % kMostReaders] = now;
  }
}

void HappensBefore::remember_write(Cell& cell, const Epoch& now) {
  std::erase_if(cell.others, [&](const Epoch& e) { return (e.bytes & ~now.bytes) == 0; });
  const bool other_bytes = (cell.write.bytes & ~now.bytes) != 0;
  if (other_bytes && cell.others.size() < kMostReaders) cell.others.push_back(cell.write);
  cell.write = now;
}

void HappensBefore::copy_landed(const void* to, Where where) {
  const Epoch landed{.thread = current->id,
                     .time = mine().time,
                     .bytes = 0xF,
                     .write = true,
                     .site = site_of(where)};
  shadow_.for_cells(to, kCopyBytes, [&](Cell& cell, uint8_t) { cell.write = landed; });
}

void HappensBefore::shared_begins(const SharedArray& array, size_t guard) {
  shadow_.for_cells(array.memory, array.bytes + 2 * guard, [](Cell& cell, uint8_t of_cell) {
    cell = Cell();
    cell.outside = of_cell;
  });
  shadow_.for_cells(array.data, array.bytes, [](Cell& cell, uint8_t of_cell) {
    cell.outside &= static_cast<uint8_t>(~of_cell);
    cell.undefined = of_cell;
  });
}

void HappensBefore::shared_ends(const SharedArray& array, size_t guard) {
  shadow_.for_cells(array.memory, array.bytes + 2 * guard, [](Cell& cell, uint8_t of_cell) {
    cell = Cell();
    cell.outside = of_cell;
  });
}

// ---- Findings

void HappensBefore::find(const char* kind, const Epoch& now, const Epoch& before) {
  ++counts.races;
  if (findings_.size() >= kMostFindings) return;
  if (seen_.insert({kind, now.site, before.site}).second) findings_.push_back({kind, now, before});
}

std::string HappensBefore::place_of(const Epoch& epoch) const {
  return text_of("block ", epoch.thread / block_threads_, " thread ", epoch.thread % block_threads_,
                 " at ", lines_of(epoch.site));
}

std::string HappensBefore::report() {
  std::string report;
  for (const Finding& finding : findings_) {
    if (!report.empty()) report += "\n";
    report += text_of(finding.kind, ": ", place_of(finding.now));
    if (finding.before.bytes != 0) report += ", " + place_of(finding.before);
  }
  return report;
}

HappensBefore detector;
const bool linked = [] {
  race_detector = &detector;
  return true;
}();

void touched(const void* p, size_t bytes, bool write, void* after) {
  if (current == nullptr) return;
  detector.touch(p, bytes, {.write = write, .site = {nullptr, reinterpret_cast<uintptr_t>(after)}});
}

}  // namespace
}  // namespace synergen::simt

// ---- What -fsanitize=thread calls

#define SIMT_HOOK __attribute__((visibility("default")))
#define SIMT_TOUCH(p, bytes, write) \
  synergen::simt::touched(p, bytes, write, __builtin_return_address(0))
#define SIMT_HOOKS_FOR(kind, bytes)                                                   \
  SIMT_HOOK void __tsan_##kind##read##bytes(void* p) { SIMT_TOUCH(p, bytes, false); } \
  SIMT_HOOK void __tsan_##kind##write##bytes(void* p) { SIMT_TOUCH(p, bytes, true); }
#define SIMT_HOOKS(bytes)           \
  SIMT_HOOKS_FOR(, bytes)           \
  SIMT_HOOKS_FOR(volatile_, bytes)  \
  SIMT_HOOKS_FOR(unaligned_, bytes) \
  SIMT_HOOKS_FOR(unaligned_volatile_, bytes)

extern "C" {
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
SIMT_HOOK void __tsan_read_range(void* p, size_t bytes) { SIMT_TOUCH(p, bytes, false); }
SIMT_HOOK void __tsan_write_range(void* p, size_t bytes) { SIMT_TOUCH(p, bytes, true); }
SIMT_HOOK void __tsan_init() {}
SIMT_HOOK void __tsan_func_entry(void*) {}
SIMT_HOOK void __tsan_func_exit() {}
SIMT_HOOK void __tsan_vptr_update(void**, void*) {}
SIMT_HOOK void __tsan_vptr_read(void**) {}
// The guard of a static local in a host function.
SIMT_HOOK uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }
SIMT_HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  SIMT_TOUCH(from, bytes, false);
  SIMT_TOUCH(to, bytes, true);
  return std::memcpy(to, from, bytes);
}
SIMT_HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  SIMT_TOUCH(from, bytes, false);
  SIMT_TOUCH(to, bytes, true);
  return std::memmove(to, from, bytes);
}
SIMT_HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
  SIMT_TOUCH(to, bytes, true);
  return std::memset(to, value, bytes);
}
}
