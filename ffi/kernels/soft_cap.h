// The soft cap of attention: a logit z becomes cap·tanh(z / cap).
#pragma once

#include "ffi/base/inline.h"
#include "ffi/kernels/exp.h"

namespace jax_softmax2p {

template <typename V, int count>
struct CappedLogits {
  V z[count];
  V derivative[count];
};

// The soft cap of adjacent vectors of logits, and its derivative. tanh(x) is (e^2x - 1) / (e^2x + 1), whose
// numerator cancels nowhere, since the exponential comes as (1 + expm1)·pow2; the derivative is
// 4·e^2x / (e^2x + 1)^2.
template <typename V, int count>
SOFTMAX2P_INLINE CappedLogits<V, count> CapLogits(typename V::Scalar soft_cap,
                                                  const typename V::Scalar* logits) {
  // Where tanh is 1, and the square of e^2x does not overflow.
  constexpr typename V::Scalar kLargest = 40;
  const V twice = V::Broadcast(2 / soft_cap), cap = V::Broadcast(soft_cap);
  const ExtExpKernel<V, 0> exp(V::Broadcast(0));
  V x[count];
  SOFTMAX2P_UNROLL for (int k = 0; k < count; ++k) {
    const V negated = V::Broadcast(0) - V::Load(logits + k * V::kLanes) * twice;
    x[k] = V::Broadcast(0) - Max(V::Broadcast(-kLargest), negated);
  }
  const ExtExp<V, count> e = exp(x);
  CappedLogits<V, count> capped;
  SOFTMAX2P_UNROLL for (int k = 0; k < count; ++k) {
    const V minus_1 = Fma(e.expm1[k], e.pow2[k], e.pow2[k] - V::Broadcast(1));
    const V inverse = V::Broadcast(1) / (minus_1 + V::Broadcast(2));
    capped.z[k] = cap * (minus_1 * inverse);
    capped.derivative[k] = (V::Broadcast(4) * e.Value(k)) * (inverse * inverse);
  }
  return capped;
}

}  // namespace jax_softmax2p
