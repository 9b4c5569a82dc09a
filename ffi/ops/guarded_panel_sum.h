// Pass 1 of a panel with the guard: see guarded_sum.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ffi/kernels/table.h"
#include "ffi/ops/column_panels.h"

namespace jax_softmax2p {

// When the maxima of columns are found, other than for columns that need the guard's third pass.
enum class PanelMaximum {
  kNone,
  kInPass1,
  kFirst,  // before pass 1, as three passes have it
};

// The sum of e^x of every column, or of e^(x - subtract), of x of type In.
//
// Methods read x from a source, whose ForBlocks(segment, body) calls body(x, panel, first row) for all rows
// of a segment in order, a panel of them at a time.
template <typename In>
class GuardedPanelSum {
  using T = ComputeOf<In>;

 public:
  GuardedPanelSum(const KernelTable<In>& kernels, const ColumnPanel& panel)
      : kernels_(kernels),
        size_(panel.segments() * panel.max_width()),
        sums_(static_cast<std::size_t>(3 * size_)),
        maxima_(static_cast<std::size_t>(size_)) {}

  // `kept` is null, or laid out as x, and where the panel's first element belongs.
  template <typename Source>
  void Compute(const ColumnPanel& panel, const Source& source, T* kept, PanelMaximum maximum) {
    const bool in_pass_1 = maximum == PanelMaximum::kInPass1, first = maximum == PanelMaximum::kFirst;
    if (first) FindMaximum(panel, source);
    Sum(panel, source, kept, first ? maxima_.data() : nullptr, nullptr, in_pass_1 ? maxima_.data() : nullptr);
    if (in_pass_1) MergeMaxima(panel);
    const T* const exponent = Sums().exponent;
    exact_ = !AnyColumn(panel.Columns(), [&](int c) { return !IsExact(exponent[c]); });
    if (exact_) return;
    if (maximum == PanelMaximum::kNone) FindMaximum(panel, source);
    SumMinusMaximum(panel, source);
  }

  // The result, of the panel's columns that differ.
  PanelSums<T> Sums() { return {sums_.data(), sums_.data() + size_, sums_.data() + 2 * size_}; }
  // Of each of the panel's columns what was subtracted, or null.
  const T* subtract() const { return exact_ ? nullptr : subtract_.data(); }
  // Of each of the panel's columns the maximum, where it was asked for or is subtracted.
  const T* maximum() const { return maxima_.data(); }

  // Turns sums into scales for pass 2. A column whose maximum is infinite has no softmax: NaN.
  PanelSums<T> Invert(const ColumnPanel& panel) {
    const PanelSums<T> scales = Sums();
    kernels_.panel_invert(scales, panel.Columns());
    for (int c = 0; !exact_ && c < panel.Columns(); ++c) {
      if (std::isinf(maxima_[c])) scales.hi[c] = std::numeric_limits<T>::quiet_NaN();
    }
    for (T* const repeated : {scales.hi, scales.lo, scales.exponent}) panel.Repeat(repeated);
    return scales;
  }

 private:
  template <typename Source>
  void Sum(const ColumnPanel& panel, const Source& source, T* kept, const T* maximum, const T* subtract,
           T* largest) {
    const PanelSums<T> sums = Sums();
    const auto from = [&](std::int64_t at) {
      return PanelSums<T>{sums.hi + at, sums.lo + at, sums.exponent + at};
    };
    panel.ForSegments([&](const ColumnPanel::Segment& segment) {
      source.ForBlocks(segment, [&](const In* x, const Panel& rows, std::int64_t begin) {
        const PanelStretch stretch{begin == segment.begin, begin + rows.rows == segment.begin + segment.rows};
        kernels_.panel_sum(x, kept == nullptr ? nullptr : kept + begin * rows.stride, rows, stretch, maximum,
                           subtract, from(segment.place),
                           largest == nullptr ? nullptr : largest + segment.place);
      });
    });
    panel.ForMerges(
        [&](std::int64_t place, int columns) { kernels_.panel_merge(sums, from(place), columns); });
  }

  bool IsExact(T exponent) const { return std::abs(exponent) < static_cast<T>(kernels_.max_exponent); }

  template <typename Source>
  void FindMaximum(const ColumnPanel& panel, const Source& source) {
    panel.ForSegments([&](const ColumnPanel::Segment& segment) {
      source.ForBlocks(segment, [&](const In* x, const Panel& rows, std::int64_t begin) {
        kernels_.panel_max(x, rows, begin != segment.begin, maxima_.data() + segment.place);
      });
    });
    MergeMaxima(panel);
  }

  void MergeMaxima(const ColumnPanel& panel) {
    T* const maxima = maxima_.data();
    panel.ForMerges([&](std::int64_t place, int columns) {
      for (int c = 0; c < columns; ++c) maxima[c] = std::max(maxima[c], maxima[place + c]);
    });
    panel.Repeat(maxima);
  }

  // The guard's third pass. Columns that do not need it have 0 subtracted, which changes nothing.
  template <typename Source>
  void SumMinusMaximum(const ColumnPanel& panel, const Source& source) {
    const T* const exponent = Sums().exponent;
    subtract_.resize(static_cast<std::size_t>(panel.width()));
    for (int c = 0; c < panel.width(); ++c) {
      const bool needed = !IsExact(exponent[c % panel.Columns()]) || std::isinf(maxima_[c]);
      subtract_[c] = needed ? maxima_[c] : 0;
    }
    Sum(panel, source, nullptr, nullptr, subtract_.data(), nullptr);
  }

  const KernelTable<In>& kernels_;
  std::int64_t size_;
  std::vector<T> sums_;
  std::vector<T> maxima_;
  std::vector<T> subtract_;
  bool exact_ = true;
};

}  // namespace jax_softmax2p
