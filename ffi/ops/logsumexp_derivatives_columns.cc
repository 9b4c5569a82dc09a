// Derivatives of logsumexp and log_softmax along an axis that is not the last: panels of columns, without a
// transpose.

#include <cmath>
#include <cstdint>

#include "ffi/ops/column_panels.h"
#include "ffi/ops/label.h"
#include "ffi/ops/logits_panel.h"
#include "ffi/ops/logsumexp.h"
#include "ffi/ops/panel_dot_sum.h"

namespace jax_softmax2p {
namespace {

// A panel of z with the lse of its columns.
template <typename E>
class LsePanel {
  using T = ComputeOf<E>;

 public:
  LsePanel(const Kernels& all, const Logits<E>& of, const ColumnPanel& panel, const LabelledLse<E>& lse)
      : kernels(all.Of<E>()), logits(all, of, panel), has_mask(of.HasMask()), lse_(lse) {}

  const ColumnPanel& panel() const { return logits.panel(); }
  const T* hi() const { return lse_.hi + panel().row(); }
  const T* lo() const { return lse_.lo + panel().row(); }
  // The label of column c, or null.
  const std::int32_t* LabelOfColumn(int c) const { return LabelOf(lse_, panel().row() + c); }

  const KernelTable<E>& kernels;
  LogitsPanel<E> logits;
  const bool has_mask;

 private:
  const LabelledLse<E>& lse_;
};

// The labels of a panel's columns and their logits.
template <typename E>
class PanelLabels {
  using T = ComputeOf<E>;

 public:
  explicit PanelLabels(const LsePanel<E>& panel) : in_(panel) {}

  void Read() {
    const std::int32_t* const labels = in_.LabelOfColumn(0);
    const std::int64_t n = in_.panel().layout().n;
    for (int c = 0; c < in_.panel().width(); ++c) indices_[c] = LabelIndex(labels[c], n);
    in_.logits.ReadElements(indices_, z_, has_logit_);
  }

  // Replaces factor·e^(z - lse) at the labels by factor·(e^(z - lse) - 1).
  void Write(E* y, const T* factor) const {
    const ColumnPanel& panel = in_.panel();
    E at_labels[kPanelWidth];
    in_.kernels.labels_minus_lse(z_, at_labels, panel.width(), in_.hi(), in_.lo(), factor);
    for (int c = 0; c < panel.width(); ++c) {
      if (indices_[c] < 0) continue;
      y[panel.FirstOf(c) + indices_[c] * panel.stride()] =
          has_logit_[c] ? at_labels[c] : FromDouble<E>(-static_cast<double>(factor[c]));
    }
  }

 private:
  const LsePanel<E>& in_;
  std::int64_t indices_[kPanelWidth];
  bool has_logit_[kPanelWidth];
  T z_[kPanelWidth];
};

template <typename E>
class LogSumExpJvpPanel {
  using T = ComputeOf<E>;

 public:
  LogSumExpJvpPanel(const Kernels& kernels, const Logits<E>& logits, const ColumnPanel& panel,
                    const LabelledLse<E>& lse, const E* t, T* out)
      : in_(kernels, logits, panel, lse), t_(t), out_(out), dot_(in_.kernels, panel) {}

  void Compute(std::int64_t p) {
    in_.logits.Move(p);
    const ColumnPanel& panel = in_.panel();
    const PanelDots<T> dots =
        dot_.Compute(panel, [&](const ColumnPanel::Segment& segment, const PanelDots<T>& sums) {
          PanelRows<const E> t(panel, t_);
          in_.logits.ForBlocks(segment, [&](const T* z, const Panel& rows, std::int64_t begin) {
            in_.kernels.panel_dot_minus_lse(z, t.Load(begin, rows.rows), rows, t.stride(),
                                            begin != segment.begin, in_.hi(), in_.lo(), sums);
          });
        });
    for (int c = 0; c < panel.width(); ++c) {
      const bool fully_masked = in_.has_mask && !std::isfinite(in_.hi()[c]) && in_.logits.IsFullyMasked(c);
      const CompensatedSum dot = fully_masked ? CompensatedSum{} : CompensatedSum{dots.hi[c], dots.lo[c]};
      out_[panel.row() + c] =
          MinusLabel(dot, in_.LabelOfColumn(c), t_ + panel.FirstOf(c), panel.stride(), panel.layout().n);
    }
  }

