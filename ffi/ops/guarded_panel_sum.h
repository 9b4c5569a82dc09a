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

// The sum of e^x of every column, or of e^(x - subtract).
template <typename E>
class GuardedPanelSum {
  using T = ComputeOf<E>;

 public:
  GuardedPanelSum(const KernelTable<E>& kernels, const ColumnPanel& panel)
      : kernels_(kernels), size_(panel.segments() * panel.width()), sums_(3 * size_), maxima_(size_) {}

  // x is the panel's first element. `kept` is as in KernelTable::panel_sum.
  void Compute(const ColumnPanel& panel, const E* x, T* kept, PanelMaximum maximum) {
    const bool in_pass_1 = maximum == PanelMaximum::kInPass1, first = maximum == PanelMaximum::kFirst;
    if (first) FindMaximum(panel, x);
    Sum(panel, x, kept, first ? maxima_.data() : nullptr, nullptr, in_pass_1 ? maxima_.data() : nullptr);
    if (in_pass_1) MergeMaxima(panel);
    const T* const exponent = Sums().exponent;
    exact_ = std::all_of(exponent, exponent + panel.Columns(), [&](T e) { return IsExact(e); });
    if (exact_) return;
    if (maximum == PanelMaximum::kNone) FindMaximum(panel, x);
    SumMinusMaximum(panel, x);
  }

  // The result, of the panel's columns that differ.
  PanelSums<T> Sums() { return {sums_.data(), sums_.data() + size_, sums_.data() + 2 * size_}; }
  // Of each of the panel's columns what was subtracted, or null.
  const T* subtract() const { return exact_ ? nullptr : subtract_.data(); }
  // Of each of the panel's columns the maximum, where it was asked for or is subtracted.
  const T* maximum() const { return maxima_.data(); }

 private:
  void Sum(const ColumnPanel& panel, const E* x, T* kept, const T* maximum, const T* subtract, T* largest) {
    const PanelSums<T> sums = Sums();
    const auto from = [&](std::int64_t at) {
      return PanelSums<T>{sums.hi + at, sums.lo + at, sums.exponent + at};
    };
    panel.ForSegments([&](std::int64_t place, std::int64_t at, const Panel& segment) {
      kernels_.panel_sum(x + at, kept == nullptr ? nullptr : kept + at, segment, maximum, subtract,
                         from(place), largest == nullptr ? nullptr : largest + place);
    });
    panel.ForMerges(
        [&](std::int64_t place, int columns) { kernels_.panel_merge(sums, from(place), columns); });
  }

  bool IsExact(T exponent) const { return std::abs(exponent) < static_cast<T>(kernels_.max_exponent); }

  void FindMaximum(const ColumnPanel& panel, const E* x) {
    panel.ForSegments([&](std::int64_t place, std::int64_t at, const Panel& segment) {
      kernels_.panel_max(x + at, segment, maxima_.data() + place);
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
  void SumMinusMaximum(const ColumnPanel& panel, const E* x) {
    const T* const exponent = Sums().exponent;
    subtract_.resize(static_cast<std::size_t>(panel.width()));
    for (int c = 0; c < panel.width(); ++c) {
      const bool needed = !IsExact(exponent[c % panel.Columns()]) || std::isinf(maxima_[c]);
      subtract_[c] = needed ? maxima_[c] : 0;
    }
    Sum(panel, x, nullptr, nullptr, subtract_.data(), nullptr);
  }

  const KernelTable<E>& kernels_;
  std::int64_t size_;
  std::vector<T> sums_;
  std::vector<T> maxima_;
  std::vector<T> subtract_;
  bool exact_ = true;
};

}  // namespace jax_softmax2p
