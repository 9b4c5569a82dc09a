// Logarithms of sums, without branches, for compilers to make vectors of.
#pragma once

#include <cstdint>
#include <cstring>

#include "ffi/simd/inline.h"

namespace jax_softmax2p {

// log(m) for normal m >= 1, to 1.5·2^-52 of itself or of 1. With m = 2^k·r, r from sqrt(1/2) on, and
// s = (r - 1)/(r + 1), it is k·ln 2 + 2·artanh(s), |s| < 0.172, where the series needs 11 terms.
SOFTMAX2P_INLINE double LogOfAtLeastOne(double m) {
  constexpr std::uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd, kMagic = 0x4330000000000000;
  std::uint64_t bits;
  std::memcpy(&bits, &m, sizeof bits);
  const std::uint64_t k = (bits - kSqrtHalf) >> 52;
  const std::uint64_t r_bits = bits - (k << 52), k_bits = k + kMagic;
  double r, k_double;
  std::memcpy(&r, &r_bits, sizeof r);
  std::memcpy(&k_double, &k_bits, sizeof k_double);
  const double exponent = k_double - 0x1p52;
  const double s = (r - 1) / (r + 1), square = s * s;
  constexpr double kTerms[] = {2. / 21, 2. / 19, 2. / 17, 2. / 15, 2. / 13,
                               2. / 11, 2. / 9,  2. / 7,  2. / 5,  2. / 3};
  double series = kTerms[0];
  SOFTMAX2P_UNROLL for (int i = 1; i < 10; ++i) series = series * square + kTerms[i];
  const double log_r = s * square * series + 2 * s;
  return exponent * 0x1.62e42fefa39efp-1 + (exponent * 0x1.abc9e3b39803fp-56 + log_r);
}

// log((high + low)·2^exponent) as a sum of two, of a T and what that leaves out, for high >= 1.
// kLn2High has 32 digits: its product with an exponent is exact.
template <typename T>
SOFTMAX2P_INLINE void LogOfSum(double high, double low, double exponent, T& log_high, T& log_low) {
  constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const double a = exponent * kLn2High;
  const double b = LogOfAtLeastOne(high) + (low / high + exponent * kLn2Low);
  const double sum = a + b, b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  log_high = static_cast<T>(sum);
  log_low = static_cast<T>((sum - static_cast<double>(log_high)) + error);
}

}  // namespace jax_softmax2p
