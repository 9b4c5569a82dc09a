#include "ffi/ops/softmax.h"

#include <cmath>
#include <type_traits>

#include "ffi/ops/parallel_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {
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
  plan.non_temporal = far && (near_row || !plan.reload);
  return plan;
}

namespace {

template <typename E>
void SmallRows(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan, const Logits<E>& logits,
               E* y) {
  using T = ComputeOf<E>;
  const std::int64_t n = logits.n;
  ForSmallRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const T* z) {
    kernels.Of<E>().logits_small_matrices(z, y + first * n, count, static_cast<int>(n), 1, plan.non_temporal);
    for (std::int64_t r = first; logits.Masked() && r < first + count; ++r) {
      if (std::isnan(Widen(y[r * n]))) {
        LogitsRow<E>(kernels, logits, r, nullptr).FillMasked(y + r * n, E{});
      }
    }
    if (plan.non_temporal) FenceNonTemporalStores();
  });
}

}  // namespace

template <typename E>
void Softmax(const Kernels& all, Executor& executor, Algorithm algorithm, const E* x, E* y,
             const Layout& layout) {
  const KernelTable<E>& kernels = all.Of<E>();
  const std::int64_t matrix = layout.n * layout.inner, size = layout.outer * matrix;
  if (size == 0) return;
  AdviseHugePages(y, static_cast<std::size_t>(size) * sizeof(E));
  const SoftmaxPlan plan = PlanSoftmax<E>(algorithm, layout, kernels.lanes);
  if (matrix <= kMaxSmall) {
    ForWholeRows(executor, layout.outer, matrix, [&](std::int64_t first, std::int64_t end) {
      kernels.small_matrices(x + first * matrix, y + first * matrix, end - first, static_cast<int>(layout.n),
                             static_cast<int>(layout.inner), plan.non_temporal);
      if (plan.non_temporal) FenceNonTemporalStores();
    });
  } else if (layout.inner == 1) {
    Logits<E> logits;
    logits.x = x;
    logits.rows = layout.outer;
    logits.n = layout.n;
    SoftmaxRows(all, executor, plan, logits, y);
  } else {
    SoftmaxColumns(kernels, executor, plan, x, y, layout);
  }
}

template <typename E>
void SoftmaxOfLogits(const Kernels& kernels, Executor& executor, Algorithm algorithm, Logits<E> logits,
                     E* y) {
  const std::int64_t size = logits.rows * logits.n;
  if (size == 0) return;
  const Layout layout{logits.rows / logits.inner, logits.n, logits.inner};
  if (logits.Plain()) return Softmax(kernels, executor, algorithm, logits.x, y, layout);
  Simplify(logits);
  AdviseHugePages(y, static_cast<std::size_t>(size) * sizeof(E));
  if (logits.inner > 1) {
    return ForColumnLogits(kernels, executor, logits, y,
                           [&](const Logits<E>& rows, E* y_rows, Executor& own) {
                             SoftmaxOfLogits(kernels, own, algorithm, rows, y_rows);
                           });
  }
  SoftmaxPlan plan = PlanSoftmax<E>(algorithm, layout, kernels.Of<E>().lanes);
  // Lines that are half result and half zeros would go to memory twice.
  if (logits.Banded()) plan.non_temporal = false;
  if (logits.n <= kMaxSmall) {
    SmallRows(kernels, executor, plan, logits, y);
  } else {
    SoftmaxRows(kernels, executor, plan, logits, y);
  }
}

template SoftmaxPlan PlanSoftmax<float>(Algorithm, const Layout&, int);
template void Softmax(const Kernels&, Executor&, Algorithm, const float*, float*, const Layout&);
template void SoftmaxOfLogits(const Kernels&, Executor&, Algorithm, Logits<float>, float*);
template SoftmaxPlan PlanSoftmax<double>(Algorithm, const Layout&, int);
template void Softmax(const Kernels&, Executor&, Algorithm, const double*, double*, const Layout&);
template void SoftmaxOfLogits(const Kernels&, Executor&, Algorithm, Logits<double>, double*);
template SoftmaxPlan PlanSoftmax<BFloat16>(Algorithm, const Layout&, int);
template void Softmax(const Kernels&, Executor&, Algorithm, const BFloat16*, BFloat16*, const Layout&);
template void SoftmaxOfLogits(const Kernels&, Executor&, Algorithm, Logits<BFloat16>, BFloat16*);
template SoftmaxPlan PlanSoftmax<Float16>(Algorithm, const Layout&, int);
template void Softmax(const Kernels&, Executor&, Algorithm, const Float16*, Float16*, const Layout&);
template void SoftmaxOfLogits(const Kernels&, Executor&, Algorithm, Logits<Float16>, Float16*);

}  // namespace jax_softmax2p
