#pragma once

#include <string>
#include <vector>

#include "engine/params.h"
#include "kernels.h"

namespace synergen::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };  // each holds those before it

const char* name_of(Isa isa);
std::vector<std::string> compiled_isas();   // in this binary
std::vector<std::string> available_isas();  // in this binary and on this CPU
Isa current_isa();                          // the one that kernels use; SYNERGEN_ISA overrides

Isa isa_of(const std::string& kernel);  // as far as this kernel goes along with it

}  // namespace synergen::cpu
