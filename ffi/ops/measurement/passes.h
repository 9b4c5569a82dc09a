// The passes of which the algorithms consist, one at a time: for measuring them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "ffi/kernels/table.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

enum class Pass {
  kMax,            // three passes: the maximum
  kSumExp,         // three passes: the sum, the maximum being known
  kExpStore,       // three-pass reload: the same, and what is computed of every exponential is kept
  kScale,          // the reload algorithms: the result, from what was kept
  kExtendedSum,    // two passes: the sum
  kExtendedWrite,  // the recomputing algorithms: the result
};

struct NamedPass {
  std::string_view name;
  Pass pass;
};

inline constexpr NamedPass kPasses[] = {
    {"max", Pass::kMax},     {"sum_exp", Pass::kSumExp},           {"exp_store", Pass::kExpStore},
    {"scale", Pass::kScale}, {"extended_sum", Pass::kExtendedSum}, {"extended_write", Pass::kExtendedWrite}};

inline std::optional<Pass> FindPass(std::string_view name) {
  for (const NamedPass& known : kPasses) {
    if (name == known.name) return known.pass;
  }
  return std::nullopt;
}

// Runs a pass over a row, in the segments and with the stores that its algorithm would have. `maximum` is
// what the algorithm knows by then. What writes the result writes e^x·2^-floor(maximum·log2 e) to y; kScale
// takes what kExpStore left there. Returns the maximum or the sum, if the pass finds one.
std::optional<double> RunPass(const Kernels& kernels, Executor& executor, Pass pass, const float* x, float* y,
                              std::int64_t n, float maximum);

}  // namespace jax_softmax2p
