#pragma once

// Everything that the per-instruction-set sources share is always inlined: an out-of-line copy, compiled
// with one set's flags and picked by the linker for all, would run instructions that the CPU may lack.
#define SOFTMAX2P_INLINE inline __attribute__((always_inline))

// Before a loop whose trip count is a constant: leaves no loop.
#define SOFTMAX2P_UNROLL _Pragma("GCC unroll 16")
