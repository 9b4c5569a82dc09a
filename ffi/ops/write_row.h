// Pass 2 of a row.
#pragma once

#include <cstdint>

#include "ffi/kernels/table.h"
#include "ffi/ops/logits_row.h"
#include "ffi/ops/parallel_rows.h"
#include "ffi/runtime/memory.h"

namespace jax_softmax2p {

// Writes y[row.size()] as `scale` says. `kept` is what pass 1 kept, if anything. The caller fences
// non-temporal stores of rows of one segment.
template <typename E>
void WriteRow(const LogitsRow<E>& row, const Segments& segments, const KeptRow<ComputeOf<E>>& kept, E* y,
              const RowScale<ComputeOf<E>>& scale, bool non_temporal) {
  // In the caches, what pass 1 did last is nearest: 2^20 float32 on two threads took 0.098 ns an element so,
  // and 0.110 forward. From memory, forward is faster: 0.26 against 0.29, at 2^24 on one (Zen 5).
  segments.ForEach(non_temporal ? Order::kForward : Order::kBackward,
                   [&](std::int64_t at, std::int64_t size) {
                     row.Write(at, size, kept + at, y + at, scale, non_temporal);
                     if (non_temporal && row.size() > kSegment) FenceNonTemporalStores();
                   });
}

}  // namespace jax_softmax2p
