// Softmax along an axis that is not the last: panels of columns, without a transpose.

#include <cmath>
#include <type_traits>

#include "ffi/ops/column_panels.h"
#include "ffi/ops/guarded_panel_sum.h"
#include "ffi/ops/logits_panel.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/softmax.h"

namespace jax_softmax2p {
namespace {

// Both passes over panels of x and y, for logits without operands.
template <typename E>
class SoftmaxPanel {
  using T = ComputeOf<E>;

 public:
  SoftmaxPanel(const KernelTable<E>& kernels, const ColumnPanel& panel, const SoftmaxPlan& plan, const E* x,
               E* y)
      : kernels_(kernels), panel_(panel), plan_(plan), x_(x), y_(y), sum_(kernels, panel) {}

  void Compute(std::int64_t p) {
    panel_.Move(p);
    // Where y has no room for what pass 1 keeps, the exponentials are recomputed.
    T* kept = nullptr;
    if constexpr (std::is_same_v<E, T>) {
      if (plan_.reload && x_ != y_) kept = y_ + panel_.first();
    }
    sum_.Compute(panel_, *this, kept, plan_.maximum_first ? PanelMaximum::kFirst : PanelMaximum::kNone);
    const PanelSums<T> scales = sum_.Invert(panel_);
    panel_.ForSegments([&](const ColumnPanel::Segment& segment) {
      ForBlocks(segment, [&](const E* x, const Panel& rows, std::int64_t begin) {
        const std::int64_t at = begin * rows.stride;
        kernels_.panel_write(x, kept == nullptr ? nullptr : kept + at, y_ + panel_.first() + at, rows, scales,
                             sum_.subtract());
      });
    });
  }

  // As the source of the sum.
  template <typename Body>
  void ForBlocks(const ColumnPanel::Segment& segment, const Body& body) const {
    const std::int64_t stride = panel_.stride();
    body(x_ + panel_.first() + segment.begin * stride, panel_.Rows(segment, segment.rows, stride),
         segment.begin);
  }

 private:
  const KernelTable<E>& kernels_;
  ColumnPanel panel_;
  SoftmaxPlan plan_;
  const E* x_;
  E* y_;
  GuardedPanelSum<E> sum_;
};

// Both passes over panels of z and y, for logits with operands. The exponentials are recomputed.
template <typename E>
class LogitsSoftmaxPanel {
  using T = ComputeOf<E>;

 public:
  LogitsSoftmaxPanel(const Kernels& kernels, const Logits<E>& logits, const ColumnPanel& panel,
                     const SoftmaxPlan& plan, E* y)
      : kernels_(kernels.Of<E>()),
        logits_(kernels, logits, panel),
        has_mask_(logits.HasMask()),
        maximum_(plan.maximum_first ? PanelMaximum::kFirst : PanelMaximum::kNone),
        y_(y),
        sum_(kernels.Of<T>(), panel) {}

  void Compute(std::int64_t p) {
    logits_.Move(p);
    const ColumnPanel& panel = logits_.panel();
    sum_.Compute(panel, logits_, nullptr, maximum_);
    const PanelSums<T> scales = sum_.Invert(panel);
    panel.ForSegments([&](const ColumnPanel::Segment& segment) {
      PanelRows<E> y(panel, y_);
      logits_.ForBlocks(segment, [&](const T* z, const Panel& rows, std::int64_t begin) {
        kernels_.logits_panel_write(z, y.Begin(begin), rows, y.stride(), scales, sum_.subtract());
        y.Store(begin, rows.rows);
      });
    });
    for (int c = 0; has_mask_ && c < panel.width(); ++c) {
      if (std::isnan(scales.hi[c])) logits_.FillMasked(c, y_, E{});
    }
  }

 private:
  const KernelTable<E>& kernels_;
  LogitsPanel<E> logits_;
  bool has_mask_;
  PanelMaximum maximum_;
  E* y_;
  GuardedPanelSum<T> sum_;
};

}  // namespace

template <typename E>
void SoftmaxColumns(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan,
                    const Logits<E>& logits, E* y) {
  const Layout layout = logits.layout();
  const KernelTable<E>& table = kernels.Of<E>();
  if (logits.HasOperands()) {
    return ForColumnPanels(
        executor, layout, PlanPanels(executor, layout, table.lanes),
        [&](const ColumnPanel& panel) { return LogitsSoftmaxPanel<E>(kernels, logits, panel, plan, y); });
  }
  if (HasSmallColumns(layout, table.lanes)) {
    return ForSmallColumns(executor, layout, [&](const ColumnPanel& panel) {
      table.small_columns(logits.x + panel.first(), y + panel.first(), panel.stride(),
                          static_cast<int>(layout.n), panel.width());
    });
  }
  ForColumnPanels(executor, layout, PlanFoldedPanels(executor, layout, table.lanes),
                  [&](const ColumnPanel& panel) { return SoftmaxPanel<E>(table, panel, plan, logits.x, y); });
}

#define SOFTMAX2P_INSTANTIATE(E) \
  template void SoftmaxColumns(const Kernels&, Executor&, const SoftmaxPlan&, const Logits<E>&, E*);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
