// Logarithms of sums, without branches, so that compilers vectorise loops over them.
#pragma once

#include <cstdint>

#include "ffi/base/bit_cast.h"
#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p {

// a·b + c, rounded once where that is one instruction.
SOFTMAX2P_INLINE double MultiplyAdd(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// log((largest + others)/largest) = hi + lo for others >= 0 and largest > 0; returns hi. T is the type that
// the result is for: the error is 2^-52 of the result or 2^-54, whichever is more, for double, and 2^-44 of
// the result for float.
//
// With the sum 2^k·(1 + f)·largest, |log2(1 + f)| < 0.59, and s = f/(2 + f), the result is k·ln 2 +
// 2·artanh(s); k is the difference of the logarithms that the numbers' bits are, to 0.09. Here |s| < 0.201. f
// is computed from the others, and so keeps its digits where they are few. kLn2Hi has 32 digits: its product
// with k is exact.
template <typename T>
SOFTMAX2P_INLINE double LogOfSum(double others, double largest, double& lo) {
  constexpr std::uint64_t kHalf = 1ull << 51, kMagic = 0x4330000000000000, kOne = 0x3ff0000000000000;
  constexpr double kTerms[] = {2. / 3,  2. / 5,  2. / 7,  2. / 9,  2. / 11, 2. / 13,
                               2. / 15, 2. / 17, 2. / 19, 2. / 21, 2. / 23};
  constexpr int kLast = sizeof(T) == sizeof(float) ? 7 : 10;
  const std::uint64_t k =
      (BitCast<std::uint64_t>(largest + others) - BitCast<std::uint64_t>(largest) + kHalf) >> 52;
  const double scaled = BitCast<double>(kOne + (k << 52)) * largest;
  const double exponent = BitCast<double>(k + kMagic) - 0x1p52;
  const double s = (others - (scaled - largest)) / (others + (scaled + largest)), square = s * s;
  double series = kTerms[kLast];
  SOFTMAX2P_UNROLL for (int i = 1; i <= kLast; ++i) series = MultiplyAdd(series, square, kTerms[kLast - i]);
  constexpr double kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  return FastTwoSum(exponent * kLn2Hi, MultiplyAdd(s * square, series, 2 * s + exponent * kLn2Lo), lo);
}

// a - b·c, rounded once where that is one instruction, otherwise by Dekker's product (base/error_free.h).
SOFTMAX2P_INLINE double SubtractProduct(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(-b, c, a);
#else
  constexpr double kSplit = (1 << 27) + 1;
  const double product = b * c;
  const double b_big = kSplit * b, b_hi = b_big - (b_big - b), b_lo = b - b_hi;
  const double c_big = kSplit * c, c_hi = c_big - (c_big - c), c_lo = c - c_hi;
  const double error = b_lo * c_lo - (((product - b_hi * c_hi) - b_lo * c_hi) - b_hi * c_lo);
  return (a - product) - error;
#endif
}

// The other terms of a sum than its largest. The sum is hi + lo, the largest term (1 + expm1)·pow2. Where the
// others are few, both differences are exact.
SOFTMAX2P_INLINE double SumOfOthers(double hi, double lo, double pow2, double expm1) {
  const double others = SubtractProduct(hi - pow2, expm1, pow2) + lo;
  return others < 0 ? 0 : others;
}

SOFTMAX2P_INLINE double LargestTerm(double pow2, double expm1) { return pow2 + expm1 * pow2; }

// Below this share of the largest term, the others leave its softmax 1 in float.
inline constexpr double kDominated = 0x1p-25;
SOFTMAX2P_INLINE bool IsDominated(double hi, double lo, double pow2, double expm1) {
  return SumOfOthers(hi, lo, pow2, expm1) < kDominated * LargestTerm(pow2, expm1);
}

// Where the others are less than this of the largest term, they are to be summed without it: the rounding of
// the sum would show in their logarithm. For double, 2^-81 of the sum is less. The sum is of n terms, in
// lanes of `lane` terms. For float,
// * others below 2^-21 each, half a last place of what terms are added to, are summed as so many floats;
// * the rounding of every other term is up to 2^-46 of the largest, and may be the same for all, so that the
//   errors grow with the square of their number. For equal terms, 2^-26 of it was found to do.
template <typename T>
SOFTMAX2P_INLINE double NearCertainty(std::int64_t n, std::int64_t lane) {
  if constexpr (sizeof(T) == sizeof(double)) return 0x1p-28;
  const double few = 0x1p-20 * static_cast<double>(n), biased = 0x1p-26 * static_cast<double>(lane * lane);
  return few > biased ? few : biased;
}

}  // namespace jax_softmax2p
