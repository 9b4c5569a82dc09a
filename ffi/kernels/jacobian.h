// The Jacobian of softmax applied to a tangent or cotangent: J(y, t) = y·(t - <y, t>), over contiguous rows.
#pragma once

#include <cstdint>

#include "ffi/kernels/extended_sum.h"
#include "ffi/kernels/table.h"
#include "ffi/simd/inline.h"

namespace jax_softmax2p {

// For elements E, computed in V.
template <typename V, typename E>
class JacobianRow {
  using T = typename V::Scalar;
  // Elements that are summed in T before they go into a DoubleSum.
  static constexpr int kBlock = 1024;

 public:
  // <y, t> in twice the working precision (Ogita, Rump & Oishi, "Accurate sum and dot product", SIAM J.
  // Sci. Comput. 26(6), 2005, Algorithm 5.3): t - <y, t> cancels where t is nearly constant.
  static DoubleSum Dot(const E* y, const E* t, std::int64_t n) {
    DoubleSum total;
    for (std::int64_t i = 0; i < n; i += kBlock) {
      DotBlock(y + i, t + i, n - i < kBlock ? static_cast<int>(n - i) : kBlock, total);
    }
    return total;
  }

  static void Write(const E* y, const E* t, E* out, std::int64_t n, const SplitScalar<T>& dot) {
    const V high = V::Broadcast(dot.high), low = V::Broadcast(dot.low);
    const auto jacobian = [&](V y_i, V t_i) { return y_i * ((t_i - high) - low); };
    std::int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) {
      jacobian(V::Load(y + i), V::Load(t + i)).Store(out + i);
    }
    if (i < n) {
      const int rest = static_cast<int>(n - i);
      jacobian(V::LoadPartial(y + i, rest, 0), V::LoadPartial(t + i, rest, 0)).StorePartial(out + i, rest);
    }
  }

 private:
  static SOFTMAX2P_INLINE void DotBlock(const E* y, const E* t, int n, DoubleSum& total) {
    Accumulator even, odd;
    int i = 0;
    for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
      even.Add(V::Load(y + i), V::Load(t + i));
      odd.Add(V::Load(y + i + V::kLanes), V::Load(t + i + V::kLanes));
    }
    if (i + V::kLanes <= n) {
      even.Add(V::Load(y + i), V::Load(t + i));
      i += V::kLanes;
    }
    if (i < n) odd.Add(V::LoadPartial(y + i, n - i, 0), V::LoadPartial(t + i, n - i, 0));
    even.AddTo(total);
    odd.AddTo(total);
  }

  struct Accumulator {
    V sum = V::Broadcast(0);
    V rest = V::Broadcast(0);

    SOFTMAX2P_INLINE void Add(V a, V b) {
      const V product = a * b;
      const V larger = sum + product;
      const V added = larger - sum;
      const V error = (sum - (larger - added)) + (product - added);
      rest = rest + (error + ProductError(a, b, product));
      sum = larger;
    }
    SOFTMAX2P_INLINE void AddTo(DoubleSum& total) const {
      total.AddLanes(sum);
      DoubleSum errors;
      errors.AddLanes(rest);
      total.low += errors.high;
    }
  };
};

}  // namespace jax_softmax2p
