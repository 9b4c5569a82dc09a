// What every handler needs: its binding, XLA's thread pool as an Executor, and the checks of its buffers.
#pragma once

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "ffi/base/half.h"
#include "ffi/base/layout.h"
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

// A handler as XLA may call it: no exception gets past it, since the caller is C.
template <auto handle>
struct NoThrow {
  template <typename... Operands>
  xla::ffi::Error operator()(Operands&&... operands) const {
    try {
      return handle(std::forward<Operands>(operands)...);
    } catch (const std::bad_alloc&) {
      // The message is so short that it needs no memory itself.
      return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, "out of memory");
    } catch (const std::exception& error) {
      return xla::ffi::Error::Internal(error.what());
    }
  }
};

// The binding that goes with a handler's parameters. XLA infers bindings likewise, but knows none for thread
// pools, remaining arguments and remaining results. A class stands for all attributes:
// XLA_FFI_REGISTER_STRUCT_ATTR_DECODING says how to decode it. It is decoded from the call's own attributes,
// not from one that is a dictionary.
template <typename Parameter, typename Binding>
auto BindOne(Binding&& binding) {
  namespace ffi = xla::ffi;
  if constexpr (std::is_same_v<Parameter, ffi::ThreadPool>) {
    return std::move(binding).template Ctx<ffi::ThreadPool>();
  } else if constexpr (std::is_same_v<Parameter, ffi::AnyBuffer>) {
    return std::move(binding).template Arg<ffi::AnyBuffer>();
  } else if constexpr (std::is_same_v<Parameter, ffi::RemainingArgs>) {
    return std::move(binding).RemainingArgs();
  } else if constexpr (std::is_same_v<Parameter, ffi::Result<ffi::AnyBuffer>>) {
    return std::move(binding).template Ret<ffi::AnyBuffer>();
  } else if constexpr (std::is_same_v<Parameter, ffi::RemainingRets>) {
    return std::move(binding).RemainingRets();
  } else {
    return std::move(binding).template Attrs<Parameter>();
  }
}
template <typename Parameter, typename... Rest, typename Binding>
auto BindAll(Binding&& binding) {
  if constexpr (sizeof...(Rest) == 0) {
    return BindOne<Parameter>(std::move(binding));
  } else {
    return BindAll<Rest...>(BindOne<Parameter>(std::move(binding)));
  }
}
template <typename... Parameters>
auto BindingOf(xla::ffi::Error (*)(Parameters...)) {
  return BindAll<Parameters...>(xla::ffi::Ffi::Bind());
}

// Defines the FFI handler `symbol` as the function `handle`, which takes, in this order, the thread pool, the
// buffers of the arguments, those of the results, and the attributes.
#define SOFTMAX2P_DEFINE_HANDLER(symbol, handle) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, NoThrow<handle>{}, BindingOf(handle))

template <typename T>
T* Data(xla::ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// The number of elements of a buffer; none where a size is negative, or where memory cannot hold so many.
std::optional<std::int64_t> ElementCount(const xla::ffi::AnyBuffer& buffer);

// The layout of all buffers along the axis. Fails unless they have one shape, of rank 1 at least, and one
// element type, and the axis, counted from the end as -1, -2, ..., is one of theirs.
xla::ffi::ErrorOr<Layout> CommonLayout(const char* handler,
                                       std::initializer_list<xla::ffi::AnyBuffer> buffers, std::int64_t axis);

// Calls body(E{}) with the C++ type of a buffer's elements; fails for one that has no kernels.
template <typename Body>
xla::ffi::Error DispatchType(const char* handler, xla::ffi::DataType type, const Body& body) {
  switch (type) {
    case xla::ffi::DataType::F32:
      return body(float{});
    case xla::ffi::DataType::F64:
      return body(double{});
    case xla::ffi::DataType::BF16:
      return body(BFloat16{});
    case xla::ffi::DataType::F16:
      return body(Float16{});
    default:
      return xla::ffi::Error::InvalidArgument(std::string(handler) +
                                              ": operands must be float32, float64, bfloat16 or float16, "
                                              "not XLA type " +
                                              std::to_string(static_cast<int>(type)));
  }
}

}  // namespace jax_softmax2p
