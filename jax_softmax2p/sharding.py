"""Softmaxes along an axis whose parts lie on several devices, inside ``jax.shard_map``.

Each device reads its part once, for the logsumexp of that. One all-gather brings every part's to every device;
what follows from the logsumexp of the whole row is each part's own affair.

Sums of exponentials travel as their logarithms, hi + lo: pairs as large as (mantissa, exponent), good to
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
from jax_softmax2p.primitives.log_softmax import subtract_lse
from jax_softmax2p.primitives.logsumexp_derivatives import no_labels
from jax_softmax2p.primitives.mask_to_zero import tangent_of_logits
from jax_softmax2p.primitives.softmax import softmax_from_lse

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
    return subtract_lse(x, *_log_sum(static, x, *operands), *operands, **dict(static[1]))


def logsumexp(logits: Logits) -> tuple[Array, Array]:
    """The logsumexp of whole rows, as (hi, lo)."""
    return _log_sum(*_prepared(logits))


def cross_entropy(logits: Logits, labels: Array) -> Array:
    """The logsumexp of whole rows less the logit at the label, which counts the elements of the whole row.

    0 for rows without a True in their mask.
    """
    static, x, *operands = _prepared(logits)
    return _cross_entropy(static, x, labels.astype(jnp.int32), *operands)[0]


def _prepared(logits: Logits) -> tuple[Any, ...]:
    """What the functions below take: the static argument, then the operands."""
    axis_name, params = logits.axis_name, dict(logits.params)
    assert axis_name is not None, "for rows in parts"
    collectives.check_derivatives(logits.operands[0], axis_name)
    first = collectives.shard_index(axis_name) * logits.operands[0].shape[params["axis"]]
    operands, params["spec"] = collectives.with_mask(logits.operands, params["spec"], 0, first)
    return (axis_name, tuple(params.items())), *(collectives.as_varying(x, axis_name) for x in operands)


def _tangent(static: _Static, primals: Any, tangents: Any) -> Array:
    """That of the logits."""
    spec = dict(static[1])["spec"]
    dots = [ad.Zero(dot.aval) if isinstance(dot, SymbolicZero) else dot for dot in tangents]
    return tangent_of_logits(primals[0], dots[0], spec.named(primals), spec.named(dots), spec)


def _gather(static: _Static, x: Array, operands: Any, *more: Array) -> tuple[Array, Array, list[Array]]:
    """The logsumexp of whole rows; and what else each part has to say of its rows, with the parts in front."""
    names, params = static
    own = logsumexp_primitives.logsumexp(x, *operands, **dict(params))
    parts = jnp.stack(jnp.broadcast_arrays(*own, *(one.astype(own[0].dtype) for one in more)))
    gathered = collectives.gather(parts, names)
    hi, lo, *rest = (gathered[:, i] for i in range(len(parts)))
    return *logsumexp_primitives.logsumexp_of_shards(hi, lo, **dict(params)), rest


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_sum(static: _Static, x: Array, *operands: Array) -> tuple[Array, Array]:
    hi, lo, _ = _gather(static, x, operands)
    return hi, lo


@functools.partial(_log_sum.defjvp, symbolic_zeros=True)
def _log_sum_jvp(static: _Static, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, *operands = primals
    hi, lo = _log_sum(static, *primals)
    dot = _dot(static, x, hi, lo, no_labels(), _tangent(static, primals, tangents), *operands)
    return (hi, lo), (dot, jnp.zeros_like(lo))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(static: _Static, x: Array, *operands: Array) -> Array:
    hi, lo = _log_sum(static, x, *operands)
    return softmax_from_lse(x, hi, lo, *operands, **dict(static[1]))


@functools.partial(_softmax.defjvp, symbolic_zeros=True)
def _softmax_jvp(static: _Static, primals: Any, tangents: Any) -> tuple[Array, Array]:
    names, params = static
    y = _softmax(static, *primals)
    total = lambda dot: jax.lax.psum(dot, names)
    t = _tangent(static, primals, tangents)
    return y, reference.softmax_jacobian(y, t, dict(params)["axis"], total=total)


# The logsumexp, and which rows have a True in their mask, are results for the sake of the derivatives.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cross_entropy(static: _Static, x: Array, labels: Array, *operands: Array) -> tuple[Array, ...]:
    names, params = static
    axis, spec = dict(params)["axis"], dict(params)["spec"]
    size = x.shape[axis]
    own = jnp.expand_dims(collectives.local_labels(labels, size, names), axis)
    # One past the end, where it is another part's, gives 0; of all parts together one adds the label's logit.
    logit = jnp.take_along_axis(x, own, axis, mode="fill", fill_value=0).squeeze(axis)
    masks = [jnp.any(spec.named(operands)["where"], axis)] if "where" in spec.names else []
    hi, lo, (logits, *masks) = _gather(static, x, operands, logit, *masks)
    whole = size * logits.shape[0]
    logit = jnp.where((labels >= -whole) & (labels < whole), jnp.sum(logits, 0), jnp.nan)
    loss = (hi - logit) + lo
    there = jnp.max(masks[0], 0) if masks else jnp.ones_like(loss)
    return jnp.where(there > 0, loss, 0), hi, lo, there


@functools.partial(_cross_entropy.defjvp, symbolic_zeros=True)
def _cross_entropy_jvp(static: _Static, primals: Any, tangents: Any) -> tuple[Any, Any]:
    names, params = static
    x, labels, *operands = primals
    loss, hi, lo, there = _cross_entropy(static, *primals)
    t = jnp.zeros_like(x) if isinstance(tangents[0], SymbolicZero) else tangents[0]
    own = collectives.local_labels(labels, x.shape[dict(params)["axis"]], names)
    dot, hi_dot = (_dot(static, x, hi, lo, which, t, *operands) for which in (own, no_labels()))
    loss_dot = jnp.where(there > 0, dot, 0)
    return (loss, hi, lo, there), (loss_dot, hi_dot, jnp.zeros_like(lo), jnp.zeros_like(there))


def _dot(static: _Static, *operands: Array) -> Array:
    """The derivative of the logsumexp of whole rows, less the label's tangent, from those of their parts."""
    names, params = static
    return jax.lax.psum(logsumexp_primitives.logsumexp_jvp(*operands, **dict(params)), names)
