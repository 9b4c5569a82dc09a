"""logsumexp_p: log(sum(exp(logits))) along one axis, and the two primitives of which its derivative is made.

It has two results, the logsumexp as hi + lo: hi is its rounding. A derivative is recomputed from x and
this pair, so nothing of x's size is kept for it, and e^(z - hi - lo) is as exact as a softmax: with hi
alone, a logsumexp of 100 would cost 32 ULP.

logsumexp_jvp_p and logsumexp_vjp_p are linear, in t and in factor, and each other's transposes:

    logsumexp_jvp(t) = sum(p·t) - t[label]        logsumexp_vjp(factor) = factor·(p - one_hot(label))

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
from jax_softmax2p.primitives.operands import OperandSpec

logsumexp_p = Primitive("softmax2p_logsumexp")
logsumexp_p.multiple_results = True
logsumexp_jvp_p = Primitive("softmax2p_logsumexp_jvp")
logsumexp_vjp_p = Primitive("softmax2p_logsumexp_vjp")


def logsumexp(x: jax.Array, *operands: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
    """The logsumexp of logits of an inexact dtype, as (hi, lo), in the dtype that x is computed in.

    Args:
      x: and the operands: see ``primitives.operands``.
      params: axis (negative), spec, implementation.
    """
    hi, lo = logsumexp_derivatives.bind(logsumexp_p, x, *operands, **params)
    return hi, lo


def logsumexp_jvp(x, hi, lo, labels, t, *operands, **params: Any) -> jax.Array:
    """The derivative of the logsumexp along t, a tangent of the logits, of x's shape."""
    return logsumexp_derivatives.bind(logsumexp_jvp_p, x, hi, lo, labels, t, *operands, **params)


def logsumexp_vjp(x, hi, lo, labels, factor, *operands, **params: Any) -> jax.Array:
    """The transpose of :func:`logsumexp_jvp`, applied to factor."""
    return logsumexp_derivatives.bind(logsumexp_vjp_p, x, hi, lo, labels, factor, *operands, **params)


def logsumexp_of_shards(hi: jax.Array, lo: jax.Array, *, implementation: str | None, **_) -> Any:
    """The logsumexp of rows from those of their parts, which lie along the first axis, as (hi, lo).

    As exact as hi + lo is: of e^(z + rest), with rest below an ULP of z, it takes two terms of the series.
    """
    params = {"axis": -hi.ndim, "spec": OperandSpec(), "implementation": implementation}
    largest = collectives.largest_of(hi)
    z, rest = collectives.relative(hi, lo, largest)
    log, log_rest = logsumexp(z, **params)
    weighted = logsumexp_jvp(z, log, log_rest, no_labels(), rest, **params)
    return collectives.plus(largest, log, log_rest + weighted)


def logsumexp_abstract_eval(x, *operands, axis, spec, implementation):
    result = registration.without_axis(x, axis, registration.compute_dtype(x.dtype))
    return result, result


def logsumexp_jvp_rule(primals, tangents, *, spec: OperandSpec, **params):
    x, *operands = primals
    hi, lo = logsumexp(*primals, spec=spec, **params)
    t = tangent_of_logits(x, tangents[0], spec.named(primals), spec.named(tangents), spec)
    hi_dot = logsumexp_jvp(x, hi, lo, no_labels(), t, *operands, spec=spec, **params)
    return (hi, lo), (hi_dot, ad.Zero(jax.typeof(lo).to_tangent_aval()))


def logsumexp_batch_rule(operands, dims, **params):
    return logsumexp(*registration.batch_logits(operands, dims), **params), (0, 0)


def logsumexp_jvp_change(change, x, hi, lo, labels, t, *operands, **params):
    return logsumexp_jvp(x, hi, lo, no_labels(), (change * t).astype(x.dtype), *operands, **params)


def logsumexp_vjp_change(change, x, hi, lo, labels, factor, *operands, **params):
    weights = logsumexp_vjp(x, hi, lo, no_labels(), factor, *operands, **params)
    return (weights * change).astype(x.dtype)


def _across_devices(names, *operands, **params):
    return collectives.reduce_lse(*logsumexp(*operands, **params), names)


def _jvp_across_devices(names, x, hi, lo, labels, t, *operands, **params):
    labels = collectives.local_labels(labels, x.shape[params["axis"]], names)
    return jax.lax.psum(logsumexp_jvp(x, hi, lo, labels, t, *operands, **params), names)


def _vjp_across_devices(names, x, hi, lo, labels, factor, *operands, **params):
    labels = collectives.local_labels(labels, x.shape[params["axis"]], names)
    return logsumexp_vjp(x, hi, lo, labels, factor, *operands, **params)


registration.define_eager_evaluation(logsumexp_p, logsumexp_derivatives.PARAMS)
logsumexp_p.def_abstract_eval(logsumexp_abstract_eval)
ad.primitive_jvps[logsumexp_p] = logsumexp_jvp_rule
batching.primitive_batchers[logsumexp_p] = logsumexp_batch_rule
registration.define_lowerings(
    logsumexp_p,
    native.LOG_SUM_TARGET,
    reference.logsumexp,
    logsumexp_derivatives.attributes,
    sharded_rule=_across_devices,
)

logsumexp_derivatives.define_rules(
    logsumexp_jvp_p, logsumexp_vjp_p, logsumexp_jvp_change, lambda x, hi, *_: hi
)
registration.define_lowerings(
    logsumexp_jvp_p,
    native.LOG_SUM_JVP_TARGET,
    reference.logsumexp_jvp,
    logsumexp_derivatives.attributes,
    sharded_rule=_jvp_across_devices,
    num_leading_operands=logsumexp_derivatives.NUM_LEADING_OPERANDS,
)

logsumexp_derivatives.define_rules(logsumexp_vjp_p, logsumexp_jvp_p, logsumexp_vjp_change, lambda x, *_: x)
registration.define_lowerings(
    logsumexp_vjp_p,
    native.LOG_SUM_VJP_TARGET,
    reference.logsumexp_vjp,
    logsumexp_derivatives.attributes,
    sharded_rule=_vjp_across_devices,
    num_leading_operands=logsumexp_derivatives.NUM_LEADING_OPERANDS,
)
