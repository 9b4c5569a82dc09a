// Inlining and unrolling, for everything that is compiled once per instruction set.
#pragma once

// Everything that the sources of the instruction sets share is always inlined. An out-of-line copy would be
// compiled with the flags of one set, the linker would pick one copy for all sets, and a CPU might then run
// instructions that it lacks.
#define SOFTMAX2P_INLINE inline __attribute__((always_inline))

// Goes before a loop whose trip count is a constant, and leaves no loop.
#define SOFTMAX2P_UNROLL _Pragma("GCC unroll 16")
