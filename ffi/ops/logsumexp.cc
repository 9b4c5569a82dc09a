#include "ffi/ops/logsumexp.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "ffi/base/bit_cast.h"
#include "ffi/kernels/log.h"
#include "ffi/ops/guarded_sum.h"
#include "ffi/ops/parallel_logits_rows.h"
#include "ffi/ops/small_rows.h"

namespace jax_softmax2p {
namespace {

// log(sum) is taken over the row's largest term, log1p(the sum of the others), so that it keeps its digits
// where one element carries nearly all of the sum.
template <typename E>
LseTerms<ComputeOf<E>> LseOfRow(const KernelTable<E>& kernels, const LogitsRow<E>& row,
                                const Segments& segments) {
  using T = ComputeOf<E>;
  const SplitSum<T> sum = GuardedSplitSum<E>(row, segments, kernels.max_exponent);
  if (std::isnan(sum.others.mantissa.hi)) return {sum.maximum, std::numeric_limits<T>::quiet_NaN(), 0};
  const double others = sum.others.mantissa.hi * PowerOfTwo(sum.others.exponent - sum.exponent);
  double exact_lo;
  const double exact_hi = LogOfSum<T>(others, sum.largest, exact_lo);
  const DoubleDouble<T> log = ToDoubleDouble<T>(exact_hi, exact_lo);
  return {sum.maximum, log.hi, log.lo};
}

// Adds the terms up. As in jax.nn's logsumexp, an infinite maximum is the lse, unless the row has a NaN,
// which the maximum passes over.
template <typename E>
void WriteLse(const LseTerms<ComputeOf<E>>& terms, const LogitsRow<E>& row, Lse<ComputeOf<E>> lse,
              std::int64_t r) {
  using T = ComputeOf<E>;
  T &hi = lse.hi[r], &lo = lse.lo[r];
  double error;
  const double sum = TwoSum<double>(terms.maximum, terms.log, error);
  hi = static_cast<T>(sum + (error + static_cast<double>(terms.rest)));
  lo = static_cast<T>(((sum - static_cast<double>(hi)) + error) + static_cast<double>(terms.rest));
  if (std::isfinite(hi)) return;
  lo = 0;
  if (std::isnan(hi) && std::isinf(terms.maximum) && !row.HasNan()) hi = terms.maximum;
}

// Whether any of p[n] is not finite. Without a branch, so that compilers vectorise it.
template <typename T>
bool HasNonFinite(const T* p, std::int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == sizeof(float), std::uint32_t, std::uint64_t>;
  const Bits infinity = BitCast<Bits>(std::numeric_limits<T>::infinity());
  Bits found = 0;
  for (std::int64_t i = 0; i < n; ++i) found |= (BitCast<Bits>(p[i]) & infinity) == infinity ? 1 : 0;
  return found != 0;
}

// The lses of a few small rows, as ForSmallRows hands them over.
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
    // NaN is also the kernel's sign that a row needs the guard's third pass.
    if (!HasNonFinite(log, count)) return;
    InlineExecutor this_thread;
    for (std::int64_t i = 0; i < count; ++i) {
      if (!std::isnan(log[i])) continue;
      const LogitsRow<E> row = Row(i);
      const LseTerms<T> terms = LseOfRow(kernels.Of<E>(), row, Segments(this_thread, row.size()));
      maximum[i] = terms.maximum;
      log[i] = terms.log;
      rest[i] = terms.rest;
    }
  }

  LogitsRow<E> Row(std::int64_t i) const { return LogitsRow<E>(kernels_, logits_, first_ + i, nullptr); }

  void Write(Lse<T> lse) const {
    T* const hi = lse.hi + first_;
    T* const lo = lse.lo + first_;
    for (std::int64_t i = 0; i < count_; ++i) {
      T error;
      hi[i] = TwoSum(maximum[i], log[i], error);
      lo[i] = error + rest[i];
    }
    if (!HasNonFinite(hi, count_)) return;
    for (std::int64_t i = 0; i < count_; ++i) {
      if (!std::isfinite(hi[i])) WriteLse<E>({maximum[i], log[i], rest[i]}, Row(i), lse, first_ + i);
    }
  }

