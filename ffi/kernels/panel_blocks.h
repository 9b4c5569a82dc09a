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

}  // namespace jax_softmax2p
