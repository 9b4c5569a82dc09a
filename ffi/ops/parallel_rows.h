// Contiguous rows shared out among threads, whole or in segments.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ffi/base/layout.h"
#include "ffi/runtime/float_mode.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// A row's sum is made of its segments' sums, in order, on however many threads: so the bits of a row depend
// on its length alone. 128 KiB of float32, some 5 µs: a segment stays in a thread's second-level cache.
inline constexpr std::int64_t kSegment = 1 << 15;
// Rows are handed out in grains of at least this many elements.
inline constexpr std::int64_t kGrain = 1 << 14;
// Below this many elements the calling thread works alone. To wake another takes some 10 µs: two threads of
// (48,1000) and (512,64) take 1.0 to 1.5 times as long as one for a logsumexp, of 15 to 20 µs on one; 0.9 of
// (4096,10), of 50 µs.
inline constexpr std::int64_t kMinParallel = 1 << 16;
// The same of gradients of short rows, which take some 1 ns an element.
inline constexpr std::int64_t kMinParallelGradients = 1 << 15;
// With this many rows a thread, whole rows keep every thread busy, and each stays in its thread's cache.
inline constexpr std::int64_t kManyRows = 8;

// From so many bytes a row on, rows that share a cache line may be written past the caches.
inline constexpr std::int64_t kMinSharedLineRow = 3 << 10;

// Whether rows of so many bytes may be written past the caches. Each part of a cache line that two rows share
// goes to memory by itself, after the line was read: softmax of 2^23 float32 on one thread, with ordinary
// stores by past the caches (Zen 4), rows of 136 elements 0.78, of 250 0.77, of 500 0.99, of 1,000 1.17, and
// of 256 elements, which are whole lines, 1.3.
inline bool FillsCacheLines(std::int64_t row_bytes) {
  return row_bytes % 64 == 0 || row_bytes >= kMinSharedLineRow;
}

// The segments of one row of n elements, on the threads of an executor.
class Segments {
 public:
  Segments(Executor& executor, std::int64_t n) : executor_(executor), n_(n) {}

  // Calls body(first element, number of elements) for every segment.
  template <typename Body>
  void ForEach(Order order, const Body& body) const {
    ForEachIndexed(order, [&](std::int64_t, std::int64_t begin, std::int64_t size) { body(begin, size); });
  }

  // Merges what body returns for every segment, first to last.
  template <typename Part, typename Body, typename Merge>
  Part Reduce(const Body& body, const Merge& merge) const {
    if (n_ <= kSegment) return body(std::int64_t{0}, n_);
    std::vector<Part> parts(CeilDiv(n_, kSegment));
    ForEachIndexed(Order::kForward, [&](std::int64_t i, std::int64_t begin, std::int64_t size) {
      parts[i] = body(begin, size);
    });
    Part result = parts[0];
    for (std::size_t i = 1; i < parts.size(); ++i) merge(result, parts[i]);
    return result;
  }

 private:
  template <typename Body>
  void ForEachIndexed(Order order, const Body& body) const {
    if (n_ <= kSegment) {
      body(0, 0, n_);
      return;
    }
    const auto segment = [&](std::int64_t i) {
      const ScopedFloatMode mode;
      body(i, i * kSegment, std::min(kSegment, n_ - i * kSegment));
    };
    ParallelFor(executor_, CeilDiv(n_, kSegment), segment, order);
  }

  Executor& executor_;
  std::int64_t n_;
};

// Whether rows of n elements are better split among threads than handed out whole.
inline bool SplitsRows(const Executor& executor, std::int64_t rows, std::int64_t n) {
  return n > kSegment && rows < kManyRows * executor.Threads();
}

// Calls body(first row, end) until all rows are done, whole rows of n elements on as many threads as are
// worth it: from `least` elements on.
template <typename Body>
void ParallelForWholeRows(Executor& executor, std::int64_t rows, std::int64_t n, const Body& body,
                          std::int64_t least = kMinParallel) {
  if (rows * n < least) {
    const ScopedFloatMode mode;
    body(0, rows);
    return;
  }
  const std::int64_t grain = CeilDiv(std::min(kGrain, least / 4), n);
  ParallelFor(executor, CeilDiv(rows, grain), [&](std::int64_t i) {
    const ScopedFloatMode mode;
    body(i * grain, std::min(rows, (i + 1) * grain));
  });
}

// Calls body(first row, end, executor for the rows' segments) until all rows are done: with few long rows in
// this thread, so that segments are shared out, otherwise as ParallelForWholeRows.
template <typename Body>
void ParallelForRows(Executor& executor, std::int64_t rows, std::int64_t n, const Body& body) {
  if (rows == 0 || n == 0) return;
  if (SplitsRows(executor, rows, n)) {
    const ScopedFloatMode mode;
    body(0, rows, executor);
    return;
  }
  ParallelForWholeRows(executor, rows, n, [&](std::int64_t first, std::int64_t end) {
    InlineExecutor this_thread;
    body(first, end, this_thread);
  });
}

}  // namespace jax_softmax2p
