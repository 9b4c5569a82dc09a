// Logarithms of the sums of a vector's lanes.
#pragma once

#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/lane_sum.h"
#include "ffi/kernels/log.h"

namespace jax_softmax2p {

// Of every lane, log(sum) over its largest term as log + rest. The log is NaN where the sum is no number,
// where its exponent is not to be trusted, and where the lane is nearly certain (kNearCertainty).
template <typename V>
struct LaneLog {
  using T = typename V::Scalar;

  T log[V::kLanes], rest[V::kLanes];

  // `largest` is the largest x whose e^x is in the sum, with which LSE = largest + log + rest.
  SOFTMAX2P_INLINE LaneLog(const LaneSums<V>& sum, V largest) {
    const V x[1] = {largest};
    const ExtExp<V, 1> of_largest = ExtExpKernel<V>(sum.exponent)(x);
    T sums[V::kLanes], rests[V::kLanes], exponents[V::kLanes], powers[V::kLanes], mantissas[V::kLanes];
    double others[V::kLanes], largests[V::kLanes], logs[V::kLanes], log_rests[V::kLanes];
    sum.hi.Store(sums);
    sum.lo.Store(rests);
    sum.exponent.Store(exponents);
    of_largest.pow2[0].Store(powers);
    of_largest.expm1[0].Store(mantissas);
    for (int l = 0; l < V::kLanes; ++l) {
      others[l] = SumOfOthers(sums[l], rests[l], powers[l], mantissas[l]);
      largests[l] = LargestTerm(powers[l], mantissas[l]);
      logs[l] = LogOfSum<T>(others[l], largests[l], log_rests[l]);
    }
    for (int l = 0; l < V::kLanes; ++l) {
      const T size = exponents[l] < 0 ? -exponents[l] : exponents[l];
      const bool certain = others[l] < kNearCertainty<T> * largests[l];
      const bool exact = size < ReductionFor<V>::kMaxExponent - 1 && !certain;
      // sums - sums is NaN where the sum is no number.
      log[l] = exact ? static_cast<T>(logs[l]) + (sums[l] - sums[l]) : kMinusInfinity<V> - kMinusInfinity<V>;
      rest[l] = static_cast<T>((logs[l] - static_cast<double>(log[l])) + log_rests[l]);
    }
  }
};

}  // namespace jax_softmax2p
