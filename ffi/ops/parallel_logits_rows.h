// Rows of logits shared out among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "ffi/ops/logits_row.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {

// Calls body(row number, row, segments) for every row, on as many threads as are worth it. The logits have
// inner 1. Non-temporal stores of rows of one segment are fenced.
template <typename E, typename Body>
void ForLogitsRows(const Kernels& kernels, Executor& executor, const Logits<E>& logits, const Body& body) {
  using T = ComputeOf<E>;
  ParallelForRows(executor, logits.rows, std::max<std::int64_t>(1, logits.n),
                  [&](std::int64_t first, std::int64_t end, Executor& segments_executor) {
                    const std::int64_t size = LogitsRow<E>::BufferSize(logits);
                    const std::unique_ptr<T[]> buffer(size != 0 ? new (std::nothrow) T[size] : nullptr);
                    for (std::int64_t r = first; r < end; ++r) {
                      const LogitsRow<E> row(kernels, logits, r, buffer.get());
                      body(r, row, Segments(segments_executor, row.size()));
                    }
                    FenceNonTemporalStores();
                  });
}

// Whether results like x are better written past the caches: they and the logits leave those between one call
// and the next.
template <typename E>
bool IsNonTemporal(const Logits<E>& logits) {
  const std::int64_t row_bytes = logits.n * static_cast<std::int64_t>(sizeof(E));
  return 2 * logits.rows * row_bytes > LastLevelCacheBytes() && FillsCacheLines(row_bytes);
}

// AdviseHugePages for a result y like x.
template <typename E>
void AdviseHugePagesFor(const Logits<E>& logits, E* y) {
  AdviseHugePages(y, static_cast<std::size_t>(logits.rows * logits.n) * sizeof(E));
}

}  // namespace jax_softmax2p
