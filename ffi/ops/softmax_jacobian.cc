#include "ffi/ops/softmax_jacobian.h"

#include "ffi/ops/column_panels.h"
#include "ffi/ops/panel_dot_sum.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
namespace {

// Contiguous rows.
template <typename E>
void JacobianRows(const KernelTable<E>& kernels, Executor& executor, const E* y, const E* t, E* out,
                  std::int64_t rows, std::int64_t n, bool non_temporal) {
  ParallelForRows(executor, rows, n, [&](std::int64_t first, std::int64_t end, Executor& segments_executor) {
    const Segments segments(segments_executor, n);
    for (std::int64_t r = first; r < end; ++r) {
      const E *y_row = y + r * n, *t_row = t + r * n;
      const auto dot = Rounded<ComputeOf<E>>(segments.Reduce<CompensatedSum>(
          [&](std::int64_t begin, std::int64_t size) {
            return kernels.dot(y_row + begin, t_row + begin, size);
          },
          [](CompensatedSum& a, const CompensatedSum& b) { a.Add(b); }));
      segments.ForEach(Order::kForward, [&](std::int64_t begin, std::int64_t size) {
        kernels.jacobian_write(y_row + begin, t_row + begin, out + r * n + begin, size, dot, non_temporal);
        if (non_temporal && n > kSegment) FenceNonTemporalStores();
      });
    }
    if (non_temporal) FenceNonTemporalStores();
  });
}

// Panels of columns.
template <typename E>
class JacobianPanel {
 public:
  JacobianPanel(const KernelTable<E>& kernels, const ColumnPanel& panel, const E* y, const E* t, E* out)
      : kernels_(kernels), panel_(panel), y_(y), t_(t), out_(out), dot_(kernels, panel) {}

  void Compute(std::int64_t p) {
    panel_.Move(p);
    const auto dots = dot_.Compute(panel_, [&](const ColumnPanel::Segment& segment, const auto& sums) {
      ForBlocks(segment, [&](const E* y, const E* t, const Panel& rows, std::int64_t begin) {
        kernels_.panel_dot(y, t, rows, begin != segment.begin, sums);
      });
    });
    panel_.ForSegments([&](const ColumnPanel::Segment& segment) {
      PanelRows<E> out(panel_, out_);
      ForBlocks(segment, [&](const E* y, const E* t, const Panel& rows, std::int64_t begin) {
        kernels_.panel_jacobian_write(y, t, out.Begin(begin), rows, dots);
        out.Store(begin, rows.rows);
      });
    });
  }

 private:
  // Calls body(y, t, panel of their rows, first row) for all rows of a segment in order.
  template <typename Body>
  void ForBlocks(const ColumnPanel::Segment& segment, const Body& body) const {
    PanelRows<const E> y(panel_, y_), t(panel_, t_);
    ForPanelRows(segment, panel_.IsGroup(), [&](std::int64_t begin, std::int64_t rows) {
      body(y.Load(begin, rows), t.Load(begin, rows), panel_.Rows(segment, rows, y.stride()), begin);
    });
  }

  const KernelTable<E>& kernels_;
  ColumnPanel panel_;
  const E* y_;
  const E* t_;
  E* out_;
  PanelDotSum<E> dot_;
};

}  // namespace

template <typename E>
void SoftmaxJacobian(const KernelTable<E>& kernels, Executor& executor, const E* y, const E* t, E* out,
                     const Layout& layout) {
  const std::int64_t n = layout.n, rows = layout.outer * layout.inner;
  if (rows * n == 0) return;
  AdviseHugePages(out, static_cast<std::size_t>(rows * n) * sizeof(E));
  if (layout.inner == 1) {
    // In place the cache lines that are written are in a cache already.
    const std::int64_t row_bytes = n * static_cast<std::int64_t>(sizeof(E));
    const bool non_temporal =
        3 * rows * row_bytes > LastLevelCacheBytes() && FillsCacheLines(row_bytes) && out != y && out != t;
    // Shorter rows are summed in lanes, whether or not their results go past the caches.
    if (n > kMaxSmall || (non_temporal && n >= kernels.long_row)) {
      return JacobianRows(kernels, executor, y, t, out, rows, n, non_temporal);
    }
    return ParallelForWholeRows(
        executor, rows, n,
        [&](std::int64_t first, std::int64_t end) {
          kernels.small_jacobian_write(y + first * n, t + first * n, out + first * n, end - first,
                                       static_cast<int>(n));
        },
        kMinParallelGradients);
  }
  ForColumnPanels(executor, layout, PlanPanels(executor, layout, kernels.lanes),
                  [&](const ColumnPanel& panel) { return JacobianPanel<E>(kernels, panel, y, t, out); });
}

#define SOFTMAX2P_INSTANTIATE(E) \
  template void SoftmaxJacobian(const KernelTable<E>&, Executor&, const E*, const E*, E*, const Layout&);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
