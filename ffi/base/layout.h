// Sizes of arrays, and where vectors lie in them.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"

namespace jax_softmax2p {

// A C-contiguous array [outer, n, inner] on which an operation works along n.
struct Layout {
  std::int64_t outer;
  std::int64_t n;
  std::int64_t inner;
};

// a/b rounded up, for a >= 0 and b > 0.
SOFTMAX2P_INLINE constexpr std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// a rounded up to a multiple of b, likewise.
SOFTMAX2P_INLINE constexpr std::int64_t RoundUp(std::int64_t a, std::int64_t b) { return CeilDiv(a, b) * b; }

// The number of elements from p to the first address that is aligned to a vector of `lanes` elements.
template <int lanes, typename Element>
SOFTMAX2P_INLINE std::int64_t ElementsToAlignment(const Element* p) {
  constexpr std::uintptr_t kBytes = lanes * sizeof(Element);
  return static_cast<std::int64_t>((kBytes - reinterpret_cast<std::uintptr_t>(p) % kBytes) % kBytes /
                                   sizeof(Element));
}

}  // namespace jax_softmax2p
