#include "ffi/ops/softmax_jacobian.h"

#include "ffi/handlers/common.h"
#include "ffi/handlers/handlers.h"
#include "ffi/runtime/dispatch.h"

namespace jax_softmax2p {

struct JacobianAttributes {
  std::int64_t axis;
};

namespace {

namespace ffi = xla::ffi;

ffi::Error HandleSoftmaxJacobian(ffi::ThreadPool pool, ffi::AnyBuffer y, ffi::AnyBuffer t,
                                 ffi::Result<ffi::AnyBuffer> out, JacobianAttributes attributes) {
  constexpr const char* kName = "jax_softmax2p_softmax_jacobian_v1";
  const ffi::ErrorOr<Layout> layout = CommonLayout(kName, {y, t, *out}, attributes.axis);
  if (layout.has_error()) return layout.error();
  const KernelChoice& choice = ActiveKernels();
  if (choice.kernels == nullptr) return ffi::Error::InvalidArgument(choice.error);
  XlaExecutor executor(pool);
  return DispatchType(kName, y.element_type(), [&](auto zero) {
    using E = decltype(zero);
    SoftmaxJacobian(choice.kernels->Of<E>(), executor, Data<const E>(y), Data<const E>(t), Data<E>(*out),
                    *layout);
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace jax_softmax2p

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_softmax2p::JacobianAttributes, StructMember<std::int64_t>("axis"));

namespace jax_softmax2p {

SOFTMAX2P_DEFINE_HANDLER(jax_softmax2p_softmax_jacobian_v1, HandleSoftmaxJacobian);

}  // namespace jax_softmax2p
