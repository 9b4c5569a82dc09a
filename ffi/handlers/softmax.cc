#include "ffi/runtime/softmax.h"

#include <string_view>

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/runtime/algorithm.h"
#include "ffi/runtime/dispatch.h"

namespace jax_softmax2p {
namespace {

namespace ffi = xla::ffi;

ffi::Error HandleSoftmax(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y,
                         std::int64_t axis, std::string_view algorithm) {
  constexpr const char* kName = "jax_softmax2p_softmax_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {x, *y}, axis);
  if (layout.has_error()) return layout.error();
  const std::optional<Algorithm> chosen = FindAlgorithm(algorithm);
  if (!chosen) {
    return ffi::Error::InvalidArgument(std::string(kName) + ": " + UnknownAlgorithm(algorithm));
  }
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, x.element_type(), [&](auto zero) {
    using E = decltype(zero);
    Softmax(choice.kernels->Of<E>(), executor, *chosen, static_cast<const E*>(x.untyped_data()),
            static_cast<E*>(y->untyped_data()), *layout);
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_softmax_v1, HandleSoftmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::int64_t>("axis")
                                  .Attr<std::string_view>("algorithm"));

}  // namespace jax_softmax2p
