// The names by which callers choose an algorithm.
#pragma once

#include <string>
#include <string_view>

namespace jax_softmax2p {

// The names, as an error message lists them and as native.ALGORITHMS repeats them.
inline constexpr std::string_view kAlgorithms[] = {"auto", "two_pass"};

inline bool IsAlgorithm(std::string_view name) {
  for (const std::string_view known : kAlgorithms) {
    if (name == known) return true;
  }
  return false;
}

inline std::string UnknownAlgorithm(std::string_view name) {
  std::string message = "algorithm='" + std::string(name) + "' is unknown; known are:";
  for (const std::string_view known : kAlgorithms) message += " " + std::string(known);
  return message;
}

}  // namespace jax_softmax2p
