// Shares work out among threads of others, without ever waiting for one that has not started.
#pragma once

#include <cstdint>
#include <functional>

namespace jax_softmax2p {

// Threads that may help: XLA's pool, or Workers.
class Executor {
 public:
  virtual ~Executor() = default;
  // How many threads may run tasks, beside the caller's: none, too, where it is not positive, as XLA says -1
  // where it has no pool.
  virtual int Helpers() const = 0;
  // These and the caller's.
  int Threads() const { return Helpers() > 0 ? Helpers() + 1 : 1; }
  // Runs the task, which throws nothing, at some time: perhaps only after the caller is done, perhaps at once
  // in the caller's thread. Or throws, and will not run it.
  virtual void Schedule(std::function<void()> task) = 0;
};

// Without helpers: everything runs in the calling thread.
class InlineExecutor : public Executor {
 public:
  int Helpers() const override { return 0; }
  void Schedule(std::function<void()> task) override { task(); }
};

// Calls body(i) for every i in [0, count), and returns when all are done. The caller takes indices like any
// helper, and waits only for indices that a helper has already taken: it finishes by itself where the pool
// has one thread, no thread, or only threads that wait themselves. The first exception that body throws, in
// whichever thread, is thrown here when all are done.
//
// Every thread has a range of indices of its own, and helps with the others' ranges when it is done: adjacent
// indices mean adjacent memory, and from one call to the next a thread finds its own range in its cache.
// Backward, a thread begins with what it did last in the call before.
enum class Order { kForward, kBackward };
void ParallelFor(Executor& executor, std::int64_t count, const std::function<void(std::int64_t)>& body,
                 Order order = Order::kForward);

// Tells the CPU that this thread waits for another.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}

}  // namespace jax_softmax2p
