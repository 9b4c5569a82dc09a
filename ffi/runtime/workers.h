// Threads of the library's own, for callers who bring none: the NumPy entry points and the self-test.
#pragma once

#include <functional>

#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// Lends worker threads of the process. They start when first wanted and stay, so that a call need not wait
// for threads to start. After a fork the child process starts its own.
class Workers : public Executor {
 public:
  // The most threads that a caller gets.
  static constexpr int kMaxThreads = 64;

  // `threads` counts the caller's.
  explicit Workers(int threads);
  int Helpers() const override { return helpers_; }
  void Schedule(std::function<void()> task) override;

 private:
  int helpers_;
};

}  // namespace jax_softmax2p
