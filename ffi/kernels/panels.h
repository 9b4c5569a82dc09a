// Softmax and its logarithm along an axis that is not the last: panels of columns, lanes across columns,
// without a transpose. Every column has a sum, an exponent and a scale of its own. In pass 1 the maximum of a
// block is found, and then its exponentials are added.
#pragma once

#include <cstdint>

#include "ffi/base/inline.h"
#include "ffi/kernels/lane_log.h"
#include "ffi/kernels/lane_scale.h"
#include "ffi/kernels/panel_blocks.h"
#include "ffi/kernels/passes.h"
#include "ffi/kernels/table.h"

namespace jax_softmax2p {

// For elements E, computed in V. KernelTable says what the public functions do.
template <typename V, typename E>
class PanelKernels {
  using T = typename V::Scalar;

 public:
  static void Maximum(const E* x, const Panel& panel, bool resume, T* maximum) {
    ForVectors<V>(panel.width, [&](int, int at, const auto& access) {
      const V above = resume ? access.Load(maximum + at) : V::Broadcast(kMinusInfinity<V>);
      access.Store(Max(MaxColumn<V>(access, x + at, panel.stride, panel.rows), above), maximum + at);
    });
    ForVectors<V>(panel.tail, [&](int, int at, const auto& access) {
      const V above = access.Load(maximum + at);
      access.Store(Max(access.Load(x + panel.rows * panel.stride + at), above), maximum + at);
    });
  }

