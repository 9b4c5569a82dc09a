// logsumexp and log_softmax along an axis that is not the last: panels of columns, without a transpose.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "ffi/base/error_free.h"
#include "ffi/ops/column_panels.h"
#include "ffi/ops/guarded_panel_sum.h"
#include "ffi/ops/logits_panel.h"
#include "ffi/ops/logsumexp.h"

namespace jax_softmax2p {
namespace {

// A panel of logits without the largest element of every column, for GuardedPanelSum.
template <typename E>
class PanelWithoutLargest {
  using T = ComputeOf<E>;

 public:
  PanelWithoutLargest(const LogitsPanel<E>& logits, const T* maximum) : logits_(logits), maximum_(maximum) {}

  template <typename Body>
  void ForBlocks(const ColumnPanel::Segment& segment, const Body& body) const {
    const ColumnPanel& panel = logits_.panel();
    logits_.ForBlocks(segment, [&](const T* z, const Panel& rows, std::int64_t begin) {
      alignas(64) T others[kPanelBlock * kPanelWidth];
      for (std::int64_t at = 0; at < rows.rows; at += kPanelBlock) {
        const std::int64_t count = std::min(kPanelBlock, rows.rows - at);
        for (std::int64_t i = 0; i < count; ++i) {
          const T* const from = z + (at + i) * rows.stride;
          T* const to = others + i * kPanelWidth;
          for (int c = 0; c < panel.width(); ++c) to[c] = from[c] == maximum_[c] ? kMinusInfinity : from[c];
        }
        body(others, panel.Rows(segment, count, kPanelWidth), begin + at);
      }
    });
  }

 private:
  static constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

  const LogitsPanel<E>& logits_;
  const T* maximum_;
};

// The lse of panels of z, and y = z - lse unless y is null.
template <typename E>
class LogSumExpPanel {
  using T = ComputeOf<E>;

 public:
  // With `small`, panels are those of PlanSmallColumns.
  LogSumExpPanel(const Kernels& kernels, const Logits<E>& logits, const ColumnPanel& panel, bool small, E* y,
                 Lse<T> lse)
      : kernels_(kernels.Of<E>()),
        kernels_of_z_(kernels.Of<T>()),
        logits_(kernels, logits, panel),
        x_(logits.x),
        has_mask_(logits.HasMask()),
        small_(small),
        y_(y),
        lse_(lse),
        sum_(kernels_of_z_, panel),
        log_(static_cast<std::size_t>(panel.width())),
        of_small_(small ? 2 * log_.size() : 0) {}

  void Compute(std::int64_t p) {
    logits_.Move(p);
    if (!small_ || !WriteSmall()) WritePanel();
    if (y_ != nullptr) WriteLogSoftmax();
  }

 private:
  bool HasNoLog(int c) const { return std::isnan(log_[static_cast<std::size_t>(c)]); }
  bool HasNearlyCertain() const {
    return AnyColumn(logits_.panel().width(),
                     [&](int c) { return HasNoLog(c) && std::isfinite(maximum_[c]); });
  }

  // The lse of whole columns, nearly certain ones included: the bits of WritePanel. False where a column
  // needs more.
  bool WriteSmall() {
    const ColumnPanel& panel = logits_.panel();
    T *const maximum = of_small_.data(), *const rest = maximum + log_.size();
    kernels_.small_columns_lse(x_ + panel.first(), panel.stride(), static_cast<int>(panel.layout().n),
                               panel.width(), maximum, log_.data(), rest);
    T *const hi = lse_.hi + panel.row(), *const lo = lse_.lo + panel.row();
    for (int c = 0; c < panel.width(); ++c) {
      T error, missing;
      const T sum = TwoSum(maximum[c], log_[static_cast<std::size_t>(c)], error);
      hi[c] = FastTwoSum(sum, error + rest[c], missing);
      lo[c] = missing;
    }
    maximum_ = maximum;
    return !AnyColumn(panel.width(), [&](int c) { return HasNoLog(c); });
  }

  void WritePanel() {
    const ColumnPanel& panel = logits_.panel();
    const std::int64_t row = panel.row();
    sum_.Compute(panel, logits_, nullptr, PanelMaximum::kInPass1);
    maximum_ = sum_.maximum();
    kernels_.panel_lse(sum_.Sums(), maximum_, sum_.subtract(), std::min(panel.layout().n, kMaxPanelRows),
                       panel.width(), lse_.hi + row, lse_.lo + row, log_.data());
    if (!AnyColumn(panel.width(), [&](int c) { return HasNoLog(c); })) return;
    if (HasNearlyCertain()) WriteNearlyCertain();
    for (int c = 0; c < panel.width(); ++c) {
      if (HasNoLog(c)) WriteWithoutKernel(c, row + c);
    }
  }

