"""signed_sum_point_p: what sums of exponentials with factors, sum(e^z·b), are computed relative to.

The sum is e^c·sum(e^(z - c)·b) for any reference point c of a row. The second sum is a derivative of
logsumexp along b but for the point, and so logsumexp_jvp_p computes it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import ad

from jax_softmax2p import reference
from jax_softmax2p.primitives.interpreters import define_taylor_rule
from jax_softmax2p.primitives.logsumexp import lse_aval
from jax_softmax2p.primitives.operands import OperandSpec, Tangent, move_batch_to_front
from jax_softmax2p.primitives.registration import bind, define_primitive
from jax_softmax2p.reference import ScaleBiasMask, compute_dtype, select

Array = jax.Array

_LN2 = float(np.log(2))
_MAX_NEAR_EXPONENT = 32
"""Factors from 2^-32 to 2^32 do not move the point, which then is a logit, from which others are subtracted
with the least error. The exponents of all others are moved towards 0 by as much, so that e^(z - c) is a
normal number in float32 where it counts."""


def signed_sum_point(
    x: Array, factors: Array, *operands: Array, axis: int, spec: OperandSpec, **_: Any
) -> tuple[Array, Array]:
    """The reference point of rows, which is finite, and the sums that are not; neither has a derivative.

    The point is the largest logit, raised by the exponent of a factor that is far from 1, so that neither
    what matters underflows nor anything overflows. The second result is 0 where the sum has finite terms
    only, and else their sum: infinite, or NaN.

    Args:
      x: as in :func:`logsumexp`.
      factors: b, of x's shape and dtype, which is 0 where elements are masked.
      operands: as in :func:`logsumexp`, as are axis and spec.
    """
    point, infinite = bind(signed_sum_point_p, x, factors, *operands, axis=axis, spec=spec)
    return point, infinite


def signed_sum_point_abstract_eval(
    x: ShapedArray, *_: ShapedArray, axis: int, **params: Any
) -> tuple[ShapedArray, ShapedArray]:
    """Two of rows."""
    aval = lse_aval(x, axis)
    return aval, aval


def signed_sum_point_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], **params: Any
) -> tuple[Sequence[Array], Sequence[ad.Zero]]:
    """Both are constants."""
    results = signed_sum_point_p.bind(*primals, **params)
    return results, [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in results]


def signed_sum_point_taylor_rule(
    primals: Sequence[Array], series: Sequence[Sequence[Array]], **params: Any
) -> tuple[Sequence[Array], list[list[Array]]]:
    """Both are constants."""
    results = signed_sum_point_p.bind(*primals, **params)
    return results, [[jnp.zeros_like(y) for _ in series[0]] for y in results]


def signed_sum_point_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Sequence[Array], tuple[int, int]]:
    """One more dimension at the front."""
    return signed_sum_point_p.bind(*move_batch_to_front(operands, dims, 2), **params), (0, 0)


def signed_sum_point_lowering(
    x: Array, factors: Array, *operands: Array, axis: int, spec: OperandSpec
) -> tuple[Array, Array]:
    """One maximum of rows, and two more if it is not finite somewhere."""
    unpacked = spec.unpack_with_band((x, factors, *operands))
    largest = _largest_term(x, factors, unpacked, axis)

    def infinite_sums() -> Array:
        positive, negative = (
            jnp.where(_largest_term(x, jnp.where(signs, factors, 0), unpacked, axis) == jnp.inf, jnp.inf, 0)
            for signs in (factors > 0, factors < 0)
        )
        sums = select(jnp.isnan(largest), largest, positive - negative)
        return select(largest < jnp.inf, jnp.zeros_like(sums), sums)

    is_finite = jnp.all(largest < jnp.inf)
    infinite = jax.lax.cond(is_finite, lambda: jnp.zeros_like(largest), infinite_sums)
    return select(jnp.isfinite(largest), largest, 0), infinite


def _largest_term(x: Array, factors: Array, operands: ScaleBiasMask[Array], axis: int) -> Array:
    """max(z + log|b|), roughly: -inf of a row without a term, and NaN or +inf where a term is."""
    size = jnp.abs(factors).astype(compute_dtype(factors.dtype))
    shift = select(size < jnp.inf, _LN2 * _far_exponent(size), size)
    bias = shift if operands.bias is None else operands.bias.astype(shift.dtype) + shift
    where = factors != 0 if operands.where is None else operands.where & (factors != 0)
    return reference.maximum(x, operands._replace(bias=bias, where=where), axis=axis)


def _far_exponent(size: Array) -> Array:
    """The exponents of numbers from 0 on, moved towards 0, in their dtype."""
    limits = jnp.finfo(size.dtype)
    bits = jax.lax.bitcast_convert_type(size, jnp.dtype(f"int{limits.bits}"))
    exponent = (bits >> limits.nmant) + (limits.minexp - 1)
    return (exponent - jnp.clip(exponent, -_MAX_NEAR_EXPONENT, _MAX_NEAR_EXPONENT)).astype(size.dtype)


signed_sum_point_p = define_primitive(
    "softmax2p_signed_sum_point",
    params=("axis", "spec"),
    multiple_results=True,
    abstract_eval=signed_sum_point_abstract_eval,
    jvp_rule=signed_sum_point_jvp_rule,
    batch_rule=signed_sum_point_batch_rule,
    lowering=signed_sum_point_lowering,
)
define_taylor_rule(signed_sum_point_p, signed_sum_point_taylor_rule)
