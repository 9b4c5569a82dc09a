#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "ffi/ops/logsumexp.h"
#include "ffi/ops/logsumexp_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
namespace {

// factor·e^-(hi + lo), times e^z as every row's kernel has it: no rounding of z - hi, which would cost
// an exponential as many ULP as that is large. Beyond the kernels' exact range, and for what is no number,
// hi is subtracted: there z - hi is exact wherever e^(z - hi) does not vanish.
template <typename T>
RowScale<T> ScaleOf(T hi, T lo, double factor, int max_exponent) {
  constexpr double kLog2E = 0x1.71547652b82fep0;
  constexpr double kLn2Hi = 0x1.62e42fefa39efp-1, kLn2Lo = 0x1.abc9e3b39803fp-56;
  RowScale<T> scale{};
  const double exponent = 2 * std::floor(static_cast<double>(hi) * (kLog2E / 2));
  if (std::abs(exponent) < max_exponent - 2 && std::isfinite(factor)) {
    const double rest = std::fma(-exponent, kLn2Hi, static_cast<double>(hi));
    const double value = factor * std::exp(-rest);
    const double missing = value * (exponent * kLn2Lo - static_cast<double>(lo));
    scale.hi = static_cast<T>(value + missing);
    scale.lo = static_cast<T>((value - static_cast<double>(scale.hi)) + missing);
    scale.exponent = static_cast<int>(exponent);
  } else {
    scale.hi = static_cast<T>(factor);
    scale.subtract = true;
    scale.maximum = hi;
    scale.rest = lo;
  }
  return scale;
}

// Where a label lies in its row, and its z, to be had before a result is written over x.
template <typename E>
class Label {
  using T = ComputeOf<E>;

 public:
  Label(const LogitsRow<E>& row, std::int64_t n, const std::int32_t* label) {
    if (label == nullptr) return;
    place_ = PlaceOf(*label, n);
    takes_part_ = place_ >= 0 && !row.Masked(place_);
    if (takes_part_) row.ApplyScaleBiasMask(place_ - row.begin(), 1, &z_);
  }

  // -1 where it is nowhere.
  static std::int64_t PlaceOf(std::int32_t label, std::int64_t n) {
    const std::int64_t place = label < 0 ? label + n : label;
    return place < n ? std::max<std::int64_t>(place, -1) : -1;
  }

  // y = factor·(e^(z - hi - lo) - 1), where y is factor·e^(z - hi - lo). Where e^... is near 1, the
  // difference cannot be had from its rounding.
  void Write(E* row_y, T hi, T lo, T factor) const {
    if (place_ < 0) return;
    E& y = row_y[place_];
    const double less = (static_cast<double>(z_) - static_cast<double>(hi)) - static_cast<double>(lo);
    if constexpr (std::is_same_v<E, T>) {
      if (takes_part_ && less < -0.7) {
        y -= factor;
        return;
      }
    }
    y = FromDouble<E>(static_cast<double>(factor) * (takes_part_ ? std::expm1(less) : -1.0));
  }

 private:
  std::int64_t place_ = -1;
  bool takes_part_ = false;
  T z_ = 0;
};

template <typename E>
const std::int32_t* LabelOf(const LabelledLse<E>& sums, std::int64_t row) {
  return sums.labels == nullptr ? nullptr : sums.labels + row;
}

template <typename E>
LabelledLse<E> From(const LabelledLse<E>& sums, std::int64_t row) {
  return {sums.hi + row, sums.lo + row, LabelOf(sums, row)};
}

template <typename E>
void SmallLogSumExpVjp(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                       const LabelledLse<E>& sums, const ComputeOf<E>* factor, E* y) {
  using T = ComputeOf<E>;
  const std::int64_t n = logits.n;
  ForSmallRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const T* z) {
    std::vector<Label<E>> labels;
    if (sums.labels != nullptr) labels.reserve(static_cast<std::size_t>(count));
    for (std::int64_t r = first; sums.labels != nullptr && r < first + count; ++r) {
      labels.emplace_back(LogitsRow<E>(kernels, logits, r, nullptr), n, sums.labels + r);
    }
    SmallLess(kernels, logits, first, count, z, y + first * n, sums.hi + first, sums.lo + first,
              factor + first);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t r = first + i;
      if (logits.Masked() && !(std::isfinite(sums.hi[r]) && std::isfinite(factor[r]))) {
        LogitsRow<E>(kernels, logits, r, nullptr).FillMasked(y + r * n, E{});
      }
      if (labels.empty()) continue;
      labels[static_cast<std::size_t>(i)].Write(y + r * n, sums.hi[r], sums.lo[r], factor[r]);
    }
  });
}

