#include "ffi/runtime/log_sum.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "ffi/kernels/log.h"
#include "ffi/runtime/memory.h"
#include "ffi/runtime/row_work.h"

namespace jax_softmax2p {
namespace {

template <typename T>
struct Pair {
  T high;
  T low;
};

// The log of a row's sum, less the maximum where that was subtracted.
template <typename T>
Pair<T> LogOfTotal(const RowTotal<T>& total) {
  Pair<T> log{};
  const DoubleSum& mantissa = total.sum.mantissa;
  LogOfSum(mantissa.high, mantissa.low, total.sum.exponent, log.high, log.low);
  // It knows no NaN.
  if (std::isnan(mantissa.high)) log.high = std::numeric_limits<T>::quiet_NaN();
  return log;
}

// The log of a row's sum, where the maximum is not infinite.
template <typename T>
Pair<T> WithMaximum(const RowTotal<T>& total) {
  const Pair<T> log = LogOfTotal(total);
  if (!total.subtract) return log;
  const double a = total.maximum, b = static_cast<double>(log.high) + static_cast<double>(log.low);
  const double sum = a + b, b_part = sum - a, error = (a - (sum - b_part)) + (b - b_part);
  const T high = static_cast<T>(sum);
  return {high, static_cast<T>((sum - static_cast<double>(high)) + error)};
}

// The log of a row's sum as logsumexp has it: an infinite maximum is that itself, but for NaNs, which a
// maximum passes over.
template <typename E>
Pair<ComputeOf<E>> LogSumOf(const LogitsRow<E>& row, const Segments& segments, int max_exponent) {
  const RowTotal<ComputeOf<E>> total = TotalOf(row, segments, max_exponent, nullptr, false);
  Pair<ComputeOf<E>> log = WithMaximum(total);
  if (total.subtract && std::isinf(total.maximum) && !row.HasNan()) log.high = total.maximum;
  if (!std::isfinite(log.high)) log.low = 0;
  return log;
}

template <typename T>
T* Allocate(std::int64_t count) {
  return new (std::nothrow) T[count];
}

// Calls body(row, segments) for every row, on as many threads as it is worth.
template <typename E, typename Body>
void ForLogits(const Kernels& kernels, Executor& executor, const Logits<E>& logits, const Body& body) {
  using T = ComputeOf<E>;
  ForRows(executor, logits.rows, std::max<std::int64_t>(1, logits.n),
          [&](std::int64_t first, std::int64_t end, Executor& for_segments) {
            const bool whole = !logits.Plain() && logits.n <= kFusedBlock;
            const std::unique_ptr<T[]> buffer(whole ? Allocate<T>(kFusedBlock) : nullptr);
            for (std::int64_t r = first; r < end; ++r) {
              const LogitsRow<E> row(kernels, logits, r, buffer.get());
              body(r, row, Segments(for_segments, row.size()));
            }
          });
}

// Whether results leave the caches between one call and the next.
template <typename E>
bool IsFar(const Logits<E>& logits) {
  return 2 * logits.rows * logits.n * static_cast<std::int64_t>(sizeof(E)) > LastLevelCacheBytes();
}

template <typename E>
void AdviseHugePagesFor(const Logits<E>& logits, E* y) {
  AdviseHugePages(y, static_cast<std::size_t>(logits.rows * logits.n) * sizeof(E));
}

template <typename E>
E FromDouble(double value);
template <>
float FromDouble<float>(double value) {
  return static_cast<float>(value);
}
template <>
double FromDouble<double>(double value) {
  return value;
}
template <>
BFloat16 FromDouble<BFloat16>(double value) {
  BFloat16 half;
  portable::Narrow(static_cast<float>(value), half);
  return half;
}
template <>
Float16 FromDouble<Float16>(double value) {
  Float16 half;
  portable::Narrow(static_cast<float>(value), half);
  return half;
}

template <typename E>
bool IsShort(const Logits<E>& logits) {
  return logits.n > 0 && logits.n <= kShort;
}

// What ForShortRows hands over, with the rows that need it sent the guard's way.
template <typename E>
void ShortLogSums(const Kernels& kernels, const Logits<E>& logits, std::int64_t first, std::int64_t count,
                  const ComputeOf<E>* z, ComputeOf<E>* high, ComputeOf<E>* low) {
  using T = ComputeOf<E>;
  const int n = static_cast<int>(logits.n);
  if (z == nullptr) {
    kernels.Of<E>().short_log_sums(logits.x + first * n, count, n, high, low);
  } else {
    kernels.Of<T>().short_log_sums(z, count, n, high, low);
  }
  InThisThread alone;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!std::isnan(high[i])) continue;
    const LogitsRow<E> row(kernels, logits, first + i, nullptr);
    const Pair<T> log = LogSumOf(row, Segments(alone, row.size()), kernels.Of<E>().max_exponent);
    high[i] = log.high;
    low[i] = log.low;
  }
}

