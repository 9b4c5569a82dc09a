// What lses and their derivatives share: rows of logits, whole or short, and the kernels for these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "ffi/ops/logits.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {

// Calls body(row number, row, segments) for every row, on as many threads as it is worth.
template <typename E, typename Body>
void ForLogits(const Kernels& kernels, Executor& executor, const Logits<E>& logits, const Body& body) {
  using T = ComputeOf<E>;
  ForRows(executor, logits.rows, std::max<std::int64_t>(1, logits.n),
          [&](std::int64_t first, std::int64_t end, Executor& for_segments) {
            const bool whole = !logits.Plain() && logits.n <= kLogitsBlock;
            const std::unique_ptr<T[]> buffer(whole ? new (std::nothrow) T[kLogitsBlock] : nullptr);
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
bool IsSmall(const Logits<E>& logits) {
  return logits.n > 0 && logits.n <= kMaxSmall;
}

// Kernel `small_less` for rows as ForSmallRows hands them over, into rows of type Out, E or T.
template <typename E, typename Out>
void SmallLess(const Kernels& kernels, const Logits<E>& logits, std::int64_t first, std::int64_t count,
               const ComputeOf<E>* z, Out* y, const ComputeOf<E>* hi, const ComputeOf<E>* lo,
               const ComputeOf<E>* factor) {
  const KernelTable<Out>& table = kernels.Of<Out>();
  const int n = static_cast<int>(logits.n);
  if (z != nullptr) return table.logits_small_less(z, y, count, n, hi, lo, factor);
  if constexpr (std::is_same_v<E, Out>) table.small_less(logits.x + first * n, y, count, n, hi, lo, factor);
}

}  // namespace jax_softmax2p