 private:
  LsePanel<E> in_;
  const E* t_;
  T* out_;
  PanelDotSum<E> dot_;
};

// Writes factor·e^(z - lse). e^z is multiplied by a scale of the column's own, which takes half of the
// operations that e^(z - lse) takes; columns that have none take the latter.
template <typename E>
class WeightsPanel {
  using T = ComputeOf<E>;

 public:
  explicit WeightsPanel(const LsePanel<E>& panel) : in_(panel) {}

  void Move(const T* factor) {
    factor_ = factor;
    in_.kernels.panel_scales(in_.hi(), in_.lo(), factor, width(), ScalesFrom(0));
    has_others_ = AnyColumn(width(), [&](int c) { return !HasScale(c); });
  }

  // Of rows of z.
  void Write(const T* z, const Panel& rows, E* y, std::int64_t y_stride) {
    if (!has_others_) return WriteScaled(z, rows, y, y_stride, 0);
    for (int begin = 0, end = 0; begin < width(); begin = end) {
      const bool has_scale = HasScale(begin);
      while (end < width() && HasScale(end) == has_scale) ++end;
      Panel some = rows;
      some.width = end - begin;
      if (has_scale) {
        WriteScaled(z + begin, some, y + begin, y_stride, begin);
      } else {
        in_.kernels.panel_minus_lse(z + begin, y + begin, some, y_stride, in_.hi() + begin, in_.lo() + begin,
                                    factor_ + begin);
      }
    }
  }

 private:
  int width() const { return in_.panel().width(); }
  PanelSums<T> ScalesFrom(int column) { return {hi_ + column, lo_ + column, exponents_ + column}; }
  bool HasScale(int c) const { return !std::isnan(hi_[c]); }
  void WriteScaled(const T* z, const Panel& rows, E* y, std::int64_t y_stride, int column) {
    in_.kernels.logits_panel_write(z, y, rows, y_stride, ScalesFrom(column), nullptr);
  }

  const LsePanel<E>& in_;
  const T* factor_ = nullptr;
  T hi_[kPanelWidth], lo_[kPanelWidth], exponents_[kPanelWidth];
  bool has_others_ = false;
};

template <typename E>
class LogSumExpVjpPanel {
  using T = ComputeOf<E>;

 public:
  LogSumExpVjpPanel(const Kernels& kernels, const Logits<E>& logits, const ColumnPanel& panel,
                    const LabelledLse<E>& lse, const T* factor, E* y)
      : in_(kernels, logits, panel, lse),
        weights_(in_),
        labels_(in_),
        has_labels_(lse.labels != nullptr),
        in_place_(y == logits.x),
        factor_(factor),
        y_(y) {}

  void Compute(std::int64_t p) {
    in_.logits.Move(p);
    const ColumnPanel& panel = in_.panel();
    const T* const factor = factor_ + panel.row();
    weights_.Move(factor);
    // In place the labels' logits are needed before they are written over; otherwise they are in a cache
    // later.
    if (has_labels_ && in_place_) labels_.Read();
    panel.ForSegments([&](const ColumnPanel::Segment& segment) {
      PanelRows<E> y(panel, y_);
      in_.logits.ForBlocks(segment, [&](const T* z, const Panel& rows, std::int64_t begin) {
        weights_.Write(z, rows, y.Begin(begin), y.stride());
        y.Store(begin, rows.rows);
      });
    });
    for (int c = 0; in_.has_mask && c < panel.width(); ++c) {
      if (!(std::isfinite(in_.hi()[c]) && std::isfinite(factor[c]))) in_.logits.FillMasked(c, y_, E{});
    }
    if (has_labels_ && !in_place_) labels_.Read();
    if (has_labels_) labels_.Write(y_, factor);
  }

 private:
  LsePanel<E> in_;
  WeightsPanel<E> weights_;
  PanelLabels<E> labels_;
  const bool has_labels_, in_place_;
  const T* factor_;
  E* y_;
};

template <typename E>
class LogSoftmaxVjpPanel {
  using T = ComputeOf<E>;

 public:
  LogSoftmaxVjpPanel(const Kernels& kernels, const Logits<E>& logits, const ColumnPanel& panel,
                     const LabelledLse<E>& lse, const E* t, E* out)
      : in_(kernels, logits, panel, lse), t_(t), out_(out), sum_(in_.kernels, panel) {}

