"""log_sum_p: log(sum(exp(logits))) along one axis, and the two primitives of which its derivative is made.

It has two results, the log-sum as high + low: high is its rounding. A derivative is recomputed from x and
this pair, so nothing of x's size is kept for it, and e^(z - high - low) is as exact as a softmax: with high
alone, a log-sum of 100 would cost 32 ULP.

log_sum_jvp_p and log_sum_vjp_p are linear, in t and in factor, and each other's transposes:

    log_sum_jvp(t) = sum(p·t) - t[label]        log_sum_vjp(factor) = factor·(p - one_hot(label))

with p = e^(z - high - low). Without labels (an empty array), what concerns these falls away.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_softmax2p import native, reference
from jax_softmax2p.primitives import common
from jax_softmax2p.primitives.logits import Given
from jax_softmax2p.primitives.zero_masked import tangent_of_logits

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


def log_sum_vjp(x, high, low, labels, factor, *operands, **params: Any) -> jax.Array:
    """The transpose of :func:`log_sum_jvp`, applied to factor."""
    return log_sum_vjp_p.bind(
        *common.with_common_varying_axes(x, high, low, labels, factor, *operands), **params
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
    t = tangent_of_logits(x, tangents[0], given.named(primals), given.named(tangents), given)
    high_dot = log_sum_jvp(x, high, low, no_labels(), t, *operands, given=given, **params)
    return (high, low), (high_dot, ad.Zero(jax.typeof(low).to_tangent_aval()))


def _log_sum_batch(operands, dims, **params):
    return log_sum(*common.batch_logits(operands, dims), **params), (0, 0)


def _jvp_abstract_eval(x, high, low, labels, t, *operands, axis, given, implementation):
    return high.update(weak_type=False)


def _vjp_abstract_eval(x, high, low, labels, factor, *operands, axis, given, implementation):
    return x.update(weak_type=False)


def change_of_log(primals: Any, tangents: Any, given: Given, axis: int) -> jax.Array | None:
    """By how much z - high - low changes, None if it does not, for operands x, high, low and more."""
    x, x_dot = primals[0], tangents[0]
    named, named_dots = given.named(primals), given.named(tangents)
    wide = primals[1].dtype
    parts = []
    dots = [x_dot, *(named_dots[name] for name in named_dots if name != "where")]
    if any(not isinstance(dot, ad.Zero) for dot in dots):
        parts.append(tangent_of_logits(x, x_dot, named, named_dots, given).astype(wide))
    parts += [-jnp.expand_dims(dot, axis) for dot in tangents[1:3] if not isinstance(dot, ad.Zero)]
    return sum(parts[1:], parts[0]) if parts else None


def _jvp_of_jvp(primals, tangents, *, axis, given: Given, implementation):
    params = {"axis": axis, "given": given, "implementation": implementation}
    x, high, low, _, t, *operands = primals
    result = log_sum_jvp(*primals, **params)
    terms = []
    change = change_of_log(primals, tangents, given, axis)
    if change is not None:
        weighted = (change * t).astype(x.dtype)
        terms.append(log_sum_jvp(x, high, low, no_labels(), weighted, *operands, **params))
    if not isinstance(tangents[4], ad.Zero):
        terms.append(log_sum_jvp(*primals[:4], tangents[4], *operands, **params))
    return result, sum(terms[1:], terms[0])


def _jvp_of_vjp(primals, tangents, *, axis, given: Given, implementation):
    params = {"axis": axis, "given": given, "implementation": implementation}
    x, high, low, labels, factor, *operands = primals
    result = log_sum_vjp(*primals, **params)
    terms = []
    change = change_of_log(primals, tangents, given, axis)
    if change is not None:
        weights = log_sum_vjp(x, high, low, no_labels(), factor, *operands, **params)
        terms.append((weights * change).astype(x.dtype))
    if not isinstance(tangents[4], ad.Zero):
        terms.append(log_sum_vjp(x, high, low, labels, tangents[4], *operands, **params))
    return result, sum(terms[1:], terms[0])


def _transpose_jvp(cotangent, x, high, low, labels, t, *operands, **params):
    assert ad.is_undefined_primal(t), "linear in t alone"
    if isinstance(cotangent, ad.Zero):
        of_t: Any = ad.Zero(t.aval)
    else:
        of_t = log_sum_vjp(x, high, low, labels, cotangent, *operands, **params).astype(t.aval.dtype)
    return [None, None, None, None, of_t, *(None for _ in operands)]


def _transpose_vjp(cotangent, x, high, low, labels, factor, *operands, **params):
    assert ad.is_undefined_primal(factor), "linear in factor alone"
    if isinstance(cotangent, ad.Zero):
        of_factor: Any = ad.Zero(factor.aval)
    else:
        of_factor = log_sum_jvp(x, high, low, labels, cotangent, *operands, **params)
    return [None, None, None, None, of_factor, *(None for _ in operands)]


def batch_linear(bind: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The batching rule of primitives with the operands x, high, low, labels, and a tangent or cotangent."""

    def rule(operands, dims, **params):
        batched = common.batch_logits(operands, dims, own_operands=4)
        if operands[3].shape == NO_LABELS:
            batched[3] = operands[3]
        return bind(*batched, **params), 0

    return rule


def attributes(*, given: Given, **_) -> dict[str, Any]:
    """Those of the FFI targets, from the primitives' parameters."""
    return given.attributes()


_PARAMS = ("axis", "given", "implementation")

common.define_eager_evaluation(log_sum_p, _PARAMS)
log_sum_p.def_abstract_eval(_log_sum_abstract_eval)
ad.primitive_jvps[log_sum_p] = _log_sum_jvp_rule
batching.primitive_batchers[log_sum_p] = _log_sum_batch
common.define_lowerings(log_sum_p, native.LOG_SUM_TARGET, reference.log_sum, attributes)

common.define_eager_evaluation(log_sum_jvp_p, _PARAMS)
log_sum_jvp_p.def_abstract_eval(_jvp_abstract_eval)
ad.primitive_jvps[log_sum_jvp_p] = _jvp_of_jvp
ad.primitive_transposes[log_sum_jvp_p] = _transpose_jvp
batching.primitive_batchers[log_sum_jvp_p] = batch_linear(log_sum_jvp)
common.define_lowerings(
    log_sum_jvp_p, native.LOG_SUM_JVP_TARGET, reference.log_sum_jvp, attributes, own_operands=4
)

common.define_eager_evaluation(log_sum_vjp_p, _PARAMS)
log_sum_vjp_p.def_abstract_eval(_vjp_abstract_eval)
ad.primitive_jvps[log_sum_vjp_p] = _jvp_of_vjp
ad.primitive_transposes[log_sum_vjp_p] = _transpose_vjp
batching.primitive_batchers[log_sum_vjp_p] = batch_linear(log_sum_vjp)
common.define_lowerings(
    log_sum_vjp_p, native.LOG_SUM_VJP_TARGET, reference.log_sum_vjp, attributes, own_operands=4
)
