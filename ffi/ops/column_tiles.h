// Rows along an axis that is not the last: packed into tiles of contiguous rows, some columns at a time,
// where they stay in a cache, and unpacked again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ffi/kernels/table.h"
#include "ffi/ops/logits.h"
#include "ffi/ops/parallel_rows.h"

namespace jax_softmax2p {

// The fewest columns of a tile, a cache line of the widest elements, and the most elements of one that has
// more columns: 128 KiB of float32.
inline constexpr std::int64_t kMinTileColumns = 16;
inline constexpr std::int64_t kTileElements = 1 << 15;

// A buffer for some columns of an array [outer, n, inner], each a row of n elements there. Columns are
// counted over [outer, inner].
template <typename E>
class ColumnTile {
 public:
  // `columns` is the most that the tile will hold.
  ColumnTile(const KernelTable<E>& kernels, std::int64_t n, std::int64_t inner, std::int64_t columns)
      : kernels_(kernels), n_(n), inner_(inner), rows_(n * columns) {}

  E* rows() { return rows_.data(); }

  // Copies `count` columns of x, from column `first` on, into the first rows.
  void Pack(const E* x, std::int64_t first, std::int64_t count) {
    ForMatrices(first, count, [&](std::int64_t at, std::int64_t columns, E* rows) {
      kernels_.pack_columns(x + at, inner_, n_, columns, rows);
    });
  }
  // The inverse.
  void Unpack(E* y, std::int64_t first, std::int64_t count) {
    ForMatrices(first, count, [&](std::int64_t at, std::int64_t columns, const E* rows) {
      kernels_.unpack_columns(rows, y + at, inner_, n_, columns);
    });
  }

 private:
  // Calls body(first element, columns, their rows) for the columns of each matrix [n, inner].
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

// Calls body(first column, end, columns of a tile, executor for its rows) until all columns are done.
template <typename Body>
void ParallelForColumns(Executor& executor, std::int64_t columns, std::int64_t n, const Body& body) {
  if (columns == 0) return;
  const std::int64_t width = std::min(columns, std::max(kMinTileColumns, kTileElements / n));
  if (SplitsRows(executor, CeilDiv(columns, width), n)) {
    const ScopedFloatMode mode;
    body(0, columns, width, executor);
    return;
  }
  ParallelForWholeRows(executor, CeilDiv(columns, width), n * width,
                       [&](std::int64_t first, std::int64_t end) {
                         InlineExecutor this_thread;
                         body(first * width, std::min(columns, end * width), width, this_thread);
                       });
}

// Calls body(logits of inner 1, their rows of y, executor) for one tile after the other, until all of the
// logits' columns are done. The rows of y are those of x, until they are written, and are unpacked into y
// unless that is null.
template <typename E, typename Body>
void ForColumnTiles(const Kernels& kernels, Executor& executor, const Logits<E>& logits, E* y,
                    const Body& body) {
  ParallelForColumns(executor, logits.rows, logits.n,
                     [&](std::int64_t first, std::int64_t end, std::int64_t width, Executor& rows_executor) {
                       ColumnTile<E> tile(kernels.Of<E>(), logits.n, logits.inner, width);
                       Logits<E> rows = logits;
                       rows.x = tile.rows();
                       rows.inner = 1;
                       for (rows.first_row = first; rows.first_row < end; rows.first_row += width) {
                         rows.rows = std::min(width, end - rows.first_row);
                         tile.Pack(logits.x, rows.first_row, rows.rows);
                         body(rows, tile.rows(), rows_executor);
                         if (y != nullptr) tile.Unpack(y, rows.first_row, rows.rows);
                       }
                     });
}

}  // namespace jax_softmax2p
