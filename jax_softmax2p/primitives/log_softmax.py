"""log_softmax_p: the logarithm of the softmax of logits along one axis; and the primitives of its derivative.

It has the log-sum as two more results, as log_sum_p has. A derivative is recomputed from x and these: from
the result, whose rounding an exponential multiplies, it would be less exact.

log_softmax_jvp_p and log_softmax_vjp_p are linear in t and each other's transposes:

    log_softmax_jvp(t) = t - sum(p·t)        log_softmax_vjp(t) = t - p·sum(t)

with p = e^(z - high - low).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import common
from jax_softmax2p.primitives.log_sum import (
    attributes,
    batch_linear,
    change_of_log,
    log_sum_jvp,
    log_sum_vjp,
    no_labels,
)
from jax_softmax2p.primitives.logits import Given
from jax_softmax2p.primitives.zero_masked import tangent_of_logits, zero_masked

log_softmax_p = Primitive("softmax2p_log_softmax")
log_softmax_p.multiple_results = True
log_softmax_jvp_p = Primitive("softmax2p_log_softmax_jvp")
log_softmax_vjp_p = Primitive("softmax2p_log_softmax_vjp")


def log_softmax(x: jax.Array, *operands: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logarithm of the softmax of logits of an inexact dtype, and their log-sum as (high, low).

    Args:
      x: and the operands: see ``primitives.logits``.
      params: axis (negative), given, implementation.
    """
    y, high, low = log_softmax_p.bind(*common.with_common_varying_axes(x, *operands), **params)
    return y, high, low


def log_softmax_jvp(x, high, low, labels, t, *operands, **params: Any) -> jax.Array:
    """The derivative along t, a tangent of the logits, of x's shape. There are no labels."""
    return log_softmax_jvp_p.bind(
        *common.with_common_varying_axes(x, high, low, labels, t, *operands), **params
    )


def log_softmax_vjp(x, high, low, labels, t, *operands, **params: Any) -> jax.Array:
    """The transpose of :func:`log_softmax_jvp`, applied to t, which is to be 0 where logits are masked."""
    return log_softmax_vjp_p.bind(
        *common.with_common_varying_axes(x, high, low, labels, t, *operands), **params
    )


def _abstract_eval(x, *operands, axis, given, implementation):
    log_sum = common.without_axis(x, axis, common.compute_dtype(x.dtype))
    return x.update(weak_type=False), log_sum, log_sum


def _jvp(primals, tangents, *, given: Given, **params):
    x, *operands = primals
    y, high, low = log_softmax(*primals, given=given, **params)
    t = tangent_of_logits(x, tangents[0], given.named(primals), given.named(tangents), given)
    of_log_sum = (x, high, low, no_labels(), t, *operands)
    y_dot = log_softmax_jvp(*of_log_sum, given=given, **params)
    y_dot = zero_masked(y_dot, given.named(primals).get("where"), given.band)
    high_dot = log_sum_jvp(*of_log_sum, given=given, **params)
    return (y, high, low), (y_dot, high_dot, ad.Zero(jax.typeof(low).to_tangent_aval()))


def _batch(operands, dims, **params):
    return log_softmax(*common.batch_logits(operands, dims), **params), (0, 0, 0)


def _linear_abstract_eval(x, high, low, labels, t, *operands, axis, given, implementation):
    return t.update(weak_type=False)


def _less_dot(x, high, low, labels, t, *operands, axis, **params):
    dot = log_sum_jvp(x, high, low, labels, t, *operands, axis=axis, **params)
    return (t.astype(dot.dtype) - jnp.expand_dims(dot, axis)).astype(t.dtype)


def _jvp_of_jvp(primals, tangents, *, axis, given: Given, implementation):
    params = {"axis": axis, "given": given, "implementation": implementation}
    *of_p, t = primals[:5]
    operands = primals[5:]
    terms = []
    change = change_of_log(primals, tangents, given, axis)
    if change is not None:
        weighted = (change * t).astype(t.dtype)
        dot = -jnp.expand_dims(log_sum_jvp(*of_p, weighted, *operands, **params), axis)
        terms.append(jnp.broadcast_to(dot, t.shape).astype(t.dtype))
    if not isinstance(tangents[4], ad.Zero):
        terms.append(log_softmax_jvp(*of_p, tangents[4], *operands, **params))
    return log_softmax_jvp(*primals, **params), sum(terms[1:], terms[0])


def _jvp_of_vjp(primals, tangents, *, axis, given: Given, implementation):
    params = {"axis": axis, "given": given, "implementation": implementation}
    *of_p, t = primals[:5]
    operands = primals[5:]
    terms = []
    change = change_of_log(primals, tangents, given, axis)
    if change is not None:
        weights = log_sum_vjp(*of_p, jnp.sum(t.astype(of_p[1].dtype), axis), *operands, **params)
        terms.append(-(weights * change).astype(t.dtype))
    if not isinstance(tangents[4], ad.Zero):
        terms.append(log_softmax_vjp(*of_p, tangents[4], *operands, **params))
    return log_softmax_vjp(*primals, **params), sum(terms[1:], terms[0])


def _transpose_to(transposed):
    def rule(cotangent, x, high, low, labels, t, *operands, **params):
        assert ad.is_undefined_primal(t), "linear in t alone"
        if isinstance(cotangent, ad.Zero):
            of_t: Any = ad.Zero(t.aval)
        else:
            of_t = transposed(x, high, low, labels, cotangent, *operands, **params)
        return [None, None, None, None, of_t, *(None for _ in operands)]

    return rule


_PARAMS = ("axis", "given", "implementation")

common.define_eager_evaluation(log_softmax_p, _PARAMS)
log_softmax_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[log_softmax_p] = _jvp
batching.primitive_batchers[log_softmax_p] = _batch
common.define_lowerings(log_softmax_p, native.LOG_SOFTMAX_TARGET, reference.log_softmax, attributes)

common.define_eager_evaluation(log_softmax_jvp_p, _PARAMS)
log_softmax_jvp_p.def_abstract_eval(_linear_abstract_eval)
ad.primitive_jvps[log_softmax_jvp_p] = _jvp_of_jvp
ad.primitive_transposes[log_softmax_jvp_p] = _transpose_to(log_softmax_vjp)
batching.primitive_batchers[log_softmax_jvp_p] = batch_linear(log_softmax_jvp)
mlir.register_lowering(log_softmax_jvp_p, mlir.lower_fun(_less_dot, multiple_results=False))

common.define_eager_evaluation(log_softmax_vjp_p, _PARAMS)
log_softmax_vjp_p.def_abstract_eval(_linear_abstract_eval)
ad.primitive_jvps[log_softmax_vjp_p] = _jvp_of_vjp
ad.primitive_transposes[log_softmax_vjp_p] = _transpose_to(log_softmax_jvp)
batching.primitive_batchers[log_softmax_vjp_p] = batch_linear(log_softmax_vjp)
common.define_lowerings(
    log_softmax_vjp_p, native.LOG_SOFTMAX_VJP_TARGET, reference.log_softmax_vjp, attributes, own_operands=4
)
