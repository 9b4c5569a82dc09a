// e^x as mantissa and exponent, the heart of every kernel: e^x = (1 + expm1)·2^n with n = round(x·log2 e), or
// n = floor(x·log2 e + 13/32) where a table is used. The polynomials are here.
//
// Source: Dukhan & Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438, section 4. Three things
// differ from the paper, all for accuracy or speed:
//
// * The mantissa is kept as expm1 = mantissa - 1, before the 1 would round it. The error of 1 + expm1 in
//   float32 is at most 0.44·2^-23, the sum of the roundings of its steps, against 0.5·2^-23 more had the 1
//   been added. That holds for every float with |n| <= ReductionFor<V>::kMaxExponent, NaN gives NaN, and sums
//   of others are marked: `tests/selftest/run` checks it for all 2^32 patterns. Found there: 0.432 for
//   AVX-512, 0.370 for AVX2, 0.407 for portable. For float64 the tests bound what follows from it.
// * n is handed on as the power of two 2^(n - reference), which is read out of the low bits of the sum that
//   rounds x·log2 e. The reference is an even integer just below the largest n, so the power never overflows.
// * x is clamped from below, where 2^(n - reference) is zero: -inf, finfo.min and the usual masks would
//   otherwise become -inf + inf. NaN passes the clamp and makes expm1 NaN. This is one half of the guard; the
//   other is in ops/guarded_sum.h.
#pragma once

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
  static constexpr double kLn2 = 0x1.62e42fefa39efp-1;
};

template <>
struct Format<double> {
  static constexpr int kBias = 1023;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kLog2E = 0x1.71547652b82fep0;
  static constexpr double kLn2 = 0x1.62e42fefa39efp-1;
};

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

// The best pair of floats: 0.028·2^-24.
template <>
struct Polynomial<float, 4> {
  static constexpr float kCoefficients[] = {0x1.00022ap-1f, 0x1.555756p-3f};
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

// 2^((j - 6)/16) - 1, for vectors that can look it up in a register: it spares the polynomial three of its
// five terms, and costs a lookup, a shift, a multiply-add and an addition. AVX-512: 0.107 ns an element in
// pass 1 against 0.116 (Zen 5, 4096 float32). With the 8 entries of AVX2 the polynomial needs a term more:
// 0.224 against 0.209, so AVX2 does without. Six steps below 1 and nine above keep expm1 from -0.25 to 0.51,
// where floats are so fine that the rounding of the entries costs nothing beside that of the polynomial.
alignas(64) inline constexpr float kSixteenths[] = {-0x1.d4c6b0p-3f,
                                                    -0x1.8edba0p-3f,
                                                    -0x1.45d81ap-3f,
                                                    -0x1.f33212p-4f,
                                                    -0x1.53f392p-4f,
                                                    -0x1.5b505ep-5f,
                                                    0.0f,
                                                    0x1.6ab0dap-5f,
                                                    0x1.72b83cp-4f,
                                                    0x1.1c3d38p-3f,
                                                    0x1.837f06p-3f,
                                                    0x1.ef5326p-3f,
                                                    0x1.2ff6b6p-2f,
                                                    0x1.6ac1f8p-2f,
                                                    0x1.a8279ap-2f,
                                                    0x1.e8451cp-2f};

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
  V pow2[K];  // 2^(n - reference), zero where x was clamped
  V expm1[K];
};

// Computes e^x for x with n - reference <= 2. Each lane has a reference of its own, an even integer: whether
// a tie rounds up depends on its parity, and expm1 from one pass must agree on n with pow2 from another.
template <typename V>
class ExtExpKernel {
  using T = typename V::Scalar;
  using F = Format<T>;
  using R = ReductionFor<V>;

 public:
  explicit SOFTMAX2P_INLINE ExtExpKernel(V reference)
      : lowest_((reference - V::Broadcast(F::kBias)) * V::Broadcast(static_cast<T>(F::kLn2))),
        rounder_(V::Broadcast(F::kRounder + F::kBias * kSteps + kBelow) - reference * V::Broadcast(kSteps)) {}

  // The power alone, with the bits that operator() gives it.
  SOFTMAX2P_INLINE V Pow2(V x) const {
    if constexpr (kGuarded) x = Max(lowest_, x);
    return Exponent(Fma(x, V::Broadcast(F::kLog2E * kSteps), rounder_));
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
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) q[k] = V::Broadcast(P::kCoefficients[kTerms - 1]);
    for (int i = kTerms - 2; i >= 0; --i) {
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) q[k] = Fma(q[k], t[k], V::Broadcast(P::kCoefficients[i]));
    }
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) e.expm1[k] = Fma(t[k] * t[k], q[k], t[k]);
    if constexpr (kBits > 0) {
      // (1 + entry)·(1 + expm1) - 1
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) n[k] = e.pow2[k].Lookup(kSixteenths);
      SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) e.expm1[k] = Fma(n[k], e.expm1[k], e.expm1[k]) + n[k];
    }
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) e.pow2[k] = Exponent(e.pow2[k]);
    return e;
  }

 private:
  static SOFTMAX2P_INLINE V Exponent(V rounded) {
    if constexpr (kBits > 0) rounded = rounded.AboveLookup();
    return ExponentFromLowBits(rounded);
  }

  using P = Polynomial<T, V::kTableBits>;
  static constexpr int kBits = V::kTableBits;
  static constexpr int kTerms = sizeof P::kCoefficients / sizeof P::kCoefficients[0];
  // Table steps per octave.
  static constexpr T kSteps = 1 << kBits;
  // Entries for 2^f with f < 0.
  static constexpr T kBelow = kBits == 0 ? 0 : 6;

  V lowest_;
  // Adding it to x·log2 e·kSteps rounds x·log2 e to 1/kSteps and leaves the biased exponent n - reference,
  // with the table index below it, in the low mantissa bits.
  V rounder_;
};

}  // namespace jax_softmax2p
