// Rows that do not lie together in memory: brought together, some at a time, where they stay in a cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ffi/kernels/table.h"
#include "ffi/ops/parallel_rows.h"

namespace jax_softmax2p {

// What a tile holds at least of columns, a line of the caches of the widest elements, and at most of
// elements: 128 KiB of float32.
inline constexpr std::int64_t kTileColumns = 16;
inline constexpr std::int64_t kTileElements = 1 << 15;

// Columns of an array [outer, n, inner] in a buffer, each a row there. They are counted by [outer, inner].
template <typename E>
class ColumnTile {
 public:
  ColumnTile(const KernelTable<E>& kernels, std::int64_t n, std::int64_t inner, std::int64_t columns)
      : kernels_(kernels), n_(n), inner_(inner), rows_(n * columns) {}

  E* rows() { return rows_.data(); }

  void Pack(const E* x, std::int64_t first, std::int64_t count) {
    ForMatrices(first, count, [&](std::int64_t at, std::int64_t columns, E* rows) {
      kernels_.pack_columns(x + at, inner_, n_, columns, rows);
    });
  }
  void Unpack(E* y, std::int64_t first, std::int64_t count) {
    ForMatrices(first, count, [&](std::int64_t at, std::int64_t columns, const E* rows) {
      kernels_.unpack_columns(rows, y + at, inner_, n_, columns);
    });
  }

 private:
  // Calls body(first element, columns, their rows) for those of each matrix [n, inner].
  template <typename Body>
  void ForMatrices(std::int64_t first, std::int64_t count, const Body& body) {
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t column = (first + done) % inner_, columns = std::min(count - done, inner_ - column);
      body((first + done) / inner_ * n_ * inner_ + column, columns, rows() + done * n_);
      done += columns;
    }
  }

  const KernelTable<E>& kernels_;
  std::int64_t n_;
  std::int64_t inner_;
  std::vector<E> rows_;
};

// Calls some(first column, end, columns of a tile, executor for their rows) until every column had its turn.
template <typename Some>
void ForColumns(Executor& executor, std::int64_t columns, std::int64_t n, const Some& some) {
  if (columns == 0) return;
  const std::int64_t width = std::min(columns, std::max(kTileColumns, kTileElements / n));
  if (SplitsRows(executor, CeilDiv(columns, width), n)) {
    const ScopedFloatMode mode;
    some(0, columns, width, executor);
    return;
  }
  ForWholeRows(executor, CeilDiv(columns, width), n * width, [&](std::int64_t first, std::int64_t end) {
    InThisThread alone;
    some(first * width, std::min(columns, end * width), width, alone);
  });
}

}  // namespace jax_softmax2p
