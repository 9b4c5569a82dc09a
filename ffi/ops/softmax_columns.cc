// Softmax along an axis that is not the last, for logits without operands: panels of columns, without a
// transpose.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "ffi/ops/column_panels.h"
#include "ffi/ops/guarded_panel_sum.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/softmax.h"

namespace jax_softmax2p {
namespace {

// Both passes over panels of x and y.
template <typename E>
class SoftmaxPanel {
  using T = ComputeOf<E>;

 public:
  SoftmaxPanel(const KernelTable<E>& kernels, const ColumnPanel& panel, const SoftmaxPlan& plan, const E* x,
               E* y)
      : kernels_(kernels), panel_(panel), plan_(plan), x_(x), y_(y), sum_(kernels, panel) {}

  void Compute(std::int64_t first, std::int64_t, int width) {
    panel_.SetWidth(width);
    const E* const x = x_ + first;
    E* const y = y_ + first;
    // Where y has no room for what pass 1 keeps, the exponentials are recomputed.
    T* kept = nullptr;
    if constexpr (std::is_same_v<E, T>) {
      if (plan_.reload && x != y) kept = y;
    }
    sum_.Compute(panel_, x, kept, plan_.maximum_first ? PanelMaximum::kFirst : PanelMaximum::kNone);
    const PanelSums<T> scales = sum_.Sums();
    Invert(scales);
    panel_.ForSegments([&](std::int64_t, std::int64_t at, const Panel& segment) {
      kernels_.panel_write(x + at, kept == nullptr ? nullptr : kept + at, y + at, segment, scales,
                           sum_.subtract());
    });
  }

 private:
  // Turns sums into scales. A column whose maximum is infinite has no softmax: NaN.
  void Invert(const PanelSums<T>& scales) {
    const int columns = panel_.Columns();
    kernels_.panel_invert(scales, columns);
    for (int c = 0; sum_.subtract() != nullptr && c < columns; ++c) {
      if (std::isinf(sum_.maximum()[c])) scales.hi[c] = std::numeric_limits<T>::quiet_NaN();
    }
    for (T* const repeated : {scales.hi, scales.lo, scales.exponent}) panel_.Repeat(repeated);
  }

  const KernelTable<E>& kernels_;
  ColumnPanel panel_;
  SoftmaxPlan plan_;
  const E* x_;
  E* y_;
  GuardedPanelSum<E> sum_;
};

// Columns of so few elements are taken whole, many at a time: a panel's sums cost more than the columns do.
constexpr std::int64_t kMaxSmallColumn = 32;

template <typename E>
void SmallColumns(const KernelTable<E>& kernels, Executor& executor, const E* x, E* y, const Layout& layout) {
  const std::int64_t matrix = layout.n * layout.inner;
  const std::int64_t width = std::min<std::int64_t>(kPanelWidth, layout.inner);
  const std::int64_t panels_per_matrix = CeilDiv(layout.inner, width);
  ParallelForWholeRows(executor, layout.outer * panels_per_matrix, matrix / panels_per_matrix,
                       [&](std::int64_t first, std::int64_t end) {
                         for (std::int64_t p = first; p < end; ++p) {
                           const std::int64_t column = p % panels_per_matrix * width,
                                              at = p / panels_per_matrix * matrix + column;
                           kernels.small_columns(x + at, y + at, layout.inner, static_cast<int>(layout.n),
                                                 static_cast<int>(std::min(width, layout.inner - column)));
                         }
                       });
}

}  // namespace

template <typename E>
void SoftmaxColumns(const KernelTable<E>& kernels, Executor& executor, const SoftmaxPlan& plan,
                    const Logits<E>& logits, E* y) {
  const Layout layout = logits.layout();
  const E* const x = logits.x;
  if (layout.n <= kMaxSmallColumn && layout.inner >= kernels.lanes) {
    return SmallColumns(kernels, executor, x, y, layout);
  }
  ForColumnPanels(executor, layout, kernels.lanes,
                  [&](const ColumnPanel& panel) { return SoftmaxPanel<E>(kernels, panel, plan, x, y); });
}

#define SOFTMAX2P_INSTANTIATE(E) \
  template void SoftmaxColumns(const KernelTable<E>&, Executor&, const SoftmaxPlan&, const Logits<E>&, E*);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
