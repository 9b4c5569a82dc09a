"""logsumexp(a, b=factors): the logarithm of a sum of exponentials with factors of any sign."""

import dataclasses

import jax
import jax.numpy as jnp

# By name: inside patch_jax_nn() the attribute of jax.nn is this package's function.
from jax.nn import logsumexp as logsumexp_of_jax

from jax_softmax2p import reference
from jax_softmax2p.arguments import Axis, Bias, Logits, Where, as_array, as_logits, as_mask, as_numeric_array
from jax_softmax2p.primitives.dispatch import Implementation, choose_path, refuse_native
from jax_softmax2p.primitives.logsumexp_derivatives import logsumexp_jvp, no_labels
from jax_softmax2p.primitives.mask_to_zero import mask_to_zero
from jax_softmax2p.primitives.operands import Band, operand_mask
from jax_softmax2p.primitives.signed_sum import signed_sum_point
from jax_softmax2p.reference import compute_dtype

Array = jax.Array


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
    is_complex = jnp.iscomplexobj(z) or jnp.iscomplexobj(factors)
    # A reference that nobody asked for is a kernel of Pallas, which is made of JAX's own primitives.
    is_pallas = implementation is None and choose_path(implementation, None) == "reference"
    if factors is None or is_complex or is_pallas:
        return _by_jax(z, factors, axis, where, scale, bias, keepdims, return_sign, implementation)
    z = z.astype(jnp.result_type(z, factors))
    if where is not None and not isinstance(where, Band):
        factors = jnp.where(as_mask(where, z.shape, "a"), factors, 0)
    logits = as_logits(
        z,
        axis,
        factors != 0,
        scale=scale,
        bias=bias,
        splits_bias=False,
        band=where if isinstance(where, Band) else None,
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
    # In 16 bits, derivatives are smaller by all factors, or larger, than can be stored.
    wide = compute_dtype(logits.operands[0].dtype)
    as_wide = lambda a: a.astype(wide) if jnp.issubdtype(a.dtype, jnp.floating) else a
    logits = dataclasses.replace(logits, operands=tuple(map(as_wide, logits.operands)))
    x, *operands = logits.operands
    t = logits.merge(jnp.broadcast_to(factors, logits.shape)).astype(x.dtype)
    t = mask_to_zero(t, None, logits.spec.band)
    point, infinite = signed_sum_point(x, t, *operands, **logits.params)
    lse_and_no_labels = point, jnp.zeros_like(point), no_labels()
    match choose_path(logits.implementation, None):
        case "reference":
            _, unpacked = logits.reference_operands()
            total = reference.logsumexp_jvp(x, *lse_and_no_labels, t, unpacked, axis=logits.axis)
        case _:
            total = logsumexp_jvp(x, *lse_and_no_labels, t, *operands, **logits.params)
    total = reference.select(infinite == 0, total, infinite)
    return point + jnp.log(jnp.abs(total) if return_sign else total), jnp.sign(total)


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
    """What is complex, or in a kernel of Pallas, by jax.nn.logsumexp."""
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
