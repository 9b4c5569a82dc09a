// The inner loops of softmax down a column of vectors: its maximum, its sum (pass 1), its result (pass 2).
//
// Source: Dukhan & Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438: Algorithm 3 without a
// maximum, 1 and 2 with it.
//
// Everything is a walk down a column, kLanes columns side by side; a contiguous row is one whose lanes are
// merged at the end. Pass 1 adds e^x with the exponent of the largest x so far as reference. Scaling by
// powers of two is exact, so a sum does not depend on the reference. Pass 2 recomputes e^x and scales, or, in
// the reload algorithms, takes from memory the values or mantissas that pass 1 kept there: the same bits,
// since rounding commutes with powers of two.
//
// Arguments that all loops share: `x` points to the first vector, `stride` is the distance of vectors in
// elements, `rows` their number, `access` is how they are loaded, `ahead` how far they are fetched ahead.
// Results have a stride of their own, `y_stride`.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/exp_source.h"
#include "ffi/kernels/lane_sum.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// The largest of every lane. NaNs are passed over; a column of no rows gives -inf.
template <typename V, typename Access, typename In, typename Stride>
SOFTMAX2P_INLINE V MaxColumn(const Access& access, const In* x, Stride stride, std::int64_t rows) {
  V ways[kUnroll];
  for (V& way : ways) way = V::Broadcast(kMinusInfinity<V>);
  std::int64_t i = 0;
  for (; i + kUnroll <= rows; i += kUnroll) {
    SOFTMAX2P_UNROLL for (int k = 0; k < kUnroll; ++k) ways[k] =
        Max(access.Load(x + (i + k) * stride), ways[k]);
  }
  for (; i < rows; ++i) ways[0] = Max(access.Load(x + i * stride), ways[0]);
  static_assert(kUnroll == 4);
  return Max(Max(ways[0], ways[1]), Max(ways[2], ways[3]));
}

template <int K, typename V, typename Access, typename In, typename Kept, typename Stride, typename Far,
          typename Read>
SOFTMAX2P_INLINE void AddVectors(const Access& access, const In* x, Kept kept, Stride stride, Far ahead,
                                 const Recompute<V, Read>& source, LaneAccumulator<V>& sum) {
  Prefetch<K>(x, stride, ahead);
  const ExtExp<V, K> e = source.template At<K>(access, x, kept, stride);
  V values[K];
  SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) values[k] = e.Value(k);
  if constexpr (std::is_same_v<Kept, Mantissas<typename V::Scalar>>) {
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) access.Store(e.expm1[k], kept.at + k * stride);
  } else if constexpr (!std::is_same_v<Kept, Discard>) {
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      access.Store(kTakesValues<V> ? values[k] : e.expm1[k], kept + k * stride);
    }
  }
  sum.Add(e, values);
}

// Pass 1: adds e^read(x) to `sum`, and writes values or mantissas to `kept` unless that is a Discard;
// mantissas to Mantissas. No read(x) may be above the maximum to which `sum` was rescaled.
template <typename V, typename Access, typename In, typename Kept, typename Stride, typename Far,
          typename Read>
SOFTMAX2P_INLINE void AddColumn(const Access& access, const In* x, Kept kept, Stride stride, Far ahead,
                                std::int64_t rows, const Read& read, LaneAccumulator<V>& sum) {
  const Recompute<V, Read> source(sum.reference(), read);
  std::int64_t i = 0;
  for (; i + kUnroll <= rows; i += kUnroll) {
    AddVectors<kUnroll>(access, x + i * stride, kept + i * stride, stride, ahead, source, sum);
  }
  for (; i < rows; ++i) AddVectors<1>(access, x + i * stride, kept + i * stride, stride, ahead, source, sum);
}

// What pass 2 makes of the exponentials: (hi + lo)·e^x. lo·expm1 is too small to matter, and the 1 was never
// added to expm1, so that there is one rounding to the result. The power comes last, lest a scale that
// underflows spoil a result that does not.
template <typename V>
struct Scaler {
  V hi, lo;

