// The native engine's Python classes.
#pragma once

#include <pybind11/pybind11.h>

namespace synergen::bind {

void define_engine(pybind11::module_& m);

}  // namespace synergen::bind
