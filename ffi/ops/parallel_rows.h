// Contiguous rows shared out among threads, whole or in segments.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "ffi/base/layout.h"
#include "ffi/runtime/float_mode.h"
#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// A row's sum is made of its segments' sums, in order, on however many threads: so the bits of a row depend
// on its length alone. 128 KiB of float32, some 5 µs: at home in a thread's second-level cache.
inline constexpr std::int64_t kSegment = 1 << 15;
// Rows are handed out this many elements at a time, at least.
inline constexpr std::int64_t kRowsChunk = 1 << 14;
// Below this many elements, some 10 µs on one thread, the calling thread stays alone.
inline constexpr std::int64_t kWorthSharing = 1 << 16;
// With this many rows a thread, whole rows keep every thread busy, and each stays in its thread's cache.
inline constexpr std::int64_t kManyRows = 8;

class InThisThread : public Executor {
 public:
  int Helpers() const override { return 0; }
  void Schedule(std::function<void()> task) override { task(); }
};

// The segments of one row, on the threads of an executor.
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

// Whether rows are better split among threads than handed out whole.
inline bool SplitsRows(const Executor& executor, std::int64_t rows, std::int64_t n) {
  return n > kSegment && rows < kManyRows * (executor.Helpers() + 1);
}

// Calls some(first row, end) until every row has had its turn, on as many threads as it is worth.
template <typename Some>
void ForWholeRows(Executor& executor, std::int64_t rows, std::int64_t n, const Some& some) {
  if (rows * n < kWorthSharing) {
    const ScopedFloatMode mode;
    some(0, rows);
    return;
  }
  const std::int64_t chunk = CeilDiv(kRowsChunk, n);
  ParallelFor(executor, CeilDiv(rows, chunk), [&](std::int64_t i) {
    const ScopedFloatMode mode;
    some(i * chunk, std::min(rows, (i + 1) * chunk));
  });
}

// Calls some(first row, end, executor for their segments) likewise.
template <typename Some>
void ForRows(Executor& executor, std::int64_t rows, std::int64_t n, const Some& some) {
  if (rows == 0 || n == 0) return;
  if (SplitsRows(executor, rows, n)) {
    const ScopedFloatMode mode;
    some(0, rows, executor);
    return;
  }
  ForWholeRows(executor, rows, n, [&](std::int64_t first, std::int64_t end) {
    InThisThread alone;
    some(first, end, alone);
  });
}

}  // namespace jax_softmax2p
