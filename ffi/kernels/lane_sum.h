// Sums of e^x in every lane of a vector, each lane with an exponent of its own: the paper's pair, kLanes
// times.
#pragma once

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/extended_sum.h"
#include "ffi/kernels/unguarded_build.h"

namespace jax_softmax2p {

// (hi + lo)·2^exponent in every lane, in twice the working precision. Exponents are integers held as
// floating-point numbers; one beyond Reduction<V>::kMaxExponent either way marks a sum that is not to be
// trusted. A monoid under Merge, with the lowest exponent and zeros as its neutral element.
template <typename V>
struct LaneTotal {
  V hi, lo, exponent;

  SOFTMAX2P_INLINE void Merge(const LaneTotal& other) {
    const V highest = Max(exponent, other.exponent);
    const V own = PowerOfTwo<V>(exponent - highest), others = PowerOfTwo<V>(other.exponent - highest);
    const DoubleDouble<V> sum = TwoSum(hi * own, other.hi * others);
    const DoubleDouble<V> total = FastTwoSum(sum.hi, sum.lo + (lo * own + other.lo * others));
    hi = total.hi;
    lo = total.lo;
    exponent = highest;
  }

  // The lanes' sum.
  SOFTMAX2P_INLINE ExtendedSum Reduce() const {
    constexpr int kMax = ReductionFor<V>::kMaxExponent;
    const auto highest = exponent.ReduceMax();
    const V power = PowerOfTwo<V>(exponent - V::Broadcast(highest));
    ExtendedSum total;
    total.exponent = highest > kMax ? kMax + 2 : static_cast<int>(highest);
    total.mantissa.AddLanes(hi * power);
    total.mantissa.AddLanes(lo * power);
    return total;
  }

  // 1/(hi + lo) as a sum of two, for `Scaler`.
  SOFTMAX2P_INLINE void Invert() {
    const V one = V::Broadcast(1);
    const V inverse = one / hi;
    const DoubleDouble<V> product = TwoProd(inverse, hi);
    const V error = ((one - product.hi) - product.lo) - inverse * lo;
    hi = inverse;
    lo = inverse * error;
  }
};

// Adds (1 + s)·2^(n - reference), with the error of every addition carried along in `rest`. The sum starts
// at 8, above any term, so that its growth is what was added, exactly (Dekker's fast two-sum); what is
// missing of the term then is power - added + s·power.
//
// Good for kFold additions: `rest` itself is not compensated, and a bias that repeats itself makes its error
// grow with their square, to 2^-26 of the sum.
template <typename V>
class LaneSum {
  using T = typename V::Scalar;
  static constexpr int kMaxExponent = ReductionFor<V>::kMaxExponent;
  static constexpr T kStart = 8;

 public:
  static constexpr int kFold = 2048;

  // Sums of elements of up to `maximum`.
  explicit SOFTMAX2P_INLINE LaneSum(V maximum) : reference_(Reference(maximum)) {}
  // Of nothing yet.
  SOFTMAX2P_INLINE LaneSum() : reference_(V::Broadcast(-kMaxExponent)) {}

  SOFTMAX2P_INLINE V reference() const { return reference_; }

  // Makes room for elements of up to `maximum`.
  SOFTMAX2P_INLINE void Rescale(V maximum) {
    const V needed = Reference(maximum);
    if (!AnyGreater(needed, reference_)) return;
    const V raised = Max(reference_, needed), start = V::Broadcast(kStart);
    const V power = PowerOfTwo<V>(reference_ - raised);
    const V terms = (sum_ - start) * power;
    const DoubleDouble<V> sum = TwoSum(start, terms);
    sum_ = sum.hi;
    rest_ = rest_ * power + sum.lo;
    reference_ = raised;
  }

  template <int K>
  SOFTMAX2P_INLINE void Add(const ExtExp<V, K>& e) {
    V missing[K];
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      const V larger = Fma(V::Broadcast(1) + e.expm1[k], e.pow2[k], sum_);
      missing[k] = e.pow2[k] - (larger - sum_);
      sum_ = larger;
    }
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) rest_ = rest_ + Fma(e.expm1[k], e.pow2[k], missing[k]);
  }

  SOFTMAX2P_INLINE LaneTotal<V> Total() const {
    const DoubleDouble<V> total = FastTwoSum(sum_ - V::Broadcast(kStart), rest_);
    return {total.hi, total.lo, reference_};
  }

 private:
  // The largest even integer not above maximum·log2 e, or the lowest exponent. Not above, so that a sum is 1
  // at least, and a result whose power underflows does, too. Even: see ExtExpKernel.
  static SOFTMAX2P_INLINE V Reference(V maximum) {
    V half = maximum * V::Broadcast(Format<T>::kLog2E / 2);
    if constexpr (kGuarded) half = Max(V::Broadcast(-kMaxExponent / 2), half);
    const V floor = Floor(half);
    return floor + floor;
  }

  V sum_ = V::Broadcast(kStart);
  V rest_ = V::Broadcast(0);
  V reference_;
};

}  // namespace jax_softmax2p