  // The lse of the columns that are nearly certain, from sums without their largest elements.
  void WriteNearlyCertain() {
    const ColumnPanel& panel = logits_.panel();
    if (!others_.has_value()) {
      others_.emplace(kernels_of_z_, panel);
      lse_of_others_.resize(3 * log_.size());
    }
    others_->Compute(panel, PanelWithoutLargest<E>(logits_, maximum_), nullptr, PanelMaximum::kNone);
    T* const hi = lse_of_others_.data();
    T *const lo = hi + log_.size(), *const log = lo + log_.size();
    kernels_.panel_lse_of_others(others_->Sums(), maximum_, panel.width(), hi, lo, log);
    for (int c = 0; c < panel.width(); ++c) {
      if (!HasNoLog(c) || (others_->subtract() != nullptr && others_->subtract()[c] != 0)) continue;
      lse_.hi[panel.row() + c] = hi[c];
      lse_.lo[panel.row() + c] = lo[c];
      log_[static_cast<std::size_t>(c)] = log[c];
    }
  }

  // The lse of column c where no kernel has it. As in jax.nn's logsumexp, an infinite maximum is the lse,
  // unless the column has a NaN, which the maximum passes over. Otherwise the column is nearly certain, and
  // its elements, or all but the largest, are too large to be summed as they are.
  void WriteWithoutKernel(int c, std::int64_t row) {
    T &hi = lse_.hi[row], &lo = lse_.lo[row];
    const T maximum = maximum_[c];
    lo = 0;
    if (logits_.HasNan(c)) return;
    hi = maximum;
    if (std::isinf(maximum)) return;
    CompensatedSum others;
    bool met_largest = false;
    for (std::int64_t i = 0; i < logits_.panel().layout().n; ++i) {
      const T z = logits_.At(c, i);
      if (z == maximum && !met_largest) {
        met_largest = true;
      } else {
        double error;
        const double difference = TwoDiff<double>(z, maximum, error), power = std::exp(difference);
        others.Add(power > 0 ? power * (1 + error) : 0);
      }
    }
    const double log = std::log1p(others.hi + others.lo), sum = static_cast<double>(maximum) + log;
    log_[static_cast<std::size_t>(c)] = static_cast<T>(log);
    hi = static_cast<T>(sum);
    lo = static_cast<T>((static_cast<double>(maximum) - static_cast<double>(hi)) + log);
  }

  // (z - maximum) - log, which is exact where z - lse would round twice.
  void WriteLogSoftmax() {
    const ColumnPanel& panel = logits_.panel();
    panel.ForSegments([&](const ColumnPanel::Segment& segment) {
      PanelRows<E> y(panel, y_);
      logits_.ForBlocks(segment, [&](const T* z, const Panel& rows, std::int64_t begin) {
        kernels_.panel_minus_lse(z, y.Begin(begin), rows, y.stride(), maximum_, log_.data(), nullptr);
        y.Store(begin, rows.rows);
      });
    });
    for (int c = 0; has_mask_ && c < panel.width(); ++c) {
      if (HasNoLog(c)) {
        logits_.FillMasked(c, y_, FromDouble<E>(-std::numeric_limits<double>::infinity()));
      }
    }
  }

  const KernelTable<E>& kernels_;
  const KernelTable<T>& kernels_of_z_;
  LogitsPanel<E> logits_;
  const E* x_;
  bool has_mask_;
  bool small_;
  E* y_;
  Lse<T> lse_;
  GuardedPanelSum<T> sum_;
  const T* maximum_ = nullptr;  // of every column
  std::vector<T> log_;
  std::vector<T> of_small_;  // what small_columns_lse gives beside the log
  std::optional<GuardedPanelSum<T>> others_;
  std::vector<T> lse_of_others_;
};

}  // namespace

template <typename E>
void LogSumExpColumns(const Kernels& kernels, Executor& executor, const Logits<E>& logits, E* y,
                      Lse<ComputeOf<E>> lse) {
  const Layout layout = logits.layout();
  const int lanes = kernels.Of<E>().lanes;
  const bool small = !logits.HasOperands() && HasSmallColumns(layout, kManyVectors * lanes);
  const PanelPlan plan = small ? PlanSmallColumns(layout) : PlanPanels(executor, layout, lanes);
  ForColumnPanels(executor, layout, plan, [&](const ColumnPanel& panel) {
    return LogSumExpPanel<E>(kernels, logits, panel, small, y, lse);
  });
}

#define SOFTMAX2P_INSTANTIATE(E) \
  template void LogSumExpColumns(const Kernels&, Executor&, const Logits<E>&, E*, Lse<ComputeOf<E>>);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
