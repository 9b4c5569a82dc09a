// The bits of one type read as another, as std::bit_cast of C++20 does it.
#pragma once

#include <cstring>

#include "ffi/base/inline.h"

namespace jax_softmax2p {

template <typename To, typename From>
SOFTMAX2P_INLINE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace jax_softmax2p
