// The scale, the bias and the mask that stand before a softmax in most programs, applied to a stretch of a
// row.
#pragma once

#include <cstdint>
#include <cstring>

#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what Apply does.
template <typename V, typename E>
class ScaleBiasMaskKernel {
  using T = typename V::Scalar;
  // Elements that are fetched ahead.
  static constexpr std::int64_t kAhead = SumAhead::value * V::kLanes;

 public:
  static T Apply(const ScaleBiasMaskArgs<E>& args, T* z, std::int64_t n) {
    return args.where == nullptr ? ApplyWith<false>(args, z, n) : ApplyWith<true>(args, z, n);
  }

 private:
  template <bool masked>
  static SOFTMAX2P_INLINE T ApplyWith(const ScaleBiasMaskArgs<E>& args, T* z, std::int64_t n) {
    const V scale = V::Broadcast(args.scale), shift = V::Broadcast(args.shift),
            fill = V::Broadcast(args.fill);
    V maximum = V::Broadcast(static_cast<T>(-__builtin_huge_val()));
    std::int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) {
      __builtin_prefetch(args.x + i + kAhead);
      V v = V::Load(args.x + i);
      v = Fma(v, scale, args.bias != nullptr ? V::Load(args.bias + i) : shift);
      if constexpr (masked) v = V::Where(args.where + i, v, fill);
      v.Store(z + i);
      maximum = Max(v, maximum);
    }
    const int rest = static_cast<int>(n - i);
    if (rest == 0) return maximum.ReduceMax();
    V v = V::LoadPartial(args.x + i, rest, 0);
    v = Fma(v, scale, args.bias != nullptr ? V::LoadPartial(args.bias + i, rest, 0) : shift);
    if constexpr (masked) {
      std::uint8_t where[V::kLanes] = {};
      std::memcpy(where, args.where + i, static_cast<std::size_t>(rest));
      v = V::Where(where, v, fill);
    }
    v.StorePartial(z + i, rest);
    const V last = V::LoadPartial(z + i, rest, static_cast<T>(-__builtin_huge_val()));
    return Max(last, maximum).ReduceMax();
  }
};

}  // namespace jax_softmax2p
