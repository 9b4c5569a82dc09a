#include <string_view>

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/runtime/algorithm.h"
#include "ffi/runtime/dispatch.h"
#include "ffi/runtime/rows.h"

namespace jax_softmax2p {
namespace {

namespace ffi = xla::ffi;

ffi::Error Softmax(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y,
                   std::string_view algorithm) {
  constexpr const char* kName = "jax_softmax2p_softmax_v1";
  const ffi::ErrorOr<RowShape> shape = CommonRowShape(kName, {x, *y});
  if (shape.has_error()) return shape.error();
  const std::optional<Algorithm> chosen = FindAlgorithm(algorithm);
  if (!chosen) {
    return ffi::Error::InvalidArgument(std::string(kName) + ": " + UnknownAlgorithm(algorithm));
  }
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    SoftmaxRows(choice.kernels->Of<T>(), executor, *chosen, x.typed_data<T>(), y->typed_data<T>(),
                shape->rows, shape->n);
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_softmax_v1, Softmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("algorithm"));

}  // namespace jax_softmax2p
