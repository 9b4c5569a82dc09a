#include <algorithm>
#include <cmath>

#include "ffi/ops/label.h"
#include "ffi/ops/logsumexp.h"
#include "ffi/ops/parallel_logits_rows.h"
#include "ffi/ops/small_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
namespace {

// factor·e^-lse, by which the kernels multiply e^z, which they have KernelTable::factor times as large. That
// avoids rounding z - hi, which would cost about |z - hi| ULP. Beyond the kernels' exact range, and where the
// lse is not finite, hi is subtracted from z: there z - hi is exact wherever e^(z - hi) does not vanish.
template <typename E, typename T = ComputeOf<E>>
RowScale<T> ScaleFromLse(const KernelTable<E>& kernels, T hi, T lo, double factor) {
  constexpr double kLog2E = 0x1.71547652b82fep0;
  constexpr double kLn2Hi = 0x1.62e42fefa39efp-1, kLn2Lo = 0x1.abc9e3b39803fp-56;
  RowScale<T> scale{};
  factor /= kernels.factor;
  const double exponent = 2 * std::floor(static_cast<double>(hi) * (kLog2E / 2));
  if (std::abs(exponent) < kernels.max_exponent - 2) {
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
  ForSmallRows(
      kernels, executor, logits,
      [&](std::int64_t first, std::int64_t count, const T* z) {
        std::int32_t labels[kLogitsBlock];
        for (std::int64_t i = 0; lse.labels != nullptr && i < count; ++i) {
          labels[i] = static_cast<std::int32_t>(LabelIndex(lse.labels[first + i], n));
        }
        SmallMinusLse(kernels, logits, first, count, z, y + first * n, lse.hi + first, lse.lo + first,
                      factor + first, lse.labels == nullptr ? nullptr : labels);
        for (std::int64_t i = 0; logits.HasMask() && i < count; ++i) {
          const std::int64_t r = first + i;
          if (std::isfinite(lse.hi[r]) && std::isfinite(factor[r])) continue;
          // What is masked, 0 but in such a row, and its label.
          const LogitsRow<E> row(kernels, logits, r, nullptr);
          const std::int64_t label = lse.labels == nullptr ? -1 : labels[i];
          const bool has_logit = label >= 0 && !row.IsMasked(label);
          const E at_label = has_logit ? y[r * n + label] : FromDouble<E>(-static_cast<double>(factor[r]));
          row.FillMasked(y + r * n, E{});
          if (label >= 0) y[r * n + label] = at_label;
        }
      },
      SmallRowsAs::kElements, kMinParallelGradients);
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
  ForSmallRows(kernels, executor, logits, rows, SmallRowsAs::kCompute, kMinParallelGradients);
}

// Whether row r has no element: its p are NaN, and count as 0.
template <typename E>
bool IsFullyMasked(const Kernels& kernels, const Logits<E>& logits, const LabelledLse<E>& lse,
                   std::int64_t r) {
  if (!logits.HasMask() || std::isfinite(lse.hi[r])) return false;
  return LogitsRow<E>(kernels, logits, r, nullptr).IsFullyMasked();
}

// factor·p, for a factor that no scale can have. In 16 bits p might be 0, and its product with infinity NaN.
template <typename E, typename T = ComputeOf<E>>
void WriteProducts(const LogitsRow<E>& row, std::int64_t at, std::int64_t size, const RowScale<T>& scale,
                   T factor, E* y) {
  row.ForScaled(at, size, scale, [&](std::int64_t i, const T* p, std::int64_t count) {
    for (std::int64_t k = 0; k < count; ++k) Narrow(p[k] * factor, y[i + k]);
  });
}

// t - p·<1, t> of row r. t and out point to the row's first element that takes part. Where p is near 1 it is
// (t - <1, t>) - (p - 1)·<1, t>, which loses no digits.
template <typename E>
void WriteLogSoftmaxVjp(const Kernels& kernels, const LogitsRow<E>& row, const Segments& segments,
                        const LabelledLse<E>& lse, std::int64_t r, const E* t, E* out) {
  using T = ComputeOf<E>;
  const KernelTable<E>& table = kernels.Of<E>();
  const T hi = lse.hi[r], lo = lse.lo[r];
  const CompensatedSum sum = segments.Reduce<CompensatedSum>(
      [&](std::int64_t at, std::int64_t size) { return table.sum(t + at, size); },
      [](CompensatedSum& a, const CompensatedSum& b) { a.Add(b); });
  // NaN where the lse is not finite: nothing of such a row has a derivative.
  const double total = (sum.hi + sum.FiniteLo()) + static_cast<double>(hi - hi);
  const RowScale<T> scale = ScaleFromLse(table, hi, lo, 1);
  const auto near_one = [&](std::int64_t at, double t_at) {
    T z;
    row.ApplyOperands(at, 1, &z);
    return FromDouble<E>(((t_at - sum.hi) - sum.FiniteLo()) - std::expm1(LogProbability(z, hi, lo)) * total);
  };
  segments.ForEach(Order::kForward, [&](std::int64_t at, std::int64_t size) {
    row.ForScaled(at, size, scale, [&](std::int64_t i, const T* p, std::int64_t count) {
      const T largest = kernels.Of<T>().row_max(p, count);
      // At most one element of a row has more than half of its sum.
      const std::int64_t found = largest > T{0.5} ? std::find(p, p + count, largest) - p : -1;
      const double t_found = found < 0 ? 0 : Widen(t[at + i + found]);
      table.subtract(t + at + i, p, static_cast<T>(total), out + at + i, count);
      if (found >= 0) out[at + i + found] = near_one(at + i + found, t_found);
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
      const bool fully_masked = IsFullyMasked(kernels, logits, lse, r);
      const CompensatedSum dot = fully_masked ? CompensatedSum{} : table.logits_dot(p, row_t, n);
      out[r] = MinusLabel(dot, LabelOf(lse, r), row_t, 1, n);
    });
  }
  ForLogitsRows(kernels, executor, logits,
                [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
                  const E* const row_t = t + r * n;
                  if (IsFullyMasked(kernels, logits, lse, r)) {
                    out[r] = MinusLabel(CompensatedSum{}, LabelOf(lse, r), row_t, 1, n);
                    return;
                  }
                  const RowScale<T> scale = ScaleFromLse(table, lse.hi[r], lse.lo[r], 1);
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
                  const bool scales = std::abs(factor[r]) <= kLargestFactor<T>;
                  const RowScale<T> scale = ScaleFromLse(kernels.Of<E>(), hi, lo, scales ? factor[r] : 1);
                  E* const row_y = y + r * logits.n;
                  const Label<E> label(row, logits.n, LabelOf(lse, r));
                  segments.ForEach(Order::kForward, [&](std::int64_t at, std::int64_t size) {
                    E* const to = row_y + row.begin() + at;
                    if (!scales) return WriteProducts(row, at, size, scale, factor[r], to);
                    row.Write(at, size, {}, to, scale, non_temporal);
                    if (non_temporal && row.size() > kSegment) FenceNonTemporalStores();
                  });
                  if (logits.HasMask()) {
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
    return ForSmallRows(
        kernels, executor, logits,
        [&](std::int64_t first, std::int64_t count, const T* z) {
          const auto subtract = [&](auto kernel, const auto* from) {
            kernel(from, t + first * n, out + first * n, count, static_cast<int>(n), lse.hi + first,
                   lse.lo + first);
          };
          if (z != nullptr) {
            subtract(table.logits_small_subtract_minus_lse, z);
          } else {
            subtract(table.small_subtract_minus_lse, logits.x + first * n);
          }
          for (std::int64_t r = first; logits.HasMask() && r < first + count; ++r) {
            fill_masked(LogitsRow<E>(kernels, logits, r, nullptr), r);
          }
        },
        SmallRowsAs::kElements, kMinParallelGradients);
  }
  ForLogitsRows(kernels, executor, logits,
                [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
                  const std::int64_t at = r * n + row.begin();
                  WriteLogSoftmaxVjp(kernels, row, segments, lse, r, t + at, out + at);
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
