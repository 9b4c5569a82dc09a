#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "ffi/runtime/memory.h"
#include "ffi/runtime/row_work.h"
#include "ffi/runtime/softmax.h"

namespace jax_softmax2p {
namespace {

// Up to so many elements, pass 1 of a row comes before pass 2 of the row above it: what ends pass 1, a chain
// of operations on single numbers, takes some 40 ns that the CPU fills with pass 2 of the other. Two rows and
// what is kept of them stay in the first-level cache.
constexpr std::int64_t kInterleavedRow = 1 << 11;

// 1/sum as a T and what that T leaves out.
template <typename T>
RowScale<T> ScaleFor(const ExtendedSum& sum) {
  const double high = 1 / sum.mantissa.high;
  const double error = (std::fma(-high, sum.mantissa.high, 1.0) - high * sum.mantissa.low) * high;
  RowScale<T> scale{};
  scale.high = static_cast<T>(high);
  scale.low = static_cast<T>((high - static_cast<double>(scale.high)) + error);
  scale.exponent = sum.exponent;
  return scale;
}

// The rows of an array.
template <typename E>
class Rows {
  using T = ComputeOf<E>;

 public:
  Rows(const KernelTable<E>& kernels, Executor& executor, const SoftmaxPlan& plan, std::int64_t n)
      : kernels_(kernels), segments_(executor, n), plan_(plan), n_(n) {}

  void Compute(const E* x, E* y, std::int64_t rows) const {
    // y will do for what pass 1 keeps, unless x is still needed there, or it has no room for a T, or must not
    // come into the caches. Without memory for scratch the row is recomputed instead.
    const bool in_y = std::is_same_v<E, T> && x != y && !plan_.stream;
    const bool needs_scratch = plan_.reload && !in_y;
    const bool interleaved = n_ <= kInterleavedRow;
    const std::unique_ptr<T[]> scratch(needs_scratch ? new (std::nothrow) T[interleaved ? 2 * n_ : n_]
                                                     : nullptr);
    const auto kept = [&](std::int64_t r) -> T* {
      if constexpr (std::is_same_v<E, T>) {
        if (plan_.reload && in_y) return y + r * n_;
      }
      return scratch == nullptr ? nullptr : scratch.get() + (interleaved ? r % 2 * n_ : 0);
    };
    if (!interleaved) {
      for (std::int64_t r = 0; r < rows; ++r) {
        Write(x + r * n_, kept(r), y + r * n_, Scale(x + r * n_, kept(r)));
      }
    } else {
      RowScale<T> next = Scale(x, kept(0));
      for (std::int64_t r = 0; r < rows; ++r) {
        const RowScale<T> scale = next;
        if (r + 1 < rows) next = Scale(x + (r + 1) * n_, kept(r + 1));
        Write(x + r * n_, kept(r), y + r * n_, scale);
      }
    }
    if (plan_.stream) FinishStreaming();
  }

 private:
  // Pass 1.
  RowScale<T> Scale(const E* x, T* kept) const {
    KnownMaximum<T> known;
    if (plan_.maximum_first) known = {KnownMaximum<T>::kReference, Maximum(x)};
    const ExtendedSum sum = Sum(x, kept, known);
    // The guard: whether the row's largest element took the sum out of the range in which kernels are exact.
    if (std::abs(sum.exponent) < kernels_.max_exponent) return ScaleFor<T>(sum);
    return ScaleLessMaximum(x);
  }

  // The third pass that the guard asks for. Only rows whose largest element is beyond the exact range come
  // here: at that size, by Sterbenz's lemma, x - maximum is exact wherever e^(x - maximum) does not vanish.
  RowScale<T> ScaleLessMaximum(const E* x) const {
    const T maximum = Maximum(x);
    RowScale<T> scale{};
    if (std::isinf(maximum)) {
      scale.high = std::numeric_limits<T>::quiet_NaN();
      return scale;
    }
    scale = ScaleFor<T>(Sum(x, nullptr, {KnownMaximum<T>::kSubtract, maximum}));
    scale.subtract = true;
    scale.maximum = maximum;
    return scale;
  }

  T Maximum(const E* x) const {
    return segments_.Reduce<T>(
        [&](std::int64_t begin, std::int64_t size) { return kernels_.row_max(x + begin, size); },
        [](T& a, T b) { a = std::max(a, b); });
  }

  ExtendedSum Sum(const E* x, T* kept, const KnownMaximum<T>& known) const {
    return segments_.Reduce<ExtendedSum>(
        [&](std::int64_t begin, std::int64_t size) {
          return kernels_.row_sum(x + begin, kept == nullptr ? nullptr : kept + begin, size, known);
        },
        [](ExtendedSum& a, const ExtendedSum& b) { a.Combine(b); });
  }

  // Pass 2.
  void Write(const E* x, const T* kept, E* y, const RowScale<T>& scale) const {
    // In the caches, what pass 1 did last is nearest: 2^20 float32 on two threads took 0.098 ns an element
    // so, and 0.110 forward. From memory, forward is faster: 0.26 against 0.29, at 2^24 on one (Zen 5).
    const Order order = plan_.stream ? Order::kForward : Order::kBackward;
    segments_.ForEach(order, [&](std::int64_t begin, std::int64_t size) {
      kernels_.row_write(x + begin, kept == nullptr ? nullptr : kept + begin, y + begin, size, scale,
                         plan_.stream);
      if (plan_.stream && n_ > kSegment) FinishStreaming();
    });
  }

  const KernelTable<E>& kernels_;
  Segments segments_;
  SoftmaxPlan plan_;
  std::int64_t n_;
};

}  // namespace

template <typename E>
void SoftmaxRows(const KernelTable<E>& kernels, Executor& executor, const SoftmaxPlan& plan, const E* x, E* y,
                 std::int64_t rows, std::int64_t n) {
  ForRows(executor, rows, n, [&](std::int64_t first, std::int64_t end, Executor& for_segments) {
    Rows<E>(kernels, for_segments, plan, n).Compute(x + first * n, y + first * n, end - first);
  });
}

template void SoftmaxRows(const KernelTable<float>&, Executor&, const SoftmaxPlan&, const float*, float*,
                          std::int64_t, std::int64_t);
template void SoftmaxRows(const KernelTable<double>&, Executor&, const SoftmaxPlan&, const double*, double*,
                          std::int64_t, std::int64_t);
template void SoftmaxRows(const KernelTable<BFloat16>&, Executor&, const SoftmaxPlan&, const BFloat16*,
                          BFloat16*, std::int64_t, std::int64_t);
template void SoftmaxRows(const KernelTable<Float16>&, Executor&, const SoftmaxPlan&, const Float16*,
                          Float16*, std::int64_t, std::int64_t);

}  // namespace jax_softmax2p
