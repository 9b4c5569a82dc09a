#include "ffi/runtime/log_sum.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "ffi/runtime/memory.h"
#include "ffi/runtime/row_work.h"

namespace jax_softmax2p {
namespace {

template <typename T>
struct Pair {
  T high;
  T low;
};

// a + b, exactly (Knuth), if nothing overflows.
template <typename T>
Pair<T> ExactSum(double a, double b) {
  const double sum = a + b, b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  const T high = static_cast<T>(sum);
  return {high, static_cast<T>((sum - static_cast<double>(high)) + error)};
}

// log(mantissa·2^exponent). kLn2High has 32 digits: its product with an exponent is exact.
struct LogOf {
  explicit LogOf(const ExtendedSum& sum)
      : high(sum.exponent * kLn2High),
        low(std::log(sum.mantissa.high) +
            (sum.mantissa.low / sum.mantissa.high + sum.exponent * kLn2Low)) {}
  double high, low;

  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
};

// The log of a row's sum, less the maximum where that was subtracted.
template <typename T>
Pair<T> LogOfTotal(const RowTotal<T>& total) {
  const LogOf log(total.sum);
  return ExactSum<T>(log.high, log.low);
}

template <typename T>
Pair<T> WithMaximum(const RowTotal<T>& total) {
  const LogOf log(total.sum);
  if (!total.subtract) return ExactSum<T>(log.high, log.low);
  return ExactSum<T>(static_cast<double>(total.maximum), log.high + log.low);
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

}  // namespace

template <typename E>
void LogSum(const Kernels& kernels, Executor& executor, Logits<E> logits, ComputeOf<E>* high,
            ComputeOf<E>* low) {
  using T = ComputeOf<E>;
  Simplify(logits);
  const int max_exponent = kernels.Of<E>().max_exponent;
  ForLogits(kernels, executor, logits, [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
    const RowTotal<T> total = TotalOf(row, segments, max_exponent, nullptr, false);
    Pair<T> log = WithMaximum(total);
    // An infinite maximum is the log itself, but for NaNs, which a maximum passes over.
    if (total.subtract && std::isinf(total.maximum) && !row.HasNan()) log = {total.maximum, 0};
    if (!std::isfinite(log.high)) log.low = 0;
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
  ForLogits(kernels, executor, logits, [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
    const RowTotal<T> total = TotalOf(row, segments, max_exponent, nullptr, false);
    const Pair<T> log = LogOfTotal(total);
    const RowLogSum<T> less{total.subtract && !std::isinf(total.maximum) ? total.maximum : 0, log.high,
                            log.low};
    E* const results = y + r * logits.n + row.begin();
    segments.ForEach(stream ? Order::kForward : Order::kBackward, [&](std::int64_t at, std::int64_t size) {
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
  const bool stream = IsFar(logits);
  ForLogits(kernels, executor, logits, [&](std::int64_t r, const LogitsRow<E>& row, const Segments& segments) {
    RowScale<T> scale{};
    scale.high = factor[r];
    scale.subtract = true;
    scale.maximum = high[r];
    scale.rest = low[r];
    E* const row_y = y + r * logits.n;
    // Before y, which may be x, is written.
    T label_z = 0;
    std::int64_t label = labels == nullptr ? -1 : labels[r];
    if (labels != nullptr && label < 0) label += logits.n;
    const std::int64_t place = label - row.begin();
    const bool labelled = place >= 0 && place < row.size() && label < logits.n;
    if (labelled) row.Fuse(place, 1, &label_z);
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
    if (labels == nullptr || label < 0 || label >= logits.n) return;
    // 1 where it is masked: the label's z counts all the same.
    const double of_label = labelled ? std::expm1((static_cast<double>(label_z) - static_cast<double>(high[r])) -
                                                  static_cast<double>(low[r]))
                                     : -1;
    row_y[label] = FromDouble<E>(static_cast<double>(factor[r]) * of_label);
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
