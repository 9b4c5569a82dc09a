// The instructions that the CPU and the operating system let a program execute.
#pragma once

namespace jax_softmax2p {

struct CpuFeatures {
  bool avx2 = false;    // AVX2, FMA and F16C, with the ymm registers saved by the operating system
  bool avx512 = false;  // AVX-512 F, BW, DQ and VL beside them, with the zmm registers saved
};

const CpuFeatures& Cpu();

}  // namespace jax_softmax2p
