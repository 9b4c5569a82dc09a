#include "ffi/runtime/softmax.h"

#include <type_traits>

#include "ffi/runtime/memory.h"
#include "ffi/runtime/row_work.h"

namespace jax_softmax2p {
namespace {

template <typename E>
SoftmaxPlan PlanSoftmax(Algorithm algorithm, const Layout& layout, int lanes) {
  const std::int64_t elements = layout.outer * layout.n * layout.inner;
  const std::int64_t row_bytes = layout.n * static_cast<std::int64_t>(sizeof(E) + sizeof(ComputeOf<E>));
  // x and y leave the caches between one call and the next: y is better written past them. What pass 1 keeps
  // must not leave the second-level cache then, nor where it needs memory of its own.
  const bool far = 2 * elements * static_cast<std::int64_t>(sizeof(E)) > LastLevelCacheBytes();
  const bool near_row = row_bytes <= SecondLevelCacheBytes() / 2;
  SoftmaxPlan plan{};
  switch (algorithm) {
    case Algorithm::kAuto:
      // Columns are better recomputed: (4096, 1000) along its first axis takes 0.25 ns an element so, on two
      // threads, and 0.41 with reload (Zen 5, AVX-512).
      plan.reload = layout.inner < lanes && (near_row || (!far && std::is_same_v<E, ComputeOf<E>>));
      break;
    case Algorithm::kTwoPass:
      break;
    case Algorithm::kTwoPassReload:
      plan.reload = true;
      break;
    case Algorithm::kThreePassRecompute:
      plan.maximum_first = true;
      break;
    case Algorithm::kThreePassReload:
      plan.maximum_first = plan.reload = true;
      break;
  }
  plan.stream = far && (near_row || !plan.reload);
  return plan;
}

}  // namespace

template <typename E>
void Softmax(const KernelTable<E>& kernels, Executor& executor, Algorithm algorithm, const E* x, E* y,
             const Layout& layout) {
  const std::int64_t matrix = layout.n * layout.inner, size = layout.outer * matrix;
  if (size == 0) return;
  AdviseHugePages(y, static_cast<std::size_t>(size) * sizeof(E));
  const SoftmaxPlan plan = PlanSoftmax<E>(algorithm, layout, kernels.lanes);
  if (matrix <= kShort) {
    ForWholeRows(executor, layout.outer, matrix, [&](std::int64_t first, std::int64_t end) {
      kernels.short_matrices(x + first * matrix, y + first * matrix, end - first, static_cast<int>(layout.n),
                             static_cast<int>(layout.inner), plan.stream);
      if (plan.stream) FinishStreaming();
    });
    return;
  }
  if (layout.inner == 1) {
    SoftmaxRows(kernels, executor, plan, x, y, layout.outer, layout.n);
  } else {
    SoftmaxColumns(kernels, executor, plan, x, y, layout);
  }
}

template void Softmax(const KernelTable<float>&, Executor&, Algorithm, const float*, float*, const Layout&);
template void Softmax(const KernelTable<double>&, Executor&, Algorithm, const double*, double*,
                      const Layout&);
template void Softmax(const KernelTable<BFloat16>&, Executor&, Algorithm, const BFloat16*, BFloat16*,
                      const Layout&);
template void Softmax(const KernelTable<Float16>&, Executor&, Algorithm, const Float16*, Float16*,
                      const Layout&);

}  // namespace jax_softmax2p
