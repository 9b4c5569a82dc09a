// The walk of all kernels over a panel: blocks of rows, and in every block one vector of columns after the
// other, so that a block stays in the first-level cache while more than one loop reads it.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/kernels/access.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For panels that are computed in V.
template <typename V>
class PanelBlocks {
  // Elements of a block of rows: 16 KiB of float32.
  static constexpr int kBlock = 4096;

 public:
  // The most vectors of columns that a panel has.
  static constexpr int kVectors = kPanelWidth / V::kLanes;

  explicit SOFTMAX2P_INLINE PanelBlocks(const Panel& panel)
      : panel_(panel), rows_(panel.width < kBlock / kUnroll ? kBlock / panel.width : kUnroll) {}

  // The rows of a block, which is also how far ahead loops fetch.
  SOFTMAX2P_INLINE std::int64_t rows() const { return rows_; }

  // Calls body(vector, its first column, access, its first element, rows) for all vectors of a block, until
  // all rows are done; those that only the first `tail` columns have come last.
  template <typename Body>
  SOFTMAX2P_INLINE void ForEach(const Body& body) const {
    for (std::int64_t row = 0; row < panel_.rows; row += rows_) {
      const std::int64_t rows = panel_.rows - row < rows_ ? panel_.rows - row : rows_;
      ForVectors<V>(panel_.width, [&](int v, int at, const auto& access) {
        body(v, at, access, row * panel_.stride + at, rows);
      });
    }
    ForVectors<V>(panel_.tail, [&](int v, int at, const auto& access) {
      body(v, at, access, panel_.rows * panel_.stride + at, std::int64_t{1});
    });
  }

 private:
  Panel panel_;
  std::int64_t rows_;
};

}  // namespace jax_softmax2p
