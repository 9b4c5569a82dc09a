#include "ffi/ops/logsumexp.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ffi/kernels/log.h"
#include "ffi/ops/logsumexp_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
namespace {

template <typename E>
LseTerms<ComputeOf<E>> LseOfRow(const KernelTable<E>& kernels, const LogitsRow<E>& row,
                                const Segments& segments) {
  using T = ComputeOf<E>;
  const RowTotal<T> total = TotalOf(row, segments, kernels.max_exponent, nullptr, false);
  const CompensatedSum& mantissa = total.sum.mantissa;
  if (std::isnan(mantissa.hi)) return {total.maximum, std::numeric_limits<T>::quiet_NaN(), 0};
  T s = 0, power = 1;
  if (!total.subtract) kernels.exponential(total.maximum, total.sum.exponent, &s, &power);
  const DoubleDouble<double> exact = LogOfSumOverLargest(mantissa.hi, mantissa.lo, power, s);
  const DoubleDouble<T> log = ToDoubleDouble<T>(exact.hi, exact.lo);
  return {total.maximum, log.hi, log.lo};
}

// As logsumexp has it: an infinite maximum is that itself, but for NaNs, which a maximum passes over.
template <typename E>
void WriteLse(const LseTerms<ComputeOf<E>>& total, const LogitsRow<E>& row, ComputeOf<E>* hi,
              ComputeOf<E>* lo) {
  using T = ComputeOf<E>;
  const DoubleDouble<double> sum = TwoSum<double>(total.maximum, total.log);
  *hi = static_cast<T>(sum.hi + (sum.lo + static_cast<double>(total.rest)));
  *lo = static_cast<T>(((sum.hi - static_cast<double>(*hi)) + sum.lo) + static_cast<double>(total.rest));
  if (std::isfinite(*hi)) return;
  *lo = 0;
  if (std::isnan(*hi) && std::isinf(total.maximum) && !row.HasNan()) *hi = total.maximum;
}

// Of rows of up to kMaxSmall elements, as ForSmallRows hands them over. Those that the guard wants to go
// another way do so.
template <typename E>
class SmallRowsLse {
  using T = ComputeOf<E>;

 public:
  SmallRowsLse(const Kernels& kernels, const Logits<E>& logits, std::int64_t first, std::int64_t count,
               const T* z)
      : kernels_(kernels), logits_(logits), first_(first), count_(count) {
    const int n = static_cast<int>(logits.n);
    if (z == nullptr) {
      kernels.Of<E>().small_lse(logits.x + first * n, count, n, maximum, log, rest);
    } else {
      kernels.Of<T>().small_lse(z, count, n, maximum, log, rest);
    }
    InThisThread alone;
    for (std::int64_t i = 0; i < count; ++i) {
      if (!std::isnan(log[i])) continue;
      const LogitsRow<E> row = Row(i);
      const LseTerms<T> total = LseOfRow(kernels.Of<E>(), row, Segments(alone, row.size()));
      maximum[i] = total.maximum;
      log[i] = total.log;
      rest[i] = total.rest;
    }
  }

  LogitsRow<E> Row(std::int64_t i) const { return LogitsRow<E>(kernels_, logits_, first_ + i, nullptr); }

  void Write(T* hi, T* lo) const {
    for (std::int64_t i = 0; i < count_; ++i) {
      const DoubleDouble<T> sum = TwoSum(maximum[i], log[i]);
      if (std::isfinite(sum.hi)) {
        hi[first_ + i] = sum.hi;
        lo[first_ + i] = sum.lo + rest[i];
      } else {
        WriteLse<E>({maximum[i], log[i], rest[i]}, Row(i), hi + first_ + i, lo + first_ + i);
      }
    }
  }

  T maximum[kLogitsBlock], log[kLogitsBlock], rest[kLogitsBlock];

