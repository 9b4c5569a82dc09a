// The 16-bit element types, their conversions, and the type in which each element type is computed.
#pragma once

#include <cstdint>

#include "ffi/base/bit_cast.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

template <typename Element>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// The type in which arrays of Element are computed: float for 16-bit elements, otherwise Element itself.
template <typename Element>
using ComputeOf = typename ComputeType<Element>::type;

// Applies a macro to every element type: for explicit instantiations of templates.
#define SOFTMAX2P_FOR_EACH_ELEMENT(macro) macro(float) macro(double) macro(BFloat16) macro(Float16)

// Widen converts to the compute type, exactly. Narrow rounds to nearest, ties to even.
SOFTMAX2P_INLINE float Widen(float x) { return x; }
SOFTMAX2P_INLINE double Widen(double x) { return x; }
SOFTMAX2P_INLINE void Narrow(float x, float& to) { to = x; }
SOFTMAX2P_INLINE void Narrow(double x, double& to) { to = x; }

// The conversions of 16-bit elements, which stand in the low bits of words: of one word, or of a vector in
// every lane. F is float or a vector of floats, Int and Word are the signed and unsigned integers of its
// lanes; signed ones are compared, since SSE2 compares no others. The pointer only names the element type.
template <typename F, typename Int, typename Word>
SOFTMAX2P_INLINE F WidenBits(Word halves, const BFloat16*) {
  return BitCast<F>(halves << 16);
}

template <typename F, typename Int, typename Word>
SOFTMAX2P_INLINE Word NarrowToBits(F x, const BFloat16*) {
  const Word bits = BitCast<Word>(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding may carry out of a NaN.
  const Int magnitude = BitCast<Int>(bits & 0x7fffffffu);
  return magnitude > (255 << 23) ? Word{} + 0x7fc0u : rounded;
}

// Below 2^-14 the last place of Float16 is 2^-24, which is also that of 0.5 in float: it counts a subnormal's
// units, which as a float might be flushed to zero, and adding it rounds to them.
constexpr std::uint32_t kBitsOfHalf = 126u << 23;

template <typename F, typename Int, typename Word>
SOFTMAX2P_INLINE F WidenBits(Word halves, const Float16*) {
  const Word sign = (halves & 0x8000u) << 16, magnitude = halves & 0x7fffu;
  const Int ordered = BitCast<Int>(magnitude);
  const F small = BitCast<F>(magnitude + kBitsOfHalf) - 0.5f;
  const Word rebias = ordered >= 0x7c00 ? Word{} + (2 * 112u << 23) : Word{} + (112u << 23);
  const Word normal = (magnitude << 13) + rebias;
  return BitCast<F>((ordered < 0x400 ? BitCast<Word>(small) : normal) | sign);
}

template <typename F, typename Int, typename Word>
SOFTMAX2P_INLINE Word NarrowToBits(F x, const Float16*) {
  const Word bits = BitCast<Word>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Int ordered = BitCast<Int>(magnitude);
  const Word small = BitCast<Word>(BitCast<F>(magnitude) + 0.5f) - kBitsOfHalf;
  const Word normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Word half = ordered >= (113 << 23) ? normal : small;
  half = ordered >= (143 << 23) ? Word{} + 0x7c00u : half;
  half = ordered > (255 << 23) ? Word{} + 0x7e00u : half;
  return half | sign;
}

template <typename Half>
SOFTMAX2P_INLINE float Widen(Half x) {
  return WidenBits<float, std::int32_t>(std::uint32_t{x.bits}, &x);
}

template <typename Half>
SOFTMAX2P_INLINE void Narrow(float x, Half& to) {
  to.bits = static_cast<std::uint16_t>(NarrowToBits<float, std::int32_t, std::uint32_t>(x, &to));
}

// `value` rounded to E: once for float and double, first to float for the 16-bit types.
template <typename E>
SOFTMAX2P_INLINE E FromDouble(double value) {
  E element;
  Narrow(static_cast<ComputeOf<E>>(value), element);
  return element;
}

}  // namespace jax_softmax2p
