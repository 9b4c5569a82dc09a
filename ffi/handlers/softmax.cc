#include "ffi/ops/softmax.h"

#include <string_view>

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/handlers/read_logits.h"
#include "ffi/ops/algorithm.h"
#include "ffi/runtime/dispatch.h"

namespace jax_softmax2p {
namespace {

namespace ffi = xla::ffi;

ffi::Error HandleSoftmax(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                         ffi::Result<ffi::AnyBuffer> y, std::int64_t axis, std::string_view algorithm,
                         std::int64_t given, std::int64_t before, std::int64_t after) {
  constexpr const char* kName = "jax_softmax2p_softmax_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, *y}, axis);
  if (layout.has_error()) return layout.error();
  const LogitsAttributes attributes{axis, given, before, after};
  const ffi::Error error = CheckOperands(kName, operands, attributes);
  if (error.failure()) return error;
  const std::optional<Algorithm> chosen = FindAlgorithm(algorithm);
  if (!chosen) {
    return ffi::Error::InvalidArgument(std::string(kName) + ": " + UnknownAlgorithm(algorithm));
  }
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, x.element_type(), [&](auto zero) {
    using E = decltype(zero);
    E* const results = static_cast<E*>(y->untyped_data());
    if (attributes.None()) {
      Softmax(*choice.kernels, executor, *chosen, static_cast<const E*>(x.untyped_data()), results, *layout);
      return ffi::Error::Success();
    }
    const ffi::ErrorOr<Logits<E>> logits = ReadLogits<E>(kName, x, *layout, operands, attributes);
    if (logits.has_error()) return logits.error();
    SoftmaxOfLogits(*choice.kernels, executor, *chosen, *logits, results);
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_softmax_v1, NoThrow<HandleSoftmax>{},
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::int64_t>("axis")
                                  .Attr<std::string_view>("algorithm")
                                  .Attr<std::int64_t>("operands")
                                  .Attr<std::int64_t>("before")
                                  .Attr<std::int64_t>("after"));

}  // namespace jax_softmax2p
