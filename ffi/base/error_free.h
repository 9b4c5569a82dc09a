// Error-free transforms: a rounded sum or product together with its rounding error, as hi + lo.
//
// T is float, double, or a vector type of simd/. The transforms hold for rounding to nearest where nothing
// overflows, and need compilers that neither contract nor reassociate (-ffp-contract=off, no -ffast-math).
//
// Sources:
// * TwoSum: D. E. Knuth, The Art of Computer Programming, vol. 2, section 4.2.2, theorem B.
// * FastTwoSum, and TwoProd without a fused multiply-add (with Veltkamp's splitting): T. J. Dekker, "A
//   floating-point technique for extending the available precision", Numer. Math. 18, 1971.
// * Sums and dot products from them: T. Ogita, S. M. Rump & S. Oishi, "Accurate sum and dot product", SIAM
//   J. Sci. Comput. 26(6), 2005.
#pragma once

#include <limits>

#include "ffi/base/inline.h"

namespace jax_softmax2p {

// a + b = hi + lo, exactly, for any a and b. All transforms return hi.
template <typename T>
SOFTMAX2P_INLINE T TwoSum(T a, T b, T& lo) {
  const T hi = a + b;
  const T b_rounded = hi - a;
  lo = (a - (hi - b_rounded)) + (b - b_rounded);
  return hi;
}

// a - b = hi + lo, exactly, for any a and b.
template <typename T>
SOFTMAX2P_INLINE T TwoDiff(T a, T b, T& lo) {
  const T hi = a - b;
  const T b_rounded = hi - a;
  lo = (a - (hi - b_rounded)) - (b + b_rounded);
  return hi;
}

// a + b = hi + lo, exactly, where |a| >= |b| or a is a multiple of b's last place.
template <typename T>
SOFTMAX2P_INLINE T FastTwoSum(T a, T b, T& lo) {
  const T hi = a + b;
  lo = b - (hi - a);
  return hi;
}

// a·b = hi + lo, exactly, for vectors: with a fused multiply-add where V has one, otherwise with Dekker's
// product of halves.
template <typename V>
SOFTMAX2P_INLINE V TwoProd(V a, V b, V& lo) {
  const V hi = a * b;
  if constexpr (V::kHasFma) {
    lo = Fms(a, b, hi);
  } else {
    using T = typename V::Scalar;
    constexpr long kSplit = (1L << (std::numeric_limits<T>::digits + 1) / 2) + 1;
    const V split = V::Broadcast(static_cast<T>(kSplit));
    const V a_big = split * a, b_big = split * b;
    const V a_hi = a_big - (a_big - a), b_hi = b_big - (b_big - b);
    const V a_lo = a - a_hi, b_lo = b - b_hi;
    lo = a_lo * b_lo - (((hi - a_hi * b_hi) - a_lo * b_hi) - a_hi * b_lo);
  }
  return hi;
}

// The unevaluated sum hi + lo, where lo is small against hi.
template <typename T>
struct DoubleDouble {
  T hi;
  T lo;
};

// hi + lo, in a narrower type or in the same one: the error is some 2^-2p of hi for the p digits of T.
template <typename T>
SOFTMAX2P_INLINE DoubleDouble<T> ToDoubleDouble(double hi, double lo) {
  const T rounded = static_cast<T>(hi);
  return {rounded, static_cast<T>((hi - static_cast<double>(rounded)) + lo)};
}

}  // namespace jax_softmax2p
