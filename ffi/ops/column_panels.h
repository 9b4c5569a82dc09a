// Columns of arrays [outer, n, inner] as panels for the kernels, shared out among threads, without a
// transpose.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "ffi/base/layout.h"
#include "ffi/kernels/table.h"
#include "ffi/ops/parallel_rows.h"

namespace jax_softmax2p {

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

// Columns side by side: up to kPanelWidth, in segments of up to kMaxPanelRows rows, so that the bits of a
// column depend on its length alone. What kernels find is in arrays [segments, width], of which the first
// columns become the result.
class ColumnPanel {
 public:
  // `width` is the most columns that the panel will have.
  ColumnPanel(Executor& executor, const Layout& layout, int lanes, int width)
      : executor_(executor),
        folding_(layout, lanes),
        inner_(layout.inner),
        segments_(std::max<std::int64_t>(1, CeilDiv(folding_.rows, kMaxPanelRows))),
        width_(width) {}

  void SetWidth(int width) { width_ = width; }
  int width() const { return width_; }
  std::int64_t segments() const { return segments_; }
  // The number of columns that differ: the others repeat them.
  int Columns() const { return folding_.fold == 1 ? width_ : static_cast<int>(inner_); }

  // Calls body(place of its first column in arrays [segments, width], first element, panel) for every
  // segment, on as many threads as the executor has.
  template <typename Body>
  void ForSegments(const Body& body) const {
    ParallelFor(executor_, segments_, [&](std::int64_t i) {
      const ScopedFloatMode mode;
      const std::int64_t first = i * kMaxPanelRows, rest = folding_.rows - first;
      const bool last = i + 1 == segments_;
      body(i * width_, first * folding_.stride,
           Panel{last ? rest : kMaxPanelRows, folding_.stride, width_, last ? folding_.tail : 0});
    });
  }

  // Calls merge(place, columns) for what is to be merged into the first columns of an array [segments,
  // width]: that many columns from each place, in turn.
  template <typename Merge>
  void ForMerges(const Merge& merge) const {
    for (std::int64_t i = 1; i < segments_; ++i) merge(i * width_, width_);
    for (int i = 1; i < folding_.fold; ++i) merge(i * inner_, Columns());
  }

  // Gives the columns that repeat others the values of those.
  template <typename T>
  void Repeat(T* values) const {
    for (int c = Columns(); c < width_; ++c) values[c] = values[c - Columns()];
  }
  // Copies the values of those that differ, and repeats them.
  template <typename T>
  void CopyRepeated(const T* from, std::vector<T>& to) const {
    to.resize(static_cast<std::size_t>(width_));
    std::copy(from, from + Columns(), to.begin());
    Repeat(to.data());
  }

 private:
  Executor& executor_;
  Folding folding_;
  std::int64_t inner_;
  std::int64_t segments_;
  int width_;
};

// Makes objects by make(ColumnPanel), one a thread, and calls Compute(first element, first row, columns) of
// these for panel after panel, until all columns are done. Rows are counted over [outer, inner].
template <typename Make>
void ForColumnPanels(Executor& executor, const Layout& layout, int lanes, const Make& make) {
  const Folding folding(layout, lanes);
  // Wide, also where a panel then leaves the second-level cache between the passes: every row of a narrow one
  // is another page.
  const int width = static_cast<int>(std::min<std::int64_t>(kPanelWidth, folding.stride));
  const std::int64_t matrix = layout.n * layout.inner;
  const std::int64_t panels_per_matrix = folding.fold > 1 ? 1 : CeilDiv(layout.inner, width);
  const std::int64_t panels = layout.outer * panels_per_matrix;
  const auto body = [&](std::int64_t first, std::int64_t end, Executor& segments_executor) {
    auto panel = make(ColumnPanel(segments_executor, layout, lanes, width));
    for (std::int64_t p = first; p < end; ++p) {
      const std::int64_t o = p / panels_per_matrix, column = p % panels_per_matrix * width;
      const std::int64_t rest = folding.stride - column;
      panel.Compute(o * matrix + column, o * layout.inner + column,
                    static_cast<int>(std::min<std::int64_t>(width, rest)));
    }
  };
  if (folding.rows > kMaxPanelRows && panels < kManyRows * (executor.Helpers() + 1)) {
    const ScopedFloatMode mode;
    body(0, panels, executor);
    return;
  }
  ParallelForWholeRows(executor, panels, matrix / panels_per_matrix,
                       [&](std::int64_t first, std::int64_t end) {
                         InlineExecutor this_thread;
                         body(first, end, this_thread);
                       });
}

// Whether columns of an array of that layout are taken as panels. Smaller matrices are not worth the sums of
// a panel: many are better taken at a time.
inline bool HasPanels(const Layout& layout) {
  return layout.inner > 1 && layout.n * layout.inner > kMaxSmall;
}

}  // namespace jax_softmax2p
