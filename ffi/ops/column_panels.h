// Columns of arrays [outer, n, inner] as panels for the kernels, shared out among threads, without a
// transpose.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "ffi/base/layout.h"
#include "ffi/kernels/table.h"
#include "ffi/ops/copy_rows.h"
#include "ffi/ops/parallel_rows.h"

namespace jax_softmax2p {

// Whether small_columns and its like take columns of n elements, each whole and many at a time: a panel's
// sums cost more than such columns do. `columns` is how many a matrix must have for that.
inline bool HasSmallColumns(const Layout& layout, int columns) {
  constexpr std::int64_t kMaxSmallColumn = 32;
  return layout.n <= kMaxSmallColumn && layout.inner >= columns;
}
// Logarithms of less than so many vectors are a chain of dependent operations. Panels of several matrices are
// faster then.
inline constexpr int kManyVectors = 4;

// How an array is divided into panels, each of columns of one matrix [n, inner] unless matrices are so narrow
// that they leave lanes of a vector empty. Then several lie side by side in a panel, which needs a copy of
// some of their rows; or `fold` rows are taken as one, so that it is a whole number of vectors: every column
// appears `fold` times, and the sums of its appearances are merged, which gives them other bits.
struct PanelPlan {
  std::int64_t group;  // matrices side by side
  int fold;
  int width;           // the most columns of a panel
  std::int64_t block;  // as in Panel; 0 for as many rows as fill a first-level cache
  std::int64_t panels_per_matrix;
  std::int64_t panels;
};

// The most columns of a panel: kPanelWidth, but every thread should find panels, though narrow ones touch
// more pages.
inline std::int64_t PanelWidth(const Executor& executor, const Layout& layout) {
  constexpr std::int64_t kNarrowest = 64;
  const std::int64_t threads = executor.Threads();
  std::int64_t width = kPanelWidth;
  if (layout.outer * layout.n * layout.inner >= kMinParallel) {
    while (width > kNarrowest && layout.outer * CeilDiv(layout.inner, width) < 2 * threads) width /= 2;
  }
  return std::min(width, layout.inner);
}

// Panels in which the bits of a column depend on n alone.
inline PanelPlan PlanPanels(const Executor& executor, const Layout& layout, int lanes) {
  // What is done once a panel takes as long as some hundred elements.
  constexpr std::int64_t kSmallMatrix = 1024, kNarrowPanel = 64;
  const std::int64_t inner = layout.inner;
  const bool is_small = layout.n * inner <= kSmallMatrix;
  const std::int64_t wanted = is_small ? kPanelWidth : inner < lanes ? kNarrowPanel : 1;
  const std::int64_t group = std::max<std::int64_t>(1, std::min(layout.outer, wanted / inner));
  const std::int64_t width = group > 1 ? group * inner : PanelWidth(executor, layout);
  const std::int64_t per_matrix = group > 1 ? 1 : CeilDiv(inner, width);
  return {group,       1,          static_cast<int>(width),
          kPanelBlock, per_matrix, CeilDiv(layout.outer, group) * per_matrix};
}

// Panels of softmax without operands, where matrices are folded.
inline PanelPlan PlanFoldedPanels(const Executor& executor, const Layout& layout, int lanes) {
  const std::int64_t inner = layout.inner;
  const int fold = inner >= lanes ? 1 : lanes / std::gcd(static_cast<int>(inner), lanes);
  // Wide, also where a panel then leaves the second-level cache between the passes: every row of a narrow one
  // is another page.
  const std::int64_t width =
      fold > 1 ? std::min<std::int64_t>(kPanelWidth, inner * fold) : PanelWidth(executor, layout);
  const std::int64_t per_matrix = fold > 1 ? 1 : CeilDiv(inner, width);
  return {1, fold, static_cast<int>(width), 0, per_matrix, layout.outer * per_matrix};
}

// Panels of HasSmallColumns arrays.
inline PanelPlan PlanSmallColumns(const Layout& layout) {
  const std::int64_t width = std::min<std::int64_t>(kPanelWidth, layout.inner);
  const std::int64_t per_matrix = CeilDiv(layout.inner, width);
  return {1, 1, static_cast<int>(width), kPanelBlock, per_matrix, layout.outer * per_matrix};
}

// One panel of a plan after the other: columns side by side, in segments of up to kMaxPanelRows rows, so that
// the bits of a column do not depend on the number of threads. What kernels find is in arrays [segments,
// width], of which the first columns become the result.
class ColumnPanel {
 public:
  // Some of the rows, `tail` as in Panel, and the place of their first column in an array [segments, width].
  struct Segment {
    std::int64_t begin;
    std::int64_t rows;
    int tail;
    std::int64_t place;
  };

