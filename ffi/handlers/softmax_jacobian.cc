#include "ffi/ops/softmax_jacobian.h"

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/runtime/dispatch.h"

namespace jax_softmax2p {
namespace {

namespace ffi = xla::ffi;

ffi::Error SoftmaxJacobian(ffi::ThreadPool pool, ffi::AnyBuffer y, ffi::AnyBuffer t,
                           ffi::Result<ffi::AnyBuffer> out, std::int64_t axis) {
  constexpr const char* kName = "jax_softmax2p_softmax_jacobian_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {y, t, *out}, axis);
  if (layout.has_error()) return layout.error();
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, y.element_type(), [&](auto zero) {
    using E = decltype(zero);
    Jacobian(choice.kernels->Of<E>(), executor, static_cast<const E*>(y.untyped_data()),
             static_cast<const E*>(t.untyped_data()), static_cast<E*>(out->untyped_data()), *layout);
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax2p_softmax_jacobian_v1, NoThrow<SoftmaxJacobian>{},
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::int64_t>("axis"));

}  // namespace jax_softmax2p
