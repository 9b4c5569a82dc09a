// Tiles: kLanes rows of up to kMaxSmall elements, transposed so that each has a lane, or kLanes columns.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements of V. A tile is [m, kLanes]: element i of row l is tile[i * kLanes + l].
template <typename V>
class SmallTile {
  using T = typename V::Scalar;
  // Of 2^23 float32 on one thread, softmax of rows of 64 took 0.93 ns an element without a fetch, and 0.81
  // with it; of 16, 0.63 and 0.73 (Zen 4).
  static constexpr int kMaxFetched = 16;
  using TileAhead = Ahead<256>;
  // From so many columns on they are read and written row by row. Softmax of (4,21,16384) then takes 0.65 of
  // the time, and that of (64,21,48) would take 1.08 (Zen 3).
  static constexpr int kRowByRow = 128;
  // 32 KiB. With 16 KiB, fewer columns fit, rows are read in shorter runs, and the CPU fetches less ahead.
  static constexpr int kColumnElements = 32768 / sizeof(T);

 public:
  // A column of a tile is a chain of dependent operations from its first element to its last result. As many
  // tiles as fit, up to these, are worked on together, so that the CPU has several chains to choose from.
  static constexpr int kMany = 4;
  static SOFTMAX2P_INLINE int Many(int m) { return kMaxSmall / m < kMany ? kMaxSmall / m : kMany; }

  // How many of `rest` rows fit a tile.
  static SOFTMAX2P_INLINE int RowsOf(std::int64_t rest) {
    return static_cast<int>(rest < V::kLanes ? rest : V::kLanes);
  }

  // Transposes the first rows, as many as fit, of `rest` rows of m elements of type In, E or T, into a tile.
  // Lanes without a row are 0.
  template <typename In>
  static SOFTMAX2P_INLINE void Load(const In* x, std::int64_t rest, int m, T* tile) {
    const int count = RowsOf(rest);
    if constexpr (std::is_same_v<In, T>) {
      if ((rest - V::kLanes) * m >= (m < V::kTransposeRows ? V::kTransposeRows - m : 0)) {
        return Transpose(x, m, tile);
      }
    }
    T rows[kMaxSmall * V::kLanes];
    const int elements = count * m;
    ForVectors<V>(elements,
                  [&](int, int at, const auto& access) { access.Load(x + at, 0).Store(rows + at); });
    const int end = (m < V::kTransposeRows ? V::kTransposeRows : m) * V::kLanes;
    for (int i = (elements + V::kLanes - 1) / V::kLanes * V::kLanes; i < end; ++i) rows[i] = 0;
    Transpose(rows, m, tile);
  }

  // The inverse. With `non_temporal`, for which y must be aligned to a vector, whole tiles are written past
  // the caches.
  template <typename E>
  static SOFTMAX2P_INLINE void Store(const T* tile, int count, int m, E* y, bool non_temporal) {
    if constexpr (std::is_same_v<E, T>) {
      if (count == V::kLanes && !non_temporal && m >= V::kTransposeRows) return TransposeBack(tile, m, y);
    }
    T rows[kMaxSmall * V::kLanes];
    TransposeBack(tile, m, rows);
    if (count == V::kLanes && non_temporal) {
      for (int i = 0; i < m * V::kLanes; i += V::kLanes) V::Load(rows + i).Stream(y + i);
    } else {
      ForVectors<V>(count * m,
                    [&](int, int at, const auto& access) { access.Store(V::Load(rows + at), y + at); });
    }
  }

