// Copies of the short rows of narrow matrices.
#pragma once

#include <cstdint>

namespace jax_softmax2p {

// Copies `rows` rows of `bytes` bytes each; the strides are in bytes, too.
void CopyRowBytes(const void* from, std::int64_t from_stride, void* to, std::int64_t to_stride,
                  std::int64_t rows, std::int64_t bytes);

// The same for elements.
template <typename E>
void CopyRows(const E* from, std::int64_t from_stride, E* to, std::int64_t to_stride, std::int64_t rows,
              std::int64_t size) {
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(E));
  CopyRowBytes(from, from_stride * kBytes, to, to_stride * kBytes, rows, size * kBytes);
}

}  // namespace jax_softmax2p
