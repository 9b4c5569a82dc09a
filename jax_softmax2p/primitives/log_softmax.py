"""log_softmax_p: the logarithm of the softmax of logits along one axis; and the primitives of its derivative.

It has the logsumexp as two more results, as logsumexp_p has. A derivative is recomputed from x and these: from
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
from jax_softmax2p.primitives.logsumexp import logsumexp, logsumexp_jvp, logsumexp_vjp
from jax_softmax2p.primitives.logsumexp_derivatives import no_labels
from jax_softmax2p.primitives.mask_to_zero import mask_to_zero, tangent_of_logits
from jax_softmax2p.primitives.operands import OperandSpec, operand_mask

log_softmax_p = Primitive("softmax2p_log_softmax")
log_softmax_p.multiple_results = True
log_softmax_jvp_p = Primitive("softmax2p_log_softmax_jvp")
log_softmax_vjp_p = Primitive("softmax2p_log_softmax_vjp")


def log_softmax(x: jax.Array, *operands: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logarithm of the softmax of logits of an inexact dtype, and their logsumexp as (hi, lo).

    Args:
      x: and the operands: see ``primitives.operands``.
      params: axis (negative), spec, implementation.
    """
    y, hi, lo = logsumexp_derivatives.bind(log_softmax_p, x, *operands, **params)
    return y, hi, lo


def log_softmax_abstract_eval(x, *operands, axis, spec, implementation):
    logsumexp = registration.without_axis(x, axis, registration.compute_dtype(x.dtype))
    return x.update(weak_type=False), logsumexp, logsumexp


def log_softmax_jvp_rule(primals, tangents, *, spec: OperandSpec, **params):
    x, *operands = primals
    y, hi, lo = log_softmax(*primals, spec=spec, **params)
    t = tangent_of_logits(x, tangents[0], spec.named(primals), spec.named(tangents), spec)
    of_log_sum = (x, hi, lo, no_labels(), t, *operands)
    y_dot = logsumexp_derivatives.bind(log_softmax_jvp_p, *of_log_sum, spec=spec, **params)
    # Its transpose wants cotangents that are 0 where logits are masked.
    y_dot = mask_to_zero(y_dot, spec.named(primals).get("where"), spec.band)
    hi_dot = logsumexp_jvp(*of_log_sum, spec=spec, **params)
    return (y, hi, lo), (y_dot, hi_dot, ad.Zero(jax.typeof(lo).to_tangent_aval()))


def log_softmax_batch_rule(operands, dims, **params):
    return log_softmax(*registration.batch_logits(operands, dims), **params), (0, 0, 0)


def log_softmax_jvp_lowering(x, hi, lo, labels, t, *operands, axis, **params):
    dot = logsumexp_jvp(x, hi, lo, labels, t, *operands, axis=axis, **params)
    return (t.astype(dot.dtype) - jnp.expand_dims(dot, axis)).astype(t.dtype)


def log_softmax_jvp_change(change, x, hi, lo, labels, t, *operands, axis, **params):
    weighted = (change * t).astype(t.dtype)
    dot = logsumexp_jvp(x, hi, lo, labels, weighted, *operands, axis=axis, **params)
    return jnp.broadcast_to(-jnp.expand_dims(dot, axis), t.shape).astype(t.dtype)


def log_softmax_vjp_change(change, x, hi, lo, labels, t, *operands, axis, **params):
    factor = jnp.sum(t.astype(hi.dtype), axis)
    weights = logsumexp_vjp(x, hi, lo, labels, factor, *operands, axis=axis, **params)
    return -(weights * change).astype(t.dtype)


def subtract_lse(x, hi, lo, *operands, axis, spec: OperandSpec, **_):
    """The logits less hi + lo, -inf where masked, and NaN throughout rows with a +inf."""
    named = spec.named(operands)
    named["where"] = operand_mask(x.shape, named.get("where"), spec.band)
    return reference.subtract_lse(x, hi, lo, axis, **named)


def _across_devices(names, x, *operands, **params):
    hi, lo = collectives.reduce_lse(*logsumexp(x, *operands, **params), names)
    return subtract_lse(x, hi, lo, *operands, **params), hi, lo


def _vjp_across_devices(names, x, hi, lo, labels, t, *operands, axis, **params):
    total = jax.lax.psum(jnp.sum(t.astype(hi.dtype), axis), names)
    weights = logsumexp_vjp(x, hi, lo, labels, total, *operands, axis=axis, **params)
    return (t - weights).astype(t.dtype)


registration.define_eager_evaluation(log_softmax_p, logsumexp_derivatives.PARAMS)
log_softmax_p.def_abstract_eval(log_softmax_abstract_eval)
ad.primitive_jvps[log_softmax_p] = log_softmax_jvp_rule
batching.primitive_batchers[log_softmax_p] = log_softmax_batch_rule
registration.define_lowerings(
    log_softmax_p,
    native.LOG_SOFTMAX_TARGET,
    reference.log_softmax,
    logsumexp_derivatives.attributes,
    sharded_rule=_across_devices,
)

logsumexp_derivatives.define_rules(
    log_softmax_jvp_p, log_softmax_vjp_p, log_softmax_jvp_change, lambda x, *_: x
)
mlir.register_lowering(log_softmax_jvp_p, mlir.lower_fun(log_softmax_jvp_lowering, multiple_results=False))

logsumexp_derivatives.define_rules(
    log_softmax_vjp_p, log_softmax_jvp_p, log_softmax_vjp_change, lambda x, *_: x
)
registration.define_lowerings(
    log_softmax_vjp_p,
    native.LOG_SOFTMAX_VJP_TARGET,
    reference.log_softmax_vjp,
    logsumexp_derivatives.attributes,
    sharded_rule=_vjp_across_devices,
    num_leading_operands=logsumexp_derivatives.NUM_LEADING_OPERANDS,
)
