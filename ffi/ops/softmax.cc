#include "ffi/ops/softmax.h"

#include <cmath>
#include <type_traits>

#include "ffi/ops/logits_row.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/ops/small_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {

template <typename E>
SoftmaxPlan PlanSoftmax(Algorithm algorithm, const Layout& layout, int lanes) {
  const std::int64_t elements = layout.outer * layout.n * layout.inner;
  const std::int64_t row_bytes = layout.n * static_cast<std::int64_t>(sizeof(E) + sizeof(ComputeOf<E>));
  // Where x and y together exceed the last-level cache, y is better written past the caches. Reloading then
  // pays only where a row and its mantissas fit the second-level cache; so it does where the mantissas need
  // memory beside y, as those of 16-bit elements do.
  const bool exceeds_llc = 2 * elements * static_cast<std::int64_t>(sizeof(E)) > LastLevelCacheBytes();
  const bool row_fits_l2 = row_bytes <= SecondLevelCacheBytes() / 2;
  SoftmaxPlan plan{};
  switch (algorithm) {
    case Algorithm::kAuto:
      // Columns are better recomputed: (4096, 1000) along its first axis takes 0.25 ns an element so, on two
      // threads, and 0.41 with reload (Zen 5, AVX-512).
      plan.reload =
          layout.inner < lanes && (row_fits_l2 || (!exceeds_llc && std::is_same_v<E, ComputeOf<E>>));
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
  // Small matrices are written as whole tiles; panels of columns are never written past the caches.
  const bool fills_lines =
      layout.n * layout.inner <= kMaxSmall ||
      (layout.inner == 1 && FillsCacheLines(layout.n * static_cast<std::int64_t>(sizeof(E))));
  plan.non_temporal = exceeds_llc && (row_fits_l2 || !plan.reload) && fills_lines;
  return plan;
}

namespace {

// x itself, as matrices of n·inner <= kMaxSmall.
template <typename E>
void SmallMatrices(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan,
                   const Logits<E>& logits, E* y) {
  const Layout layout = logits.layout();
  const std::int64_t matrix = layout.n * layout.inner;
  ParallelForWholeRows(executor, layout.outer, matrix, [&](std::int64_t first, std::int64_t end) {
    kernels.Of<E>().small_matrices(logits.x + first * matrix, y + first * matrix, end - first,
                                   static_cast<int>(layout.n), static_cast<int>(layout.inner),
                                   plan.non_temporal);
    if (plan.non_temporal) FenceNonTemporalStores();
  });
}

// Small rows with operands. The kernel gives NaN to rows that are masked throughout.
template <typename E>
void SmallRows(const Kernels& kernels, Executor& executor, const SoftmaxPlan& plan, const Logits<E>& logits,
               E* y) {
  using T = ComputeOf<E>;
  const std::int64_t n = logits.n;
  ForSmallRows(kernels, executor, logits, [&](std::int64_t first, std::int64_t count, const T* z) {
    kernels.Of<E>().logits_small_matrices(z, y + first * n, count, static_cast<int>(n), 1, plan.non_temporal);
    for (std::int64_t r = first; logits.HasMask() && r < first + count; ++r) {
      if (std::isnan(Widen(y[r * n]))) {
        LogitsRow<E>(kernels, logits, r, nullptr).FillMasked(y + r * n, E{});
      }
    }
    if (plan.non_temporal) FenceNonTemporalStores();
  });
}

}  // namespace

template <typename E>
void Softmax(const Kernels& kernels, Executor& executor, Algorithm algorithm, Logits<E> logits, E* y) {
  const std::int64_t size = logits.rows * logits.n;
  if (size == 0) return;
  AdviseHugePages(y, static_cast<std::size_t>(size) * sizeof(E));
  SoftmaxPlan plan = PlanSoftmax<E>(algorithm, logits.layout(), kernels.Of<E>().lanes);
  if (!logits.HasOperands()) {
    if (logits.n * logits.inner <= kMaxSmall) return SmallMatrices(kernels, executor, plan, logits, y);
    if (logits.inner > 1) return SoftmaxColumns(kernels, executor, plan, logits, y);
    return SoftmaxRows(kernels, executor, plan, logits, y);
  }
  MergeDims(logits);
  if (logits.inner > 1) return SoftmaxColumns(kernels, executor, plan, logits, y);
  // Cache lines that are half result and half zeros would go to memory twice.
  if (logits.HasBand()) plan.non_temporal = false;
  if (HasSmallRows(logits)) return SmallRows(kernels, executor, plan, logits, y);
  SoftmaxRows(kernels, executor, plan, logits, y);
}

#define SOFTMAX2P_INSTANTIATE(E)                                      \
  template SoftmaxPlan PlanSoftmax<E>(Algorithm, const Layout&, int); \
  template void Softmax(const Kernels&, Executor&, Algorithm, Logits<E>, E*);
SOFTMAX2P_FOR_EACH_ELEMENT(SOFTMAX2P_INSTANTIATE)

}  // namespace jax_softmax2p
