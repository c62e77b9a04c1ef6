"""Sine and cosine, as rope uses them."""

from . import planted

MUTANTS, add = planted("angle.cuh", unit="rope.cu")

add("step < 2; ++step", "step < 1; ++step")
add("std::fma(-turns, kMiddle, std::fma(-turns, kHigh, r))", "std::fma(-turns, kHigh, r)")
add("quarter & 2 ? -1.0 : 1.0", "quarter & 4 ? -1.0 : 1.0")
add("(quarter + 1) & 2", "quarter & 2")
add("const bool swap = quarter & 1;", "const bool swap = false;")