  static void Sum(const E* x, T* kept, const Panel& panel, PanelStretch stretch, const T* maximum,
                  const T* subtract, const PanelSums<T>& sums, T* largest) {
    if (subtract != nullptr) {
      SumPanel(x, Discard{}, panel, stretch, maximum, SubtractMaxOf{subtract}, sums, largest);
    } else if (kept != nullptr) {
      SumPanel(x, Mantissas<T>{kept}, panel, stretch, maximum, RecomputeAll{}, sums, largest);
    } else {
      SumPanel(x, Discard{}, panel, stretch, maximum, RecomputeAll{}, sums, largest);
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

  static void Lse(const PanelSums<T>& sums, const T* maximum, const T* subtract, std::int64_t n, int width,
                  T* hi, T* lo, T* log) {
    ForVectors<V>(width, [&](int, int at, const auto& access) {
      const V largest = access.Load(maximum + at, 0);
      const V read = subtract != nullptr ? largest - access.Load(subtract + at, 0) : largest;
      StoreLse(access, largest, LaneLog<V>(Load(access, sums, at), read, n), hi + at, lo + at, log + at);
    });
  }

  static void LseOfOthers(const PanelSums<T>& sums, const T* maximum, int width, T* hi, T* lo, T* log) {
    ForVectors<V>(width, [&](int, int at, const auto& access) {
      const V largest = access.Load(maximum + at, 0);
      StoreLse(access, largest, LaneLog<V>(Load(access, sums, at), largest), hi + at, lo + at, log + at);
    });
  }

  static void Scales(const T* hi, const T* lo, const T* factor, int width, const PanelSums<T>& scales) {
    ScalesFromLse<V>(hi, lo, factor, width, scales);
  }

  static void Write(const E* x, const T* kept, E* y, const Panel& panel, const PanelSums<T>& scales,
                    const T* subtract) {
    if (subtract != nullptr) {
      WriteScaled(SubtractMaxOf{subtract}, x, Discard{}, y, panel, panel.stride, scales);
    } else if (kept != nullptr) {
      WriteScaled(ReloadAll{}, x, kept, y, panel, panel.stride, scales);
    } else {
      WriteScaled(RecomputeAll{}, x, Discard{}, y, panel, panel.stride, scales);
    }
  }

  static void WriteLogits(const T* z, E* y, const Panel& panel, std::int64_t y_stride,
                          const PanelSums<T>& scales, const T* subtract) {
    if (subtract != nullptr) {
      WriteScaled(SubtractMaxOf{subtract}, z, Discard{}, y, panel, y_stride, scales);
    } else {
      WriteScaled(RecomputeAll{}, z, Discard{}, y, panel, y_stride, scales);
    }
  }

  static void MinusLse(const T* z, E* y, const Panel& panel, std::int64_t y_stride, const T* hi, const T* lo,
                       const T* factor) {
    ForPanelWrites<V>(panel, [&](int, int at, const auto& access, std::int64_t row, std::int64_t rows) {
      const T* const from = z + row * panel.stride + at;
      E* const to = y + row * y_stride + at;
      const V lse_hi = access.Load(hi + at, 0), lse_lo = access.Load(lo + at, 0);
      if (factor == nullptr) {
        const NoExp<V, SubtractLse<V>> minus{{lse_hi, lse_lo}};
        WriteColumn<V>(access, access, minus, from, Discard{}, to, panel.stride, y_stride, panel.block, rows,
                       NoScaler<V>{});
      } else {
        const RecomputeMinusLse<V> minus(lse_hi, lse_lo);
        WriteColumn<V>(access, access, minus, from, Discard{}, to, panel.stride, y_stride, panel.block, rows,
                       FactorScaler<V>(access.Load(factor + at, 0)));
      }
    });
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

  template <typename Kept, typename Readers>
  static SOFTMAX2P_INLINE void SumPanel(const E* x, Kept kept, const Panel& panel, PanelStretch stretch,
                                        const T* maximum, const Readers& readers, const PanelSums<T>& sums,
                                        T* largest) {
    LaneAccumulator<V> accumulators[kPanelVectors<V>];
    V maxima[kPanelVectors<V>];
    ForVectors<V>(panel.width, [&](int v, int at, const auto& access) {
      if (!stretch.first) accumulators[v] = LaneAccumulator<V>(Load(access, sums, at));
      const bool resume = largest != nullptr && !stretch.first;
      maxima[v] = resume ? access.Load(largest + at) : V::Broadcast(kMinusInfinity<V>);
    });
    ForPanelBlocks<V>(panel, [&](int v, int at, const auto& access, std::int64_t row, std::int64_t rows) {
      const auto read = readers.Reader(access, at);
      const std::int64_t i = row * panel.stride + at;
      const V highest =
          maximum != nullptr ? access.Load(maximum + at) : MaxColumn<V>(access, x + i, panel.stride, rows);
      maxima[v] = Max(highest, maxima[v]);
      accumulators[v].Rescale(read(highest));
      AddColumn(access, x + i, kept + i, panel.stride, panel.block, rows, read, accumulators[v]);
    });
    ForVectors<V>(panel.width, [&](int v, int at, const auto& access) {
      Store(access, stretch.last ? accumulators[v].Sums() : accumulators[v].State(), sums, at);
      if (largest != nullptr) access.Store(maxima[v], largest + at);
    });
  }

  template <typename Access>
  static SOFTMAX2P_INLINE void StoreLse(const Access& access, V largest, const LaneLog<V>& of_sum, T* hi,
                                        T* lo, T* log) {
    const V of_lanes = V::Load(of_sum.log);
    V error, rest;
    const V sum = TwoSum(largest, of_lanes, error);
    access.Store(FastTwoSum(sum, error + V::Load(of_sum.rest), rest), hi);
    access.Store(rest, lo);
    access.Store(of_lanes, log);
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

  // `In` is E or T.
  template <typename Sources, typename In, typename Kept>
  static SOFTMAX2P_INLINE void WriteScaled(const Sources& sources, const In* x, Kept kept, E* y,
                                           const Panel& panel, std::int64_t y_stride,
                                           const PanelSums<T>& scales) {
    ForPanelWrites<V>(panel, [&](int, int at, const auto& access, std::int64_t row, std::int64_t rows) {
      const LaneSums<V> scale = Load(access, scales, at);
      const std::int64_t i = row * panel.stride + at;
      WriteColumn<V>(access, access, sources.Source(access, at, scale.exponent), x + i, kept + i,
                     y + row * y_stride + at, panel.stride, y_stride, panel.block, rows,
                     MantissaScaler<V>{scale.hi, scale.lo});
    });
  }
};

}  // namespace jax_softmax2p
