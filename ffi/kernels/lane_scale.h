// Scales that turn e^x into factor·e^(x - lse), for kLanes rows or columns at a time: what RowScale is for
// one row. A multiplication by them takes half of the operations that RecomputeMinusLse takes for the
// difference x - lse, and spares its roundings.
#pragma once

#include <limits>

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/exp.h"
#include "ffi/kernels/lane_sum.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// factor·e^-lse as (hi + lo)·2^-exponent, for an lse within the exact range and a factor up to
// kLargestFactor.
template <typename V>
SOFTMAX2P_INLINE LaneSums<V> LaneScale(V lse_hi, V lse_lo, V factor) {
  using T = typename V::Scalar;
  using R = ReductionFor<V>;
  // K·e^x, divided by K for its own factor and for that of the e^z which it multiplies.
  constexpr double kInverse = 1 / (static_cast<double>(kFactor<V>) * static_cast<double>(kFactor<V>));
  constexpr T kInverseHi = static_cast<T>(kInverse), kInverseLo = static_cast<T>(kInverse - kInverseHi);
  const V half = Floor(lse_hi * V::Broadcast(Format<T>::kLog2E / 2)), exponent = half + half;
  const V rest = Fnma(exponent, V::Broadcast(R::kLn2Hi), lse_hi);
  const V rest_lo = Fnma(exponent, V::Broadcast(R::kLn2Lo), lse_lo);
  V missing, error, factor_error;
  const V x[1] = {TwoSum(V::Broadcast(0) - rest, V::Broadcast(0) - rest_lo, missing)};
  const ExtExp<V, 1> e = ExtExpKernel<V>(V::Broadcast(0))(x);
  const V expm1 = e.expm1[0] + Fma(e.expm1[0], missing, missing);
  const V power = e.pow2[0] * V::Broadcast(1 / kUnit<V>);
  const V divided = TwoProd(power, V::Broadcast(kInverseHi), error);
  error = Fma(power, V::Broadcast(kInverseLo), error);
  const V scaled = TwoProd(divided, factor, factor_error);
  LaneSums<V> scale{};
  scale.hi = FastTwoSum(scaled, Fma(scaled, expm1, Fma(error, factor, factor_error)), scale.lo);
  scale.exponent = exponent;
  return scale;
}

// Those of `width` rows or columns. hi is NaN where there is no scale.
template <typename V, typename T = typename V::Scalar>
SOFTMAX2P_INLINE void ScalesFromLse(const T* lse_hi, const T* lse_lo, const T* factor, int width,
                                    const PanelSums<T>& scales) {
  constexpr T kLimit = static_cast<T>((ReductionFor<V>::kMaxExponent - 4) * Format<T>::kLn2);
  ForVectors<V>(width, [&](int, int at, const auto& access) {
    const LaneSums<V> scale =
        LaneScale(access.Load(lse_hi + at, 0), access.Load(lse_lo + at, 0), access.Load(factor + at, 0));
    access.Store(scale.hi, scales.hi + at);
    access.Store(scale.lo, scales.lo + at);
    access.Store(scale.exponent, scales.exponent + at);
  });
  for (int i = 0; i < width; ++i) {
    // Not so for NaNs.
    const bool has_scale = lse_hi[i] < kLimit && lse_hi[i] > -kLimit && factor[i] <= kLargestFactor<T> &&
                           factor[i] >= -kLargestFactor<T>;
    if (!has_scale) scales.hi[i] = std::numeric_limits<T>::quiet_NaN();
  }
}

}  // namespace jax_softmax2p
