"""logsumexp(a, b=factors): the logarithm of a sum of exponentials with factors of any sign.

The sum is that of exponentials relative to a reference point c of the row, e^(z - c)·b, which is a derivative
of logsumexp along b but for the point. c is the largest z, raised by the exponent of a factor that is far
from 1, so that neither what matters underflows nor anything overflows. It need not be exact, since
log|sum| + c holds for any c.
"""

import jax
import jax.numpy as jnp
import numpy as np

# By name: inside patch_jax_nn() the attribute of jax.nn is this package's function.
from jax.nn import logsumexp as logsumexp_of_jax

from jax_softmax2p import reference
from jax_softmax2p.arguments import Axis, Bias, Logits, Where, as_array, as_logits, as_mask, as_numeric_array
from jax_softmax2p.primitives.dispatch import Implementation, choose_path, refuse_native
from jax_softmax2p.primitives.logsumexp import logsumexp_jvp
from jax_softmax2p.primitives.logsumexp_derivatives import no_labels
from jax_softmax2p.primitives.mask_to_zero import mask_to_zero
from jax_softmax2p.primitives.operands import Band, operand_mask

Array = jax.Array

_LN2 = float(np.log(2))
_MAX_NEAR_EXPONENT = 32
"""Factors from 2^-32 to 2^32 do not move the reference point, which stays a logit, from which others are
subtracted with the least error. The exponents of all others are moved towards 0 by as much, so that e^(z - c)
is a normal number in float32 for every factor that is one."""


def logsumexp_with_factors(
    a: jax.typing.ArrayLike,
    b: jax.typing.ArrayLike | None,
    axis: Axis,
    where: Where,
    *,
    scale: jax.typing.ArrayLike | None,
    bias: Bias,
    keepdims: bool,
    return_sign: bool,
    implementation: Implementation | None,
) -> Array | tuple[Array, Array]:
    """The public logsumexp with factors b, or of complex a."""
    a = as_numeric_array(a, "a")
    factors = None if b is None else as_array(b, "b")
    z = _broadcast_with(a, factors, where)
    if factors is None or jnp.iscomplexobj(z) or jnp.iscomplexobj(factors):
        return _by_jax(z, factors, axis, where, scale, bias, keepdims, return_sign, implementation)
    z = z.astype(jnp.result_type(z, factors))
    band = where if isinstance(where, Band) else None
    if where is not None and band is None:
        factors = jnp.where(as_mask(where, z.shape, "a"), factors, 0)
    logits = as_logits(
        z,
        axis,
        factors != 0,
        scale=scale,
        bias=bias,
        splits_bias=False,
        band=band,
        implementation=implementation,
        shift_invariant=False,
        name="a",
    )
    log, sign = (logits.restore_reduced(y, keepdims) for y in _signed_logsumexp(logits, factors, return_sign))
    return (log, sign) if return_sign else log


def _signed_logsumexp(logits: Logits, factors: Array, return_sign: bool) -> tuple[Array, Array]:
    """The logarithm of the sum, or with ``return_sign`` of its absolute value, and the sum's sign.

    Args:
      logits: masked where a factor is 0.
      factors: broadcasts to the logits' shape.
      return_sign: as in :func:`logsumexp`.
    """
    x, *operands = logits.operands
    t = logits.merge(jnp.broadcast_to(factors, logits.shape)).astype(x.dtype)
    t = mask_to_zero(t, None, logits.spec.band)
    largest = jax.lax.stop_gradient(_largest_term(logits, t))
    point = reference.select(jnp.isfinite(largest), largest, 0)
    lse_and_no_labels = point, jnp.zeros_like(point), no_labels()
    match choose_path(logits.implementation, None):
        case "reference":
            _, unpacked = logits.reference_operands()
            total = reference.logsumexp_jvp(x, *lse_and_no_labels, t, unpacked, axis=logits.axis)
        case _:
            total = logsumexp_jvp(x, *lse_and_no_labels, t, *operands, **logits.params)
    is_finite = largest < jnp.inf
    infinite = jax.lax.cond(
        jnp.all(is_finite),
        lambda: jnp.zeros_like(largest),
        lambda: _infinite_sum(logits, jax.lax.stop_gradient(t), largest),
    )
    total = reference.select(is_finite, total, infinite)
    return point + jnp.log(jnp.abs(total) if return_sign else total), jnp.sign(total)


def _largest_term(logits: Logits, factors: Array, takes_part: Array | None = None) -> Array:
    """The reference point of rows; -inf where no term counts, and else NaN or +inf where a term is.

    Args:
      logits: as in :func:`_signed_logsumexp`.
      factors: of the merged x's shape and dtype.
      takes_part: which terms, of the same shape, take part besides; None for all.
    """
    x, operands = logits.reference_operands()
    size = jnp.abs(factors).astype(reference.compute_dtype(factors.dtype))
    shift = reference.select(size < jnp.inf, _LN2 * _far_exponent(size), size)
    bias = shift if operands.bias is None else operands.bias + shift
    where = operands.where if takes_part is None else operands.where & takes_part
    return reference.maximum(x, operands._replace(bias=bias, where=where), axis=logits.axis)


def _infinite_sum(logits: Logits, factors: Array, largest: Array) -> Array:
    """The sum of rows in which a term is infinite or NaN, from the largest term."""
    positive, negative = (
        jnp.where(_largest_term(logits, factors, signs) == jnp.inf, jnp.inf, 0)
        for signs in (factors > 0, factors < 0)
    )
    return reference.select(jnp.isnan(largest), largest, positive - negative)


def _far_exponent(size: Array) -> Array:
    """The exponents of normal numbers from 0 on, moved towards 0, in their dtype."""
    limits = jnp.finfo(size.dtype)
    bits = jax.lax.bitcast_convert_type(size, jnp.dtype(f"int{limits.bits}"))
    exponent = (bits >> limits.nmant) + (limits.minexp - 1)
    return (exponent - jnp.clip(exponent, -_MAX_NEAR_EXPONENT, _MAX_NEAR_EXPONENT)).astype(size.dtype)


def _by_jax(
    z: Array,
    b: Array | None,
    axis: Axis,
    where: Where,
    scale: jax.typing.ArrayLike | None,
    bias: Bias,
    keepdims: bool,
    return_sign: bool,
    implementation: str | None,
) -> Array | tuple[Array, Array]:
    """What is complex, by jax.nn.logsumexp."""
    logits = as_logits(
        z, axis, where, scale=scale, bias=bias, implementation=None, shift_invariant=False, name="a"
    )
    if implementation == "native":
        refuse_native("there is no native kernel for complex")
    mask = operand_mask(logits.shape, None, logits.spec.band) if isinstance(where, Band) else where
    if scale is not None:
        z = z * scale
    for term in bias if isinstance(bias, tuple) else () if bias is None else (bias,):
        z = z + term
    return logsumexp_of_jax(z, axis, b, keepdims, return_sign, mask)


def _broadcast_with(a: Array, b: Array | None, where: Where) -> Array:
    """a, broadcast with factors and with a mask that is an array; ValueError if they do not broadcast."""
    named = {"a": a, "b": b, "where": where}
    arrays = {key: x for key, x in named.items() if x is not None and not isinstance(x, Band)}
    shapes = [as_array(x, key).shape for key, x in arrays.items()]
    try:
        return jnp.broadcast_to(a, jnp.broadcast_shapes(*shapes))
    except ValueError:
        raise ValueError(f"a, b and where must broadcast, got shapes {shapes}") from None
