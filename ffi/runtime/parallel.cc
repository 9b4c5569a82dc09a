#include "ffi/runtime/parallel.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

namespace jax_softmax2p {
namespace {

// Outlives the call: a helper that starts late finds no index left, and touches nothing else.
struct Shared {
  Shared(std::int64_t count, const std::function<void(std::int64_t)>& body) : count(count), body(body) {}

  void Work() {
    std::int64_t finished = 0;
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++finished) body(i);
    if (finished != 0) done.fetch_add(finished, std::memory_order_release);
  }

  const std::int64_t count;
  const std::function<void(std::int64_t)>& body;
  // On cache lines of their own: every thread writes `next`, the caller spins on `done`.
  alignas(64) std::atomic<std::int64_t> next{0};
  alignas(64) std::atomic<std::int64_t> done{0};
};

}  // namespace

void ParallelFor(Executor& executor, std::int64_t count, const std::function<void(std::int64_t)>& body) {
  const std::int64_t helpers = std::min<std::int64_t>(executor.Helpers(), count - 1);
  if (helpers <= 0) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  const auto shared = std::make_shared<Shared>(count, body);
  for (std::int64_t i = 0; i < helpers; ++i) executor.Schedule([shared] { shared->Work(); });
  shared->Work();
  // What is left is being computed right now, and takes about as long as one index: microseconds. The
  // yield is for machines with more runnable threads than cores.
  constexpr int kSpins = 4096;
  for (int spins = 0; shared->done.load(std::memory_order_acquire) != count; ++spins) {
    if (spins < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace jax_softmax2p
