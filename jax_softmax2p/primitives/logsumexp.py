"""log_sum_p: log(sum(exp(logits))) along one axis, and the two primitives of which its derivative is made.

It has two results, the log-sum as high + low: high is its rounding. A derivative is recomputed from x and
this pair, so nothing of x's size is kept for it, and e^(z - high - low) is as exact as a softmax: with high
alone, a log-sum of 100 would cost 32 ULP.

log_sum_jvp_p and log_sum_vjp_p are linear, in t and in factor, and each other's transposes:

    log_sum_jvp(t) = sum(p·t) - t[label]        log_sum_vjp(factor) = factor·(p - one_hot(label))

Without labels, what concerns these falls away. See ``primitives.logsumexp_derivatives``.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import collectives, logsumexp_derivatives, registration
from jax_softmax2p.primitives.logsumexp_derivatives import no_labels
from jax_softmax2p.primitives.mask_to_zero import tangent_of_logits
from jax_softmax2p.primitives.operands import Given

log_sum_p = Primitive("softmax2p_log_sum")
log_sum_p.multiple_results = True
log_sum_jvp_p = Primitive("softmax2p_log_sum_jvp")
log_sum_vjp_p = Primitive("softmax2p_log_sum_vjp")


def log_sum(x: jax.Array, *operands: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
    """The log-sum of logits of an inexact dtype, as (high, low), in the dtype that x is computed in.

    Args:
      x: and the operands: see ``primitives.operands``.
      params: axis (negative), given, implementation.
    """
    high, low = logsumexp_derivatives.bind(log_sum_p, x, *operands, **params)
    return high, low


def log_sum_jvp(x, high, low, labels, t, *operands, **params: Any) -> jax.Array:
    """The derivative of the log-sum along t, a tangent of the logits, of x's shape."""
    return logsumexp_derivatives.bind(log_sum_jvp_p, x, high, low, labels, t, *operands, **params)


def log_sum_vjp(x, high, low, labels, factor, *operands, **params: Any) -> jax.Array:
    """The transpose of :func:`log_sum_jvp`, applied to factor."""
    return logsumexp_derivatives.bind(log_sum_vjp_p, x, high, low, labels, factor, *operands, **params)


def log_sum_of_parts(high: jax.Array, low: jax.Array, *, implementation: str | None, **_) -> Any:
    """The log-sum of rows from those of their parts, which lie along the first axis, as (high, low).

    As exact as high + low is: of e^(z + rest), with rest below an ULP of z, it takes two terms of the series.
    """
    params = {"axis": -high.ndim, "given": Given(), "implementation": implementation}
    largest = collectives.largest_of(high)
    z, rest = collectives.relative(high, low, largest)
    log, log_rest = log_sum(z, **params)
    weighted = log_sum_jvp(z, log, log_rest, no_labels(), rest, **params)
    return collectives.plus(largest, log, log_rest + weighted)


def _abstract_eval(x, *operands, axis, given, implementation):
    result = registration.without_axis(x, axis, registration.compute_dtype(x.dtype))
    return result, result


def _jvp(primals, tangents, *, given: Given, **params):
    x, *operands = primals
    high, low = log_sum(*primals, given=given, **params)
    t = tangent_of_logits(x, tangents[0], given.named(primals), given.named(tangents), given)
    high_dot = log_sum_jvp(x, high, low, no_labels(), t, *operands, given=given, **params)
    return (high, low), (high_dot, ad.Zero(jax.typeof(low).to_tangent_aval()))


def _batch(operands, dims, **params):
    return log_sum(*registration.batch_logits(operands, dims), **params), (0, 0)


def _change_of_jvp(change, x, high, low, labels, t, *operands, **params):
    return log_sum_jvp(x, high, low, no_labels(), (change * t).astype(x.dtype), *operands, **params)


def _change_of_vjp(change, x, high, low, labels, factor, *operands, **params):
    weights = log_sum_vjp(x, high, low, no_labels(), factor, *operands, **params)
    return (weights * change).astype(x.dtype)


def _across_devices(names, *operands, **params):
    return collectives.reduce_log_sums(*log_sum(*operands, **params), names)


def _jvp_across_devices(names, x, high, low, labels, t, *operands, **params):
    labels = collectives.own_labels(labels, x.shape[params["axis"]], names)
    return jax.lax.psum(log_sum_jvp(x, high, low, labels, t, *operands, **params), names)


def _vjp_across_devices(names, x, high, low, labels, factor, *operands, **params):
    labels = collectives.own_labels(labels, x.shape[params["axis"]], names)
    return log_sum_vjp(x, high, low, labels, factor, *operands, **params)


registration.define_eager_evaluation(log_sum_p, logsumexp_derivatives.PARAMS)
log_sum_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[log_sum_p] = _jvp
batching.primitive_batchers[log_sum_p] = _batch
registration.define_lowerings(
    log_sum_p,
    native.LOG_SUM_TARGET,
    reference.log_sum,
    logsumexp_derivatives.attributes,
    across_devices=_across_devices,
)

logsumexp_derivatives.define_rules(log_sum_jvp_p, log_sum_vjp_p, _change_of_jvp, lambda x, high, *_: high)
registration.define_lowerings(
    log_sum_jvp_p,
    native.LOG_SUM_JVP_TARGET,
    reference.log_sum_jvp,
    logsumexp_derivatives.attributes,
    across_devices=_jvp_across_devices,
    own_operands=logsumexp_derivatives.OWN_OPERANDS,
)

logsumexp_derivatives.define_rules(log_sum_vjp_p, log_sum_jvp_p, _change_of_vjp, lambda x, *_: x)
registration.define_lowerings(
    log_sum_vjp_p,
    native.LOG_SUM_VJP_TARGET,
    reference.log_sum_vjp,
    logsumexp_derivatives.attributes,
    across_devices=_vjp_across_devices,
    own_operands=logsumexp_derivatives.OWN_OPERANDS,
)
