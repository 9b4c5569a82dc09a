// e^x as a power and a mantissa near 1, the heart of every kernel: e^x = (1 + expm1)·2^n with n =
// round(x·log2 e), or, where a table of quarter powers is used, K·e^x = (1 + expm1)·K·2^n with 4n =
// round(4x·log2 e). Softmax does not see the factor K; attention does without the table. The polynomials are
// here.
//
// Source: Dukhan & Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438, section 4. Three things
// differ from the paper, all for accuracy or speed:
//
// * The mantissa is kept as expm1 = mantissa - 1, before the 1 would round it. The relative error of
//   (1 + expm1)·pow2 in float32 is at most 0.13·2^-23 with a table and 0.44·2^-23 without, the sum of the
//   roundings of its steps. That holds for every float with |n| <= ReductionFor<V>::kMaxExponent, NaN gives
//   NaN, and sums of others are marked: `tests/selftest/run` checks it for all 2^32 patterns. Found there:
//   0.119 for AVX-512 and AVX2, 0.394 for portable. For float64 the tests bound what follows from it.
// * n is handed on as the power 2^(n - reference), or K times that, which is read out of the low bits of the
//   sum that rounds x·log2 e. The reference is an even integer just below the largest n, so the power never
//   overflows.
// * x is clamped from below, where 2^(n - reference) is zero: -inf, finfo.min and the usual masks would
//   otherwise become -inf + inf. NaN passes the clamp and makes expm1 NaN. This is one half of the guard; the
//   other is in ops/guarded_sum.h.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/kernels/unguarded_build.h"

