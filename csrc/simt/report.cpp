// What reports say of places and of threads that wait.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "simt/machine.h"

namespace synergen::simt {

std::string file_name(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

std::ostream& operator<<(std::ostream& out, const Where& where) {
  return out << file_name(where.file_name()) << ":" << where.line();
}

std::ostream& operator<<(std::ostream& out, const uint3& index) {
  return out << "(" << index.x << ", " << index.y << ", " << index.z << ")";
}

// Threads of a block that wait for the same thing share a line.
std::string deadlock_report() {
  std::map<std::pair<uint64_t, std::string>, std::vector<unsigned>> groups;
  for (const Block& block : machine->slots) {
    for (const Thread* thread : block.threads) {
      std::string doing = "exited";
      if (thread->state != State::kExited) {
        doing = text_of("wait in ", thread->doing, " at ", thread->where);
      }
      groups[{block.id, doing}].push_back(thread->rank);
    }
  }
  constexpr size_t kMostLines = 12;
  std::string report = "deadlock: no thread can run";
  size_t lines = 0;
  for (const auto& [key, ranks] : groups) {
    if (++lines > kMostLines) return report + "\n  ...";
    report += text_of("\n  block ", key.first, ": ", ranks.size(), " threads, ", ranks.front(),
                      " to ", ranks.back(), ", ", key.second);
  }
  return report;
}

// "access.cuh:60 in rms_norm.cu:47".
std::string source_lines(uintptr_t address) {
  Dl_info library;
  if (dladdr(reinterpret_cast<void*>(address), &library) == 0) return "?";
  const uintptr_t offset = address - 1 - reinterpret_cast<uintptr_t>(library.dli_fbase);
  char command[1024];
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' 0x%zx 2>/dev/null",
                library.dli_fname, static_cast<size_t>(offset));
  std::string lines;
  if (FILE* pipe = popen(command, "r")) {
    char line[1024];
    while (std::fgets(line, sizeof(line), pipe) != nullptr) {
      line[std::strcspn(line, " \n")] = '\0';  // what follows a space is no part of the line
      lines += (lines.empty() ? "" : " in ") + file_name(line);
    }
    pclose(pipe);
  }
  return lines.empty() ? text_of(file_name(library.dli_fname), "+", offset) : lines;
}

}  // namespace synergen::simt
