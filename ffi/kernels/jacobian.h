// Derivatives over contiguous rows: the Jacobian of softmax applied to a tangent or cotangent, J(y, t) =
// y·(t - <y, t>), and the sums of which the derivatives of its logarithm are made.
#pragma once

#include <cstdint>

#include "ffi/base/error_free.h"
#include "ffi/base/inline.h"
#include "ffi/base/layout.h"
#include "ffi/kernels/compensated_lanes.h"
#include "ffi/kernels/extended_sum.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class JacobianKernels {
  using T = typename V::Scalar;
  // Elements that are summed in T before they go into a CompensatedSum of doubles.
  static constexpr int kBlock = 1024;

 public:
  // `In`, the type of y, is E or T. In twice the working precision (Ogita, Rump & Oishi, "Accurate sum and
  // dot product", SIAM J. Sci. Comput. 26(6), 2005, Algorithm 5.3), since t - <y, t> cancels where t is
  // nearly constant.
  template <typename In>
  static CompensatedSum Dot(const In* y, const E* t, std::int64_t n) {
    return SumBlocks(Products<In>{y, t}, n);
  }

  static CompensatedSum Sum(const E* t, std::int64_t n) { return SumBlocks(Terms{t}, n); }

  static void Subtract(const E* t, const T* p, T factor, E* out, std::int64_t n) {
    const V v = V::Broadcast(factor);
    std::int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) Fnma(v, V::Load(p + i), V::Load(t + i)).Store(out + i);
    if (i == n) return;
    const int rest = static_cast<int>(n - i);
    Fnma(v, V::LoadPartial(p + i, rest, 0), V::LoadPartial(t + i, rest, 0)).StorePartial(out + i, rest);
  }

  static void Write(const E* y, const E* t, E* out, std::int64_t n, const DoubleDouble<T>& dot,
                    bool non_temporal) {
    const V hi = V::Broadcast(dot.hi), lo = V::Broadcast(dot.lo);
    const auto jacobian = [&](V y_i, V t_i) { return y_i * ((t_i - hi) - lo); };
    const auto part = [&](std::int64_t i, std::int64_t size) {
      const int count = static_cast<int>(size);
      jacobian(V::LoadPartial(y + i, count, 0), V::LoadPartial(t + i, count, 0)).StorePartial(out + i, count);
    };
    std::int64_t i = 0;
    if (non_temporal) {
      i = ElementsToAlignment<V::kLanes>(out);
      if (i > n) i = n;
      if (i > 0) part(0, i);
      for (; i + V::kLanes <= n; i += V::kLanes) {
        jacobian(V::Load(y + i), V::Load(t + i)).Stream(out + i);
      }
    } else {
      for (; i + V::kLanes <= n; i += V::kLanes) {
        jacobian(V::Load(y + i), V::Load(t + i)).Store(out + i);
      }
    }
    if (i < n) part(i, n - i);
  }

 private:
  // What is summed: At returns the terms of element i and those after it, and their rounding errors.
  template <typename In>
  struct Products {
    const In* y;
    const E* t;
    SOFTMAX2P_INLINE V At(std::int64_t i, V& error) const {
      return TwoProd(V::Load(y + i), V::Load(t + i), error);
    }
    SOFTMAX2P_INLINE V At(std::int64_t i, int count, V& error) const {
      return TwoProd(V::LoadPartial(y + i, count, 0), V::LoadPartial(t + i, count, 0), error);
    }
  };
  struct Terms {
    const E* t;
    SOFTMAX2P_INLINE V At(std::int64_t i, V& error) const {
      error = V::Broadcast(0);
      return V::Load(t + i);
    }
    SOFTMAX2P_INLINE V At(std::int64_t i, int count, V& error) const {
      error = V::Broadcast(0);
      return V::LoadPartial(t + i, count, 0);
    }
  };

  template <typename Source>
  static SOFTMAX2P_INLINE CompensatedSum SumBlocks(const Source& source, std::int64_t n) {
    CompensatedSum total;
    for (std::int64_t i = 0; i < n; i += kBlock) SumBlock(source, i, n - i < kBlock ? n : i + kBlock, total);
    return total;
  }

  template <typename Source>
  static SOFTMAX2P_INLINE void SumBlock(const Source& source, std::int64_t i, std::int64_t n,
                                        CompensatedSum& total) {
    CompensatedLanes<V> even, odd;
    const auto add = [&](CompensatedLanes<V>& to, auto... at) {
      V error;
      const V term = source.At(at..., error);
      to.Add(term, error);
    };
    for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
      add(even, i);
      add(odd, i + V::kLanes);
    }
    if (i + V::kLanes <= n) {
      add(even, i);
      i += V::kLanes;
    }
    if (i < n) add(odd, i, static_cast<int>(n - i));
    even.Add(odd);
    if constexpr (sizeof(T) == sizeof(float)) {
      const double sum = ReduceSum(even.sum, even.rest);
      // An infinite or NaN term leaves nothing sensible in the rest. So seldom that a branch costs least.
      total.Add(sum - sum == 0 ? sum : ReduceSum(even.sum, V::Broadcast(0)));
    } else {
      total.AddLanes(even.sum);
      CompensatedSum errors;
      errors.AddLanes(even.rest);
      total.lo += errors.hi;
    }
  }
};

}  // namespace jax_softmax2p
