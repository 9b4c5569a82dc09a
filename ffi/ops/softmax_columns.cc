// Softmax along an axis that is not the last, for logits without operands: panels of columns, without a
// transpose.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/softmax.h"

namespace jax_softmax2p {
namespace {

// How a matrix [n, inner] is divided into columns of vectors. Where inner is less than a vector, `fold` rows
// are taken as one, so that it is a whole number of vectors: every column appears `fold` times, and the sums
// of its appearances are merged.
struct Folding {
  Folding(const Layout& layout, int lanes)
      : fold(layout.inner >= lanes ? 1 : lanes / std::gcd(static_cast<int>(layout.inner), lanes)),
        stride(layout.inner * fold),
        rows(layout.n / fold),
        tail(static_cast<int>(layout.n % fold * layout.inner)) {}

  int fold;
  std::int64_t stride;
  std::int64_t rows;
  int tail;
};

// Both passes over columns side by side.
template <typename E>
class ColumnPanel {
  using T = ComputeOf<E>;

 public:
  ColumnPanel(const KernelTable<E>& kernels, Executor& executor, const SoftmaxPlan& plan,
              const Layout& layout, int width)
      : kernels_(kernels),
        executor_(executor),
        plan_(plan),
        folding_(layout, kernels.lanes),
        inner_(layout.inner),
        segments_(std::max<std::int64_t>(1, CeilDiv(folding_.rows, kMaxPanelRows))),
        width_(width),
        sums_(3 * segments_ * width),
        maximum_(width),
        maxima_(segments_ * width) {}

  // x and y are the first elements of a panel of `width` columns, no more than the constructor was given.
  void Compute(const E* x, E* y, int width) {
    width_ = width;
    // Where y has no room for what pass 1 keeps, the exponentials are recomputed.
    T* kept = nullptr;
    if constexpr (std::is_same_v<E, T>) {
      if (plan_.reload && x != y) kept = y;
    }
    if (plan_.maximum_first) FindMaximum(x);
    Sum(x, kept, plan_.maximum_first ? maximum_.data() : nullptr, nullptr);
    const bool exact = AllExact();
    if (!exact) SumMinusMaximum(x);
    Invert(exact);
    const T* const subtract = exact ? nullptr : maximum_.data();
    ForSegments([&](std::int64_t, std::int64_t at, const Panel& panel) {
      kernels_.panel_write(x + at, kept == nullptr ? nullptr : kept + at, y + at, panel, Sums(0), subtract);
    });
  }

 private:
  PanelSums<T> Sums(std::int64_t segment) {
    T* const first = sums_.data() + 3 * segment * width_;
    return {first, first + width_, first + 2 * width_};
  }

  // The number of columns that differ: the others repeat them.
  int Columns() const { return folding_.fold == 1 ? width_ : static_cast<int>(inner_); }

  // Calls body(index, first element, panel) for segments that are short enough for the kernels.
  template <typename Body>
  void ForSegments(const Body& body) {
    ParallelFor(executor_, segments_, [&](std::int64_t i) {
      const ScopedFloatMode mode;
      const std::int64_t first = i * kMaxPanelRows, rest = folding_.rows - first;
      const bool last = i + 1 == segments_;
      body(i, first * folding_.stride,
           Panel{last ? rest : kMaxPanelRows, folding_.stride, width_, last ? folding_.tail : 0});
    });
  }

  void Sum(const E* x, T* kept, const T* maximum, const T* subtract) {
    ForSegments([&](std::int64_t i, std::int64_t at, const Panel& panel) {
      kernels_.panel_sum(x + at, kept == nullptr ? nullptr : kept + at, panel, maximum, subtract, Sums(i));
    });
    const PanelSums<T> total = Sums(0);
    for (std::int64_t i = 1; i < segments_; ++i) kernels_.panel_merge(total, Sums(i), width_);
    for (int i = 1; i < folding_.fold; ++i) {
      const std::int64_t at = i * inner_;
      kernels_.panel_merge(total, {total.hi + at, total.lo + at, total.exponent + at}, Columns());
    }
  }

