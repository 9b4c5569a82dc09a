"""log_sum_p: log(sum(exp(logits))) along one axis, and the two primitives of which its derivative is made.

It has two results, the log-sum as high + low: high is its rounding. A derivative is recomputed from x and
this pair, so nothing of x's size is kept for it, and e^(z - high - low) is as exact as a softmax: with high
alone, a log-sum of 100 would cost 32 ULP.

log_sum_jvp_p and log_sum_vjp_p are linear, in t and in factor, and each other's transposes:

    log_sum_jvp(t) = sum(p·t) - t[label]        log_sum_vjp(factor) = factor·(p - one_hot(label))

with p = e^(z - high - low). Without labels (an empty array), what concerns these falls away.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import common, logits
from jax_softmax2p.primitives.logits import Given

log_sum_p = Primitive("softmax2p_log_sum")
log_sum_p.multiple_results = True
log_sum_jvp_p = Primitive("softmax2p_log_sum_jvp")
log_sum_vjp_p = Primitive("softmax2p_log_sum_vjp")

NO_LABELS = (0,)
"""The shape of an array of labels that are not there."""


def log_sum(x: jax.Array, *operands: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
    """The log-sum of logits of an inexact dtype, as (high, low), in the dtype that x is computed in.

    Args:
      x: and the operands: see ``primitives.logits``.
      params: axis (negative), given, implementation.
    """
    high, low = log_sum_p.bind(*common.with_common_varying_axes(x, *operands), **params)
    return high, low


def log_sum_jvp(x, high, low, labels, t, *operands, **params: Any) -> jax.Array:
    """The derivative of the log-sum along t, a tangent of the logits, of x's shape."""
    return log_sum_jvp_p.bind(*common.with_common_varying_axes(x, high, low, labels, t, *operands), **params)


def log_sum_vjp(x, high, low, factor, labels, *operands, **params: Any) -> jax.Array:
    """The transpose of :func:`log_sum_jvp`, applied to factor."""
    return log_sum_vjp_p.bind(
        *common.with_common_varying_axes(x, high, low, factor, labels, *operands), **params
    )


def no_labels() -> jax.Array:
    """What stands for labels that are not there."""
    return jnp.zeros(NO_LABELS, jnp.int32)


def _log_sum_abstract_eval(x, *operands, axis, given, implementation):
    result = common.without_axis(x, axis, common.compute_dtype(x.dtype))
    return result, result


def _log_sum_jvp_rule(primals, tangents, *, given: Given, **params):
    x, *operands = primals
    high, low = log_sum(*primals, given=given, **params)
    t = logits.tangent(x, tangents[0], given.named(primals), given.named(tangents), given)
    high_dot = log_sum_jvp(x, high, low, no_labels(), t, *operands, given=given, **params)
    return (high, low), (high_dot, ad.Zero(jax.typeof(low).to_tangent_aval()))


def _log_sum_batch(operands, dims, **params):
    return log_sum(*common.batch_logits(operands, dims), **params), (0, 0)


def _jvp_abstract_eval(x, high, low, labels, t, *operands, axis, given, implementation):
    return high.update(weak_type=False)


def _vjp_abstract_eval(x, high, low, factor, labels, *operands, axis, given, implementation):
    return x.update(weak_type=False)


def _weighted_tangent(primals, tangents, high, low, given: Given, axis: int):
    """By how much z - high - low changes; and whether it does."""
    x, x_dot = primals[0], tangents[0]
    named, named_dots = given.named(primals), given.named(tangents)
    wide = high.dtype
    parts = []
    dots = [x_dot, *(named_dots[name] for name in named_dots if name != "where")]
    if any(not isinstance(dot, ad.Zero) for dot in dots):
        parts.append(logits.tangent(x, x_dot, named, named_dots, given).astype(wide))
    parts += [-jnp.expand_dims(dot, axis) for dot in tangents[1:3] if not isinstance(dot, ad.Zero)]
    return sum(parts[1:], parts[0]) if parts else None


