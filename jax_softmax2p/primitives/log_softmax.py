"""log_softmax_p: the logarithm of the softmax of logits along one axis; and the primitives of its derivative.

It has the log-sum as two more results, as log_sum_p has. A derivative is recomputed from x and these: from
the result, whose rounding an exponential multiplies, it would be less exact.

log_softmax_jvp_p and log_softmax_vjp_p are linear in t and each other's transposes:

    log_softmax_jvp(t) = t - sum(p·t)        log_softmax_vjp(t) = t - p·sum(t)

There are no labels. See ``primitives.logsumexp_derivatives``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import collectives, logsumexp_derivatives, registration
from jax_softmax2p.primitives.logsumexp import log_sum, log_sum_jvp, log_sum_vjp
from jax_softmax2p.primitives.logsumexp_derivatives import no_labels
from jax_softmax2p.primitives.mask_to_zero import tangent_of_logits, zero_masked
from jax_softmax2p.primitives.operands import Given, mask_of

log_softmax_p = Primitive("softmax2p_log_softmax")
log_softmax_p.multiple_results = True
log_softmax_jvp_p = Primitive("softmax2p_log_softmax_jvp")
log_softmax_vjp_p = Primitive("softmax2p_log_softmax_vjp")


def log_softmax(x: jax.Array, *operands: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logarithm of the softmax of logits of an inexact dtype, and their log-sum as (high, low).

    Args:
      x: and the operands: see ``primitives.operands``.
      params: axis (negative), given, implementation.
    """
    y, high, low = logsumexp_derivatives.bind(log_softmax_p, x, *operands, **params)
    return y, high, low


def _abstract_eval(x, *operands, axis, given, implementation):
    log_sum = registration.without_axis(x, axis, registration.compute_dtype(x.dtype))
    return x.update(weak_type=False), log_sum, log_sum


def _jvp(primals, tangents, *, given: Given, **params):
    x, *operands = primals
    y, high, low = log_softmax(*primals, given=given, **params)
    t = tangent_of_logits(x, tangents[0], given.named(primals), given.named(tangents), given)
    of_log_sum = (x, high, low, no_labels(), t, *operands)
    y_dot = logsumexp_derivatives.bind(log_softmax_jvp_p, *of_log_sum, given=given, **params)
    # Its transpose wants cotangents that are 0 where logits are masked.
    y_dot = zero_masked(y_dot, given.named(primals).get("where"), given.band)
    high_dot = log_sum_jvp(*of_log_sum, given=given, **params)
    return (y, high, low), (y_dot, high_dot, ad.Zero(jax.typeof(low).to_tangent_aval()))


def _batch(operands, dims, **params):
    return log_softmax(*registration.batch_logits(operands, dims), **params), (0, 0, 0)


def _less_dot(x, high, low, labels, t, *operands, axis, **params):
    dot = log_sum_jvp(x, high, low, labels, t, *operands, axis=axis, **params)
    return (t.astype(dot.dtype) - jnp.expand_dims(dot, axis)).astype(t.dtype)


def _change_of_jvp(change, x, high, low, labels, t, *operands, axis, **params):
    weighted = (change * t).astype(t.dtype)
    dot = log_sum_jvp(x, high, low, labels, weighted, *operands, axis=axis, **params)
    return jnp.broadcast_to(-jnp.expand_dims(dot, axis), t.shape).astype(t.dtype)


def _change_of_vjp(change, x, high, low, labels, t, *operands, axis, **params):
    factor = jnp.sum(t.astype(high.dtype), axis)
    weights = log_sum_vjp(x, high, low, labels, factor, *operands, axis=axis, **params)
    return -(weights * change).astype(t.dtype)


def less_log_sum(x, high, low, *operands, axis, given: Given, **_):
    """The logits less high + low, -inf where masked, and NaN throughout rows with a +inf."""
    named = given.named(operands)
    named["where"] = mask_of(x.shape, named.get("where"), given.band)
    return reference.less_log_sum(x, high, low, axis, **named)


def _across_devices(names, x, *operands, **params):
    high, low = collectives.reduce_log_sums(*log_sum(x, *operands, **params), names)
    return less_log_sum(x, high, low, *operands, **params), high, low


def _vjp_across_devices(names, x, high, low, labels, t, *operands, axis, **params):
    total = jax.lax.psum(jnp.sum(t.astype(high.dtype), axis), names)
    weights = log_sum_vjp(x, high, low, labels, total, *operands, axis=axis, **params)
    return (t - weights).astype(t.dtype)


registration.define_eager_evaluation(log_softmax_p, logsumexp_derivatives.PARAMS)
log_softmax_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[log_softmax_p] = _jvp
batching.primitive_batchers[log_softmax_p] = _batch
registration.define_lowerings(
    log_softmax_p,
    native.LOG_SOFTMAX_TARGET,
    reference.log_softmax,
    logsumexp_derivatives.attributes,
    across_devices=_across_devices,
)

logsumexp_derivatives.define_rules(log_softmax_jvp_p, log_softmax_vjp_p, _change_of_jvp, lambda x, *_: x)
mlir.register_lowering(log_softmax_jvp_p, mlir.lower_fun(_less_dot, multiple_results=False))

logsumexp_derivatives.define_rules(log_softmax_vjp_p, log_softmax_jvp_p, _change_of_vjp, lambda x, *_: x)
registration.define_lowerings(
    log_softmax_vjp_p,
    native.LOG_SOFTMAX_VJP_TARGET,
    reference.log_softmax_vjp,
    logsumexp_derivatives.attributes,
    across_devices=_vjp_across_devices,
    own_operands=logsumexp_derivatives.OWN_OPERANDS,
)
