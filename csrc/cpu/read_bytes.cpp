// read_bytes on the CPU: each thread adds up a contiguous share, a line at a time.
#include <cstring>

#include "cpu/parallel.h"
#include "engine/params.h"

namespace synergen::cpu::SYNERGEN_ISA {

void read_bytes(const ReadBytesParams& p) {
  uint64_t all = 0;
  parallel_for(p.lines, 1, [&](int64_t begin, int64_t end) {
    constexpr int kWords = 32;  // four lines: enough chains of additions
    uint64_t sum[kWords] = {};
    const char* from = static_cast<const char*>(p.data);
    const auto add = [&](int64_t line, int lines) {
      uint64_t words[kWords];
      std::memcpy(words, from + line * 64, static_cast<size_t>(lines) * 64);
      for (int i = 0; i < 8 * lines; ++i) sum[i] += words[i];
    };
    int64_t line = begin;
    for (; line + 4 <= end; line += 4) add(line, 4);
    for (; line < end; ++line) add(line, 1);
    uint64_t own = 0;
    for (uint64_t word : sum) own += word;
    __atomic_fetch_add(&all, own, __ATOMIC_RELAXED);
  });
  *p.sum = all;
}

}  // namespace synergen::cpu::SYNERGEN_ISA
