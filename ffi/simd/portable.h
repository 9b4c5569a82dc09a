// The vector types F32 and F64 for any machine, on the compilers' vector extension (SSE2 on x86-64).
//
// Every header in this folder defines, in a namespace of its own, the same two types with the same
// members, which kernels/ takes as its template parameter V. The contract beyond the obvious:
//
//   Scalar, kLanes       element type and elements per vector
//   Load, Store          from and to Scalar*, and in F32 also 16-bit elements, converted: to nearest even,
//                        exact the other way. No alignment beyond the element's
//   LoadPartial          the first `count` elements (0 <= count < kLanes), the rest `fill`; touches no others
//   StorePartial         likewise
//   Stream               a Store past the caches, to an address aligned to what a vector takes there; the
//                        caller ends with FinishStreaming() of runtime/memory.h. A Store where there is none
//   LoadQuads            kQuad adjacent elements (16 bytes) from each of kLanes rows `stride` apart, as kQuad
//                        vectors: lane l of columns[c] is p[l * stride + c]. StoreQuads is its inverse
//   Where(where, a, b)   lane by lane a where where[lane] is not 0, else b
//   Fma(a, b, c)         a*b + c, Fnma(a, b, c): c - a*b; rounded once, except here, where each step rounds
//   ProductError(a,b,p)  a*b - p for p = a*b rounded: exact
//   Max(a, b)            elementwise; b where either is NaN (the order lets a caller choose what NaN does)
//   Floor(a)             for |a| < 2^22 in F32, 2^51 in F64
//   AnyGreater(a, b)     whether a > b in any lane
//   ReduceMax            the largest lane, none of which is NaN
//   Total                in F32: the sum of the lanes in double, halves of the vector pairwise
//   ExponentFromLowBits  the low integer bits of a lane moved into the exponent field: 2^(low - bias)
//   kTableBits           0, or b where there are also Lookup(table), the entry that a lane's lowest b bits
//                        choose of an aligned table of 2^b, and AboveLookup(), the integer bits above those
//   kFused               whether Fma rounds once; Reduction<V> in kernels/exp.h follows from it
#pragma once

#include <cstdint>
#include <cstring>

#include "ffi/kernels/element.h"
#include "ffi/simd/inline.h"

