#include "ffi/runtime/log_sum.h"

#include <initializer_list>

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/handlers/logits.h"
#include "ffi/runtime/dispatch.h"

namespace jax_softmax2p {
namespace {

namespace ffi = xla::ffi;

// Whether a buffer has an element of the compute type of x, or what `type` says, for every row of x.
ffi::Error CheckOnePerRow(const char* handler, const char* name, const ffi::AnyBuffer& x,
                          const ffi::AnyBuffer& buffer, ffi::DataType type) {
  std::int64_t rows = 1;
  const auto dims = x.dimensions();
  for (std::size_t d = 0; d + 1 < dims.size(); ++d) rows *= dims[d];
  if (static_cast<std::int64_t>(buffer.element_count()) == rows && buffer.element_type() == type) {
    return ffi::Error::Success();
  }
  return ffi::Error::InvalidArgument(std::string(handler) + ": " + name +
                                     " must have one element a row, of the type that goes with x's");
}

ffi::DataType ComputeTypeOf(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::DataType::F64 ? ffi::DataType::F64 : ffi::DataType::F32;
}

ffi::Error HandleLogSum(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                        ffi::Result<ffi::AnyBuffer> high, ffi::Result<ffi::AnyBuffer> low, std::int64_t given,
                        std::int64_t before, std::int64_t after) {
  constexpr const char* kName = "jax_softmax2p_log_sum_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x}, -1);
  if (layout.has_error()) return layout.error();
  for (const ffi::Error& error : {CheckOnePerRow(kName, "high", x, *high, ComputeTypeOf(x)),
                                  CheckOnePerRow(kName, "low", x, *low, ComputeTypeOf(x))}) {
    if (error.failure()) return error;
  }
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, x.element_type(), [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeOf<E>;
    const ffi::ErrorOr<Logits<E>> logits = ReadLogits<E>(kName, x, operands, {given, before, after});
    if (logits.has_error()) return logits.error();
    LogSum(*choice.kernels, executor, *logits, static_cast<T*>(high->untyped_data()),
           static_cast<T*>(low->untyped_data()));
    return ffi::Error::Success();
  });
}

ffi::Error HandleLogSoftmax(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                            ffi::Result<ffi::AnyBuffer> y, std::int64_t given, std::int64_t before,
                            std::int64_t after) {
  constexpr const char* kName = "jax_softmax2p_log_softmax_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, *y}, -1);
  if (layout.has_error()) return layout.error();
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, x.element_type(), [&](auto zero) {
    using E = decltype(zero);
    const ffi::ErrorOr<Logits<E>> logits = ReadLogits<E>(kName, x, operands, {given, before, after});
    if (logits.has_error()) return logits.error();
    LogSoftmax(*choice.kernels, executor, *logits, static_cast<E*>(y->untyped_data()));
    return ffi::Error::Success();
  });
}

// `labels` has no elements where there are none.
ffi::Error HandleLogSumVjp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer high, ffi::AnyBuffer low,
                           ffi::AnyBuffer factor, ffi::AnyBuffer labels, ffi::RemainingArgs operands,
                           ffi::Result<ffi::AnyBuffer> y, std::int64_t given, std::int64_t before,
                           std::int64_t after) {
  constexpr const char* kName = "jax_softmax2p_log_sum_vjp_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, *y}, -1);
  if (layout.has_error()) return layout.error();
  const ffi::DataType compute = ComputeTypeOf(x);
  for (const ffi::Error& error :
       {CheckOnePerRow(kName, "high", x, high, compute), CheckOnePerRow(kName, "low", x, low, compute),
        CheckOnePerRow(kName, "factor", x, factor, compute)}) {
    if (error.failure()) return error;
  }
  const bool labelled = labels.element_count() != 0;
  if (labelled) {
    const ffi::Error error = CheckOnePerRow(kName, "labels", x, labels, ffi::DataType::S32);
    if (error.failure()) return error;
  }
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, x.element_type(), [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeOf<E>;
    const ffi::ErrorOr<Logits<E>> logits = ReadLogits<E>(kName, x, operands, {given, before, after});
    if (logits.has_error()) return logits.error();
    LogSumVjp(*choice.kernels, executor, *logits, static_cast<const T*>(high.untyped_data()),
              static_cast<const T*>(low.untyped_data()), static_cast<const T*>(factor.untyped_data()),
              labelled ? static_cast<const std::int32_t*>(labels.untyped_data()) : nullptr,
              static_cast<E*>(y->untyped_data()));
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_log_sum_v1, HandleLogSum,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::int64_t>("operands")
                                  .Attr<std::int64_t>("before")
                                  .Attr<std::int64_t>("after"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_log_softmax_v1, HandleLogSoftmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::int64_t>("operands")
                                  .Attr<std::int64_t>("before")
                                  .Attr<std::int64_t>("after"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_log_sum_vjp_v1, HandleLogSumVjp,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::int64_t>("operands")
                                  .Attr<std::int64_t>("before")
                                  .Attr<std::int64_t>("after"));

}  // namespace jax_softmax2p
