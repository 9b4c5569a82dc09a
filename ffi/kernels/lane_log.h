// Logarithms of the sums of a vector's lanes.
#pragma once

#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/lane_sum.h"
#include "ffi/kernels/log.h"

namespace jax_softmax2p {

// Of every lane, log(sum) over its largest term as log + rest: LSE = largest + log + rest, where `largest` is
// the largest x. The log is NaN where the sum is no number, and where its exponent is not to be trusted.
template <typename V>
struct LaneLog {
  using T = typename V::Scalar;

  T log[V::kLanes], rest[V::kLanes];

  // Of sums of n terms. The log is also NaN where the lane is nearly certain (NearCertainty).
  SOFTMAX2P_INLINE LaneLog(const LaneSums<V>& sum, V largest, std::int64_t n) {
    const LargestTerms terms(sum.exponent, largest);
    const Lanes lanes(sum);
    const auto others = [&](int l) {
      return SumOfOthers(lanes.hi[l], lanes.lo[l], terms.powers[l], terms.mantissas[l]);
    };
    Set(others, terms, lanes, NearCertainty<T>(n, n));
  }

  // Of sums without the largest terms.
  SOFTMAX2P_INLINE LaneLog(const LaneSums<V>& sum, V largest) {
    const LargestTerms terms(LaneAccumulator<V>(largest).reference(), largest);
    const Lanes lanes(sum);
    const auto others = [&](int l) {
      // Infinite elements have no exponent, and Set no use for their sums.
      const T exponent = lanes.exponents[l] - terms.exponents[l];
      return (static_cast<double>(lanes.hi[l]) + static_cast<double>(lanes.lo[l])) *
             PowerOfTwo(exponent > -2048 && exponent <= 0 ? static_cast<int>(exponent) : -2048);
    };
    Set(others, terms, lanes, 0);
  }

 private:
  struct Lanes {
    T hi[V::kLanes], lo[V::kLanes], exponents[V::kLanes];
    explicit SOFTMAX2P_INLINE Lanes(const LaneSums<V>& sum) {
      sum.hi.Store(hi);
      sum.lo.Store(lo);
      sum.exponent.Store(exponents);
    }
  };
  struct LargestTerms {
    T exponents[V::kLanes], powers[V::kLanes], mantissas[V::kLanes];
    SOFTMAX2P_INLINE LargestTerms(V exponent, V largest) {
      const V x[1] = {largest};
      const ExtExp<V, 1> e = ExtExpKernel<V>(exponent)(x);
      exponent.Store(exponents);
      e.pow2[0].Store(powers);
      e.expm1[0].Store(mantissas);
    }
  };

  // Others of less than `least` of the largest term give NaN.
  template <typename OthersOf>
  SOFTMAX2P_INLINE void Set(const OthersOf& others_of, const LargestTerms& terms, const Lanes& lanes,
                            double least) {
    double others[V::kLanes], largests[V::kLanes], logs[V::kLanes], rests[V::kLanes];
    for (int l = 0; l < V::kLanes; ++l) {
      others[l] = others_of(l);
      largests[l] = LargestTerm(terms.powers[l], terms.mantissas[l]);
      logs[l] = LogOfSum<T>(others[l], largests[l], rests[l]);
    }
    for (int l = 0; l < V::kLanes; ++l) {
      const T size = terms.exponents[l] < 0 ? -terms.exponents[l] : terms.exponents[l];
      const bool certain = others[l] < least * largests[l];
      const bool exact = size < ReductionFor<V>::kMaxExponent - 1 && !certain;
      // hi - hi is NaN where the sum is no number.
      log[l] = exact ? static_cast<T>(logs[l]) + (lanes.hi[l] - lanes.hi[l])
                     : kMinusInfinity<V> - kMinusInfinity<V>;
      rest[l] = static_cast<T>((logs[l] - static_cast<double>(log[l])) + rests[l]);
    }
  }
};

}  // namespace jax_softmax2p
