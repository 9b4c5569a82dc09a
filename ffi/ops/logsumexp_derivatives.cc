#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "ffi/ops/label.h"
#include "ffi/ops/logsumexp.h"
#include "ffi/ops/parallel_logits_rows.h"
#include "ffi/ops/small_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
namespace {

// factor·e^-lse, by which the kernels multiply e^z, which they have KernelTable::factor times as large. That
// avoids rounding z - hi, which would cost about |z - hi| ULP. Beyond the kernels' exact range, and where the
// lse or the factor is not finite, hi is subtracted from z: there z - hi is exact wherever e^(z - hi) does
// not vanish.
template <typename E, typename T = ComputeOf<E>>
RowScale<T> ScaleFromLse(const KernelTable<E>& kernels, T hi, T lo, double factor) {
  constexpr double kLog2E = 0x1.71547652b82fep0;
  constexpr double kLn2Hi = 0x1.62e42fefa39efp-1, kLn2Lo = 0x1.abc9e3b39803fp-56;
  RowScale<T> scale{};
  factor /= kernels.factor;
  const double exponent = 2 * std::floor(static_cast<double>(hi) * (kLog2E / 2));
  if (std::abs(exponent) < kernels.max_exponent - 2 && std::isfinite(factor)) {
    const double rest = std::fma(-exponent, kLn2Hi, static_cast<double>(hi));
    const double value = factor * std::exp(-rest);
    const double missing = value * (exponent * kLn2Lo - static_cast<double>(lo));
    scale.hi = static_cast<T>(value + missing);
    scale.lo = static_cast<T>((value - static_cast<double>(scale.hi)) + missing);
    scale.exponent = static_cast<int>(exponent);
  } else {
    scale.hi = static_cast<T>(factor);
    scale.subtract_shift = true;
    scale.shift_hi = hi;
    scale.shift_lo = lo;
  }
  return scale;
}

template <typename E>
void SmallLogSumExpVjp(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                       const LabelledLse<E>& lse, const ComputeOf<E>* factor, E* y) {
  using T = ComputeOf<E>;
  const std::int64_t n = logits.n;
  ForSmallRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const T* z) {
    std::vector<Label<E>> labels;
    if (lse.labels != nullptr) labels.reserve(static_cast<std::size_t>(count));
    for (std::int64_t r = first; lse.labels != nullptr && r < first + count; ++r) {
      labels.emplace_back(LogitsRow<E>(kernels, logits, r, nullptr), n, lse.labels + r);
    }
    SmallMinusLse(kernels, logits, first, count, z, y + first * n, lse.hi + first, lse.lo + first,
                  factor + first);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t r = first + i;
      if (logits.HasMask() && !(std::isfinite(lse.hi[r]) && std::isfinite(factor[r]))) {
        LogitsRow<E>(kernels, logits, r, nullptr).FillMasked(y + r * n, E{});
      }
      if (labels.empty()) continue;
      labels[static_cast<std::size_t>(i)].Write(y + r * n, 1, lse.hi[r], lse.lo[r], factor[r]);
    }
  });
}

// Calls body(row number, p of the row as T) for small rows.
template <typename E, typename Body>
void ForSmallProbabilities(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                           const LabelledLse<E>& lse, const Body& body) {
  using T = ComputeOf<E>;
  const auto rows = [&](std::int64_t first, std::int64_t count, const T* z) {
    T p[kLogitsBlock], ones[kLogitsBlock];
    std::fill(ones, ones + count, T{1});
    SmallMinusLse<E, T>(kernels, logits, first, count, z, p, lse.hi + first, lse.lo + first, ones);
    for (std::int64_t i = 0; i < count; ++i) body(first + i, p + i * logits.n);
  };
  ForSmallRows(kernels, executor, logits, rows, SmallRowsAs::kCompute);
}

// <1, t> of a small row. Sums of so few floats in double need no compensation, and no vectors.
template <typename E>
double SmallSum(const KernelTable<E>& kernels, const E* t, std::int64_t n) {
  if constexpr (std::is_same_v<E, double>) {
    const CompensatedSum sum = kernels.sum(t, n);
    return sum.hi + sum.lo;
  } else {
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += Widen(t[i]);
    return sum;
  }
}

// t - p·<1, t> of row r. t and out point to the row's first element that takes part.
template <typename E>
void WriteLogSoftmaxVjp(const KernelTable<E>& kernels, const LogitsRow<E>& row, const Segments& segments,
                        const LabelledLse<E>& lse, std::int64_t r, const E* t, E* out) {
  using T = ComputeOf<E>;
  const CompensatedSum sum = segments.Reduce<CompensatedSum>(
      [&](std::int64_t at, std::int64_t size) { return kernels.sum(t + at, size); },
      [](CompensatedSum& a, const CompensatedSum& b) { a.Add(b); });
  const RowScale<T> scale = ScaleFromLse(kernels, lse.hi[r], lse.lo[r], sum.hi + sum.lo);
  segments.ForEach(Order::kForward, [&](std::int64_t at, std::int64_t size) {
    row.ForScaled(at, size, scale, [&](std::int64_t i, const T* p, std::int64_t count) {
      kernels.subtract(t + at + i, p, out + at + i, count);
    });
  });
}

}  // namespace