  void Compute(std::int64_t p) {
    in_.logits.Move(p);
    const ColumnPanel& panel = in_.panel();
    const PanelDots<T> sums =
        sum_.Compute(panel, [&](const ColumnPanel::Segment& segment, const PanelDots<T>& of_segment) {
          PanelRows<const E> t(panel, t_);
          ForPanelRows(segment, panel.IsGroup(), [&](std::int64_t begin, std::int64_t rows) {
            in_.kernels.panel_sum_terms(t.Load(begin, rows), panel.Rows(segment, rows, t.stride()),
                                        begin != segment.begin, of_segment);
          });
        });
    panel.ForSegments([&](const ColumnPanel::Segment& segment) {
      PanelRows<const E> t(panel, t_);
      PanelRows<E> out(panel, out_);
      in_.logits.ForBlocks(segment, [&](const T* z, const Panel& rows, std::int64_t begin) {
        in_.kernels.panel_subtract_minus_lse(z, t.Load(begin, rows.rows), out.Begin(begin), rows, t.stride(),
                                             in_.hi(), in_.lo(), sums);
        out.Store(begin, rows.rows);
      });
    });
    for (int c = 0; in_.has_mask && c < panel.width(); ++c) {
      if (!std::isfinite(in_.hi()[c])) in_.logits.FillMasked(c, out_, E{});
    }
  }

 private:
  LsePanel<E> in_;
  const E* t_;
  E* out_;
  PanelDotSum<E> sum_;
};

// With labels, each column whole.
template <typename E>
void LogSumExpVjpSmallColumns(const KernelTable<E>& kernels, Executor& executor, const Logits<E>& logits,
                              const LabelledLse<E>& lse, const ComputeOf<E>* factor, E* y) {
  ForSmallColumns(executor, logits.layout(), [&](const ColumnPanel& panel) {
    const std::int64_t at = panel.first(), row = panel.row();
    const int n = static_cast<int>(logits.n);
    std::int32_t labels[kPanelWidth];
    for (int c = 0; c < panel.width(); ++c) {
      labels[c] = static_cast<std::int32_t>(LabelIndex(lse.labels[row + c], n));
    }
    kernels.small_columns_minus_lse(logits.x + at, y + at, panel.stride(), n, panel.width(), lse.hi + row,
                                    lse.lo + row, factor + row, labels);
  });
}

}  // namespace

template <typename E>
void LogSumExpJvpColumns(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                         const LabelledLse<E>& lse, const E* t, ComputeOf<E>* out) {
  const PanelPlan plan = PlanPanels(executor, logits.layout(), kernels.Of<E>().lanes);
  ForColumnPanels(executor, logits.layout(), plan, [&](const ColumnPanel& panel) {
    return LogSumExpJvpPanel<E>(kernels, logits, panel, lse, t, out);
  });
}

template <typename E>
void LogSumExpVjpColumns(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                         const LabelledLse<E>& lse, const ComputeOf<E>* factor, E* y) {
  const int lanes = kernels.Of<E>().lanes;
  // Only the labels' elements cost a panel much.
  if (lse.labels != nullptr && !logits.HasOperands() &&
      HasSmallColumns(logits.layout(), kManyVectors * lanes)) {
    return LogSumExpVjpSmallColumns(kernels.Of<E>(), executor, logits, lse, factor, y);
  }
  const PanelPlan plan = PlanPanels(executor, logits.layout(), lanes);
  ForColumnPanels(executor, logits.layout(), plan, [&](const ColumnPanel& panel) {
    return LogSumExpVjpPanel<E>(kernels, logits, panel, lse, factor, y);
  });
}

template <typename E>
void LogSoftmaxVjpColumns(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                          const LabelledLse<E>& lse, const E* t, E* out) {
  const PanelPlan plan = PlanPanels(executor, logits.layout(), kernels.Of<E>().lanes);
  ForColumnPanels(executor, logits.layout(), plan, [&](const ColumnPanel& panel) {
    return LogSoftmaxVjpPanel<E>(kernels, logits, panel, lse, t, out);
  });
}

#define SOFTMAX2P_INSTANTIATE(E)                                                                         \
  template void LogSumExpJvpColumns(const Kernels&, Executor&, const Logits<E>&, const LabelledLse<E>&,  \
                                    const E*, ComputeOf<E>*);                                            \
  template void LogSumExpVjpColumns(const Kernels&, Executor&, const Logits<E>&, const LabelledLse<E>&,  \
                                    const ComputeOf<E>*, E*);                                            \
  template void LogSoftmaxVjpColumns(const Kernels&, Executor&, const Logits<E>&, const LabelledLse<E>&, \
                                     const E*, E*);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