  ColumnPanel(Executor& executor, const Layout& layout, const PanelPlan& plan)
      : executor_(executor),
        layout_(layout),
        plan_(plan),
        rows_(layout.n / plan.fold),
        segments_(std::max<std::int64_t>(1, CeilDiv(rows_, kMaxPanelRows))),
        width_(plan.width) {}

  // Becomes panel number p.
  void Move(std::int64_t p) {
    const std::int64_t o = p / plan_.panels_per_matrix * plan_.group;
    const std::int64_t column = p % plan_.panels_per_matrix * plan_.width;
    const std::int64_t columns =
        plan_.group > 1 ? std::min(plan_.group, layout_.outer - o) * layout_.inner : stride() - column;
    first_ = o * Matrix() + column;
    row_ = o * layout_.inner + column;
    width_ = static_cast<int>(std::min<std::int64_t>(plan_.width, columns));
  }

  const Layout& layout() const { return layout_; }
  // Whether the panel is that of several matrices.
  bool IsGroup() const { return width_ > stride(); }
  // Of the array, from one row to the next.
  std::int64_t stride() const { return layout_.inner * plan_.fold; }
  std::int64_t segments() const { return segments_; }
  int width() const { return width_; }
  // The most that a panel has.
  int max_width() const { return plan_.width; }
  // The number of columns that differ: the others repeat them.
  int Columns() const { return plan_.fold == 1 ? width_ : static_cast<int>(layout_.inner); }
  // The first column, counted over [outer, inner], and its first element.
  std::int64_t row() const { return row_; }
  std::int64_t first() const { return first_; }
  // The first element of column c.
  std::int64_t FirstOf(int c) const {
    return IsGroup() ? first_ + c / stride() * Matrix() + c % stride() : first_ + c;
  }

  // Calls body(segment) for all of these, on as many threads as the executor has.
  template <typename Body>
  void ForSegments(const Body& body) const {
    ParallelFor(executor_, segments_, [&](std::int64_t i) {
      const ScopedFloatMode mode;
      const std::int64_t begin = i * kMaxPanelRows, rest = rows_ - begin;
      const bool last = i + 1 == segments_;
      const std::int64_t tail = last ? layout_.n % plan_.fold * layout_.inner : 0;
      body(Segment{begin, last ? rest : kMaxPanelRows, static_cast<int>(tail), i * width_});
    });
  }

  // Those rows of a segment for a kernel, which reads them from an array with that stride.
  Panel Rows(const Segment& segment, std::int64_t rows, std::int64_t stride) const {
    return {rows, stride, width_, segment.tail, plan_.block != 0 ? plan_.block : BlockOfWidest()};
  }

  // Calls merge(place, columns) for what is to be merged into the first columns of an array [segments,
  // width]: that many columns from each place, in turn.
  template <typename Merge>
  void ForMerges(const Merge& merge) const {
    for (std::int64_t i = 1; i < segments_; ++i) merge(i * width_, width_);
    for (int i = 1; i < plan_.fold; ++i) merge(i * layout_.inner, Columns());
  }

  // Gives the columns that repeat others the values of those.
  template <typename T>
  void Repeat(T* values) const {
    for (int c = Columns(); c < width_; ++c) values[c] = values[c - Columns()];
  }

 private:
  std::int64_t Matrix() const { return layout_.n * layout_.inner; }
  // How many rows fill half of a first-level cache, of the panel that the columns would be in if panels were
  // as wide as they can be: so the bits of a column do not depend on the number of threads.
  std::int64_t BlockOfWidest() const {
    constexpr std::int64_t kBlockElements = 4096;
    const std::int64_t column = row_ % layout_.inner, left = stride() - column / kPanelWidth * kPanelWidth;
    return kBlockElements / std::min<std::int64_t>(kPanelWidth, left);
  }