namespace jax_softmax2p {

// How x is reduced to t = x - n·ln 2. Rows whose largest element has |n| beyond kMaxExponent need the guard's
// third pass. Within it, n·kLn2Hi is exact, and so is x - n·kLn2Hi: its bits lie between 2^-1 and the last
// bit of kLn2Hi. With kLn2Lo, n·ln 2 has more digits than t can show.
template <typename T, bool has_fma>
struct Reduction;

template <typename T>
struct Format;

template <>
struct Format<float> {
  static constexpr int kBias = 127;
  static constexpr float kRounder = 0x1.8p23f;  // adding it rounds to an integer, held in the low bits
  static constexpr float kLog2E = 0x1.715476p0f;
  // A scale with which values that are kUnit times as large do not overflow, and others do not underflow.
  static constexpr float kLarge = 0x1p64f;
  static constexpr double kLn2 = 0x1.62e42fefa39efp-1;
};

template <>
struct Format<double> {
  static constexpr int kBias = 1023;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kLog2E = 0x1.71547652b82fep0;
  static constexpr double kLarge = 0x1p900;
  static constexpr double kLn2 = 0x1.62e42fefa39efp-1;
};

// Whether passes over rows take e^x as its value, rounded once, which pass 1 keeps for pass 2. Without a
// table the error of 1 + expm1 leaves no room for that rounding: they take power and expm1.
template <typename V>
inline constexpr bool kTakesValues = V::kTableBits > 0;

// Powers and values are then 2^kUnitExponent times as large, an even exponent, so that pass 2 can multiply
// them before the least of its results would underflow. It is also above the digits of the type.
template <typename V>
inline constexpr int kUnitExponent = kTakesValues<V> ? 32 : 0;
template <typename V>
inline constexpr auto kUnit = static_cast<typename V::Scalar>(std::uint64_t{1} << kUnitExponent<V>);

// The factor K.
template <typename V>
inline constexpr auto kFactor = static_cast<typename V::Scalar>(V::kTableBits > 0 ? 0x1.b3c218p0 : 1);

// v/K.
template <typename V>
SOFTMAX2P_INLINE V DivideByFactor(V v) {
  if constexpr (kFactor<V> == 1) return v;
  return v / V::Broadcast(kFactor<V>);
}

// (e^t - 1 - t)/t^2 on |t| <= 1.01·ln(2)/2, with a table of 2^bits entries /2^bits, minimax in the relative
// error of e^t.
template <typename T, int table_bits>
struct Polynomial;

// Fitted by Lawson's iteration, each coefficient rounded before the next was fitted: 0.057·2^-24.
template <>
struct Polynomial<float, 0> {
  static constexpr float kCoefficients[] = {0x1.fffffcp-2f, 0x1.55548cp-3f, 0x1.5558b8p-5f, 0x1.123e5ap-7f,
                                            0x1.6a4db0p-10f};
};

// Fitted as the first: 0.02·2^-24.
template <>
struct Polynomial<float, 2> {
  static constexpr float kCoefficients[] = {0x1.000008p-1f, 0x1.557262p-3f, 0x1.5518b4p-5f};
};

// Fitted as the first: 0.038·2^-53.
template <>
struct Polynomial<double, 0> {
  static constexpr double kCoefficients[] = {
      0x1.000000000000bp-1,  0x1.5555555555500p-3,  0x1.5555555550076p-5,  0x1.11111111261d2p-7,
      0x1.6c16c185ead81p-10, 0x1.a01a01347a325p-13, 0x1.a01995411f9cep-16, 0x1.71df0ab7d3569p-19,
      0x1.28b1ee04d923bp-22, 0x1.adb0b5759fc66p-26};
};

template <>
struct Reduction<float, true> {
  static constexpr int kMaxExponent = 1 << 17;
  static constexpr float kLn2Hi = 0x1.62e430p-1f;
  static constexpr float kLn2Lo = -0x1.05c610p-29f;
};

template <>
struct Reduction<double, true> {
  static constexpr int kMaxExponent = 1 << 17;
  static constexpr double kLn2Hi = 0x1.62e42fefa39efp-1;
  static constexpr double kLn2Lo = 0x1.abc9e3b39803fp-56;
};

// Without a fused multiply-add the product n·kLn2Hi must fit the format by itself, which leaves
// kLn2Hi 13 of 24 bits, or 40 of 53.
template <>
struct Reduction<float, false> {
  static constexpr int kMaxExponent = 1 << 10;
  static constexpr float kLn2Hi = 0x1.62ep-1f;
  static constexpr float kLn2Lo = 0x1.0bfbe8p-15f;
};

template <>
struct Reduction<double, false> {
  static constexpr int kMaxExponent = 1 << 12;
  static constexpr double kLn2Hi = 0x1.62e42fefa2p-1;
  static constexpr double kLn2Lo = 0x1.9ef35793c7673p-41;
};

template <typename V>
using ReductionFor = Reduction<typename V::Scalar, V::kHasFma>;

// K·2^(j/4), as PowerFromTable wants it, and kUnit times as large. K is a float for which all four entries
// are nearly floats, within 0.02·2^-24, and their reciprocals, too, within a tenth of an ULP: so the largest
// element of a row, where it is the whole sum, has a softmax of exactly 1. (Entries can be within
// 0.005·2^-24, but then a reciprocal lies near the middle of two floats, and 1 became 1 - 2^-24 at times.)
// A table spares the polynomial two of its five terms and divides its errors by four, which pays for rounding
// e^x: pass 2 is then a multiply-add, and need not read x. It costs a lookup and an addition of integers,
// beside what the floating-point operations leave free. 16 entries spare one term more, but are further from
// floats: 0.26·2^-24.
constexpr std::uint32_t QuarterEntry(std::uint32_t bits, std::uint32_t j) {
  return bits + (32u << 23) - (j << 21);
}
alignas(16) inline constexpr std::uint32_t kQuarters[] = {
    QuarterEntry(0x3fd9e10c, 0), QuarterEntry(0x40018d3b, 1), QuarterEntry(0x401a1054, 2),
    QuarterEntry(0x403736b8, 3)};

// 2^n for integers n <= 0, zero below the normal range.
template <typename V>
SOFTMAX2P_INLINE V PowerOfTwo(V n) {
  using F = Format<typename V::Scalar>;
  const V biased = Max(V::Broadcast(-F::kBias), n) + V::Broadcast(F::kRounder + F::kBias);
  return ExponentFromLowBits(biased);
}

// e^x = (1 + expm1)·2^n of K vectors. Every step is taken for all K before the next: one vector after the
// other would be a chain of some ten dependent operations, too long for a CPU's scheduler.
template <typename V, int K>
struct ExtExp {
  V pow2[K];  // kUnit·kFactor·2^(n - reference), or without a table the last alone; zero where x was clamped
  V expm1[K];

