// Columns of a matrix copied into contiguous rows, and back.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ffi/base/half.h"
#include "ffi/base/inline.h"

namespace jax_softmax2p {

// For elements E. V is the vector type that E is computed in.
template <typename V, typename E>
class PackKernels {
 public:
  // rows[c * n + i] = x[i * stride + c] for i < n and c < columns.
  static void Pack(const E* x, std::int64_t stride, std::int64_t n, std::int64_t columns, E* rows) {
    ForBlocks(
        n, columns,
        [&](std::int64_t i, std::int64_t c, auto& block) {
          V::LoadTransposed(x + i * stride + c, stride, block);
          SOFTMAX2P_UNROLL for (int q = 0; q < V::kTransposeRows; ++q) block[q].Store(rows + (c + q) * n + i);
        },
        [&](std::int64_t i, std::int64_t c) { rows[c * n + i] = x[i * stride + c]; });
  }

  // x[i * stride + c] = rows[c * n + i].
  static void Unpack(const E* rows, E* x, std::int64_t stride, std::int64_t n, std::int64_t columns) {
    ForBlocks(
        n, columns,
        [&](std::int64_t i, std::int64_t c, auto& block) {
          SOFTMAX2P_UNROLL for (int q = 0; q < V::kTransposeRows; ++q) block[q] =
              V::Load(rows + (c + q) * n + i);
          V::StoreTransposed(block, x + i * stride + c, stride);
        },
        [&](std::int64_t i, std::int64_t c) { x[i * stride + c] = rows[c * n + i]; });
  }

 private:
  // Calls vectors(i, c, registers) for blocks of kLanes rows by kTransposeRows columns, and one(i, c) for
  // what those leave, and for 16-bit elements, which vectors do not transpose. A block of rows is done for
  // all columns before the next, while its cache lines of x are in the first-level cache.
  template <typename Vectors, typename One>
  static SOFTMAX2P_INLINE void ForBlocks(std::int64_t n, std::int64_t columns, const Vectors& vectors,
                                         const One& one) {
    constexpr bool kVectors = std::is_same_v<E, typename V::Scalar>;
    constexpr std::int64_t kRows = V::kLanes;
    for (std::int64_t i = 0; i < n; i += kRows) {
      const std::int64_t rows = n - i < kRows ? n - i : kRows;
      std::int64_t c = 0;
      if constexpr (kVectors) {
        V block[V::kTransposeRows];
        for (; rows == kRows && c + V::kTransposeRows <= columns; c += V::kTransposeRows)
          vectors(i, c, block);
      }
      for (; c < columns; ++c) {
        for (std::int64_t r = i; r < i + rows; ++r) one(r, c);
      }
    }
  }
};

}  // namespace jax_softmax2p
