// The vector types F32 and F64 for any machine, on the compilers' vector extension (SSE2 on x86-64).
//
// Every header in this folder defines, in a namespace of its own, the same two types with the same members,
// which kernels/ takes as its template parameter V. A type holds one register as its member `v`, and its
// number of lanes is a constant: for vectors of variable length, such as SVE's, a header fixes one width, and
// runtime/cpu.cc must check at run time that the CPU has that. The contract beyond the obvious:
//
//   Scalar, kLanes       The element type, and the elements of a vector.
//   Load, Store          From and to Scalar*. In F32 also from and to 16-bit elements, which are converted,
//                        exactly one way and to nearest even the other. No alignment beyond the element's.
//   LoadPartial          Loads the first `count` elements, 0 <= count < kLanes, and `fill` in the others.
//                        No other element is touched.
//   StorePartial         Stores the first `count` elements. No other element is touched.
//   Stream               Stores past the caches, to an address aligned to the vector. The caller ends with
//                        FenceNonTemporalStores() of runtime/memory.h. It is a Store where there are no such
//                        stores.
//   LoadTransposed       Loads kTransposeRows adjacent elements (16 bytes) from each of kLanes rows, `stride`
//                        apart, as kTransposeRows vectors: lane l of columns[c] is p[l * stride + c].
//   StoreTransposed      The inverse of LoadTransposed.
//   Where(where, a, b)   In every lane, a if where[lane] is not 0, otherwise b.
//   WhereEqual(x, y, a, b)  In every lane, a if x is y, otherwise b.
//   Fma(a, b, c)         a*b + c, rounded once, except here, where each step rounds.
//   Fnma(a, b, c)        c - a*b, rounded as Fma.
//   Fms(a, b, c)         a*b - c, rounded once. Only where kHasFma.
//   Max(a, b)            The larger of each lane, or b where either is NaN: the order of the arguments says
//                        what becomes of NaN.
//   Floor(a)             For |a| < 2^22 in F32, 2^51 in F64.
//   AnyGreater(a, b)     Whether a > b in any lane.
//   ReduceMax            The largest lane. None may be NaN.
//   ReduceSum(hi, lo)    Only in F32: the sum of the lanes of both in double, halves of the vectors pairwise.
//   ExponentFromLowBits  Moves the low integer bits of a lane into the exponent field: 2^(low bits - bias).
//   kTableBits           0, or b where there is PowerFromTable.
//   PowerFromTable(t)    The float t[i] of an aligned table of 2^b, i the lowest b bits of a lane, times 2^m,
//                        m the integer above those bits; a table holds the floats' bits less i in bit 23 - b.
//   kRegisters           How many vectors the CPU has registers for.
//   kHasFma              Whether Fma rounds once. ReductionFor<V> in kernels/exp.h depends on it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ffi/base/half.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p::portable {

template <typename T, typename Bits, int kMantissaBits>
struct Vector {
  using Scalar = T;
  typedef T Register __attribute__((vector_size(16)));
  typedef Bits Integers __attribute__((vector_size(16)));
  typedef std::make_unsigned_t<Bits> Words __attribute__((vector_size(16)));
  typedef std::uint16_t Halves __attribute__((vector_size(2 * (16 / sizeof(T)))));
  static constexpr int kLanes = 16 / sizeof(T);
  static constexpr int kTransposeRows = kLanes;
  static constexpr int kTableBits = 0;
  static constexpr bool kHasFma = false;
  static constexpr int kRegisters = 16;

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
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return {WidenBits<Register, Integers>(__builtin_convertvector(halves, Words), p)};
  }
  template <typename Half>
  static SOFTMAX2P_INLINE Vector LoadPartial(const Half* p, int count, T fill) {
    Vector r = Broadcast(fill);
    for (int i = 0; i < count; ++i) r.v[i] = Widen(p[i]);
    return r;
  }
  template <typename Half>
  SOFTMAX2P_INLINE void Store(Half* p) const {
    const Halves halves = __builtin_convertvector((NarrowToBits<Register, Integers, Words>(v, p)), Halves);
    std::memcpy(p, &halves, sizeof halves);
  }
  template <typename Half>
  SOFTMAX2P_INLINE void StorePartial(Half* p, int count) const {
    for (int i = 0; i < count; ++i) Narrow(v[i], p[i]);
  }
  template <typename Element>
  SOFTMAX2P_INLINE void Stream(Element* p) const {
    Store(p);
  }

  static SOFTMAX2P_INLINE void LoadTransposed(const T* p, std::int64_t stride,
                                              Vector (&columns)[kTransposeRows]) {
    SOFTMAX2P_UNROLL for (int c = 0; c < kTransposeRows; ++c) {
      T lanes[kLanes];
      SOFTMAX2P_UNROLL for (int l = 0; l < kLanes; ++l) lanes[l] = p[l * stride + c];
      columns[c] = Load(lanes);
    }
  }
  static SOFTMAX2P_INLINE void StoreTransposed(const Vector (&columns)[kTransposeRows], T* p,
                                               std::int64_t stride) {
    SOFTMAX2P_UNROLL for (int c = 0; c < kTransposeRows; ++c) {
      T lanes[kLanes];
      columns[c].Store(lanes);
      SOFTMAX2P_UNROLL for (int l = 0; l < kLanes; ++l) p[l * stride + c] = lanes[l];
    }
  }

  static SOFTMAX2P_INLINE Vector Where(const std::uint8_t* where, Vector a, Vector b) {
    SOFTMAX2P_UNROLL for (int i = 0; i < kLanes; ++i) a.v[i] = where[i] != 0 ? a.v[i] : b.v[i];
    return a;
  }

  friend SOFTMAX2P_INLINE Vector WhereEqual(Vector x, Vector y, Vector a, Vector b) {
    return {x.v == y.v ? a.v : b.v};
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
    SOFTMAX2P_UNROLL for (int i = 0; i < kLanes; ++i) {
      if (greater[i]) return true;
    }
    return false;
  }
  SOFTMAX2P_INLINE T ReduceMax() const {
    T max = v[0];
    SOFTMAX2P_UNROLL for (int i = 1; i < kLanes; ++i) max = v[i] > max ? v[i] : max;
    return max;
  }
  friend SOFTMAX2P_INLINE double ReduceSum(Vector hi, Vector lo) {
    static_assert(kLanes == 4);
    const auto halves = [](Vector a, int i) { return double{a.v[i]} + double{a.v[i + 2]}; };
    return (halves(hi, 0) + halves(lo, 0)) + (halves(hi, 1) + halves(lo, 1));
  }

  friend SOFTMAX2P_INLINE Vector ExponentFromLowBits(Vector a) {
    Integers bits;
    std::memcpy(&bits, &a.v, sizeof bits);
    bits = bits << kMantissaBits;
    std::memcpy(&a.v, &bits, sizeof bits);
    return a;
  }
};

using F32 = Vector<float, std::int32_t, 23>;
using F64 = Vector<double, std::int64_t, 52>;

}  // namespace jax_softmax2p::portable
