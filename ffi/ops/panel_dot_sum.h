// Dot products of the columns of a panel.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "ffi/base/error_free.h"
#include "ffi/kernels/table.h"
#include "ffi/ops/column_panels.h"

namespace jax_softmax2p {

template <typename E>
class PanelDotSum {
  using T = ComputeOf<E>;

 public:
  PanelDotSum(const KernelTable<E>& kernels, const ColumnPanel& panel)
      : kernels_(kernels), size_(panel.segments() * panel.max_width()), dots_(2 * size_) {}

  // Calls dot(segment, where its dot products go) for every segment. The result has those of each of the
  // panel's columns as hi + lo, hi its rounding, until the next call.
  template <typename Dot>
  PanelDots<T> Compute(const ColumnPanel& panel, const Dot& dot) {
    panel.ForSegments([&](const ColumnPanel::Segment& segment) { dot(segment, From(segment.place)); });
    const PanelDots<T> dots = From(0);
    panel.ForMerges(
        [&](std::int64_t place, int columns) { kernels_.panel_add_dots(dots, From(place), columns); });
    for (int c = 0; c < panel.Columns(); ++c) {
      T lo;
      const T hi = TwoSum(dots.hi[c], dots.lo[c], lo);
      if (!std::isfinite(hi)) continue;
      dots.hi[c] = hi;
      dots.lo[c] = lo;
    }
    return dots;
  }

 private:
  PanelDots<T> From(std::int64_t place) { return {dots_.data() + place, dots_.data() + size_ + place}; }

  const KernelTable<E>& kernels_;
  std::int64_t size_;
  std::vector<T> dots_;
};

}  // namespace jax_softmax2p
