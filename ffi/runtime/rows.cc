#include "ffi/runtime/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "ffi/runtime/float_mode.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
namespace {

// A row's sum is made of its segments' sums, in order, on however many threads: so the bits of a row depend
// on its length alone. 128 KiB of float32, some 15 µs: worth a thread, and at home in its L2 cache.
constexpr std::int64_t kSegment = 1 << 15;
// Rows are handed out this many elements at a time, at least.
constexpr std::int64_t kRowsChunk = 1 << 14;
// Below this many elements, some 15 µs at half a nanosecond each, the calling thread stays alone.
constexpr std::int64_t kWorthSharing = 1 << 15;
// With this many rows a thread, whole rows keep every thread busy, and each stays in its thread's cache.
constexpr std::int64_t kManyRows = 8;

// Up to so many bytes a row stays in the second-level cache between the passes. Shorter rows gain nothing
// from stores past the caches, and lose much where two rows meet in a line: 1.46 against 0.69 ns an element
// for 49,152 rows of 512 (float32, Zen 4 with AVX2, one thread). Longer ones, in arrays beyond the
// last-level cache, take 0.73 by streaming and recomputing against 0.81 by reloading, at 2^24.
constexpr std::int64_t kLongestReloadBytes = 1 << 20;

constexpr std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

class InThisThread : public Executor {
 public:
  int Helpers() const override { return 0; }
  void Schedule(std::function<void()> task) override { task(); }
};

// The segments of one row, on the threads of an executor.
class Segments {
 public:
  Segments(Executor& executor, std::int64_t n) : executor_(executor), n_(n) {}

  // Calls body(first element, number of elements) for every segment.
  template <typename Body>
  void ForEach(const Body& body) const {
    ForEachIndexed([&](std::int64_t, std::int64_t begin, std::int64_t size) { body(begin, size); });
  }

  // Merges what body returns for every segment, first to last.
  template <typename Part, typename Body, typename Merge>
  Part Reduce(const Body& body, const Merge& merge) const {
    if (n_ <= kSegment) return body(std::int64_t{0}, n_);
    std::vector<Part> parts(CeilDiv(n_, kSegment));
    ForEachIndexed(
        [&](std::int64_t i, std::int64_t begin, std::int64_t size) { parts[i] = body(begin, size); });
    Part result = parts[0];
    for (std::size_t i = 1; i < parts.size(); ++i) merge(result, parts[i]);
    return result;
  }

 private:
  template <typename Body>
  void ForEachIndexed(const Body& body) const {
    if (n_ <= kSegment) {
      body(0, 0, n_);
      return;
    }
    ParallelFor(executor_, CeilDiv(n_, kSegment), [&](std::int64_t i) {
      const ScopedFloatMode mode;
      body(i, i * kSegment, std::min(kSegment, n_ - i * kSegment));
    });
  }

