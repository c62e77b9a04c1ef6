// read_bytes on the CPU, with lines asked for ahead and shares taken as in packed_linear.
#include <cstring>

#include "cpu/parallel.h"
#include "engine/params.h"

namespace synergen::cpu::SYNERGEN_ISA {

void read_bytes(const ReadBytesParams& p) {
  constexpr int64_t kShare = 4096;  // lines, 256 KB: what packed_linear takes at once
  uint64_t all = 0;
  parallel_tasks(ceil_div(p.lines, kShare), [&](const auto& claim) {
    constexpr int kWords = 32;  // four lines: enough chains of additions
    uint64_t sum[kWords] = {};
    for (int64_t i; (i = claim()) * kShare < p.lines;) {
      const int64_t end = (i + 1) * kShare < p.lines ? (i + 1) * kShare : p.lines;
      for (int64_t line = i * kShare; line < end; line += 4) {
        const int lines = end - line < 4 ? static_cast<int>(end - line) : 4;
        const char* from = static_cast<const char*>(p.data) + line * 64;
        for (int j = 0; j < lines; ++j) __builtin_prefetch(from + 4096 + j * 64, 0, 2);
        uint64_t words[kWords] = {};
        std::memcpy(words, from, static_cast<size_t>(lines) * 64);
        for (int j = 0; j < kWords; ++j) sum[j] += words[j];
      }
    }
    uint64_t own = 0;
    for (uint64_t word : sum) own += word;
    __atomic_fetch_add(&all, own, __ATOMIC_RELAXED);
  });
  *p.sum = all;
}

}  // namespace synergen::cpu::SYNERGEN_ISA
