// Derivatives of logsumexp and log_softmax along an axis that is not the last, for logits without operands:
// panels of columns, without a transpose.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ffi/ops/column_panels.h"
#include "ffi/ops/label.h"
#include "ffi/ops/logsumexp.h"
#include "ffi/ops/panel_dot_sum.h"

namespace jax_softmax2p {
namespace {

// A panel of x with the lse of its columns.
template <typename E>
class LsePanel {
  using T = ComputeOf<E>;

 public:
  LsePanel(const KernelTable<E>& kernels, const ColumnPanel& panel, const Logits<E>& logits,
           const LabelledLse<E>& lse)
      : kernels(kernels), panel(panel), logits_(logits), lse_(lse) {}

  // Begins with the columns from element `first` and row `row` on.
  void Begin(std::int64_t first, std::int64_t row, int width) {
    panel.SetWidth(width);
    x_ = logits_.x + first;
    row_ = row;
    panel.CopyRepeated(lse_.hi + row, hi_);
    panel.CopyRepeated(lse_.lo + row, lo_);
  }

  const E* x() const { return x_; }
  const T* hi() const { return hi_.data(); }
  const T* lo() const { return lo_.data(); }
  std::int64_t n() const { return logits_.n; }
  std::int64_t inner() const { return logits_.inner; }
  // The label of column c, or null.
  const std::int32_t* LabelOfColumn(int c) const { return LabelOf(lse_, row_ + c); }

  const KernelTable<E>& kernels;
  ColumnPanel panel;

 private:
  const Logits<E>& logits_;
  const LabelledLse<E>& lse_;
  const E* x_ = nullptr;
  std::int64_t row_ = 0;
  std::vector<T> hi_, lo_;
};

template <typename E>
class LogSumExpJvpPanel {
  using T = ComputeOf<E>;

 public:
  LogSumExpJvpPanel(const LsePanel<E>& in, const E* t, T* out)
      : in_(in), t_(t), out_(out), dot_(in.kernels, in.panel) {}

  void Compute(std::int64_t first, std::int64_t row, int width) {
    in_.Begin(first, row, width);
    const E* const t = t_ + first;
    const PanelDots<T> dots =
        dot_.Compute(in_.panel, [&](std::int64_t at, const Panel& segment, const PanelDots<T>& of_segment) {
          in_.kernels.panel_dot_minus_lse(in_.x() + at, t + at, segment, in_.hi(), in_.lo(), of_segment);
        });
    for (int c = 0; c < in_.panel.Columns(); ++c) {
      out_[row + c] = MinusLabel({dots.hi[c], dots.lo[c]}, in_.LabelOfColumn(c), t + c, in_.inner(), in_.n());
    }
  }

 private:
  LsePanel<E> in_;
  const E* t_;
  T* out_;
  PanelDotSum<E> dot_;
};

template <typename E>
class LogSumExpVjpPanel {
  using T = ComputeOf<E>;

 public:
  LogSumExpVjpPanel(const LsePanel<E>& in, const T* factor, E* y) : in_(in), factor_(factor), y_(y) {}

  void Compute(std::int64_t first, std::int64_t row, int width) {
    in_.Begin(first, row, width);
    in_.panel.CopyRepeated(factor_ + row, factors_);
    E* const y = y_ + first;
    // Their logits are read before y, which may be x, is written.
    labels_.clear();
    for (int c = 0; c < in_.panel.Columns() && in_.LabelOfColumn(c) != nullptr; ++c) {
      labels_.emplace_back(in_.x() + c, in_.inner(), in_.n(), *in_.LabelOfColumn(c));
    }
    in_.panel.ForSegments([&](std::int64_t, std::int64_t at, const Panel& segment) {
      in_.kernels.panel_minus_lse(in_.x() + at, y + at, segment, in_.hi(), in_.lo(), factors_.data());
    });
    for (std::size_t c = 0; c < labels_.size(); ++c) {
      labels_[c].Write(y + c, in_.inner(), in_.hi()[c], in_.lo()[c], factors_[c]);
    }
  }

 private:
  LsePanel<E> in_;
  const T* factor_;
  E* y_;
  std::vector<T> factors_;
  std::vector<Label<E>> labels_;
};

template <typename E>
class LogSoftmaxVjpPanel {
  using T = ComputeOf<E>;

 public:
  LogSoftmaxVjpPanel(const LsePanel<E>& in, const E* t, E* out)
      : in_(in), t_(t), out_(out), sum_(in.kernels, in.panel) {}

  void Compute(std::int64_t first, std::int64_t row, int width) {
    in_.Begin(first, row, width);
    const E* const t = t_ + first;
    E* const out = out_ + first;
    const PanelDots<T> sums =
        sum_.Compute(in_.panel, [&](std::int64_t at, const Panel& segment, const PanelDots<T>& of_segment) {
          in_.kernels.panel_sum_terms(t + at, segment, of_segment);
        });
    in_.panel.ForSegments([&](std::int64_t, std::int64_t at, const Panel& segment) {
      in_.kernels.panel_subtract_minus_lse(in_.x() + at, t + at, out + at, segment, in_.hi(), in_.lo(), sums);
    });
  }

 private:
  LsePanel<E> in_;
  const E* t_;
  E* out_;
  PanelDotSum<E> sum_;
};

}  // namespace

template <typename E>
void LogSumExpJvpColumns(const KernelTable<E>& kernels, Executor& executor, const Logits<E>& logits,
                         const LabelledLse<E>& lse, const E* t, ComputeOf<E>* out) {
  ForColumnPanels(executor, logits.layout(), kernels.lanes, [&](const ColumnPanel& panel) {
    return LogSumExpJvpPanel<E>({kernels, panel, logits, lse}, t, out);
  });
}

template <typename E>
void LogSumExpVjpColumns(const KernelTable<E>& kernels, Executor& executor, const Logits<E>& logits,
                         const LabelledLse<E>& lse, const ComputeOf<E>* factor, E* y) {
  ForColumnPanels(executor, logits.layout(), kernels.lanes, [&](const ColumnPanel& panel) {
    return LogSumExpVjpPanel<E>({kernels, panel, logits, lse}, factor, y);
  });
}

template <typename E>
void LogSoftmaxVjpColumns(const KernelTable<E>& kernels, Executor& executor, const Logits<E>& logits,
                          const LabelledLse<E>& lse, const E* t, E* out) {
  ForColumnPanels(executor, logits.layout(), kernels.lanes, [&](const ColumnPanel& panel) {
    return LogSoftmaxVjpPanel<E>({kernels, panel, logits, lse}, t, out);
  });
}

#define SOFTMAX2P_INSTANTIATE(E)                                                         \
  template void LogSumExpJvpColumns(const KernelTable<E>&, Executor&, const Logits<E>&,  \
                                    const LabelledLse<E>&, const E*, ComputeOf<E>*);     \
  template void LogSumExpVjpColumns(const KernelTable<E>&, Executor&, const Logits<E>&,  \
                                    const LabelledLse<E>&, const ComputeOf<E>*, E*);     \
  template void LogSoftmaxVjpColumns(const KernelTable<E>&, Executor&, const Logits<E>&, \
                                     const LabelledLse<E>&, const E*, E*);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