  Executor& executor_;
  Layout layout_;
  PanelPlan plan_;
  std::int64_t rows_;
  std::int64_t segments_;
  std::int64_t first_ = 0;
  std::int64_t row_ = 0;
  int width_;
};

// Whether it holds for any column, from 0 on. All are counted, since compilers vectorise no search.
template <typename Predicate>
bool AnyColumn(int columns, const Predicate& holds) {
  int count = 0;
  for (int c = 0; c < columns; ++c) count += holds(c);
  return count > 0;
}

// Blocks of rows of a panel of an array of E, which may be const: where they lie in it, or, of several
// matrices, a copy of up to kPanelBlock rows.
template <typename E>
class PanelRows {
  using Element = std::remove_const_t<E>;

 public:
  PanelRows(const ColumnPanel& panel, E* array) : panel_(panel), array_(array + panel.first()) {}

  std::int64_t stride() const { return panel_.IsGroup() ? kPanelWidth : panel_.stride(); }

  // Where rows are to be written from row `begin` on.
  E* Begin(std::int64_t begin) { return panel_.IsGroup() ? buffer_ : array_ + begin * panel_.stride(); }
  // After Begin, when they are written.
  void Store(std::int64_t begin, std::int64_t rows) {
    ForMatrices(begin, [&](E* in_array, const E* copy, std::int64_t inner) {
      CopyRows<E>(copy, kPanelWidth, in_array, inner, rows, inner);
    });
  }

  E* Load(std::int64_t begin, std::int64_t rows) {
    ForMatrices(begin, [&](E* in_array, Element* copy, std::int64_t inner) {
      CopyRows<Element>(in_array, inner, copy, kPanelWidth, rows, inner);
    });
    return Begin(begin);
  }

 private:
  // Calls body(row `begin` in the array, its place in the copy, inner) for every matrix, if there are
  // several.
  template <typename Body>
  void ForMatrices(std::int64_t begin, const Body& body) {
    if (!panel_.IsGroup()) return;
    const std::int64_t inner = panel_.stride(), matrix = panel_.layout().n * inner;
    E* from = array_ + begin * inner;
    for (std::int64_t at = 0; at < panel_.width(); at += inner, from += matrix) {
      body(from, buffer_ + at, inner);
    }
  }

  const ColumnPanel& panel_;
  E* array_;
  alignas(64) Element buffer_[kPanelBlock * kPanelWidth];
};

// Calls body(first row, rows) for the rows of a segment: for all at once, or, where they are copied, block
// after block.
template <typename Body>
void ForPanelRows(const ColumnPanel::Segment& segment, bool copied, const Body& body) {
  const std::int64_t most = copied ? kPanelBlock : std::max<std::int64_t>(1, segment.rows);
  for (std::int64_t i = 0; i < segment.rows; i += most) {
    body(segment.begin + i, std::min(most, segment.rows - i));
  }
}

// Makes objects by make(ColumnPanel), one a thread, and calls Compute(panel number) of these for panel after
// panel, until all columns are done.
template <typename Make>
void ForColumnPanels(Executor& executor, const Layout& layout, const PanelPlan& plan, const Make& make) {
  const auto body = [&](std::int64_t first, std::int64_t end, Executor& segments_executor) {
    auto panel = make(ColumnPanel(segments_executor, layout, plan));
    for (std::int64_t p = first; p < end; ++p) panel.Compute(p);
  };
  if (layout.n / plan.fold > kMaxPanelRows && plan.panels < kManyRows * executor.Threads()) {
    const ScopedFloatMode mode;
    body(0, plan.panels, executor);
    return;
  }
  const std::int64_t elements =
      std::max<std::int64_t>(1, layout.n * layout.inner * plan.group / plan.panels_per_matrix);
  ParallelForWholeRows(executor, plan.panels, elements, [&](std::int64_t first, std::int64_t end) {
    InlineExecutor this_thread;
    body(first, end, this_thread);
  });
}

// Calls body(ColumnPanel) for the panels of a HasSmallColumns array.
template <typename Body>
void ForSmallColumns(Executor& executor, const Layout& layout, const Body& body) {
  struct Panels {
    ColumnPanel panel;
    const Body& body;
    void Compute(std::int64_t p) {
      panel.Move(p);
      body(panel);
    }
  };
  ForColumnPanels(executor, layout, PlanSmallColumns(layout),
                  [&](const ColumnPanel& panel) { return Panels{panel, body}; });
}

}  // namespace jax_softmax2p