  bool AllExact() {
    const T* const exponent = Sums(0).exponent;
    return std::all_of(exponent, exponent + Columns(), [&](T e) { return IsExact(e); });
  }
  bool IsExact(T exponent) const { return std::abs(exponent) < static_cast<T>(kernels_.max_exponent); }

  void FindMaximum(const E* x) {
    ForSegments([&](std::int64_t i, std::int64_t at, const Panel& panel) {
      kernels_.panel_max(x + at, panel, maxima_.data() + i * width_);
    });
    const int columns = Columns();
    for (int c = 0; c < columns; ++c) {
      T highest = -std::numeric_limits<T>::infinity();
      for (std::int64_t i = c; i < segments_ * width_; i += columns) highest = std::max(highest, maxima_[i]);
      maximum_[c] = highest;
    }
    for (int c = columns; c < width_; ++c) maximum_[c] = maximum_[c - columns];
  }

  // The guard's third pass: see guarded_sum.h. Columns that do not need it have 0 subtracted, which changes
  // nothing.
  void SumMinusMaximum(const E* x) {
    FindMaximum(x);
    for (int c = 0; c < width_; ++c) {
      if (IsExact(Sums(0).exponent[c % Columns()]) && !std::isinf(maximum_[c])) maximum_[c] = 0;
    }
    Sum(x, nullptr, nullptr, maximum_.data());
  }

  // Turns sums into scales. A column whose maximum is infinite has no softmax: NaN.
  void Invert(bool exact) {
    const PanelSums<T> scale = Sums(0);
    const int columns = Columns();
    kernels_.panel_invert(scale, columns);
    if (!exact) {
      for (int c = 0; c < columns; ++c) {
        if (std::isinf(maximum_[c])) scale.hi[c] = std::numeric_limits<T>::quiet_NaN();
      }
    }
    for (T* const repeated : {scale.hi, scale.lo, scale.exponent}) {
      for (int c = columns; c < width_; ++c) repeated[c] = repeated[c - columns];
    }
  }

  const KernelTable<E>& kernels_;
  Executor& executor_;
  SoftmaxPlan plan_;
  Folding folding_;
  std::int64_t inner_;
  std::int64_t segments_;
  int width_;
  std::vector<T> sums_;
  std::vector<T> maximum_;
  std::vector<T> maxima_;
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
  const Folding folding(layout, kernels.lanes);
  // Wide, also where a panel then leaves the second-level cache between the passes: every row of a narrow one
  // is another page.
  const int width = static_cast<int>(std::min<std::int64_t>(kPanelWidth, folding.stride));
  const std::int64_t matrix = layout.n * layout.inner;
  const std::int64_t panels_per_matrix = folding.fold > 1 ? 1 : CeilDiv(layout.inner, width);
  const std::int64_t panels = layout.outer * panels_per_matrix;
  const auto body = [&](std::int64_t first, std::int64_t end, Executor& segments_executor) {
    ColumnPanel<E> panel(kernels, segments_executor, plan, layout, width);
    for (std::int64_t p = first; p < end; ++p) {
      const std::int64_t column = p % panels_per_matrix * width, at = p / panels_per_matrix * matrix + column;
      const std::int64_t rest = folding.stride - column;
      panel.Compute(x + at, y + at, static_cast<int>(std::min<std::int64_t>(width, rest)));
    }
  };
  if (folding.rows > kMaxPanelRows && panels < kManyRows * (executor.Helpers() + 1)) {
    body(0, panels, executor);
    return;
  }
  ParallelForWholeRows(executor, panels, matrix / panels_per_matrix,
                       [&](std::int64_t first, std::int64_t end) {
                         InlineExecutor this_thread;
                         body(first, end, this_thread);
                       });
}

#define SOFTMAX2P_INSTANTIATE(E) \
  template void SoftmaxColumns(const KernelTable<E>&, Executor&, const SoftmaxPlan&, const Logits<E>&, E*);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