def _jvp_of_jvp(primals, tangents, *, axis, given: Given, implementation):
    params = {"axis": axis, "given": given, "implementation": implementation}
    x, high, low, _, t, *operands = primals
    result = log_sum_jvp(*primals, **params)
    terms = []
    change = _weighted_tangent(primals, tangents, high, low, given, axis)
    if change is not None:
        weighted = (change * t).astype(x.dtype)
        terms.append(log_sum_jvp(x, high, low, no_labels(), weighted, *operands, **params))
    if not isinstance(tangents[4], ad.Zero):
        terms.append(log_sum_jvp(*primals[:4], tangents[4], *operands, **params))
    return result, sum(terms[1:], terms[0])


def _jvp_of_vjp(primals, tangents, *, axis, given: Given, implementation):
    params = {"axis": axis, "given": given, "implementation": implementation}
    x, high, low, factor, labels, *operands = primals
    result = log_sum_vjp(*primals, **params)
    terms = []
    change = _weighted_tangent(primals, tangents, high, low, given, axis)
    if change is not None:
        weights = log_sum_vjp(x, high, low, factor, no_labels(), *operands, **params)
        terms.append((weights * change).astype(x.dtype))
    if not isinstance(tangents[3], ad.Zero):
        terms.append(log_sum_vjp(x, high, low, tangents[3], labels, *operands, **params))
    return result, sum(terms[1:], terms[0])


def _transpose_jvp(cotangent, x, high, low, labels, t, *operands, **params):
    assert ad.is_undefined_primal(t), "linear in t alone"
    if isinstance(cotangent, ad.Zero):
        of_t: Any = ad.Zero(t.aval)
    else:
        of_t = log_sum_vjp(x, high, low, cotangent, labels, *operands, **params).astype(t.aval.dtype)
    return [None, None, None, None, of_t, *(None for _ in operands)]


def _transpose_vjp(cotangent, x, high, low, factor, labels, *operands, **params):
    assert ad.is_undefined_primal(factor), "linear in factor alone"
    if isinstance(cotangent, ad.Zero):
        of_factor: Any = ad.Zero(factor.aval)
    else:
        of_factor = log_sum_jvp(x, high, low, labels, cotangent, *operands, **params)
    return [None, None, None, of_factor, None, *(None for _ in operands)]


def _batch_linear(bind, labels_at):
    def rule(operands, dims, **params):
        batched = common.batch_logits(operands, dims, own_operands=4)
        if dims[labels_at] is None and operands[labels_at].shape == NO_LABELS:
            batched[labels_at] = operands[labels_at]
        return bind(*batched, **params), 0

    return rule


def _attributes(*, axis, given: Given):
    return given.attributes()


_PARAMS = ("axis", "given", "implementation")

common.define_eager_evaluation(log_sum_p, _PARAMS)
log_sum_p.def_abstract_eval(_log_sum_abstract_eval)
ad.primitive_jvps[log_sum_p] = _log_sum_jvp_rule
batching.primitive_batchers[log_sum_p] = _log_sum_batch
common.define_lowerings(log_sum_p, native.LOG_SUM_TARGET, reference.log_sum, _attributes)

common.define_eager_evaluation(log_sum_jvp_p, _PARAMS)
log_sum_jvp_p.def_abstract_eval(_jvp_abstract_eval)
ad.primitive_jvps[log_sum_jvp_p] = _jvp_of_jvp
ad.primitive_transposes[log_sum_jvp_p] = _transpose_jvp
batching.primitive_batchers[log_sum_jvp_p] = _batch_linear(log_sum_jvp, labels_at=3)
common.define_lowerings(log_sum_jvp_p, None, reference.log_sum_jvp, _attributes, own_operands=4)

common.define_eager_evaluation(log_sum_vjp_p, _PARAMS)
log_sum_vjp_p.def_abstract_eval(_vjp_abstract_eval)
ad.primitive_jvps[log_sum_vjp_p] = _jvp_of_vjp
ad.primitive_transposes[log_sum_vjp_p] = _transpose_vjp
batching.primitive_batchers[log_sum_vjp_p] = _batch_linear(log_sum_vjp, labels_at=4)
common.define_lowerings(
    log_sum_vjp_p, native.LOG_SUM_VJP_TARGET, reference.log_sum_vjp, _attributes, own_operands=4
)
