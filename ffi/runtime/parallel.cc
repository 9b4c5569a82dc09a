#include "ffi/runtime/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <utility>

namespace jax_softmax2p {
namespace {

// The state of one call. It outlives the call: a helper that starts late finds no index left, and touches
// nothing else.
class Shared {
 public:
  Shared(std::int64_t count, std::int64_t threads, const std::function<void(std::int64_t)>& body, Order order)
      : count_(count), threads_(threads), body_(body), order_(order), ranges_(new Range[threads]) {
    for (std::int64_t t = 0; t < threads; ++t) {
      ranges_[t].begin = count * t / threads;
      ranges_[t].size = count * (t + 1) / threads - ranges_[t].begin;
    }
  }

  void Work(std::int64_t thread) {
    std::int64_t finished = 0;
    for (std::int64_t t = 0; t < threads_; ++t) {
      Range& range = ranges_[(thread + t) % threads_];
      while (true) {
        const std::int64_t i = range.taken.fetch_add(1, std::memory_order_relaxed);
        if (i >= range.size) break;
        Run(range.begin + (order_ == Order::kForward ? i : range.size - 1 - i));
        ++finished;
      }
    }
    if (finished != 0) done_.fetch_add(finished, std::memory_order_release);
  }

  bool Done() const { return done_.load(std::memory_order_acquire) == count_; }

  // The first exception, if there was one, when all is done. Only the caller may hold it then.
  std::exception_ptr TakeException() { return std::exchange(exception_, nullptr); }

 private:
  // An exception must not leave: it would end the process in a pool's thread, and in the caller it would
  // return while others work.
  void Run(std::int64_t index) noexcept {
    try {
      body_(index);
    } catch (...) {
      if (!failed_.exchange(true)) exception_ = std::current_exception();
    }
  }

  // Each on a cache line of its own, since many threads write `taken`.
  struct alignas(64) Range {
    std::atomic<std::int64_t> taken{0};
    std::int64_t begin;
    std::int64_t size;
  };

  const std::int64_t count_;
  const std::int64_t threads_;
  const std::function<void(std::int64_t)>& body_;
  const Order order_;
  const std::unique_ptr<Range[]> ranges_;
  alignas(64) std::atomic<std::int64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr exception_;
};

}  // namespace

void ParallelFor(Executor& executor, std::int64_t count, const std::function<void(std::int64_t)>& body,
                 Order order) {
  const std::int64_t helpers = std::min<std::int64_t>(executor.Helpers(), count - 1);
  if (helpers <= 0) {
    for (std::int64_t i = 0; i < count; ++i) body(order == Order::kForward ? i : count - 1 - i);
    return;
  }
  const auto shared = std::make_shared<Shared>(count, helpers + 1, body, order);
  try {
    for (std::int64_t i = 1; i <= helpers; ++i) executor.Schedule([shared, i] { shared->Work(i); });
  } catch (...) {
    // There is no memory for a task. The helpers that there are will do.
  }
  shared->Work(0);
  // The indices that are left are being computed right now, which takes microseconds. The yield is for
  // machines with more runnable threads than cores.
  constexpr int kSpins = 4096;
  for (int spins = 0; !shared->Done(); ++spins) {
    if (spins < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
  if (const std::exception_ptr exception = shared->TakeException()) std::rethrow_exception(exception);
}

}  // namespace jax_softmax2p