 private:
  const Kernels& kernels_;
  const Logits<E>& logits_;
  std::int64_t first_;
  std::int64_t count_;
};

template <typename E>
void SmallLogSoftmax(const Kernels& kernels, Executor& executor, const Logits<E>& logits, E* y,
                     ComputeOf<E>* hi, ComputeOf<E>* lo, E masked) {
  ForSmallRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const ComputeOf<E>* z) {
    const SmallRowsLse<E> totals(kernels, logits, first, count, z);
    totals.Write(hi, lo);
    SmallLess<E>(kernels, logits, first, count, z, y + first * logits.n, totals.maximum, totals.log, nullptr);
    for (std::int64_t i = 0; logits.Masked() && i < count; ++i) {
      if (!std::isnan(totals.log[i])) continue;
      totals.Row(i).FillMasked(y + (first + i) * logits.n, masked);
    }
  });
}

}  // namespace

template <typename E>
void LogSumExp(const Kernels& kernels, Executor& executor, Logits<E> logits, ComputeOf<E>* hi,
               ComputeOf<E>* lo) {
  using T = ComputeOf<E>;
  Simplify(logits);
  if (logits.inner > 1 && logits.n > 0) {
    const auto some = [&](const Logits<E>& rows, E*, Executor& own) {
      LogSumExp(kernels, own, rows, hi + rows.first_row, lo + rows.first_row);
    };
    return ForColumnLogits<E>(kernels, executor, logits, nullptr, some);
  }
  if (IsSmall(logits)) {
    ForSmallRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const T* z) {
      SmallRowsLse<E>(kernels, logits, first, count, z).Write(hi, lo);
    });
    return;
  }
  ForLogits(kernels, executor, logits,
            [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
              WriteLse(LseOfRow(kernels.Of<E>(), row, segments), row, hi + r, lo + r);
            });
}

template <typename E>
void LogSoftmax(const Kernels& kernels, Executor& executor, Logits<E> logits, E* y, ComputeOf<E>* hi,
                ComputeOf<E>* lo) {
  using T = ComputeOf<E>;
  if (logits.rows * logits.n == 0) return LogSumExp(kernels, executor, std::move(logits), hi, lo);
  Simplify(logits);
  AdviseHugePagesFor(logits, y);
  if (logits.inner > 1) {
    const auto some = [&](const Logits<E>& rows, E* y_rows, Executor& own) {
      LogSoftmax(kernels, own, rows, y_rows, hi + rows.first_row, lo + rows.first_row);
    };
    return ForColumnLogits(kernels, executor, logits, y, some);
  }
  const bool non_temporal = IsFar(logits);
  const E masked = FromDouble<E>(-std::numeric_limits<double>::infinity());
  if (IsSmall(logits)) return SmallLogSoftmax(kernels, executor, logits, y, hi, lo, masked);
  ForLogits(kernels, executor, logits,
            [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
              const LseTerms<T> total = LseOfRow(kernels.Of<E>(), row, segments);
              WriteLse(total, row, hi + r, lo + r);
              E* const results = y + r * logits.n + row.begin();
              segments.ForEach(non_temporal ? Order::kForward : Order::kBackward,
                               [&](std::int64_t at, std::int64_t size) {
                                 row.WriteLog(at, size, results + at, total, non_temporal);
                                 if (non_temporal) FenceNonTemporalStores();
                               });
              if (!logits.Masked()) return;
              if (std::isnan(total.log)) {
                row.FillMasked(y + r * logits.n, masked);
              } else {
                row.FillOutside(y + r * logits.n, masked);
              }
            });
}

#define SOFTMAX2P_INSTANTIATE(E)                                                               \
  template void LogSumExp(const Kernels&, Executor&, Logits<E>, ComputeOf<E>*, ComputeOf<E>*); \
  template void LogSoftmax(const Kernels&, Executor&, Logits<E>, E*, ComputeOf<E>*, ComputeOf<E>*)
SOFTMAX2P_INSTANTIATE(float);
SOFTMAX2P_INSTANTIATE(double);
SOFTMAX2P_INSTANTIATE(BFloat16);
SOFTMAX2P_INSTANTIATE(Float16);
#undef SOFTMAX2P_INSTANTIATE

}  // namespace jax_softmax2p
