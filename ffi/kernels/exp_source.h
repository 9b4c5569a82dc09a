// Where a pass takes e^x from: computed from x, or put together from x and from what pass 1 kept.
//
// A reader maps the x that was loaded to the x whose exponential is wanted. A source has
//
//   At<K>(access, x, kept, stride) -> ExtExp<V, K> or Values<V, K>
//
// for the K vectors at x, x + stride, ...; `kept` points to the mantissas of pass 1, or is a Discard.
#pragma once

#include <limits>

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/exp.h"

namespace jax_softmax2p {

template <typename V, int K>
struct Values {
  V v[K];
};

// Readers.
struct Identity {
  template <typename V>
  SOFTMAX2P_INLINE V operator()(V x) const {
    return x;
  }
};
template <typename V>
struct SubtractMax {
  V maximum;
  SOFTMAX2P_INLINE V operator()(V x) const { return x - maximum; }
};
// x - (hi + lo), with the rounding of both differences.
template <typename V>
struct SubtractLse {
  V hi, lo;
  SOFTMAX2P_INLINE V operator()(V x) const { return (x - hi) - lo; }
};

// Computes e^read(x). `reference` is that of ExtExpKernel.
template <typename V, typename Read>
class Recompute {
 public:
  SOFTMAX2P_INLINE Recompute(V reference, const Read& read) : exponential_(reference), read_(read) {}
  template <int K, typename Access, typename In, typename Kept, typename Stride>
  SOFTMAX2P_INLINE ExtExp<V, K> At(const Access& access, const In* x, Kept, Stride stride) const {
    V v[K];
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) v[k] = read_(access.Load(x + k * stride));
    return exponential_(v);
  }

 private:
  ExtExpKernel<V> exponential_;
  Read read_;
};

// Computes e^(x - hi - lo) without the rounding of the differences, as (1 + expm1)·pow2/kFactor: the
// reference takes kUnit off.
template <typename V>
class RecomputeMinusLse {
  using T = typename V::Scalar;

 public:
  SOFTMAX2P_INLINE RecomputeMinusLse(V hi, V lo)
      : exponential_(V::Broadcast(kUnitExponent<V>)), hi_(hi), lo_(lo) {}
  template <int K, typename Access, typename In, typename Kept, typename Stride>
  SOFTMAX2P_INLINE ExtExp<V, K> At(const Access& access, const In* x, Kept, Stride stride) const {
    const V lowest = V::Broadcast(std::numeric_limits<T>::lowest());
    const V zero = V::Broadcast(0), minus_one = V::Broadcast(-1);
    V v[K], missing[K];
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      V error;
      const V difference = TwoDiff(access.Load(x + k * stride), hi_, error);
      // Max replaces the NaN that comes of infinities. What is missing is below an ULP where the power is
      // not 0. Where the power is 0, what is missing must be finite, so that their product is 0.
      v[k] = FastTwoSum(difference, Max(error - lo_, lowest), missing[k]);
      missing[k] = zero - Max(zero - Max(missing[k], minus_one), minus_one);
    }
    ExtExp<V, K> e = exponential_(v);
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      e.expm1[k] = e.expm1[k] + Fma(e.expm1[k], missing[k], missing[k]);
    }
    return e;
  }

 private:
  ExtExpKernel<V> exponential_;
  V hi_, lo_;
};

// Takes what pass 1 kept, if that was values.
template <typename V>
struct KeptValues {
  template <int K, typename Access, typename Stride>
  SOFTMAX2P_INLINE Values<V, K> At(const Access& access, const typename V::Scalar* kept, Discard,
                                   Stride stride) const {
    Values<V, K> values;
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) values.v[k] = access.Load(kept + k * stride);
    return values;
  }
};

// Takes the mantissa from pass 1, and computes the power from x, at three operations: the same bits.
template <typename V>
class Reload {
 public:
  explicit SOFTMAX2P_INLINE Reload(V reference) : exponential_(reference) {}
  template <int K, typename Access, typename In, typename Stride>
  SOFTMAX2P_INLINE ExtExp<V, K> At(const Access& access, const In* x, const typename V::Scalar* kept,
                                   Stride stride) const {
    ExtExp<V, K> e;
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) {
      e.pow2[k] = exponential_.Pow2(access.Load(x + k * stride));
      e.expm1[k] = access.Load(kept + k * stride);
    }
    return e;
  }

 private:
  ExtExpKernel<V> exponential_;
};

// No exponential: read(x) itself, for results that are logarithms.
template <typename V, typename Read>
struct NoExp {
  Read read;
  template <int K, typename Access, typename In, typename Stride>
  SOFTMAX2P_INLINE Values<V, K> At(const Access& access, const In* x, Discard, Stride stride) const {
    Values<V, K> r;
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) r.v[k] = read(access.Load(x + k * stride));
    return r;
  }
};

}  // namespace jax_softmax2p
