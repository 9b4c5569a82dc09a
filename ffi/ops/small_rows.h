// Rows so small that kernels take many of them at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "ffi/kernels/table.h"
#include "ffi/ops/logits_row.h"
#include "ffi/ops/parallel_rows.h"

namespace jax_softmax2p {

template <typename E>
bool HasSmallRows(const Logits<E>& logits) {
  return logits.n > 0 && logits.n <= kMaxSmall;
}

enum class SmallRowsAs {
  kElements,  // x itself where there are no operands
  kCompute,   // z of the compute type always
};

// Calls body(first row, number of rows, z) for a few rows of HasSmallRows logits of inner 1 at a time, until
// all rows are done, on several threads from `least` elements on. z[number, n] are their logits; it is null
// where body is to take x itself.
template <typename E, typename Body>
void ForSmallRows(const Kernels& kernels, Executor& executor, const Logits<E>& logits, const Body& body,
                  SmallRowsAs as = SmallRowsAs::kElements, std::int64_t least = kMinParallel) {
  using T = ComputeOf<E>;
  constexpr T kMasked = -std::numeric_limits<T>::infinity();
  const bool has_operands = logits.HasOperands(), has_z = has_operands || as == SmallRowsAs::kCompute;
  const std::int64_t n = logits.n, most = kLogitsBlock / n;
  ParallelForWholeRows(
      executor, logits.rows, n,
      [&](std::int64_t first, std::int64_t end) {
        T z[kLogitsBlock];
        for (std::int64_t r = first; r < end; r += most) {
          const std::int64_t count = std::min(most, end - r);
          for (std::int64_t i = 0; i < count && has_operands; ++i) {
            const LogitsRow<E> row(kernels, logits, r + i, nullptr);
            if (row.size() < n) std::fill(z + i * n, z + (i + 1) * n, kMasked);
            row.ApplyOperands(0, row.size(), z + i * n + row.begin());
          }
          if (has_z && !has_operands) {
            kernels.Of<E>().apply_scale_bias_mask({logits.x + r * n, nullptr, nullptr, 1, 0, kMasked}, z,
                                                  count * n);
          }
          body(r, count, has_z ? z : nullptr);
        }
      },
      least);
}

// Kernel small_minus_lse for rows as ForSmallRows hands them over, into rows of type Out, E or T. hi, lo,
// factor and labels have an element for each of the `count` rows; factor and labels may be null.
template <typename E, typename Out>
void SmallMinusLse(const Kernels& kernels, const Logits<E>& logits, std::int64_t first, std::int64_t count,
                   const ComputeOf<E>* z, Out* y, const ComputeOf<E>* hi, const ComputeOf<E>* lo,
                   const ComputeOf<E>* factor, const std::int32_t* labels = nullptr) {
  const KernelTable<Out>& table = kernels.Of<Out>();
  const int n = static_cast<int>(logits.n);
  if (z != nullptr) return table.logits_small_minus_lse(z, y, count, n, hi, lo, factor, labels);
  if constexpr (std::is_same_v<E, Out>) {
    table.small_minus_lse(logits.x + first * n, y, count, n, hi, lo, factor, labels);
  }
}

}  // namespace jax_softmax2p
