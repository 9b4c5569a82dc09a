// Sums of e^x whose exponent lies outside the floating-point format: (hi + lo)·2^exponent.
#pragma once

#include <cstdint>

#include "ffi/base/bit_cast.h"
#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p {

// 2^k for k <= 0; zero below the normal range of double. Without a branch, so that compilers vectorise it.
SOFTMAX2P_INLINE double PowerOfTwo(int k) {
  return BitCast<double>(static_cast<std::uint64_t>(k < -1023 ? 0 : k + 1023) << 52);
}

// A sum of doubles with twice their digits, hi + lo (Ogita, Rump & Oishi's Sum2: see base/error_free.h).
// float64 rows need it, and it costs float32 rows nothing.
struct CompensatedSum {
  double hi = 0;
  double lo = 0;

  SOFTMAX2P_INLINE void Add(double x) {
    double error;
    hi = TwoSum(hi, x, error);
    lo += error;
  }
  SOFTMAX2P_INLINE void Add(const CompensatedSum& other) {
    Add(other.hi);
    lo += other.lo;
  }
  // Adds the lanes of a vector, or of the sum of two. A double has digits to spare for a few floats, and
  // adding pairs is faster than a chain.
  template <typename V>
  SOFTMAX2P_INLINE void AddLanes(V v) {
    if constexpr (sizeof(typename V::Scalar) == sizeof(float)) {
      Add(ReduceSum(v, V::Broadcast(0)));
    } else {
      double lanes[V::kLanes];
      v.Store(lanes);
      for (const double lane : lanes) Add(lane);
    }
  }
  template <typename V>
  SOFTMAX2P_INLINE void AddLanes(V v, V w) {
    if constexpr (sizeof(typename V::Scalar) == sizeof(float)) {
      Add(ReduceSum(v, w));
    } else {
      AddLanes(v);
      AddLanes(w);
    }
  }
  // An infinite or NaN term leaves nothing sensible in `lo`, which must not spoil `hi`.
  SOFTMAX2P_INLINE double FiniteLo() const { return lo - lo == 0 ? lo : 0.0; }
  SOFTMAX2P_INLINE void Scale(double power_of_two) {
    hi *= power_of_two;
    lo *= power_of_two;
  }
};

// A sum as kernels take it: hi is its rounding, also where terms have cancelled.
template <typename T>
SOFTMAX2P_INLINE DoubleDouble<T> Rounded(const CompensatedSum& sum) {
  double error;
  const double total = TwoSum(sum.hi, sum.FiniteLo(), error);
  const DoubleDouble<T> rounded = ToDoubleDouble<T>(total, error);
  return {rounded.hi, rounded.lo - rounded.lo == 0 ? rounded.lo : 0};
}

// The pair of arXiv 2001.04438: mantissa·2^exponent. A monoid under Combine, with the default as its neutral
// element. A NaN stays NaN, and an exponent beyond the kernels' range stays beyond it.
struct ExtendedSum {
  static constexpr int kLowestExponent = -(1 << 30);

  CompensatedSum mantissa;
  int exponent = kLowestExponent;

  SOFTMAX2P_INLINE void Combine(ExtendedSum other) {
    if (other.exponent > exponent) {
      mantissa.Scale(PowerOfTwo(exponent - other.exponent));
      exponent = other.exponent;
    } else {
      other.mantissa.Scale(PowerOfTwo(other.exponent - exponent));
    }
    mantissa.Add(other.mantissa);
  }
};

}  // namespace jax_softmax2p
