// logsumexp and log_softmax along an axis that is not the last, for logits without operands: panels
// of columns, without a transpose.

#include <cmath>
#include <cstdint>
#include <vector>

#include "ffi/ops/column_panels.h"
#include "ffi/ops/guarded_panel_sum.h"
#include "ffi/ops/logsumexp.h"

namespace jax_softmax2p {
namespace {

// The lse of panels of x, and y = x - lse unless y is null.
template <typename E>
class LogSumExpPanel {
  using T = ComputeOf<E>;

 public:
  LogSumExpPanel(const KernelTable<E>& kernels, const ColumnPanel& panel, const Logits<E>& logits, E* y,
                 Lse<T> lse)
      : kernels_(kernels),
        panel_(panel),
        logits_(logits),
        y_(y),
        lse_(lse),
        sum_(kernels, panel),
        log_(static_cast<std::size_t>(panel.width())) {}

  void Compute(std::int64_t first, std::int64_t row, int width) {
    panel_.SetWidth(width);
    const E* const x = logits_.x + first;
    sum_.Compute(panel_, x, nullptr, PanelMaximum::kInPass1);
    kernels_.panel_lse(sum_.Sums(), sum_.maximum(), sum_.subtract(), panel_.Columns(), lse_.hi + row,
                       lse_.lo + row, log_.data());
    WriteNonFinite(x, row);
    if (y_ == nullptr) return;
    panel_.Repeat(log_.data());
    panel_.ForSegments([&](std::int64_t, std::int64_t at, const Panel& segment) {
      // (x - maximum) - log, which is exact where x - lse would round twice.
      kernels_.panel_minus_lse(x + at, y_ + first + at, segment, sum_.maximum(), log_.data(), nullptr);
    });
  }

 private:
  // As in jax.nn's logsumexp, an infinite maximum is the lse, unless the column has a NaN, which the maximum
  // passes over.
  void WriteNonFinite(const E* x, std::int64_t row) const {
    for (int c = 0; c < panel_.Columns(); ++c) {
      T& hi = lse_.hi[row + c];
      if (std::isfinite(hi)) continue;
      lse_.lo[row + c] = 0;
      const T maximum = sum_.maximum()[c];
      if (std::isnan(hi) && std::isinf(maximum) && !HasNan(x + c)) hi = maximum;
    }
  }

  bool HasNan(const E* column) const {
    for (std::int64_t i = 0; i < logits_.n; ++i) {
      if (std::isnan(Widen(column[i * logits_.inner]))) return true;
    }
    return false;
  }

  const KernelTable<E>& kernels_;
  ColumnPanel panel_;
  const Logits<E>& logits_;
  E* y_;
  Lse<T> lse_;
  GuardedPanelSum<E> sum_;
  std::vector<T> log_;
};

}  // namespace

template <typename E>
void LogSumExpColumns(const KernelTable<E>& kernels, Executor& executor, const Logits<E>& logits, E* y,
                      Lse<ComputeOf<E>> lse) {
  ForColumnPanels(executor, logits.layout(), kernels.lanes, [&](const ColumnPanel& panel) {
    return LogSumExpPanel<E>(kernels, panel, logits, y, lse);
  });
}

#define SOFTMAX2P_INSTANTIATE(E) \
  template void LogSumExpColumns(const KernelTable<E>&, Executor&, const Logits<E>&, E*, Lse<ComputeOf<E>>);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