template <typename E>
void LogSumExpJvp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& lse,
                  const E* t, ComputeOf<E>* out) {
  using T = ComputeOf<E>;
  const std::int64_t n = logits.n;
  if (logits.rows * n == 0) {
    std::fill(out, out + logits.rows, T{0});
    return;
  }
  const KernelTable<E>& table = kernels.Of<E>();
  MergeDims(logits);
  if (logits.inner > 1) return LogSumExpJvpColumns(kernels, executor, logits, lse, t, out);
  if (HasSmallRows(logits)) {
    return ForSmallProbabilities(kernels, executor, logits, lse, [&](std::int64_t r, const T* p) {
      const E* const row_t = t + r * n;
      const bool fully_masked = logits.HasMask() && !std::isfinite(lse.hi[r]);
      const CompensatedSum dot = fully_masked ? CompensatedSum{} : table.logits_dot(p, row_t, n);
      out[r] = MinusLabel(dot, LabelOf(lse, r), row_t, 1, n);
    });
  }
  ForLogitsRows(kernels, executor, logits,
                [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
                  const RowScale<T> scale = ScaleFromLse(table, lse.hi[r], lse.lo[r], 1);
                  const E* const row_t = t + r * n;
                  const CompensatedSum dot = segments.Reduce<CompensatedSum>(
                      [&](std::int64_t at, std::int64_t size) {
                        CompensatedSum sum;
                        row.ForScaled(at, size, scale, [&](std::int64_t i, const T* p, std::int64_t count) {
                          sum.Add(table.logits_dot(p, row_t + row.begin() + at + i, count));
                        });
                        return sum;
                      },
                      [](CompensatedSum& a, const CompensatedSum& b) { a.Add(b); });
                  out[r] = MinusLabel(dot, LabelOf(lse, r), row_t, 1, n);
                });
}

template <typename E>
void LogSumExpVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& lse,
                  const ComputeOf<E>* factor, E* y) {
  using T = ComputeOf<E>;
  if (logits.rows * logits.n == 0) return;
  AdviseHugePagesFor(logits, y);
  MergeDims(logits);
  if (logits.inner > 1) return LogSumExpVjpColumns(kernels, executor, logits, lse, factor, y);
  if (HasSmallRows(logits)) return SmallLogSumExpVjp(kernels, executor, logits, lse, factor, y);
  const bool non_temporal = IsNonTemporal(logits);
  ForLogitsRows(kernels, executor, logits,
                [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
                  const T hi = lse.hi[r], lo = lse.lo[r];
                  const RowScale<T> scale = ScaleFromLse(kernels.Of<E>(), hi, lo, factor[r]);
                  E* const row_y = y + r * logits.n;
                  const Label<E> label(row, logits.n, LabelOf(lse, r));
                  segments.ForEach(Order::kForward, [&](std::int64_t at, std::int64_t size) {
                    row.Write(at, size, {}, row_y + row.begin() + at, scale, non_temporal);
                    if (non_temporal && row.size() > kSegment) FenceNonTemporalStores();
                  });
                  if (logits.HasMask()) {
                    if (std::isfinite(hi) && std::isfinite(factor[r])) {
                      row.FillOutside(row_y, E{});
                    } else {
                      row.FillMasked(row_y, E{});
                    }
                  }
                  label.Write(row_y, 1, hi, lo, factor[r]);
                });
}

template <typename E>
void LogSoftmaxVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const LabelledLse<E>& lse,
                   const E* t, E* out) {
  using T = ComputeOf<E>;
  const std::int64_t n = logits.n;
  if (logits.rows * n == 0) return;
  AdviseHugePagesFor(logits, out);
  const KernelTable<E>& table = kernels.Of<E>();
  MergeDims(logits);
  if (logits.inner > 1) return LogSoftmaxVjpColumns(kernels, executor, logits, lse, t, out);
  const auto fill_masked = [&](const LogitsRow<E>& row, std::int64_t r) {
    if (!logits.HasMask()) return;
    std::isfinite(lse.hi[r]) ? row.FillOutside(out + r * n, E{}) : row.FillMasked(out + r * n, E{});
  };
  if (HasSmallRows(logits)) {
    return ForSmallProbabilities(kernels, executor, logits, lse, [&](std::int64_t r, T* p) {
      const T factor = static_cast<T>(SmallSum(table, t + r * n, n));
      for (std::int64_t i = 0; i < n; ++i) p[i] *= factor;
      table.subtract(t + r * n, p, out + r * n, n);
      if (logits.HasMask()) fill_masked(LogitsRow<E>(kernels, logits, r, nullptr), r);
    });
  }
  ForLogitsRows(kernels, executor, logits,
                [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
                  const std::int64_t at = r * n + row.begin();
                  WriteLogSoftmaxVjp(table, row, segments, lse, r, t + at, out + at);
                  fill_masked(row, r);
                });
}

#define SOFTMAX2P_INSTANTIATE(E)                                                                    \
  template void LogSumExpJvp(const Kernels&, Executor&, Logits<E>, const LabelledLse<E>&, const E*, \
                             ComputeOf<E>*);                                                        \
  template void LogSumExpVjp(const Kernels&, Executor&, Logits<E>, const LabelledLse<E>&,           \
                             const ComputeOf<E>*, E*);                                              \
  template void LogSoftmaxVjp(const Kernels&, Executor&, Logits<E>, const LabelledLse<E>&, const E*, E*);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