  // LseTerms of row first + i.
  T maximum[kLogitsBlock], log[kLogitsBlock], rest[kLogitsBlock];

 private:
  const Kernels& kernels_;
  const Logits<E>& logits_;
  std::int64_t first_;
  std::int64_t count_;
};

template <typename E>
void SmallLogSoftmax(const Kernels& kernels, Executor& executor, const Logits<E>& logits, E* y,
                     Lse<ComputeOf<E>> lse, E masked) {
  ForSmallRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const ComputeOf<E>* z) {
    const SmallRowsLse<E> rows(kernels, logits, first, count, z);
    rows.Write(lse);
    SmallMinusLse<E>(kernels, logits, first, count, z, y + first * logits.n, rows.maximum, rows.log, nullptr);
    for (std::int64_t i = 0; logits.HasMask() && i < count; ++i) {
      if (!std::isnan(rows.log[i])) continue;
      rows.Row(i).FillMasked(y + (first + i) * logits.n, masked);
    }
  });
}

}  // namespace

template <typename E>
void LogSumExp(const Kernels& kernels, Executor& executor, Logits<E> logits, Lse<ComputeOf<E>> lse) {
  using T = ComputeOf<E>;
  MergeDims(logits);
  if (logits.inner > 1 && logits.rows * logits.n > 0) {
    return LogSumExpColumns<E>(kernels, executor, logits, nullptr, lse);
  }
  if (HasSmallRows(logits)) {
    return ForSmallRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const T* z) {
      SmallRowsLse<E>(kernels, logits, first, count, z).Write(lse);
    });
  }
  ForLogitsRows(kernels, executor, logits,
                [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
                  WriteLse(LseOfRow(kernels.Of<E>(), row, segments), row, lse, r);
                });
}

template <typename E>
void LogSoftmax(const Kernels& kernels, Executor& executor, Logits<E> logits, E* y, Lse<ComputeOf<E>> lse) {
  using T = ComputeOf<E>;
  if (logits.rows * logits.n == 0) return LogSumExp(kernels, executor, std::move(logits), lse);
  AdviseHugePagesFor(logits, y);
  MergeDims(logits);
  if (logits.inner > 1) return LogSumExpColumns(kernels, executor, logits, y, lse);
  const bool non_temporal = IsNonTemporal(logits);
  const E masked = FromDouble<E>(-std::numeric_limits<double>::infinity());
  if (HasSmallRows(logits)) return SmallLogSoftmax(kernels, executor, logits, y, lse, masked);
  ForLogitsRows(kernels, executor, logits,
                [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
                  const LseTerms<T> terms = LseOfRow(kernels.Of<E>(), row, segments);
                  WriteLse(terms, row, lse, r);
                  E* const results = y + r * logits.n + row.begin();
                  segments.ForEach(non_temporal ? Order::kForward : Order::kBackward,
                                   [&](std::int64_t at, std::int64_t size) {
                                     row.WriteLog(at, size, results + at, terms, non_temporal);
                                     if (non_temporal && row.size() > kSegment) FenceNonTemporalStores();
                                   });
                  if (!logits.HasMask()) return;
                  if (std::isnan(terms.log)) {
                    row.FillMasked(y + r * logits.n, masked);
                  } else {
                    row.FillOutside(y + r * logits.n, masked);
                  }
                });
}

#define SOFTMAX2P_INSTANTIATE(E)                                                    \
  template void LogSumExp(const Kernels&, Executor&, Logits<E>, Lse<ComputeOf<E>>); \
  template void LogSoftmax(const Kernels&, Executor&, Logits<E>, E*, Lse<ComputeOf<E>>);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
