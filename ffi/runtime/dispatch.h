// Chooses the instruction set, once, on first use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// The instruction sets that this machine can execute, best first. Never empty.
const std::vector<const Kernels*>& SupportedKernels();

// Kernels, or the reason why there are none.
struct KernelChoice {
  const Kernels* kernels = nullptr;
  std::string error;
};

// The kernels of the instruction set called `name`. `source` says in the error where the name came from.
KernelChoice FindKernels(std::string_view name, std::string_view source);

// The kernels of the best instruction set, or of the one that the environment variable JAX_SOFTMAX2P_ISA
// names.
const KernelChoice& ActiveKernels();

}  // namespace jax_softmax2p
