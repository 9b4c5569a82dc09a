// Logarithms of sums, without branches, so that compilers vectorise loops over them.
#pragma once

#include <cstdint>

#include "ffi/base/bit_cast.h"
#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p {

// log(1 + t) = hi + lo for t >= 0; returns hi. The error is 2^-52 of the result or 2^-54, whichever is more.
//
// With 1 + t = 2^k·(1 + f), 1 + f >= sqrt(1/2), and s = f/(2 + f), the result is k·ln 2 + 2·artanh(s). Here
// |s| < 0.172, and the series needs 11 terms. f is computed from t, and so keeps its digits where t is small.
// kLn2Hi has 32 digits: its product with k is exact.
SOFTMAX2P_INLINE double LogOfOnePlus(double t, double& lo) {
  constexpr std::uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd, kMagic = 0x4330000000000000,
                          kOne = 0x3ff0000000000000;
  const std::uint64_t k = (BitCast<std::uint64_t>(1 + t) - kSqrtHalf) >> 52;
  const double power = BitCast<double>(kOne + (k << 52)), inverse = BitCast<double>(kOne - (k << 52));
  const double exponent = BitCast<double>(k + kMagic) - 0x1p52;
  const double f = (t - (power - 1)) * inverse;
  const double s = f / (2 + f), square = s * s;
  constexpr double kTerms[] = {2. / 21, 2. / 19, 2. / 17, 2. / 15, 2. / 13,
                               2. / 11, 2. / 9,  2. / 7,  2. / 5,  2. / 3};
  double series = kTerms[0];
  SOFTMAX2P_UNROLL for (int i = 1; i < 10; ++i) series = series * square + kTerms[i];
  constexpr double kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  return FastTwoSum(exponent * kLn2Hi, s * square * series + (2 * s + exponent * kLn2Lo), lo);
}

// The other terms of a sum over its largest. The sum is (hi + lo) of its reference, the largest term
// (1 + expm1)·pow2 of it. Where the others are few, both differences are exact.
SOFTMAX2P_INLINE double OthersOverLargest(double hi, double lo, double pow2, double expm1) {
  const double others = (((hi - pow2) - expm1 * pow2) + lo) / (pow2 + expm1 * pow2);
  return others < 0 ? 0 : others;
}

// Where the others are less than this of the largest term, the rounding of a sum of floats, some 2^-46 of it,
// would show in their logarithm: then they are to be summed without it.
inline constexpr double kNearCertainty = 0x1p-20;

}  // namespace jax_softmax2p
