// Runs the passes of which the algorithms consist one at a time, to measure them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "ffi/kernels/table.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

enum class Pass {
  kMax,            // of three passes: finds the maximum
  kSumExp,         // of three passes: sums, with the maximum known
  kExpStore,       // of three-pass reload: sums, with the maximum known, and keeps the mantissas
  kScale,          // of the reload algorithms: writes the result from the mantissas that were kept
  kExtendedSum,    // of two passes: sums
  kExtendedWrite,  // of the recomputing algorithms: writes the result
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

// Runs a pass over the row x[n], in the segments and with the stores that its algorithm would have. `maximum`
// is that of the row, for passes that follow kMax. A pass that writes the result writes
// e^x·2^-floor(maximum·log2 e) to y[n]; kScale takes what kExpStore left there. Returns the maximum or the
// sum, if the pass finds one.
std::optional<double> RunPass(const Kernels& kernels, Executor& executor, Pass pass, const float* x, float* y,
                              std::int64_t n, float maximum);

}  // namespace jax_softmax2p