template <typename E>
void ShortLess(const Kernels& kernels, const Logits<E>& logits, std::int64_t first, std::int64_t count,
               const ComputeOf<E>* z, E* y, const ComputeOf<E>* high, const ComputeOf<E>* low,
               const ComputeOf<E>* factor) {
  const KernelTable<E>& own = kernels.Of<E>();
  const int n = static_cast<int>(logits.n);
  if (z == nullptr) {
    own.short_less(logits.x + first * n, y + first * n, count, n, high, low, factor);
  } else {
    own.fused_short_less(z, y + first * n, count, n, high, low, factor);
  }
}

template <typename E>
void ShortLogSoftmax(const Kernels& kernels, Executor& executor, const Logits<E>& logits, E* y, E masked) {
  using T = ComputeOf<E>;
  ForShortRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const T* z) {
    T high[kFusedBlock], low[kFusedBlock];
    ShortLogSums(kernels, logits, first, count, z, high, low);
    for (std::int64_t i = 0; i < count; ++i) {
      if (std::isinf(high[i])) high[i] = std::numeric_limits<T>::quiet_NaN();
    }
    ShortLess<E>(kernels, logits, first, count, z, y, high, low, nullptr);
    for (std::int64_t i = 0; logits.Masked() && i < count; ++i) {
      if (!std::isnan(high[i])) continue;
      LogitsRow<E>(kernels, logits, first + i, nullptr).FillMasked(y + (first + i) * logits.n, masked);
    }
  });
}

// Where labels lie, and their z, before y, which may be x, is written.
template <typename E>
class Label {
  using T = ComputeOf<E>;

 public:
  Label(const LogitsRow<E>& row, std::int64_t n, const std::int32_t* label) {
    if (label == nullptr) return;
    place_ = *label < 0 ? *label + n : *label;
    if (place_ >= n) place_ = -1;
    const std::int64_t of_some = place_ - row.begin();
    takes_part_ = place_ >= 0 && of_some >= 0 && of_some < row.size();
    if (takes_part_) row.Fuse(of_some, 1, &z_);
  }

  // y = factor·(e^(z - high - low) - 1), where y is factor·e^(z - high - low). Where e^... is near 1, the
  // difference cannot be had from its rounding.
  void Write(E* row_y, T high, T low, T factor) const {
    if (place_ < 0) return;
    E& y = row_y[place_];
    const double less = (static_cast<double>(z_) - static_cast<double>(high)) - static_cast<double>(low);
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
void ShortLogSumVjp(const Kernels& kernels, Executor& executor, const Logits<E>& logits,
                    const ComputeOf<E>* high, const ComputeOf<E>* low, const ComputeOf<E>* factor,
                    const std::int32_t* labels, E* y) {
  using T = ComputeOf<E>;
  const std::int64_t n = logits.n;
  ForShortRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const T* z) {
    std::vector<Label<E>> of_rows;
    if (labels != nullptr) of_rows.reserve(static_cast<std::size_t>(count));
    for (std::int64_t r = first; labels != nullptr && r < first + count; ++r) {
      of_rows.emplace_back(LogitsRow<E>(kernels, logits, r, nullptr), n, labels + r);
    }
    ShortLess(kernels, logits, first, count, z, y, high + first, low + first, factor + first);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t r = first + i;
      if (logits.Masked() && !(std::isfinite(high[r]) && std::isfinite(factor[r]))) {
        LogitsRow<E>(kernels, logits, r, nullptr).FillMasked(y + r * n, E{});
      }
      if (labels != nullptr)
        of_rows[static_cast<std::size_t>(i)].Write(y + r * n, high[r], low[r], factor[r]);
    }
  });
}

}  // namespace