namespace jax_softmax2p::portable {

template <typename To, typename From>
SOFTMAX2P_INLINE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

SOFTMAX2P_INLINE float Widen(BFloat16 x) { return BitCast<float>(std::uint32_t{x.bits} << 16); }

SOFTMAX2P_INLINE void Narrow(float x, BFloat16& to) {
  const std::uint32_t bits = BitCast<std::uint32_t>(x);
  to.bits = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

SOFTMAX2P_INLINE float Widen(Float16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // Subnormals by way of an integer: as floats they might be flushed.
  const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  const std::uint32_t rebias = magnitude >= 0x7c00u ? 2 * 112u << 23 : 112u << 23;
  const std::uint32_t normal = (magnitude << 13) + rebias;
  return BitCast<float>((magnitude < 0x400u ? BitCast<std::uint32_t>(small) : normal) | sign);
}

SOFTMAX2P_INLINE void Narrow(float x, Float16& to) {
  const std::uint32_t bits = BitCast<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the last place is 2^-24, as that of 0.5 is in float: adding that rounds where it should.
  const float small = BitCast<float>(magnitude) + 0.5f;
  std::uint32_t half = BitCast<std::uint32_t>(small) - BitCast<std::uint32_t>(0.5f);
  if (magnitude >= 113u << 23) half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  if (magnitude >= 143u << 23) half = 0x7c00;
  if (magnitude > 255u << 23) half = 0x7e00;
  to.bits = static_cast<std::uint16_t>(half | sign);
}

template <typename T, typename Bits, int kMantissaBits, int kSplitBits>
struct Vector {
  using Scalar = T;
  typedef T Register __attribute__((vector_size(16)));
  typedef Bits Integers __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / sizeof(T);
  static constexpr int kQuad = kLanes;
  static constexpr int kTableBits = 0;
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
  SOFTMAX2P_INLINE void StorePartial(T* p, int count) const {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }

  template <typename Half>
  static SOFTMAX2P_INLINE Vector Load(const Half* p) {
    return LoadPartial(p, kLanes, 0);
  }
  template <typename Half>
  static SOFTMAX2P_INLINE Vector LoadPartial(const Half* p, int count, T fill) {
    Vector r = Broadcast(fill);
    for (int i = 0; i < count; ++i) r.v[i] = Widen(p[i]);
    return r;
  }
  template <typename Half>
  SOFTMAX2P_INLINE void Store(Half* p) const {
    StorePartial(p, kLanes);
  }
  template <typename Half>
  SOFTMAX2P_INLINE void StorePartial(Half* p, int count) const {
    for (int i = 0; i < count; ++i) Narrow(v[i], p[i]);
  }
  template <typename Element>
  SOFTMAX2P_INLINE void Stream(Element* p) const {
    Store(p);
  }

  static SOFTMAX2P_INLINE void LoadQuads(const T* p, std::int64_t stride, Vector (&columns)[kQuad]) {
    for (int c = 0; c < kQuad; ++c) {
      T lanes[kLanes];
      for (int l = 0; l < kLanes; ++l) lanes[l] = p[l * stride + c];
      columns[c] = Load(lanes);
    }
  }
  static SOFTMAX2P_INLINE void StoreQuads(const Vector (&columns)[kQuad], T* p, std::int64_t stride) {
    for (int c = 0; c < kQuad; ++c) {
      T lanes[kLanes];
      columns[c].Store(lanes);
      for (int l = 0; l < kLanes; ++l) p[l * stride + c] = lanes[l];
    }
  }

  static SOFTMAX2P_INLINE Vector Where(const std::uint8_t* where, Vector a, Vector b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = where[i] != 0 ? a.v[i] : b.v[i];
    return a;
  }

  friend SOFTMAX2P_INLINE Vector operator+(Vector a, Vector b) { return {a.v + b.v}; }
  friend SOFTMAX2P_INLINE Vector operator-(Vector a, Vector b) { return {a.v - b.v}; }
  friend SOFTMAX2P_INLINE Vector operator*(Vector a, Vector b) { return {a.v * b.v}; }
  friend SOFTMAX2P_INLINE Vector operator/(Vector a, Vector b) { return {a.v / b.v}; }
  friend SOFTMAX2P_INLINE Vector Fma(Vector a, Vector b, Vector c) { return {a.v * b.v + c.v}; }
  friend SOFTMAX2P_INLINE Vector Fnma(Vector a, Vector b, Vector c) { return {c.v - a.v * b.v}; }
  friend SOFTMAX2P_INLINE Vector Max(Vector a, Vector b) { return {a.v > b.v ? a.v : b.v}; }
  friend SOFTMAX2P_INLINE Vector Floor(Vector a) {
    const Vector rounder = Broadcast(static_cast<T>(Bits{3} << (kMantissaBits - 1)));
    const Vector nearest = (a + rounder) - rounder;
    return {nearest.v > a.v ? nearest.v - 1 : nearest.v};
  }
  friend SOFTMAX2P_INLINE bool AnyGreater(Vector a, Vector b) {
    const Integers greater = a.v > b.v;
    for (int i = 0; i < kLanes; ++i) {
      if (greater[i]) return true;
    }
    return false;
  }
  SOFTMAX2P_INLINE T ReduceMax() const {
    T max = v[0];
    for (int i = 1; i < kLanes; ++i) max = v[i] > max ? v[i] : max;
    return max;
  }
  SOFTMAX2P_INLINE double Total() const {
    static_assert(kLanes == 4);
    return (double{v[0]} + double{v[2]}) + (double{v[1]} + double{v[3]});
  }

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
