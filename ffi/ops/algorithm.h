// The names by which callers choose an algorithm.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace jax_softmax2p {

enum class Algorithm {
  kAuto,
  kTwoPass,             // Algorithm 3 of arXiv 2001.04438: pass 2 recomputes every exponential
  kTwoPassReload,       // pass 2 loads the exponentials that pass 1 kept
  kThreePassRecompute,  // Algorithm 1: finds the maximum first, then as kTwoPass
  kThreePassReload,     // Algorithm 2: finds the maximum first, then as kTwoPassReload
};

struct NamedAlgorithm {
  std::string_view name;
  Algorithm algorithm;
};

inline constexpr NamedAlgorithm kAlgorithms[] = {{"auto", Algorithm::kAuto},
                                                 {"two_pass", Algorithm::kTwoPass},
                                                 {"two_pass_reload", Algorithm::kTwoPassReload},
                                                 {"three_pass_recompute", Algorithm::kThreePassRecompute},
                                                 {"three_pass_reload", Algorithm::kThreePassReload}};

inline std::optional<Algorithm> FindAlgorithm(std::string_view name) {
  for (const NamedAlgorithm& known : kAlgorithms) {
    if (name == known.name) return known.algorithm;
  }
  return std::nullopt;
}

inline std::string UnknownAlgorithm(std::string_view name) {
  std::string message = "algorithm='" + std::string(name) + "' is unknown; known are:";
  for (const NamedAlgorithm& known : kAlgorithms) message += " " + std::string(known.name);
  return message;
}

}  // namespace jax_softmax2p
