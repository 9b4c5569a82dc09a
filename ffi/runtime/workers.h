// Threads of our own, for callers who bring none: the NumPy entry points and the self-test.
#pragma once

#include <functional>

#include "ffi/runtime/parallel.h"

namespace jax_softmax2p {

// Lends some of the process's worker threads, which start when first wanted and stay, so that a call need not
// wait for threads to start. After a fork the child starts its own.
class Workers : public Executor {
 public:
  // Beyond so many threads a caller gets no more.
  static constexpr int kMaxThreads = 64;

  // `threads` counts the caller's.
  explicit Workers(int threads);
  int Helpers() const override { return helpers_; }
  void Schedule(std::function<void()> task) override;

 private:
  int helpers_;
};

}  // namespace jax_softmax2p
