// Sums of e^x in every lane of a vector, each lane with an exponent of its own: the pair of arXiv 2001.04438,
// kLanes times.
#pragma once

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/extended_sum.h"
#include "ffi/kernels/unguarded_build.h"

namespace jax_softmax2p {

// A sum in every lane, (hi + lo)·2^exponent, kUnit·kFactor times as large, in twice the working precision.
// Exponents are integers held as floating-point numbers. One beyond ReductionFor<V>::kMaxExponent, either
// way, marks a sum that is not to be trusted. A monoid under Merge, with the lowest exponent and zeros as its
// neutral element.
template <typename V>
struct LaneSums {
  V hi, lo, exponent;

  SOFTMAX2P_INLINE void Merge(const LaneSums& other) {
    const V highest = Max(exponent, other.exponent);
    const V own = PowerOfTwo<V>(exponent - highest), others = PowerOfTwo<V>(other.exponent - highest);
    V error;
    const V sum = TwoSum(hi * own, other.hi * others, error);
    hi = FastTwoSum(sum, error + (lo * own + other.lo * others), lo);
    exponent = highest;
  }

  // Gives all lanes the highest exponent.
  SOFTMAX2P_INLINE void Align() {
    const V highest = V::Broadcast(exponent.ReduceMax());
    const V power = PowerOfTwo<V>(exponent - highest);
    hi = hi * power;
    lo = lo * power;
    exponent = highest;
  }

  // The sum of the lanes, which have one exponent, without kUnit.
  SOFTMAX2P_INLINE ExtendedSum ReduceSum() const {
    constexpr int kMax = ReductionFor<V>::kMaxExponent;
    typename V::Scalar common;
    Tail<V>{1}.Store(exponent, &common);
    ExtendedSum total;
    total.exponent = common > kMax ? kMax + 2 : static_cast<int>(common);
    total.mantissa.AddLanes(hi, lo);
    total.mantissa.Scale(1 / static_cast<double>(kUnit<V>));
    return total;
  }

  // Replaces hi + lo by kUnit/(hi + lo), also as a sum of two, for SoftmaxScaler.
  SOFTMAX2P_INLINE void Invert() {
    const V unit = V::Broadcast(kUnit<V>);
    const V inverse = unit / hi;
    V product_lo;
    const V product = TwoProd(inverse, hi, product_lo);
    const V error = ((unit - product) - product_lo) - inverse * lo;
    hi = inverse;
    lo = inverse * (error * V::Broadcast(1 / kUnit<V>));
  }
};

// Adds e^x as (1 + expm1)·pow2, and carries the error of every addition along in `rest`. What is added is the
// term's value; the sum starts at 8, above any term, so that its growth is what was added, exactly (see
// FastTwoSum); what is then missing of the term is pow2 - added + expm1·pow2. So the rounding of values is
// not in the sum: it could be the same for many.
//
// Good for kFold additions of a lane: `rest` itself is not compensated, and a bias that repeats itself makes
// its error grow with the square of their number, to 2^-26 of the sum.
template <typename V>
class LaneAccumulator {
  using T = typename V::Scalar;
  static constexpr int kMaxExponent = ReductionFor<V>::kMaxExponent;
  static constexpr T kStart = 8 * kUnit<V>;

 public:
  static constexpr int kFold = 2048;

  // With room for elements x of up to `maximum`.
  explicit SOFTMAX2P_INLINE LaneAccumulator(V maximum) : reference_(Reference(maximum)) {}
  // With the lowest reference.
  SOFTMAX2P_INLINE LaneAccumulator() : reference_(V::Broadcast(-kMaxExponent)) {}

  // Continues where another stopped.
  explicit SOFTMAX2P_INLINE LaneAccumulator(const LaneSums<V>& state)
      : sum_(state.hi), rest_(state.lo), reference_(state.exponent) {}
  // What another needs to continue: no sums, but as many vectors.
  SOFTMAX2P_INLINE LaneSums<V> State() const { return {sum_, rest_, reference_}; }

  SOFTMAX2P_INLINE V reference() const { return reference_; }

  // Raises the reference where needed, so that there is room for elements x of up to `maximum`.
  SOFTMAX2P_INLINE void Rescale(V maximum) {
    const V needed = Reference(maximum);
    if (!AnyGreater(needed, reference_)) return;
    const V raised = Max(reference_, needed), start = V::Broadcast(kStart);
    const V power = PowerOfTwo<V>(reference_ - raised);
    const V terms = (sum_ - start) * power;
    V error;
    sum_ = TwoSum(start, terms, error);
    rest_ = rest_ * power + error;
    reference_ = raised;
  }

  template <int K>
  SOFTMAX2P_INLINE void Add(const ExtExp<V, K>& e, const V (&values)[K]) {
    V missing[K];
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      const V larger = sum_ + values[k];
      missing[k] = e.pow2[k] - (larger - sum_);
      sum_ = larger;
    }
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) rest_ = rest_ + Fma(e.expm1[k], e.pow2[k], missing[k]);
  }

  SOFTMAX2P_INLINE LaneSums<V> Sums() const {
    V lo;
    const V hi = FastTwoSum(sum_ - V::Broadcast(kStart), rest_, lo);
    return {hi, lo, reference_};
  }

 private:
  // The largest even integer not above maximum·log2 e, or the lowest exponent. It is not above, so that a sum
  // is at least 1, and a result underflows where its power does. It is even: see ExtExpKernel.
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
