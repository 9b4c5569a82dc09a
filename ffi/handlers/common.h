// What every handler needs: XLA's thread pool as an Executor, and the checks of its buffers.
#pragma once

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <string>
#include <utility>

#include "ffi/runtime/parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jax_softmax2p {

class XlaExecutor : public Executor {
 public:
  explicit XlaExecutor(xla::ffi::ThreadPool pool) : pool_(std::move(pool)) {}

  // One of the pool's threads is the caller's, or stands in for it.
  int Helpers() const override { return static_cast<int>(pool_.num_threads()) - 1; }
  // ThreadPool::Schedule keeps the type that it is given: it must be a value, not a reference.
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  xla::ffi::ThreadPool pool_;
};

// A buffer as rows along its last axis.
struct RowShape {
  std::int64_t rows = 0;
  std::int64_t n = 0;
};

// Fails unless all buffers have one shape, of rank 1 at least, and one element type.
xla::ffi::ErrorOr<RowShape> CommonRowShape(const char* handler,
                                           std::initializer_list<xla::ffi::AnyBuffer> buffers);

// Calls body(T{}) with the C++ type of a buffer's elements; fails for one that has no kernels.
// No exception gets past it: the caller is C.
template <typename Body>
xla::ffi::Error DispatchType(const char* handler, xla::ffi::DataType type, const Body& body) {
  try {
    switch (type) {
      case xla::ffi::DataType::F32:
        return body(float{});
      case xla::ffi::DataType::F64:
        return body(double{});
      default:
        return xla::ffi::Error::InvalidArgument(std::string(handler) +
                                                ": operands must be float32 or float64, not XLA type " +
                                                std::to_string(static_cast<int>(type)));
    }
  } catch (const std::exception& error) {
    return xla::ffi::Error::Internal(std::string(handler) + ": " + error.what());
  }
}

}  // namespace jax_softmax2p