// <p, t> - t[label] of one row, for `dot` the first of these.
template <typename E>
ComputeOf<E> LessLabel(const CompensatedSum& dot, const std::int32_t* label, const E* t, std::int64_t n) {
  double sum = dot.hi + dot.lo;
  const std::int64_t place = label == nullptr ? -1 : Label<E>::PlaceOf(*label, n);
  if (place >= 0) sum -= Widen(t[place]);
  return static_cast<ComputeOf<E>>(sum);
}

// Calls body(row number, p of the row, without the factor) for rows of up to kMaxSmall elements.
template <typename E, typename Body>
void ForSmallProbabilities(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                           const LabelledLse<E>& sums, const Body& body) {
  using T = ComputeOf<E>;
  const auto some = [&](std::int64_t first, std::int64_t count, const T* z) {
    T p[kLogitsBlock], ones[kLogitsBlock];
    std::fill(ones, ones + count, T{1});
    SmallLess<E, T>(kernels, logits, first, count, z, p, sums.hi + first, sums.lo + first, ones);
    for (std::int64_t i = 0; i < count; ++i) body(first + i, p + i * logits.n);
  };
  ForSmallRows(kernels, executor, logits, some, true);
}

// <1, t> of up to kMaxSmall elements: in double floats need no more, and no vectors.
template <typename E>
double SmallTotal(const KernelTable<E>& kernels, const E* t, std::int64_t n) {
  if constexpr (std::is_same_v<E, double>) {
    const CompensatedSum total = kernels.total(t, n);
    return total.hi + total.lo;
  } else {
    double total = 0;
    for (std::int64_t i = 0; i < n; ++i) total += Widen(t[i]);
    return total;
  }
}

// t - p·<1, t> of one row.
template <typename E>
void WriteLogSoftmaxVjp(const KernelTable<E>& kernels, const LogitsRow<E>& row, const Segments& segments,
                        const LabelledLse<E>& sums, std::int64_t r, const E* t, E* out) {
  using T = ComputeOf<E>;
  const CompensatedSum total = segments.Reduce<CompensatedSum>(
      [&](std::int64_t at, std::int64_t size) { return kernels.total(t + at, size); },
      [](CompensatedSum& a, const CompensatedSum& b) { a.Add(b); });
  const double factor = total.hi + total.lo;
  const RowScale<T> scale = ScaleOf(sums.hi[r], sums.lo[r], factor, kernels.max_exponent);
  segments.ForEach(Order::kForward, [&](std::int64_t at, std::int64_t size) {
    row.ForScaled(at, size, scale, [&](std::int64_t i, const T* p, std::int64_t count) {
      kernels.less(t + at + i, p, out + at + i, count);
    });
  });
}

}  // namespace

template <typename E>
void LogSumExpJvp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& sums,
                  const E* t, ComputeOf<E>* out) {
  using T = ComputeOf<E>;
  const std::int64_t n = logits.n;
  if (logits.rows * n == 0) {
    std::fill(out, out + logits.rows, T{0});
    return;
  }
  Simplify(logits);
  const KernelTable<E>& own = kernels.Of<E>();
  if (logits.inner > 1) {
    // A tile for t beside that of the logits.
    const auto some = [&](const Logits<E>& rows, E*, Executor& for_rows) {
      ColumnTile<E> of_t(own, n, logits.inner, rows.rows);
      of_t.Pack(t, rows.first_row, rows.rows);
      LogSumExpJvp(kernels, for_rows, rows, From(sums, rows.first_row), of_t.rows(), out + rows.first_row);
    };
    return ForColumnLogits<E>(kernels, executor, logits, nullptr, some);
  }
  if (IsSmall(logits)) {
    return ForSmallProbabilities(kernels, executor, logits, sums, [&](std::int64_t r, const T* p) {
      const E* const row_t = t + r * n;
      const bool masked_throughout = logits.Masked() && !std::isfinite(sums.hi[r]);
      const CompensatedSum dot = masked_throughout ? CompensatedSum{} : own.logits_dot(p, row_t, n);
      out[r] = LessLabel(dot, LabelOf(sums, r), row_t, n);
    });
  }
  ForLogits(kernels, executor, logits,
            [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
              const RowScale<T> scale = ScaleOf(sums.hi[r], sums.lo[r], 1, own.max_exponent);
              const E* const row_t = t + r * n;
              const CompensatedSum dot = segments.Reduce<CompensatedSum>(
                  [&](std::int64_t at, std::int64_t size) {
                    CompensatedSum sum;
                    row.ForScaled(at, size, scale, [&](std::int64_t i, const T* p, std::int64_t count) {
                      sum.Add(own.logits_dot(p, row_t + row.begin() + at + i, count));
                    });
                    return sum;
                  },
                  [](CompensatedSum& a, const CompensatedSum& b) { a.Add(b); });
              out[r] = LessLabel(dot, LabelOf(sums, r), row_t, n);
            });
}

