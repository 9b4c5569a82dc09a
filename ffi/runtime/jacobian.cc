#include "ffi/runtime/jacobian.h"

#include <cmath>

#include "ffi/runtime/memory.h"
#include "ffi/runtime/row_work.h"

namespace jax_softmax2p {
namespace {

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

template <typename E>
void JacobianRows(const KernelTable<E>& kernels, Executor& executor, const E* y, const E* t, E* out,
                  std::int64_t rows, std::int64_t n) {
  AdviseHugePages(out, static_cast<std::size_t>(rows * n) * sizeof(E));
  ForRows(executor, rows, n, [&](std::int64_t first, std::int64_t end, Executor& for_segments) {
    const Segments segments(for_segments, n);
    for (std::int64_t r = first; r < end; ++r) {
      const E *y_row = y + r * n, *t_row = t + r * n;
      const auto dot = SplitDot<ComputeOf<E>>(segments.Reduce<DoubleSum>(
          [&](std::int64_t begin, std::int64_t size) {
            return kernels.dot(y_row + begin, t_row + begin, size);
          },
          [](DoubleSum& a, const DoubleSum& b) { a.Add(b); }));
      segments.ForEach(Order::kForward, [&](std::int64_t begin, std::int64_t size) {
        kernels.jacobian_write(y_row + begin, t_row + begin, out + r * n + begin, size, dot);
      });
    }
  });
}

template void JacobianRows(const KernelTable<float>&, Executor&, const float*, const float*, float*,
                           std::int64_t, std::int64_t);
template void JacobianRows(const KernelTable<double>&, Executor&, const double*, const double*, double*,
                           std::int64_t, std::int64_t);
template void JacobianRows(const KernelTable<BFloat16>&, Executor&, const BFloat16*, const BFloat16*,
                           BFloat16*, std::int64_t, std::int64_t);
template void JacobianRows(const KernelTable<Float16>&, Executor&, const Float16*, const Float16*, Float16*,
                           std::int64_t, std::int64_t);

}  // namespace jax_softmax2p
