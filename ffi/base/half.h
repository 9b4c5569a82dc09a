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

SOFTMAX2P_INLINE float Widen(BFloat16 x) { return BitCast<float>(std::uint32_t{x.bits} << 16); }

SOFTMAX2P_INLINE void Narrow(float x, BFloat16& to) {
  const std::uint32_t bits = BitCast<std::uint32_t>(x);
  to.bits = static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

SOFTMAX2P_INLINE float Widen(Float16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // A subnormal is converted as an integer: as a float it might be flushed to zero.
  const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  const std::uint32_t rebias = magnitude >= 0x7c00u ? 2 * 112u << 23 : 112u << 23;
  const std::uint32_t normal = (magnitude << 13) + rebias;
  return BitCast<float>((magnitude < 0x400u ? BitCast<std::uint32_t>(small) : normal) | sign);
}

SOFTMAX2P_INLINE void Narrow(float x, Float16& to) {
  const std::uint32_t bits = BitCast<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the last place is 2^-24, which is also that of 0.5 in float: adding 0.5 rounds to it.
  const float small = BitCast<float>(magnitude) + 0.5f;
  std::uint32_t half = BitCast<std::uint32_t>(small) - BitCast<std::uint32_t>(0.5f);
  if (magnitude >= 113u << 23) half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  if (magnitude >= 143u << 23) half = 0x7c00;
  if (magnitude > 255u << 23) half = 0x7e00;
  to.bits = static_cast<std::uint16_t>(half | sign);
}

// `value` rounded to E: once for float and double, first to float for the 16-bit types.
template <typename E>
SOFTMAX2P_INLINE E FromDouble(double value) {
  E element;
  Narrow(static_cast<ComputeOf<E>>(value), element);
  return element;
}

}  // namespace jax_softmax2p
