#include "ffi/ops/softmax_jacobian.h"

#include <algorithm>
#include <cmath>

#include "ffi/ops/column_tiles.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
namespace {

// An infinite or NaN product leaves nothing sensible in the lo part, and must not spoil the hi one.
template <typename T>
DoubleDouble<T> SplitDot(const CompensatedSum& dot) {
  DoubleDouble<T> split = ToDoubleDouble<T>(dot.hi, dot.lo);
  if (!std::isfinite(split.lo)) split.lo = 0;
  return split;
}

template <typename E>
void JacobianRows(const KernelTable<E>& kernels, Executor& executor, const E* y, const E* t, E* out,
                  std::int64_t rows, std::int64_t n, bool non_temporal) {
  ForRows(executor, rows, n, [&](std::int64_t first, std::int64_t end, Executor& for_segments) {
    const Segments segments(for_segments, n);
    for (std::int64_t r = first; r < end; ++r) {
      const E *y_row = y + r * n, *t_row = t + r * n;
      const auto dot = SplitDot<ComputeOf<E>>(segments.Reduce<CompensatedSum>(
          [&](std::int64_t begin, std::int64_t size) {
            return kernels.dot(y_row + begin, t_row + begin, size);
          },
          [](CompensatedSum& a, const CompensatedSum& b) { a.Add(b); }));
      segments.ForEach(Order::kForward, [&](std::int64_t begin, std::int64_t size) {
        kernels.jacobian_write(y_row + begin, t_row + begin, out + r * n + begin, size, dot, non_temporal);
        if (non_temporal && n > kSegment) FenceNonTemporalStores();
      });
    }
    if (non_temporal) FenceNonTemporalStores();
  });
}

}  // namespace

template <typename E>
void Jacobian(const KernelTable<E>& kernels, Executor& executor, const E* y, const E* t, E* out,
              const Layout& layout) {
  const std::int64_t n = layout.n, inner = layout.inner, columns = layout.outer * inner;
  if (columns * n == 0) return;
  AdviseHugePages(out, static_cast<std::size_t>(columns * n) * sizeof(E));
  if (inner == 1) {
    // In place the lines that are written are in a cache already.
    const bool far = 3 * columns * n * static_cast<std::int64_t>(sizeof(E)) > LastLevelCacheBytes();
    return JacobianRows(kernels, executor, y, t, out, columns, n, far && out != y && out != t);
  }
  const auto some = [&](std::int64_t first, std::int64_t end, std::int64_t width, Executor& for_rows) {
    ColumnTile<E> of_y(kernels, n, inner, width), of_t(kernels, n, inner, width);
    for (; first < end; first += width) {
      const std::int64_t count = std::min(width, end - first);
      of_y.Pack(y, first, count);
      of_t.Pack(t, first, count);
      JacobianRows(kernels, for_rows, of_y.rows(), of_t.rows(), of_t.rows(), count, n, false);
      of_t.Unpack(out, first, count);
    }
  };
  ForColumns(executor, columns, n, some);
}

template void Jacobian(const KernelTable<float>&, Executor&, const float*, const float*, float*,
                       const Layout&);
template void Jacobian(const KernelTable<double>&, Executor&, const double*, const double*, double*,
                       const Layout&);
template void Jacobian(const KernelTable<BFloat16>&, Executor&, const BFloat16*, const BFloat16*, BFloat16*,
                       const Layout&);
template void Jacobian(const KernelTable<Float16>&, Executor&, const Float16*, const Float16*, Float16*,
                       const Layout&);

}  // namespace jax_softmax2p
