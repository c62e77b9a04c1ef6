// Philox4x32-10 (Salmon et al., SC 2011): a counter-based generator, the same numbers on CPU and
// GPU for the same key and counter, with no state to keep.
#pragma once

#include "common/types.h"

namespace synergen {

struct Philox4 {
  uint32_t v[4];
};

SYNERGEN_HD inline Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.v[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.v[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.v[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.v[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// One 32-bit word per (seed, position): the seed is the key, the position the low half of the
// counter.
SYNERGEN_HD inline uint32_t philox_word(uint64_t seed, uint64_t position) {
  const Philox4 counter = {
      {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0}};
  return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)).v[0];
}

// The middle of one of 2^32 equal steps of (0, 1): never 0, never 1, exact in double.
SYNERGEN_HD inline double philox_uniform(uint64_t seed, uint64_t position) {
  return (philox_word(seed, position) + 0.5) * 0x1p-32;
}

}  // namespace synergen
