// How the softmax kernels walk through memory: vectors down a column, each loaded and stored in one of
// several ways.
//
// A walk has a stride in elements between one vector and the next. A contiguous row is a walk with stride
// kLanes; kLanes columns side by side are a walk with the stride of the array.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ffi/base/inline.h"

namespace jax_softmax2p {

// Vectors that a loop takes at a time: see ExtExp in exp.h.
inline constexpr int kUnroll = 4;

// The stride of a contiguous row.
template <typename V>
inline constexpr std::integral_constant<std::int64_t, V::kLanes> kAdjacent{};

template <typename V>
inline constexpr typename V::Scalar kMinusInfinity = static_cast<typename V::Scalar>(-__builtin_huge_val());

// Loads and stores of whole vectors.
template <typename V>
struct FullVector {
  template <typename P>
  SOFTMAX2P_INLINE V Load(const P* p, typename V::Scalar = kMinusInfinity<V>) const {
    return V::Load(p);
  }
  template <typename P>
  SOFTMAX2P_INLINE void Store(V v, P* p) const {
    v.Store(p);
  }
};

// Loads and stores of the first `count` lanes, 0 < count < kLanes. The others are loaded as `fill`.
template <typename V>
struct Tail {
  int count;
  template <typename P>
  SOFTMAX2P_INLINE V Load(const P* p, typename V::Scalar fill = kMinusInfinity<V>) const {
    return V::LoadPartial(p, count, fill);
  }
  template <typename P>
  SOFTMAX2P_INLINE void Store(V v, P* p) const {
    v.StorePartial(p, count);
  }
};

// Stores whole vectors past the caches, to aligned addresses.
template <typename V>
struct NonTemporal : FullVector<V> {
  template <typename P>
  SOFTMAX2P_INLINE void Store(V v, P* p) const {
    v.Stream(p);
  }
};

// Stands in for the pointer to the mantissas that pass 1 keeps, where it keeps none.
struct Discard {
  friend SOFTMAX2P_INLINE Discard operator+(Discard, std::int64_t) { return {}; }
};

// Pointer to the mantissas that pass 1 keeps where rows keep values: a block's columns have references of
// their own.
template <typename T>
struct Mantissas {
  T* at;
  friend SOFTMAX2P_INLINE Mantissas operator+(Mantissas a, std::int64_t n) { return {a.at + n}; }
};

// Calls body(index, first element, access) for the vectors of which `width` elements consist.
template <typename V, typename Body>
SOFTMAX2P_INLINE void ForVectors(int width, const Body& body) {
  int v = 0;
  for (; (v + 1) * V::kLanes <= width; ++v) body(v, v * V::kLanes, FullVector<V>{});
  const Tail<V> rest{width - v * V::kLanes};
  if (rest.count > 0) body(v, v * V::kLanes, rest);
}

// Writes n elements of another type.
template <typename V, typename E>
SOFTMAX2P_INLINE void StoreElements(const typename V::Scalar* from, std::int64_t n, E* to) {
  ForVectors<V>(static_cast<int>(n),
                [&](int, int h, const auto& access) { access.Store(access.Load(from + h, 0), to + h); });
}

// How many vectors ahead a loop fetches what it will read, as a type. Pass 1 of a row (SumAhead in rows.h)
// fetches the block after the next, since the next has been read for its maximum; fetching a block too late
// took 0.27 ns an element of 2^24 float32 where this takes 0.23 (Zen 4, AVX2). For pass 2 (WriteAhead), Zen
// 5, 2^26 float32, past the caches: .178 ns without, .165 at 32, .153 at 128, AVX-512; .206, .202, .192,
// AVX2. A fetch costs nothing where the data are in a cache.
template <int kVectors>
using Ahead = std::integral_constant<int, kVectors>;
using WriteAhead = Ahead<128>;

template <int K, typename In, typename Stride, typename Far>
SOFTMAX2P_INLINE void Prefetch(const In* x, Stride stride, Far ahead) {
  if constexpr (!std::is_same_v<Far, Ahead<0>>) {
    SOFTMAX2P_UNROLL for (int k = 0; k < K; ++k) __builtin_prefetch(x + (k + ahead) * stride);
  }
}

}  // namespace jax_softmax2p