template <typename E>
void LogSum(const Kernels& kernels, Executor& executor, Logits<E> logits, ComputeOf<E>* high,
            ComputeOf<E>* low) {
  using T = ComputeOf<E>;
  Simplify(logits);
  if (IsShort(logits)) {
    ForShortRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const T* z) {
      ShortLogSums(kernels, logits, first, count, z, high + first, low + first);
    });
    return;
  }
  const int max_exponent = kernels.Of<E>().max_exponent;
  ForLogits(kernels, executor, logits,
            [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
              const Pair<T> log = LogSumOf(row, segments, max_exponent);
              high[r] = log.high;
              low[r] = log.low;
            });
}

template <typename E>
void LogSoftmax(const Kernels& kernels, Executor& executor, Logits<E> logits, E* y) {
  using T = ComputeOf<E>;
  if (logits.rows * logits.n == 0) return;
  Simplify(logits);
  AdviseHugePagesFor(logits, y);
  const int max_exponent = kernels.Of<E>().max_exponent;
  const bool stream = IsFar(logits);
  const E masked = FromDouble<E>(-std::numeric_limits<double>::infinity());
  if (IsShort(logits)) return ShortLogSoftmax(kernels, executor, logits, y, masked);
  ForLogits(kernels, executor, logits,
            [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
              const RowTotal<T> total = TotalOf(row, segments, max_exponent, nullptr, false);
              const Pair<T> log = LogOfTotal(total);
              const RowLogSum<T> less{total.subtract && !std::isinf(total.maximum) ? total.maximum : 0,
                                      log.high, log.low};
              E* const results = y + r * logits.n + row.begin();
              segments.ForEach(stream ? Order::kForward : Order::kBackward,
                               [&](std::int64_t at, std::int64_t size) {
                                 row.WriteLog(at, size, results + at, less, stream);
                                 if (stream) FinishStreaming();
                               });
              if (!logits.Masked()) return;
              if (std::isnan(log.high)) {
                row.FillMasked(y + r * logits.n, masked);
              } else {
                row.FillOutside(y + r * logits.n, masked);
              }
            });
}

template <typename E>
void LogSumVjp(const Kernels& kernels, Executor& executor, Logits<E> logits, const ComputeOf<E>* high,
               const ComputeOf<E>* low, const ComputeOf<E>* factor, const std::int32_t* labels, E* y) {
  using T = ComputeOf<E>;
  if (logits.rows * logits.n == 0) return;
  Simplify(logits);
  AdviseHugePagesFor(logits, y);
  if (IsShort(logits)) return ShortLogSumVjp(kernels, executor, logits, high, low, factor, labels, y);
  const bool stream = IsFar(logits);
  ForLogits(kernels, executor, logits,
            [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
              RowScale<T> scale{};
              scale.high = factor[r];
              scale.subtract = true;
              scale.maximum = high[r];
              scale.rest = low[r];
              E* const row_y = y + r * logits.n;
              const Label<E> label(row, logits.n, labels == nullptr ? nullptr : labels + r);
              segments.ForEach(Order::kForward, [&](std::int64_t at, std::int64_t size) {
                row.Write(at, size, nullptr, row_y + row.begin() + at, scale, stream);
                if (stream) FinishStreaming();
              });
              if (logits.Masked()) {
                if (std::isfinite(scale.maximum) && std::isfinite(scale.high)) {
                  row.FillOutside(row_y, E{});
                } else {
                  row.FillMasked(row_y, E{});
                }
              }
              label.Write(row_y, high[r], low[r], factor[r]);
            });
}

#define SOFTMAX2P_INSTANTIATE(E)                                                                          \
  template void LogSum(const Kernels&, Executor&, Logits<E>, ComputeOf<E>*, ComputeOf<E>*);               \
  template void LogSoftmax(const Kernels&, Executor&, Logits<E>, E*);                                     \
  template void LogSumVjp(const Kernels&, Executor&, Logits<E>, const ComputeOf<E>*, const ComputeOf<E>*, \
                          const ComputeOf<E>*, const std::int32_t*, E*)
SOFTMAX2P_INSTANTIATE(float);
SOFTMAX2P_INSTANTIATE(double);
SOFTMAX2P_INSTANTIATE(BFloat16);
SOFTMAX2P_INSTANTIATE(Float16);
#undef SOFTMAX2P_INSTANTIATE

}  // namespace jax_softmax2p
