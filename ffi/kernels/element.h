// The element types of arrays. 16-bit ones are converted in registers and computed in float.
#pragma once

#include <cstdint>

namespace jax_softmax2p {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

template <typename Element>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// What an array of Element is computed in.
template <typename Element>
using ComputeOf = typename ComputeType<Element>::type;

}  // namespace jax_softmax2p
