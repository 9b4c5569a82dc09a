#include "ffi/runtime/workers.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace jax_softmax2p {
namespace {

class Pool {
 public:
  // Starts threads until there are `threads`, or fewer where the system has no more, or no memory for them:
  // helpers are optional. Returns how many of these there are.
  int Grow(int threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; threads_ < threads; ++threads_) std::thread([this] { Run(); }).detach();
    } catch (const std::exception&) {
    }
    return std::min(threads, threads_);
  }

  void Schedule(std::function<void()> task) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
      waiting_.store(tasks_.size(), std::memory_order_relaxed);
    }
    wake_.notify_one();
  }

 private:
  void Run() {
    while (true) {
      Spin();
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return !tasks_.empty(); });
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      waiting_.store(tasks_.size(), std::memory_order_relaxed);
      lock.unlock();
      task();
    }
  }

  // Waits for a task for some tens of microseconds: waking a thread that sleeps takes as long as a small
  // softmax.
  void Spin() const {
    constexpr int kSpins = 2048;
    for (int i = 0; i < kSpins && waiting_.load(std::memory_order_relaxed) == 0; ++i) Pause();
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::atomic<std::size_t> waiting_{0};
  int threads_ = 0;
};

// The pool is never destroyed: its threads outlive static destructors.
std::atomic<Pool*> current{nullptr};

// In a child process only the caller's thread lives on, and locks stay as they were: the pool is left behind.
void ForgetPool() { current.store(nullptr); }

Pool& CurrentPool() {
  static const int registered = pthread_atfork(nullptr, nullptr, ForgetPool);
  (void)registered;
  Pool* pool = current.load();
  if (pool == nullptr) {
    Pool* const fresh = new Pool;
    if (current.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
  }
  return *pool;
}

}  // namespace

Workers::Workers(int threads) : helpers_(std::min(threads, kMaxThreads) - 1) {
  // Without a thread nobody would ever take what is scheduled.
  if (helpers_ > 0) helpers_ = CurrentPool().Grow(helpers_);
}

void Workers::Schedule(std::function<void()> task) { CurrentPool().Schedule(std::move(task)); }

}  // namespace jax_softmax2p
