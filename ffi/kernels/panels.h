// Softmax along an axis that is not the last: panels of columns, lanes across columns, without a transpose.
//
// Every column has a sum, an exponent and a scale of its own. Pass 1 takes a panel in blocks of rows, and in
// every block one vector of columns after the other, so that a block stays in the first-level cache while its
// maximum is found and its exponentials are added.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/kernels/passes.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class PanelKernels {
  using T = typename V::Scalar;
  // Elements of a block of rows: 16 KiB of float32.
  static constexpr int kBlock = 4096;
  static constexpr int kVectors = kPanelWidth / V::kLanes;

 public:
  static void Maximum(const E* x, const Panel& panel, T* maximum) {
    ForVectors<V>(panel.width, [&](int, int at, const auto& access) {
      access.Store(MaxColumn<V>(access, x + at, panel.stride, panel.rows), maximum + at);
    });
    ForVectors<V>(panel.tail, [&](int, int at, const auto& access) {
      const V above = access.Load(maximum + at);
      access.Store(Max(access.Load(x + panel.rows * panel.stride + at), above), maximum + at);
    });
  }

  static void Sum(const E* x, T* kept, const Panel& panel, const T* maximum, const T* subtract,
                  const PanelSums<T>& sums) {
    if (subtract != nullptr) {
      SumPanel(x, Discard{}, panel, maximum, SubtractMaxOf{subtract}, sums);
    } else if (kept != nullptr) {
      SumPanel(x, kept, panel, maximum, RecomputeAll{}, sums);
    } else {
      SumPanel(x, Discard{}, panel, maximum, RecomputeAll{}, sums);
    }
  }

  static void Merge(const PanelSums<T>& into, const PanelSums<T>& from, int width) {
    ForVectors<V>(width, [&](int, int at, const auto& access) {
      LaneSums<V> total = Load(access, into, at);
      total.Merge(Load(access, from, at));
      Store(access, total, into, at);
    });
  }

  static void Invert(const PanelSums<T>& sums, int width) {
    ForVectors<V>(width, [&](int, int at, const auto& access) {
      LaneSums<V> total = Load(access, sums, at);
      total.Invert();
      Store(access, total, sums, at);
    });
  }

  static void Write(const E* x, const T* kept, E* y, const Panel& panel, const PanelSums<T>& scales,
                    const T* subtract) {
    if (subtract != nullptr) {
      WritePanel(SubtractMaxOf{subtract}, x, Discard{}, y, panel, scales);
    } else if (kept != nullptr) {
      WritePanel(ReloadAll{}, x, kept, y, panel, scales);
    } else {
      WritePanel(RecomputeAll{}, x, Discard{}, y, panel, scales);
    }
  }

 private:
  // The reader and the source of the vector at column `at` of a panel: the same for all columns,
  struct RecomputeAll {
    template <typename Access>
    SOFTMAX2P_INLINE Identity Reader(const Access&, int) const {
      return {};
    }
    template <typename Access>
    SOFTMAX2P_INLINE Recompute<V, Identity> Source(const Access&, int, V exponent) const {
      return {exponent, Identity{}};
    }
  };
  struct ReloadAll {
    template <typename Access>
    SOFTMAX2P_INLINE Reload<V> Source(const Access&, int, V exponent) const {
      return Reload<V>(exponent);
    }
  };
  // or with a maximum of each column's own.
  struct SubtractMaxOf {
    const T* maximum;
    template <typename Access>
    SOFTMAX2P_INLINE SubtractMax<V> Reader(const Access& access, int at) const {
      // In the lanes beyond a tail, -inf - -inf would be NaN.
      return {access.Load(maximum + at, 0)};
    }
    template <typename Access>
    SOFTMAX2P_INLINE Recompute<V, SubtractMax<V>> Source(const Access& access, int at, V exponent) const {
      return {exponent, Reader(access, at)};
    }
  };

  static SOFTMAX2P_INLINE std::int64_t BlockRows(const Panel& panel) {
    return panel.width < kBlock / kUnroll ? kBlock / panel.width : kUnroll;
  }

  template <typename Kept, typename Readers>
  static SOFTMAX2P_INLINE void SumPanel(const E* x, Kept kept, const Panel& panel, const T* maximum,
                                        const Readers& readers, const PanelSums<T>& sums) {
    LaneAccumulator<V> accumulators[kVectors];
    const auto add = [&](int v, int at, const auto& access, std::int64_t row, std::int64_t rows) {
      const auto read = readers.Reader(access, at);
      const E* const from = x + row * panel.stride + at;
      const V highest =
          maximum != nullptr ? access.Load(maximum + at) : MaxColumn<V>(access, from, panel.stride, rows);
      accumulators[v].Rescale(read(highest));
      AddColumn(access, from, kept + row * panel.stride + at, panel.stride, BlockRows(panel), rows, read,
                accumulators[v]);
    };
    const std::int64_t block = BlockRows(panel);
    for (std::int64_t row = 0; row < panel.rows; row += block) {
      const std::int64_t rows = panel.rows - row < block ? panel.rows - row : block;
      ForVectors<V>(panel.width, [&](int v, int at, const auto& access) { add(v, at, access, row, rows); });
    }
    ForVectors<V>(panel.tail, [&](int v, int at, const auto& access) { add(v, at, access, panel.rows, 1); });
    ForVectors<V>(panel.width, [&](int v, int at, const auto& access) {
      Store(access, accumulators[v].Sums(), sums, at);
    });
  }

  template <typename Access>
  static SOFTMAX2P_INLINE LaneSums<V> Load(const Access& access, const PanelSums<T>& sums, int at) {
    return {access.Load(sums.hi + at), access.Load(sums.lo + at), access.Load(sums.exponent + at)};
  }
  template <typename Access>
  static SOFTMAX2P_INLINE void Store(const Access& access, const LaneSums<V>& total, const PanelSums<T>& sums,
                                     int at) {
    access.Store(total.hi, sums.hi + at);
    access.Store(total.lo, sums.lo + at);
    access.Store(total.exponent, sums.exponent + at);
  }

  template <typename Sources, typename Kept>
  static SOFTMAX2P_INLINE void WritePanel(const Sources& sources, const E* x, Kept kept, E* y,
                                          const Panel& panel, const PanelSums<T>& scales) {
    const auto write = [&](int at, const auto& access, std::int64_t row, std::int64_t rows) {
      const std::int64_t i = row * panel.stride + at;
      const LaneSums<V> scale = Load(access, scales, at);
      WriteColumn<V>(access, access, sources.Source(access, at, scale.exponent), x + i, kept + i, y + i,
                     panel.stride, BlockRows(panel), rows, Scaler<V>{scale.hi, scale.lo});
    };
    const std::int64_t block = BlockRows(panel);
    for (std::int64_t row = 0; row < panel.rows; row += block) {
      const std::int64_t rows = panel.rows - row < block ? panel.rows - row : block;
      ForVectors<V>(panel.width, [&](int, int at, const auto& access) { write(at, access, row, rows); });
    }
    ForVectors<V>(panel.tail, [&](int, int at, const auto& access) { write(at, access, panel.rows, 1); });
  }
};

}  // namespace jax_softmax2p