  Executor& executor_;
  std::int64_t n_;
};

// Whether rows are better split among threads than handed out whole.
bool SplitsRows(const Executor& executor, std::int64_t rows, std::int64_t n) {
  return n > kSegment && rows < kManyRows * (executor.Helpers() + 1);
}

// Calls some(first row, end, executor for their segments) until every row has had its turn.
template <typename Some>
void ForRows(Executor& executor, std::int64_t rows, std::int64_t n, const Some& some) {
  if (rows == 0 || n == 0) return;
  InThisThread alone;
  const bool split = SplitsRows(executor, rows, n);
  if (split || rows * n < kWorthSharing) {
    const ScopedFloatMode mode;
    some(0, rows, split ? executor : alone);
    return;
  }
  const std::int64_t chunk = CeilDiv(kRowsChunk, n);
  ParallelFor(executor, CeilDiv(rows, chunk), [&](std::int64_t i) {
    const ScopedFloatMode mode;
    InThisThread alone_here;
    some(i * chunk, std::min(rows, (i + 1) * chunk), alone_here);
  });
}

// 1/sum as a T and what that T leaves out.
template <typename T>
SoftmaxScale<T> ScaleFor(const ExtendedSum& sum) {
  const double high = 1 / sum.mantissa.high;
  const double error = (std::fma(-high, sum.mantissa.high, 1.0) - high * sum.mantissa.low) * high;
  SoftmaxScale<T> scale{};
  scale.high = static_cast<T>(high);
  scale.low = static_cast<T>((high - static_cast<double>(scale.high)) + error);
  scale.exponent = sum.exponent;
  return scale;
}

template <typename Body>
ExtendedSum SumOf(const Segments& segments, const Body& sum_of_segment) {
  return segments.Reduce<ExtendedSum>(sum_of_segment,
                                      [](ExtendedSum& a, const ExtendedSum& b) { a.Combine(b); });
}

// The guard: whether the row's largest element, or a NaN, took the sum out of the range in which the
// kernels are exact.
template <typename T>
bool IsExact(const KernelTable<T>& kernels, const ExtendedSum& sum) {
  return std::abs(sum.exponent) < kernels.max_exponent && !std::isnan(sum.mantissa.high);
}

// The third pass that the guard asks for. Only rows whose largest element is beyond the exact range come
// here: at that size, by Sterbenz's lemma, x - maximum is exact wherever e^(x - maximum) does not vanish.
template <typename T>
SoftmaxScale<T> ScaleLessMaximum(const KernelTable<T>& kernels, const Segments& segments, const T* x) {
  const T maximum =
      segments.Reduce<T>([&](std::int64_t begin, std::int64_t size) { return kernels.max(x + begin, size); },
                         [](T& a, T b) { a = std::max(a, b); });
  SoftmaxScale<T> scale{};
  if (std::isinf(maximum)) {
    scale.high = std::numeric_limits<T>::quiet_NaN();
    return scale;
  }
  const ExtendedSum sum = SumOf(segments, [&](std::int64_t begin, std::int64_t size) {
    return kernels.sum_less_maximum(x + begin, size, maximum);
  });
  scale = ScaleFor<T>(sum);
  scale.less_maximum = true;
  scale.maximum = maximum;
  return scale;
}

// How the rows of one call are computed: the same bits in every way, at different speeds.
struct SoftmaxPlan {
  bool reload;  // pass 1 keeps what it computes of every exponential, and pass 2 loads it
  bool stream;  // y is written past the caches
};

template <typename T>
SoftmaxPlan PlanSoftmax(Algorithm algorithm, std::int64_t rows, std::int64_t n) {
  constexpr std::int64_t kBytes = sizeof(T);
  SoftmaxPlan plan;
  // A row that leaves the second-level cache between the passes, in an array that leaves the last one: what
  // pass 1 keeps would have to come back from memory, and so would every line of y, to be overwritten.
  const bool far = n * kBytes > kLongestReloadBytes && 2 * rows * n * kBytes > LastLevelCacheBytes();
  plan.reload = algorithm == Algorithm::kTwoPassReload || (algorithm == Algorithm::kAuto && !far);
  plan.stream = far && !plan.reload;
  return plan;
}

// `kept` is null, y, or scratch of n elements.
template <typename T>
void OneSoftmaxRow(const KernelTable<T>& kernels, const Segments& segments, bool stream, const T* x, T* kept,
                   T* y) {
  const auto at = [&](std::int64_t begin) { return kept == nullptr ? nullptr : kept + begin; };
  const ExtendedSum sum = SumOf(segments, [&](std::int64_t begin, std::int64_t size) {
    return kernels.sum(x + begin, at(begin), size);
  });
  const SoftmaxScale<T> scale =
      IsExact(kernels, sum) ? ScaleFor<T>(sum) : ScaleLessMaximum(kernels, segments, x);
  segments.ForEach([&](std::int64_t begin, std::int64_t size) {
    kernels.write(x + begin, at(begin), y + begin, size, scale, stream);
    if (stream) FinishStreaming();
  });
}

// An infinite or NaN product leaves nothing sensible in the low part, and must not spoil the high one.
template <typename T>
SplitScalar<T> SplitDot(const DoubleSum& dot) {
  SplitScalar<T> split{};
  split.high = static_cast<T>(dot.high);
  const double low = (dot.high - static_cast<double>(split.high)) + dot.low;
  if (std::isfinite(low)) split.low = static_cast<T>(low);
  return split;
}

}  // namespace

template <typename T>
void SoftmaxRows(const KernelTable<T>& kernels, Executor& executor, Algorithm algorithm, const T* x, T* y,
                 std::int64_t rows, std::int64_t n) {
  const SoftmaxPlan plan = PlanSoftmax<T>(algorithm, rows, n);
  AdviseHugePages(y, static_cast<std::size_t>(rows * n) * sizeof(T));
  ForRows(executor, rows, n, [&](std::int64_t first, std::int64_t end, Executor& for_segments) {
    const Segments segments(for_segments, n);
    // y will do for what pass 1 keeps, unless x is still needed there. Without memory for scratch the row is
    // recomputed instead.
    const bool needs_scratch = plan.reload && x == y;
    const std::unique_ptr<T[]> scratch(needs_scratch ? new (std::nothrow) T[n] : nullptr);
    for (std::int64_t r = first; r < end; ++r) {
      T* const kept = !plan.reload ? nullptr : needs_scratch ? scratch.get() : y + r * n;
      OneSoftmaxRow(kernels, segments, plan.stream, x + r * n, kept, y + r * n);
    }
  });
}

template <typename T>
void JacobianRows(const KernelTable<T>& kernels, Executor& executor, const T* y, const T* t, T* out,
                  std::int64_t rows, std::int64_t n) {
  AdviseHugePages(out, static_cast<std::size_t>(rows * n) * sizeof(T));
  ForRows(executor, rows, n, [&](std::int64_t first, std::int64_t end, Executor& for_segments) {
    const Segments segments(for_segments, n);
    for (std::int64_t r = first; r < end; ++r) {
      const T *y_row = y + r * n, *t_row = t + r * n;
      const SplitScalar<T> dot = SplitDot<T>(segments.Reduce<DoubleSum>(
          [&](std::int64_t begin, std::int64_t size) {
            return kernels.dot(y_row + begin, t_row + begin, size);
          },
          [](DoubleSum& a, const DoubleSum& b) { a.Add(b); }));
      segments.ForEach([&](std::int64_t begin, std::int64_t size) {
        kernels.jacobian_write(y_row + begin, t_row + begin, out + r * n + begin, size, dot);
      });
    }
  });
}

template void SoftmaxRows(const KernelTable<float>&, Executor&, Algorithm, const float*, float*, std::int64_t,
                          std::int64_t);
template void SoftmaxRows(const KernelTable<double>&, Executor&, Algorithm, const double*, double*,
                          std::int64_t, std::int64_t);
template void JacobianRows(const KernelTable<float>&, Executor&, const float*, const float*, float*,
                           std::int64_t, std::int64_t);
template void JacobianRows(const KernelTable<double>&, Executor&, const double*, const double*, double*,
                           std::int64_t, std::int64_t);

}  // namespace jax_softmax2p
