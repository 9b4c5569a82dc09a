// Labels: the elements of rows that losses compare with the logsumexp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "ffi/ops/logits_row.h"
#include "ffi/ops/logsumexp.h"

namespace jax_softmax2p {

// The index that a label means in a row of n elements; -1 where it is out of range.
inline std::int64_t LabelIndex(std::int32_t label, std::int64_t n) {
  const std::int64_t index = label < 0 ? label + n : label;
  return index < n ? std::max<std::int64_t>(index, -1) : -1;
}

// log p of a logit z, from the lse. Where p is near 1, it has lost no digits.
template <typename T>
double LogProbability(T z, T hi, T lo) {
  return (static_cast<double>(z) - static_cast<double>(hi)) - static_cast<double>(lo);
}

// A row's label and its logit z, which is read before a result is written over x.
template <typename E>
class Label {
  using T = ComputeOf<E>;

 public:
  // `label` is null where the row has none.
  Label(const LogitsRow<E>& row, std::int64_t n, const std::int32_t* label) {
    if (label == nullptr) return;
    index_ = LabelIndex(*label, n);
    has_logit_ = index_ >= 0 && !row.IsMasked(index_);
    if (has_logit_) row.ApplyOperands(index_ - row.begin(), 1, &z_);
  }

  // Replaces y[label] = factor·e^(z - lse) by factor·(e^(z - lse) - 1). Where e^(z - lse) is near 1, the
  // difference is computed from z, since its rounding has no digits left.
  void Write(E* row_y, T hi, T lo, T factor) const {
    if (index_ < 0) return;
    E& y = row_y[index_];
    const double log_p = LogProbability(z_, hi, lo);
    if constexpr (std::is_same_v<E, T>) {
      // Of an infinite factor y is infinite as well.
      if (has_logit_ && log_p < -0.7 && std::isfinite(factor)) {
        y -= factor;
        return;
      }
    }
    y = FromDouble<E>(static_cast<double>(factor) * (has_logit_ ? std::expm1(log_p) : -1.0));
  }

 private:
  std::int64_t index_ = -1;
  bool has_logit_ = false;
  T z_ = 0;
};

template <typename E>
const std::int32_t* LabelOf(const LabelledLse<E>& lse, std::int64_t row) {
  return lse.labels == nullptr ? nullptr : lse.labels + row;
}

// <p, t> - t[label] of one row, from <p, t>. Elements of t are `stride` apart.
template <typename E>
ComputeOf<E> MinusLabel(const CompensatedSum& dot, const std::int32_t* label, const E* t, std::int64_t stride,
                        std::int64_t n) {
  double sum = dot.hi + dot.FiniteLo();
  const std::int64_t index = label == nullptr ? -1 : LabelIndex(*label, n);
  if (index >= 0) sum -= Widen(t[index * stride]);
  return static_cast<ComputeOf<E>>(sum);
}

}  // namespace jax_softmax2p
