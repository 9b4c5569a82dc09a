"""Softmaxes along an axis whose parts lie on several devices, inside ``jax.shard_map``.

Each device reads its part once, for the log-sum of that. One all-gather brings every part's to every device;
what follows from the log-sum of the whole row is each part's own affair.

Sums of exponentials travel as their logarithms, high + low: pairs as large as (mantissa, exponent), good to
2^-42 for float32, where a mantissa of 24 bits would take half of the 2 ULP that results may be off by.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad

from jax_softmax2p import reference
from jax_softmax2p.arguments import Logits
from jax_softmax2p.primitives import collectives
from jax_softmax2p.primitives import logsumexp as logsumexp_primitives
from jax_softmax2p.primitives.log_softmax import less_log_sum
from jax_softmax2p.primitives.logsumexp_derivatives import no_labels
from jax_softmax2p.primitives.mask_to_zero import tangent_of_logits
from jax_softmax2p.primitives.softmax import softmax_of_log_sum

Array = jax.Array

# What the functions with derivatives of their own take as one argument: the axis's name and the primitives'
# parameters, as a hashable value.
_Static = tuple[collectives.Names, tuple[tuple[str, Any], ...]]


def softmax(logits: Logits) -> Array:
    """The softmax of this part of the rows, in the merged x's shape."""
    return _softmax(*_prepared(logits))


def log_softmax(logits: Logits) -> Array:
    """The logarithm of the softmax of this part of the rows, in the merged x's shape."""
    static, x, *operands = _prepared(logits)
    return less_log_sum(x, *_log_sum(static, x, *operands), *operands, **dict(static[1]))


def log_sum(logits: Logits) -> tuple[Array, Array]:
    """The log-sum of whole rows, as (high, low)."""
    return _log_sum(*_prepared(logits))


def cross_entropy(logits: Logits, labels: Array) -> Array:
    """The log-sum of whole rows less the logit at the label, which counts the elements of the whole row.

    0 for rows without a True in their mask.
    """
    static, x, *operands = _prepared(logits)
    return _cross_entropy(static, x, labels.astype(jnp.int32), *operands)[0]


def _prepared(logits: Logits) -> tuple[Any, ...]:
    """What the functions below take: the static argument, then the operands."""
    axis_name, params = logits.axis_name, dict(logits.params)
    assert axis_name is not None, "for rows in parts"
    collectives.check_derivatives(logits.operands[0], axis_name)
    first = collectives.part_number(axis_name) * logits.operands[0].shape[params["axis"]]
    operands, params["given"] = collectives.with_mask(logits.operands, params["given"], 0, first)
    return (axis_name, tuple(params.items())), *(collectives.as_varying(x, axis_name) for x in operands)


def _tangent(static: _Static, primals: Any, tangents: Any) -> Array:
    """That of the logits."""
    given = dict(static[1])["given"]
    dots = [ad.Zero(dot.aval) if isinstance(dot, SymbolicZero) else dot for dot in tangents]
    return tangent_of_logits(primals[0], dots[0], given.named(primals), given.named(dots), given)


def _gather(static: _Static, x: Array, operands: Any, *more: Array) -> tuple[Array, Array, list[Array]]:
    """The log-sum of whole rows; and what else each part has to say of its rows, with the parts in front."""
    names, params = static
    own = logsumexp_primitives.log_sum(x, *operands, **dict(params))
    parts = jnp.stack(jnp.broadcast_arrays(*own, *(one.astype(own[0].dtype) for one in more)))
    gathered = collectives.gather(parts, names)
    high, low, *rest = (gathered[:, i] for i in range(len(parts)))
    return *logsumexp_primitives.log_sum_of_parts(high, low, **dict(params)), rest


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_sum(static: _Static, x: Array, *operands: Array) -> tuple[Array, Array]:
    high, low, _ = _gather(static, x, operands)
    return high, low


@functools.partial(_log_sum.defjvp, symbolic_zeros=True)
def _log_sum_jvp(static: _Static, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, *operands = primals
    high, low = _log_sum(static, *primals)
    dot = _dot(static, x, high, low, no_labels(), _tangent(static, primals, tangents), *operands)
    return (high, low), (dot, jnp.zeros_like(low))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(static: _Static, x: Array, *operands: Array) -> Array:
    high, low = _log_sum(static, x, *operands)
    return softmax_of_log_sum(x, high, low, *operands, **dict(static[1]))


@functools.partial(_softmax.defjvp, symbolic_zeros=True)
def _softmax_jvp(static: _Static, primals: Any, tangents: Any) -> tuple[Array, Array]:
    names, params = static
    y = _softmax(static, *primals)
    total = lambda dot: jax.lax.psum(dot, names)
    t = _tangent(static, primals, tangents)
    return y, reference.softmax_jacobian(y, t, dict(params)["axis"], total=total)


# The log-sum, and which rows have a True in their mask, are results for the sake of the derivatives.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cross_entropy(static: _Static, x: Array, labels: Array, *operands: Array) -> tuple[Array, ...]:
    names, params = static
    axis, given = dict(params)["axis"], dict(params)["given"]
    size = x.shape[axis]
    own = jnp.expand_dims(collectives.own_labels(labels, size, names), axis)
    # One past the end, where it is another part's, gives 0; of all parts together one adds the label's logit.
    logit = jnp.take_along_axis(x, own, axis, mode="fill", fill_value=0).squeeze(axis)
    masks = [jnp.any(given.named(operands)["where"], axis)] if "where" in given.names else []
    high, low, (logits, *masks) = _gather(static, x, operands, logit, *masks)
    whole = size * logits.shape[0]
    logit = jnp.where((labels >= -whole) & (labels < whole), jnp.sum(logits, 0), jnp.nan)
    loss = (high - logit) + low
    there = jnp.max(masks[0], 0) if masks else jnp.ones_like(loss)
    return jnp.where(there > 0, loss, 0), high, low, there


@functools.partial(_cross_entropy.defjvp, symbolic_zeros=True)
def _cross_entropy_jvp(static: _Static, primals: Any, tangents: Any) -> tuple[Any, Any]:
    names, params = static
    x, labels, *operands = primals
    loss, high, low, there = _cross_entropy(static, *primals)
    t = jnp.zeros_like(x) if isinstance(tangents[0], SymbolicZero) else tangents[0]
    own = collectives.own_labels(labels, x.shape[dict(params)["axis"]], names)
    dot, high_dot = (_dot(static, x, high, low, which, t, *operands) for which in (own, no_labels()))
    loss_dot = jnp.where(there > 0, dot, 0)
    return (loss, high, low, there), (loss_dot, high_dot, jnp.zeros_like(low), jnp.zeros_like(there))


def _dot(static: _Static, *operands: Array) -> Array:
    """The derivative of the log-sum of whole rows, less the label's tangent, from those of their parts."""
    names, params = static
    return jax.lax.psum(logsumexp_primitives.log_sum_jvp(*operands, **dict(params)), names)
