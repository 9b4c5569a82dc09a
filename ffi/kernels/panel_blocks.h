// The walk of all kernels over a panel: blocks of rows, and in every block one vector of columns after the
// other, so that a block stays in the first-level cache while more than one loop reads it.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// The most vectors of columns that a panel has.
template <typename V>
inline constexpr int kPanelVectors = kPanelWidth / V::kLanes;

// Calls body(vector, its first column, access, first row, rows) for all vectors of a block, until all rows
// are done; those that only the first `tail` columns have come last.
template <typename V, typename Body>
SOFTMAX2P_INLINE void ForPanelBlocks(const Panel& panel, const Body& body) {
  for (std::int64_t row = 0; row < panel.rows; row += panel.block) {
    const std::int64_t rest = panel.rows - row, rows = rest < panel.block ? rest : panel.block;
    ForVectors<V>(panel.width, [&](int v, int at, const auto& access) { body(v, at, access, row, rows); });
  }
  ForVectors<V>(panel.tail,
                [&](int v, int at, const auto& access) { body(v, at, access, panel.rows, std::int64_t{1}); });
}

// The same where each element is read once and a result written: the results need room in the cache, too.
// With blocks of half as many rows of the widest panels, softmax of (2000,1500) along axis 0 takes 0.85 of
// the time (Zen 3).
template <typename V, typename Body>
SOFTMAX2P_INLINE void ForPanelWrites(const Panel& panel, const Body& body) {
  constexpr int kWide = kPanelWidth / 2;
  constexpr std::int64_t kMaxRows = 8;
  Panel written = panel;
  if (panel.width > kWide && panel.block > kMaxRows) written.block = kMaxRows;
  ForPanelBlocks<V>(written, body);
}

}  // namespace jax_softmax2p