  template <int K>
  SOFTMAX2P_INLINE void operator()(const ExtExp<V, K>& e, V (&y)[K]) const {
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = Fma(hi, e.expm1[k], lo);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = (hi + y[k]) * e.pow2[k];
  }
};
// The same where powers are no powers of two, so that a product with one is rounded: the sum comes last, and
// equal elements have the rounding of 1/n. Its smaller term would underflow beside the least results: hence
// kUnit, which is taken off at the end.
template <typename V>
struct TableScaler {
  V hi, lo;

  template <int K>
  SOFTMAX2P_INLINE void operator()(const ExtExp<V, K>& e, V (&y)[K]) const {
    const V unit = V::Broadcast(1 / kUnit<V>);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = Fma(hi, e.expm1[k], lo);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = Fma(hi, e.pow2[k], y[k] * e.pow2[k]) * unit;
  }
};
// What softmax takes where pass 1 keeps mantissas.
template <typename V>
using MantissaScaler = std::conditional_t<kTakesValues<V>, TableScaler<V>, Scaler<V>>;

// factor·e^x/kFactor for any factor. An infinite one is multiplied last, since a Scaler adds two products,
// which would be inf - inf. One beyond kLargestFactor is divided by a power of two before, and the result
// multiplied by that last, since a product on the way would overflow.
template <typename V>
class FactorScaler {
  using T = typename V::Scalar;

 public:
  explicit SOFTMAX2P_INLINE FactorScaler(V factor) {
    const V one = V::Broadcast(1), limit = V::Broadcast(kLargestFactor<T>);
    const V infinity = V::Broadcast(std::numeric_limits<T>::infinity());
    const V magnitude = Max(factor, V::Broadcast(0) - factor), larger = Max(magnitude, limit);
    const V reduced = WhereEqual(larger, limit, factor, factor * V::Broadcast(1 / kFactorHeadroom<T>));
    const V power = WhereEqual(larger, limit, one, V::Broadcast(kFactorHeadroom<T>));
    scaler_ = {DivideByFactor(WhereEqual(magnitude, infinity, one, reduced)), V::Broadcast(0)};
    last_factor_ = WhereEqual(magnitude, infinity, factor, power);
  }

  template <int K>
  SOFTMAX2P_INLINE void operator()(const ExtExp<V, K>& e, V (&y)[K]) const {
    scaler_(e, y);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = y[k] * last_factor_;
  }
  // The same of a p that is kFactor times as large.
  SOFTMAX2P_INLINE V Times(V p) const { return scaler_.hi * p * last_factor_; }

 private:
  Scaler<V> scaler_;
  V last_factor_;
};

// FactorScaler, less the factor in the element whose number is the label: factor·(p - 1), for p =
// e^x/kFactor. Near 1 the power is kFactor, and expm1 the difference. The vectors are a row each of a tile,
// from the first on.
template <typename V>
struct LabelScaler {
  FactorScaler<V> factor;
  V label;
  mutable V place = V::Broadcast(0);

  template <int K>
  SOFTMAX2P_INLINE void operator()(const ExtExp<V, K>& e, V (&y)[K]) const {
    const V one = V::Broadcast(kFactor<V>);
    V at_label[K];
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      at_label[k] = factor.Times(Fma(e.expm1[k], e.pow2[k], e.pow2[k] - one));
    }
    factor(e, y);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      y[k] = WhereEqual(place, label, at_label[k], y[k]);
      place = place + V::Broadcast(1);
    }
  }
};
// t - p·sum for p = e^x/kFactor, where sum = hi + lo is the sum of all t. Where p is near 1 it is (t - sum) -
// (p - 1)·sum, which loses no digits. It is NaN where the lse of a row is not finite: nothing of such a row
// has a derivative.
template <typename V>
class MinusProbability {
  using T = typename V::Scalar;

