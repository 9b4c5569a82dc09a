// The element types of arrays. 16-bit ones are converted in registers and computed in float.
#pragma once

#include <cstdint>

#include "ffi/simd/inline.h"

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

// How many elements lie before the first that is aligned to a vector of so many.
template <int lanes, typename Element>
SOFTMAX2P_INLINE std::int64_t ElementsToAlignment(const Element* p) {
  constexpr std::uintptr_t kBytes = lanes * sizeof(Element);
  return static_cast<std::int64_t>((kBytes - reinterpret_cast<std::uintptr_t>(p) % kBytes) % kBytes /
                                   sizeof(Element));
}

}  // namespace jax_softmax2p
