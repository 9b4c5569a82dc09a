#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/runtime/dispatch.h"
#include "ffi/runtime/rows.h"

namespace jax_softmax2p {
namespace {

namespace ffi = xla::ffi;

ffi::Error SoftmaxJacobian(ffi::ThreadPool pool, ffi::AnyBuffer y, ffi::AnyBuffer t,
                           ffi::Result<ffi::AnyBuffer> out) {
  constexpr const char* kName = "jax_softmax2p_softmax_jacobian_v1";
  const ffi::ErrorOr<RowShape> shape = CommonRowShape(kName, {y, t, *out});
  if (shape.has_error()) return shape.error();
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, y.element_type(), [&](auto zero) {
    using T = decltype(zero);
    JacobianRows(choice.kernels->Of<T>(), executor, y.typed_data<T>(), t.typed_data<T>(),
                 out->typed_data<T>(), shape->rows, shape->n);
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_softmax_jacobian_v1, SoftmaxJacobian,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace jax_softmax2p
