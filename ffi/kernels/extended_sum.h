// Sums of e^x whose exponent lies outside the floating-point format: (high + low)·2^exponent.
#pragma once

#include <cstdint>
#include <cstring>

#include "ffi/simd/inline.h"

namespace jax_softmax2p {

// 2^k for k <= 0; zero below the normal range of double.
SOFTMAX2P_INLINE double PowerOfTwo(int k) {
  if (k < -1022) return 0.0;
  const std::uint64_t bits = static_cast<std::uint64_t>(k + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// A double with twice the digits: float64 rows need them, float32 rows do not mind.
struct DoubleSum {
  double high = 0;
  double low = 0;

  // Knuth's two-sum (TAOCP vol. 2, 4.2.2, theorem B): the rounding error goes to `low`, exactly.
  SOFTMAX2P_INLINE void Add(double x) {
    const double sum = high + x;
    const double x_part = sum - high;
    low += (high - (sum - x_part)) + (x - x_part);
    high = sum;
  }
  SOFTMAX2P_INLINE void Add(const DoubleSum& other) {
    Add(other.high);
    low += other.low;
  }
  // The lanes of a vector. A double has digits to spare for a few floats, and pairs add up faster than a
  // chain.
  template <typename V>
  SOFTMAX2P_INLINE void AddLanes(V v) {
    if constexpr (sizeof(typename V::Scalar) == sizeof(float)) {
      Add(v.Total());
    } else {
      double lanes[V::kLanes];
      v.Store(lanes);
      for (const double lane : lanes) Add(lane);
    }
  }
  SOFTMAX2P_INLINE void Scale(double power_of_two) {
    high *= power_of_two;
    low *= power_of_two;
  }
};

// The paper's pair. A monoid under Combine with the default as its neutral element; what is not to be
// trusted (a NaN, or an exponent beyond the kernel's range) has a NaN mantissa and stays so.
struct ExtendedSum {
  static constexpr int kLowestExponent = -(1 << 30);

  DoubleSum mantissa;
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