template <typename E>
void LogSumExpVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& sums,
                  const ComputeOf<E>* factor, E* y) {
  using T = ComputeOf<E>;
  if (logits.rows * logits.n == 0) return;
  Simplify(logits);
  AdviseHugePagesFor(logits, y);
  if (logits.inner > 1) {
    const auto some = [&](const Logits<E>& rows, E* y_rows, Executor& own) {
      LogSumExpVjp(kernels, own, rows, From(sums, rows.first_row), factor + rows.first_row, y_rows);
    };
    return ForColumnLogits(kernels, executor, logits, y, some);
  }
  if (IsSmall(logits)) return SmallLogSumExpVjp(kernels, executor, logits, sums, factor, y);
  const bool non_temporal = IsFar(logits);
  const int max_exponent = kernels.Of<E>().max_exponent;
  ForLogits(kernels, executor, logits,
            [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
              const T hi = sums.hi[r], lo = sums.lo[r];
              const RowScale<T> scale = ScaleOf(hi, lo, factor[r], max_exponent);
              E* const row_y = y + r * logits.n;
              const Label<E> label(row, logits.n, LabelOf(sums, r));
              segments.ForEach(Order::kForward, [&](std::int64_t at, std::int64_t size) {
                row.Write(at, size, nullptr, row_y + row.begin() + at, scale, non_temporal);
                if (non_temporal) FenceNonTemporalStores();
              });
              if (logits.Masked()) {
                if (std::isfinite(hi) && std::isfinite(factor[r])) {
                  row.FillOutside(row_y, E{});
                } else {
                  row.FillMasked(row_y, E{});
                }
              }
              label.Write(row_y, hi, lo, factor[r]);
            });
}

template <typename E>
void LogSoftmaxVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& sums,
                   const E* t, E* out) {
  using T = ComputeOf<E>;
  const std::int64_t n = logits.n;
  if (logits.rows * n == 0) return;
  Simplify(logits);
  AdviseHugePagesFor(logits, out);
  const KernelTable<E>& own = kernels.Of<E>();
  if (logits.inner > 1) {
    const auto some = [&](const Logits<E>& rows, E*, Executor& for_rows) {
      ColumnTile<E> of_t(own, n, logits.inner, rows.rows);
      of_t.Pack(t, rows.first_row, rows.rows);
      LogSoftmaxVjp(kernels, for_rows, rows, From(sums, rows.first_row), of_t.rows(), of_t.rows());
      of_t.Unpack(out, rows.first_row, rows.rows);
    };
    return ForColumnLogits<E>(kernels, executor, logits, nullptr, some);
  }
  const auto fill_masked = [&](const LogitsRow<E>& row, std::int64_t r) {
    if (!logits.Masked()) return;
    std::isfinite(sums.hi[r]) ? row.FillOutside(out + r * n, E{}) : row.FillMasked(out + r * n, E{});
  };
  if (IsSmall(logits)) {
    return ForSmallProbabilities(kernels, executor, logits, sums, [&](std::int64_t r, T* p) {
      const T factor = static_cast<T>(SmallTotal(own, t + r * n, n));
      for (std::int64_t i = 0; i < n; ++i) p[i] *= factor;
      own.less(t + r * n, p, out + r * n, n);
      if (logits.Masked()) fill_masked(LogitsRow<E>(kernels, logits, r, nullptr), r);
    });
  }
  ForLogits(kernels, executor, logits,
            [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
              const std::int64_t at = r * n + row.begin();
              WriteLogSoftmaxVjp(own, row, segments, sums, r, t + at, out + at);
              fill_masked(row, r);
            });
}

#define SOFTMAX2P_INSTANTIATE(E)                                                                    \
  template void LogSumExpJvp(const Kernels&, Executor&, Logits<E>, const LabelledLse<E>&, const E*, \
                             ComputeOf<E>*);                                                        \
  template void LogSumExpVjp(const Kernels&, Executor&, Logits<E>, const LabelledLse<E>&,           \
                             const ComputeOf<E>*, E*);                                              \
  template void LogSoftmaxVjp(const Kernels&, Executor&, Logits<E>, const LabelledLse<E>&, const E*, E*)
SOFTMAX2P_INSTANTIATE(float);
SOFTMAX2P_INSTANTIATE(double);
SOFTMAX2P_INSTANTIATE(BFloat16);
SOFTMAX2P_INSTANTIATE(Float16);
#undef SOFTMAX2P_INSTANTIATE

}  // namespace jax_softmax2p