  SOFTMAX2P_INLINE V Value(int k) const { return Fma(expm1[k], pow2[k], pow2[k]); }
};

// Computes e^x for x with n - reference <= 2, or, without a table, as large as a power can be. Each lane has
// a reference of its own, an even integer: whether a tie rounds up depends on its parity, and what one pass
// finds must agree with another.
//
// x is clamped where the power has the lowest exponent: then it is zero, or, with a table, subnormal, which
// ScopedFloatMode makes a zero.
//
// Without the table, `table_bits` 0, powers are 2^(n - reference), whatever the vector.
template <typename V, int table_bits = V::kTableBits>
class ExtExpKernel {
  using T = typename V::Scalar;
  using F = Format<T>;
  using R = ReductionFor<V>;

 public:
  explicit SOFTMAX2P_INLINE ExtExpKernel(V reference)
      : lowest_((reference - V::Broadcast(kLowest)) * V::Broadcast(static_cast<T>(F::kLn2))),
        rounder_(V::Broadcast(F::kRounder + kBias) - reference * V::Broadcast(kSteps)) {}

  // The power alone, with the bits that operator() gives it.
  SOFTMAX2P_INLINE V Pow2(V x) const {
    if constexpr (kGuarded) x = Max(lowest_, x);
    return Power(Fma(x, V::Broadcast(F::kLog2E * kSteps), rounder_));
  }

  template <int K>
  SOFTMAX2P_INLINE ExtExp<V, K> operator()(const V (&x)[K]) const {
    ExtExp<V, K> e;
    V n[K], t[K], q[K];
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) t[k] = kGuarded ? Max(lowest_, x[k]) : x[k];
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      e.pow2[k] = Fma(t[k], V::Broadcast(F::kLog2E * kSteps), rounder_);
    }
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) n[k] = e.pow2[k] - rounder_;
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) t[k] = Fnma(n[k], V::Broadcast(R::kLn2Hi / kSteps), t[k]);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) t[k] = Fnma(n[k], V::Broadcast(R::kLn2Lo / kSteps), t[k]);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) e.pow2[k] = Power(e.pow2[k]);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) q[k] = V::Broadcast(P::kCoefficients[kTerms - 1]);
    SOFTMAX2P_UNROLL for (int i = kTerms - 2; i >= 0; --i) {
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) q[k] = Fma(q[k], t[k], V::Broadcast(P::kCoefficients[i]));
    }
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) e.expm1[k] = Fma(t[k] * t[k], q[k], t[k]);
    return e;
  }

 private:
  static SOFTMAX2P_INLINE V Power(V rounded) {
    if constexpr (kHasTable) {
      return rounded.PowerFromTable(kQuarters);
    } else {
      return ExponentFromLowBits(rounded);
    }
  }

  using P = Polynomial<T, table_bits>;
  static constexpr bool kHasTable = table_bits > 0;
  static_assert(!kHasTable || (table_bits == 2 && kUnitExponent<V> == 32), "what kQuarters is made for");
  static constexpr int kTerms = sizeof P::kCoefficients / sizeof P::kCoefficients[0];
  // Table steps per octave.
  static constexpr T kSteps = 1 << table_bits;
  // What is added to n - reference to give the exponent field; the entries of a table have it already.
  static constexpr T kBias = kHasTable ? 0 : F::kBias;
  // x is clamped this far below the reference: in the middle of the entries with the lowest exponent.
  static constexpr T kLowest = F::kBias + (kHasTable ? kUnitExponent<V> + T{0.5} : T{0});

  V lowest_;
  // Adding it to x·log2 e·kSteps rounds x·log2 e to 1/kSteps and leaves the biased exponent n - reference,
  // with the table index below it, in the low mantissa bits.
  V rounder_;
};

}  // namespace jax_softmax2p
