// What the emulator's own tests call through ctypes: small kernels that show what it computes, and
// small kernels with a planted bug each that show what it finds.
#pragma once

#include <stdexcept>
#include <string>

#include "simt/simt.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace synergen::simt {

// Null, or what `run` threw; valid until the next call.
template <class F>
const char* error_of(F&& run) {
  static std::string error;
  try {
    run();
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace synergen::simt
