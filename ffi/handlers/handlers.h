// The XLA FFI handlers. A handler's name, operands and attributes are frozen once released: compiled and
// exported programs refer to them. A change of meaning takes a new name, with the next version number.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_softmax2p {

// y = softmax(x) along the last axis. Attribute algorithm: string, see runtime/algorithm.h.
extern "C" XLA_FFI_Error* jax_softmax2p_softmax_v1(XLA_FFI_CallFrame* call_frame);

// out = y·(t - <y, t>) along the last axis.
extern "C" XLA_FFI_Error* jax_softmax2p_softmax_jacobian_v1(XLA_FFI_CallFrame* call_frame);

}  // namespace jax_softmax2p
