// The scale, the bias and the mask that stand before a softmax in most programs, applied to a stretch of a
// row, or to rows of a panel.
#pragma once

#include <cstdint>
#include <cstring>

#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class ScaleBiasMaskKernel {
  using T = typename V::Scalar;
  // Elements that are fetched ahead.
  static constexpr std::int64_t kAhead = 256 * V::kLanes;

 public:
  static T Apply(const ScaleBiasMaskArgs<E>& args, T* z, std::int64_t n) {
    return args.where == nullptr ? ApplyWith<false>(args, z, n) : ApplyWith<true>(args, z, n);
  }

  static void ApplyToPanel(const PanelLogits<E>& logits, std::int64_t rows, int width, T* z,
                           std::int64_t z_stride) {
    const PanelOperand<E>& bias = logits.bias;
    const PanelOperand<std::uint8_t>& where = logits.where;
    for (std::int64_t i = 0; i < rows; ++i) {
      const E* const x = logits.x + i * logits.stride;
      T* const to = z + i * z_stride;
      const std::uint8_t* const mask = where.data == nullptr ? nullptr : where.data + i * where.stride;
      const bool masked_throughout = mask != nullptr && where.step == 0 && *mask == 0;
      const auto apply = [&](const auto& shift) {
        if (masked_throughout) return FillRow(width, to);
        where.step == 0 ? ApplyToRow<false>(x, logits.scale, shift, mask, width, to)
                        : ApplyToRow<true>(x, logits.scale, shift, mask, width, to);
      };
      if (bias.step != 0) {
        apply(Shifts{bias.data + i * bias.stride});
      } else {
        apply(Shift{V::Broadcast(bias.data == nullptr ? T{0} : T{Widen(bias.data[i * bias.stride])})});
      }
    }
  }

 private:
  // The bias of the columns from `at` on: an element for each, or one for all.
  struct Shifts {
    const E* bias;
    template <typename Access>
    SOFTMAX2P_INLINE V At(const Access& access, int at) const {
      return access.Load(bias + at, 0);
    }
  };
  struct Shift {
    V bias;
    template <typename Access>
    SOFTMAX2P_INLINE V At(const Access&, int) const {
      return bias;
    }
  };

  // The bytes of a mask that belong to a vector: where there are fewer, a copy.
  struct Mask {
    SOFTMAX2P_INLINE Mask(const FullVector<V>&, const std::uint8_t* where) : bytes(where) {}
    SOFTMAX2P_INLINE Mask(const Tail<V>& tail, const std::uint8_t* where) : bytes(copy) {
      std::memcpy(copy, where, static_cast<std::size_t>(tail.count));
    }
    const std::uint8_t* bytes;
    std::uint8_t copy[V::kLanes] = {};
  };

  template <bool masked, typename Bias>
  static SOFTMAX2P_INLINE void ApplyToRow(const E* x, const T* scale, const Bias& bias,
                                          const std::uint8_t* where, int width, T* z) {
    ForVectors<V>(width, [&](int, int at, const auto& access) {
      V v = Fma(access.Load(x + at, 0), access.Load(scale + at, 0), bias.At(access, at));
      if constexpr (masked) v = V::Where(Mask(access, where + at).bytes, v, V::Broadcast(kMinusInfinity<V>));
      access.Store(v, z + at);
    });
  }

  static SOFTMAX2P_INLINE void FillRow(int width, T* z) {
    ForVectors<V>(width, [&](int, int at, const auto& access) {
      access.Store(V::Broadcast(kMinusInfinity<V>), z + at);
    });
  }

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
