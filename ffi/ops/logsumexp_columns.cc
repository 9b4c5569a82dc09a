// logsumexp and log_softmax along an axis that is not the last: panels of columns, without a transpose.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ffi/base/error_free.h"
#include "ffi/ops/column_panels.h"
#include "ffi/ops/guarded_panel_sum.h"
#include "ffi/ops/logits_panel.h"
#include "ffi/ops/logsumexp.h"

namespace jax_softmax2p {
namespace {

// The lse of panels of z, and y = z - lse unless y is null.
template <typename E>
class LogSumExpPanel {
  using T = ComputeOf<E>;

 public:
  LogSumExpPanel(const Kernels& kernels, const Logits<E>& logits, const ColumnPanel& panel, E* y, Lse<T> lse)
      : kernels_(kernels.Of<E>()),
        logits_(kernels, logits, panel),
        has_mask_(logits.HasMask()),
        y_(y),
        lse_(lse),
        sum_(kernels.Of<T>(), panel),
        log_(static_cast<std::size_t>(panel.width())) {}

  void Compute(std::int64_t p) {
    logits_.Move(p);
    const ColumnPanel& panel = logits_.panel();
    const std::int64_t row = panel.row();
    sum_.Compute(panel, logits_, nullptr, PanelMaximum::kInPass1);
    kernels_.panel_lse(sum_.Sums(), sum_.maximum(), sum_.subtract(), panel.width(), lse_.hi + row,
                       lse_.lo + row, log_.data());
    for (int c = 0; c < panel.width(); ++c) {
      if (std::isnan(log_[static_cast<std::size_t>(c)])) WriteWithoutKernel(c, row + c);
    }
    if (y_ != nullptr) WriteLogSoftmax();
  }

 private:
  // The lse of column c where the kernel has none. As in jax.nn's logsumexp, an infinite maximum is the lse,
  // unless the column has a NaN, which the maximum passes over. Otherwise the column is nearly certain: the
  // logarithm is that of 1 + the others over the largest.
  void WriteWithoutKernel(int c, std::int64_t row) {
    T &hi = lse_.hi[row], &lo = lse_.lo[row];
    const T maximum = sum_.maximum()[c];
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
        kernels_.panel_minus_lse(z, y.Begin(begin), rows, y.stride(), sum_.maximum(), log_.data(), nullptr);
        y.Store(begin, rows.rows);
      });
    });
    for (int c = 0; has_mask_ && c < panel.width(); ++c) {
      if (std::isnan(log_[static_cast<std::size_t>(c)])) {
        logits_.FillMasked(c, y_, FromDouble<E>(-std::numeric_limits<double>::infinity()));
      }
    }
  }

  const KernelTable<E>& kernels_;
  LogitsPanel<E> logits_;
  bool has_mask_;
  E* y_;
  Lse<T> lse_;
  GuardedPanelSum<T> sum_;
  std::vector<T> log_;
};

}  // namespace

template <typename E>
void LogSumExpColumns(const Kernels& kernels, Executor& executor, const Logits<E>& logits, E* y,
                      Lse<ComputeOf<E>> lse) {
  const PanelPlan plan = PlanPanels(executor, logits.layout(), kernels.Of<E>().lanes);
  ForColumnPanels(executor, logits.layout(), plan, [&](const ColumnPanel& panel) {
    return LogSumExpPanel<E>(kernels, logits, panel, y, lse);
  });
}

#define SOFTMAX2P_INSTANTIATE(E) \
  template void LogSumExpColumns(const Kernels&, Executor&, const Logits<E>&, E*, Lse<ComputeOf<E>>);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