 public:
  SOFTMAX2P_INLINE MinusProbability(V hi, V lo, V lse)
      : hi_(hi + (lse - lse)), lo_(lo), scale_(DivideByFactor(hi_)) {}
  SOFTMAX2P_INLINE V operator()(V t, V expm1, V pow2) const {
    const V zero = V::Broadcast(0), one = V::Broadcast(kFactor<V>);
    // 1 for powers from 2^(-3/4) to 1, which are near it, and 0 below.
    const V near_one = Floor(pow2 * V::Broadcast(static_cast<T>(1.7) / kFactor<V>));
    const V hi = WhereEqual(near_one, zero, zero, hi_), lo = WhereEqual(near_one, zero, zero, lo_);
    return ((t - hi) - lo) - Fma(expm1, pow2, pow2 - near_one * one) * scale_;
  }

 private:
  V hi_, lo_, scale_;
};

// The same of one vector of t after the other.
template <typename V, typename Access, typename In>
struct SubtractScaler {
  MinusProbability<V> minus;
  Access access;
  mutable const In* t;

  template <int K>
  SOFTMAX2P_INLINE void operator()(const ExtExp<V, K>& e, V (&y)[K]) const {
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      y[k] = minus(access.Load(t + k * V::kLanes, 0), e.expm1[k], e.pow2[k]);
    }
    t += K * V::kLanes;
  }
};
// TableScaler of exponentials' values: kUnit likewise, which `power` takes off.
template <typename V>
struct ValueScaler {
  V hi, lo, power = V::Broadcast(1 / kUnit<V>);

  template <int K>
  SOFTMAX2P_INLINE void operator()(const Values<V, K>& e, V (&y)[K]) const {
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = Fma(e.v[k], hi, e.v[k] * lo) * power;
  }
  template <int K>
  SOFTMAX2P_INLINE void operator()(const ExtExp<V, K>& e, V (&y)[K]) const {
    Values<V, K> values;
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) values.v[k] = e.Value(k);
    (*this)(values, y);
  }
};
// What softmax takes of rows, whose pass 1 keeps what there is to keep.
template <typename V>
using SoftmaxScaler = std::conditional_t<kTakesValues<V>, ValueScaler<V>, Scaler<V>>;

// The same where the source gives the results themselves.
template <typename V>
struct NoScaler {
  template <int K>
  SOFTMAX2P_INLINE void operator()(const Values<V, K>& r, V (&y)[K]) const {
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) y[k] = r.v[k];
  }
};

template <int K, typename V, typename Access, typename Out, typename In, typename E, typename Kept,
          typename Stride, typename YStride, typename Far, typename Source, typename Scaling>
SOFTMAX2P_INLINE void WriteVectors(const Access& access, const Out& out, const Source& source, const In* x,
                                   Kept kept, E* y, Stride stride, YStride y_stride, Far ahead,
                                   const Scaling& scaler) {
  Prefetch<K>(x, stride, ahead);
  // Down a column processors fetch nothing ahead of stores: without this, softmax of (2000,1500) along axis 0
  // takes 1.3 times as long (Cascade Lake, AVX-512).
  if constexpr (std::is_same_v<YStride, std::int64_t>) Prefetch<K>(y, y_stride, ahead);
  V v[K];
  scaler(source.template At<K>(access, x, kept, stride), v);
  SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) out.Store(v[k], y + k * y_stride);
}

// Pass 2: writes scaler(source(x)) to y through `out`. y may be x.
template <typename V, typename Access, typename Out, typename In, typename E, typename Kept, typename Stride,
          typename YStride, typename Far, typename Source, typename Scaling>
SOFTMAX2P_INLINE void WriteColumn(const Access& access, const Out& out, const Source& source, const In* x,
                                  Kept kept, E* y, Stride stride, YStride y_stride, Far ahead,
                                  std::int64_t rows, const Scaling& scaler) {
  std::int64_t i = 0;
  for (; i + kUnroll <= rows; i += kUnroll) {
    WriteVectors<kUnroll, V>(access, out, source, x + i * stride, kept + i * stride, y + i * y_stride, stride,
                             y_stride, ahead, scaler);
  }
  for (; i < rows; ++i) {
    WriteVectors<1, V>(access, out, source, x + i * stride, kept + i * stride, y + i * y_stride, stride,
                       y_stride, ahead, scaler);
  }
}

}  // namespace jax_softmax2p
