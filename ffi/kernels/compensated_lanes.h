// Sums in every lane of a vector with the errors of their additions.
#pragma once

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p {

// What an infinite or NaN term leaves in the rest of a sum is nothing sensible, and must not spoil the sum.
template <typename V>
SOFTMAX2P_INLINE V FiniteOr0(V rest) {
  const V zero = V::Broadcast(0);
  return WhereEqual(rest - rest, zero, rest, zero);
}

// sum + rest, in twice the working precision for some hundred terms (Ogita, Rump & Oishi: see
// base/error_free.h).
template <typename V>
struct CompensatedLanes {
  V sum = V::Broadcast(0);
  V rest = V::Broadcast(0);

  // Adds term + error.
  SOFTMAX2P_INLINE void Add(V term, V error) {
    V rounding;
    sum = TwoSum(sum, term, rounding);
    rest = rest + (rounding + error);
  }
  SOFTMAX2P_INLINE void Add(const CompensatedLanes& other) { Add(other.sum, other.rest); }
};

}  // namespace jax_softmax2p