  // Makes tiles of `width` columns of n elements, where element i of column c is x[c + i * stride], and calls
  // body(tiles, their first column, columns) for as many as are worked on together, until all are done. Where
  // y is not null, the tiles then become its columns. Many tiles are loaded at a time, row by row: where rows
  // lie a power of two apart, the lines that a cache has of them push each other out.
  template <typename E, typename Body>
  static SOFTMAX2P_INLINE void ForColumns(const E* x, E* y, std::int64_t stride, int n, int width,
                                          const Body& body) {
    T tiles[kColumnElements];
    int most = kPanelWidth;
    while (most * n > kColumnElements) most /= 2;
    const int together = Many(n) * V::kLanes;
    for (int first = 0; first < width; first += most) {
      const int count = width - first < most ? width - first : most;
      ForVectorsOfRows(n, count, [&](int i, int v, int at, const auto& access) {
        access.Load(x + i * stride + first + at, 0).Store(tiles + (v * n + i) * V::kLanes);
      });
      for (int c = 0; c < count; c += together) {
        body(tiles + c * n, first + c, count - c < together ? count - c : together);
      }
      if (y == nullptr) continue;
      ForVectorsOfRows(n, count, [&](int i, int v, int at, const auto& access) {
        access.Store(V::Load(tiles + (v * n + i) * V::kLanes), y + i * stride + first + at);
      });
    }
  }

 private:
  // Calls body(row, vector, its first column, access) for all: row by row, or, of few columns, one vector
  // after the other, which takes fewer operations.
  template <typename Body>
  static SOFTMAX2P_INLINE void ForVectorsOfRows(int n, int columns, const Body& body) {
    if (columns < kRowByRow) {
      ForVectors<V>(columns, [&](int v, int at, const auto& access) {
        for (int i = 0; i < n; ++i) body(i, v, at, access);
      });
      return;
    }
    for (int i = 0; i < n; ++i) {
      ForVectors<V>(columns, [&](int v, int at, const auto& access) { body(i, v, at, access); });
    }
  }

  // Of rows of less than kTransposeRows elements, so many are read from the last, too.
  static SOFTMAX2P_INLINE void Transpose(const T* rows, int m, T* tile) {
    if (m < V::kTransposeRows) {
      V columns[V::kTransposeRows];
      V::LoadTransposed(rows, m, columns);
      for (int c = 0; c < m; ++c) columns[c].Store(tile + c * V::kLanes);
      return;
    }
    V columns[V::kTransposeRows];
    for (int i = 0; i < m; i = Next(i, m)) {
      // The CPU fetches tiles of shorter rows, a part of a page, by itself.
      if (m > kMaxFetched) Prefetch<V::kTransposeRows>(rows + i * V::kLanes, kAdjacent<V>, TileAhead{});
      V::LoadTransposed(rows + i, m, columns);
      SOFTMAX2P_UNROLL for (int c = 0; c < V::kTransposeRows; ++c) {
        columns[c].Store(tile + (i + c) * V::kLanes);
      }
    }
  }

  // After rows of less than kTransposeRows elements, some more are written.
  static SOFTMAX2P_INLINE void TransposeBack(const T* tile, int m, T* rows) {
    V columns[V::kTransposeRows];
    if (m < V::kTransposeRows) {
      constexpr int kWide = V::kTransposeRows;
      for (int c = 0; c < kWide; ++c) {
        columns[c] = c < m ? V::Load(tile + c * V::kLanes) : V::Broadcast(0);
      }
      T wide[kWide * V::kLanes];
      V::StoreTransposed(columns, wide, kWide);
      // Each row is moved whole: the next overwrites what comes after it.
      for (int l = 0; l < V::kLanes; ++l) std::memcpy(rows + l * m, wide + l * kWide, kWide * sizeof(T));
      return;
    }
    for (int i = 0; i < m; i = Next(i, m)) {
      SOFTMAX2P_UNROLL for (int c = 0; c < V::kTransposeRows; ++c) {
        columns[c] = V::Load(tile + (i + c) * V::kLanes);
      }
      V::StoreTransposed(columns, rows + i, m);
    }
  }

  // Where the elements after those from i on begin: the last overlap those before, lest they be moved one by
  // one. m where there are none.
  static SOFTMAX2P_INLINE int Next(int i, int m) {
    const int next = i + V::kTransposeRows;
    return next + V::kTransposeRows <= m || next >= m ? next : m - V::kTransposeRows;
  }
};

}  // namespace jax_softmax2p
