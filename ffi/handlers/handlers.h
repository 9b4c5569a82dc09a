// The XLA FFI handlers. A handler's name, operands and attributes are frozen once released: compiled and
// exported programs refer to them. A change of meaning takes a new name, with the next version number.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_softmax2p {

// Logits are x and the operands that are applied to it: scale·x + bias where the mask lets it through. The
// attribute `operands` (1: scale, 2: bias, 4: where, added up) says which there are. They come last among the
// arguments, have x's rank and broadcast against it; scale has size 1 along the axis and the type that x is
// computed in. The attributes `before` and `after` are a band: of row i of a matrix, the elements from
// i - before to i + after take part; a negative attribute is no limit. The attribute `axis` counts from the
// end; a band needs -1. Results that belong to a row are counted over x's other dimensions.

// y = softmax(logits). Attribute `algorithm`: see ops/algorithm.h.
extern "C" XLA_FFI_Error* jax_softmax2p_softmax_v1(XLA_FFI_CallFrame* call_frame);

// y = log(softmax(logits)), and the lse of every row as hi + lo, both of the type that x is computed in.
extern "C" XLA_FFI_Error* jax_softmax2p_log_softmax_v1(XLA_FFI_CallFrame* call_frame);

// hi + lo alone.
extern "C" XLA_FFI_Error* jax_softmax2p_log_sum_v1(XLA_FFI_CallFrame* call_frame);

// Derivatives of these: see LogSumExpJvp and so on in ops/logsumexp.h. Arguments: x, hi, lo, labels (int32;
// without elements where there are none), and t or, for log_sum_vjp, factor.
extern "C" XLA_FFI_Error* jax_softmax2p_log_sum_jvp_v1(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* jax_softmax2p_log_sum_vjp_v1(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* jax_softmax2p_log_softmax_vjp_v1(XLA_FFI_CallFrame* call_frame);

// out = y·(t - <y, t>) along the axis. The only attribute is `axis`.
extern "C" XLA_FFI_Error* jax_softmax2p_softmax_jacobian_v1(XLA_FFI_CallFrame* call_frame);

// Attention: output and lse of query (B, T, N, H), key (B, S, K, H) and value (B, S, K, H'), where K divides
// N. The batch of any of them may be 1. Then scale, one element, and the operands that the attribute
// `operands` says there are: 1: bias, and 2: mask, which broadcast to (B, N, T, S); 4 and 8: int32 lengths of
// queries and of keys; 16: dropout mask, False for weights that become 0, which broadcasts, too; 32: sinks
// (B, 1, N, 1). Scale, bias, sinks and lse are of the type that the arrays are computed in; lse is (B, T, N,
// 1), or (B, T, N, 2) where it has the rest that its rounding leaves as well. `before` and `after` are a
// band, as above; `soft_cap` is a float64, and 0 for none. See Attend in ops/attention.h.
extern "C" XLA_FFI_Error* jax_softmax2p_attention_v1(XLA_FFI_CallFrame* call_frame);

// The gradients of attention in query, key and value. Arguments: query, key, value and scale, output and lse,
// the cotangent of the output, and then the operands. All have one batch. A fourth result is the gradient in
// the bias, which must not broadcast over keys then.
extern "C" XLA_FFI_Error* jax_softmax2p_attention_vjp_v1(XLA_FFI_CallFrame* call_frame);

}  // namespace jax_softmax2p
