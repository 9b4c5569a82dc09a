// The vector types F32 and F64 for any machine, on the compilers' vector extension (SSE2 on x86-64).
//
// Every header in this folder defines, in a namespace of its own, the same two types with the same
// members, which kernels/ takes as its template parameter V. The contract beyond the obvious:
//
//   Scalar, kLanes       element type and elements per vector
//   Load, Store          no alignment beyond the element's
//   LoadPartial          the first `count` elements (0 <= count < kLanes), the rest `fill`; touches no others
//   StorePartial         likewise
//   Stream               a Store past the caches, to an address aligned to the vector; the caller
//                        ends with FinishStreaming() of runtime/memory.h. A Store where there is none
//   Fma(a, b, c)         a*b + c, Fnma(a, b, c): c - a*b; rounded once, except here, where each step rounds
//   ProductError(a,b,p)  a*b - p for p = a*b rounded: exact
//   Max(a, b)            elementwise; b where either is NaN (the order lets a caller choose what NaN does)
//   ExponentFromLowBits  the low integer bits of a lane moved into the exponent field: 2^(low - bias)
//   kFused               whether Fma rounds once; Reduction<V> in kernels/exp.h follows from it
#pragma once

#include <cstdint>
#include <cstring>

#include "ffi/simd/inline.h"

namespace jax_softmax2p::portable {

template <typename T, typename Bits, int kMantissaBits, int kSplitBits>
struct Vector {
  using Scalar = T;
  typedef T Register __attribute__((vector_size(16)));
  typedef Bits Integers __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / sizeof(T);
  static constexpr bool kFused = false;

  Register v;

  static SOFTMAX2P_INLINE Vector Broadcast(T x) { return {Register{} + x}; }
  static SOFTMAX2P_INLINE Vector Load(const T* p) {
    Vector r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static SOFTMAX2P_INLINE Vector LoadPartial(const T* p, int count, T fill) {
    Vector r = Broadcast(fill);
    for (int i = 0; i < count; ++i) r.v[i] = p[i];
    return r;
  }
  SOFTMAX2P_INLINE void Store(T* p) const { std::memcpy(p, &v, sizeof v); }
  SOFTMAX2P_INLINE void Stream(T* p) const { Store(p); }
  SOFTMAX2P_INLINE void StorePartial(T* p, int count) const {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }

  friend SOFTMAX2P_INLINE Vector operator+(Vector a, Vector b) { return {a.v + b.v}; }
  friend SOFTMAX2P_INLINE Vector operator-(Vector a, Vector b) { return {a.v - b.v}; }
  friend SOFTMAX2P_INLINE Vector operator*(Vector a, Vector b) { return {a.v * b.v}; }
  friend SOFTMAX2P_INLINE Vector Fma(Vector a, Vector b, Vector c) { return {a.v * b.v + c.v}; }
  friend SOFTMAX2P_INLINE Vector Fnma(Vector a, Vector b, Vector c) { return {c.v - a.v * b.v}; }
  friend SOFTMAX2P_INLINE Vector Max(Vector a, Vector b) { return {a.v > b.v ? a.v : b.v}; }

  // Dekker's product (Numer. Math. 18, 1971): Veltkamp's splitting makes the partial products exact.
  friend SOFTMAX2P_INLINE Vector ProductError(Vector a, Vector b, Vector p) {
    const Vector split = Broadcast(static_cast<T>((Bits{1} << kSplitBits) + 1));
    const Vector a_big = split * a, b_big = split * b;
    const Vector a_hi = a_big - (a_big - a), b_hi = b_big - (b_big - b);
    const Vector a_lo = a - a_hi, b_lo = b - b_hi;
    return a_lo * b_lo - (((p - a_hi * b_hi) - a_lo * b_hi) - a_hi * b_lo);
  }

  friend SOFTMAX2P_INLINE Vector ExponentFromLowBits(Vector a) {
    Integers bits;
    std::memcpy(&bits, &a.v, sizeof bits);
    bits = bits << kMantissaBits;
    std::memcpy(&a.v, &bits, sizeof bits);
    return a;
  }
};

using F32 = Vector<float, std::int32_t, 23, 12>;
using F64 = Vector<double, std::int64_t, 52, 27>;

}  // namespace jax_softmax2p::portable
