"""mask_to_zero_p: an array with 0 where logits are masked; and tangents of logits, which need it.

A primitive rather than jnp.where, whose transpose would save an array of zeros (and a Band's mask as an
array) as residuals.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.interpreters import ad

from jax_softmax2p.primitives.operands import Band, OperandSpec, Tangent, move_batch_to_front, operand_mask
from jax_softmax2p.primitives.registration import bind, define_primitive
from jax_softmax2p.reference import ScaleBiasMask, compute_dtype, select

Array = jax.Array


def mask_to_zero(t: Array, where: Array | None, band: Band | None) -> Array:
    """t, and 0 where the mask or the band is False.

    Args:
      t: of any dtype and the shape of the logits.
      where: boolean, of t's rank, broadcasts to t; or None.
      band: or None.
    """
    if where is None and band is None:
        return t
    return bind(mask_to_zero_p, t, *([] if where is None else [where]), band=band)


def tangent_of_logits(
    x: Array,
    x_dot: Tangent,
    operands: ScaleBiasMask[Array],
    tangents: ScaleBiasMask[Tangent],
    band: Band | None,
) -> Array:
    """The tangent of the logits scale·x + bias, of x's shape and dtype, 0 where they are masked.

    Args:
      x: as the primitive takes it.
      x_dot: its tangent, an array or ad.Zero.
      operands: what is applied to x.
      tangents: of the operands, arrays or ad.Zero, or None; that of ``where`` is not looked at.
      band: of the primitive.
    """
    wide = compute_dtype(x.dtype)
    terms: list[Array] = []
    if not isinstance(x_dot, ad.Zero):
        terms.append(x_dot if operands.scale is None else x_dot.astype(wide) * operands.scale)
    if tangents.scale is not None and not isinstance(tangents.scale, ad.Zero):
        # Masked first: 0 times a NaN that is masked would be NaN.
        terms.append(mask_to_zero(x, operands.where, band).astype(wide) * tangents.scale)
    if tangents.bias is not None and not isinstance(tangents.bias, ad.Zero):
        terms.append(jnp.broadcast_to(tangents.bias, x.shape))
    if len(terms) > 1:
        terms = [term.astype(wide) for term in terms]
    return mask_to_zero(sum(terms[1:], terms[0]).astype(x.dtype), operands.where, band)


def tangent_from_operands(primals: Sequence[Array], tangents: Sequence[Tangent], spec: OperandSpec) -> Array:
    """The same, from all operands of a primitive and their tangents."""
    return tangent_of_logits(primals[0], tangents[0], spec.unpack(primals), spec.unpack(tangents), spec.band)


def mask_to_zero_abstract_eval(t: ShapedArray, *where: ShapedArray, band: Band | None) -> ShapedArray:
    """Of t's shape and dtype."""
    return t.update(weak_type=False)


def mask_to_zero_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, band: Band | None
) -> tuple[Array, Tangent]:
    """It is linear in t."""
    t, *where = primals
    y = mask_to_zero_p.bind(t, *where, band=band)
    if isinstance(tangents[0], ad.Zero):
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    return y, mask_to_zero_p.bind(tangents[0], *where, band=band)


def mask_to_zero_transpose_rule(
    cotangent: Tangent, t: ad.UndefinedPrimal, *where: Array, band: Band | None
) -> list[Tangent | None]:
    """It is its own transpose in t."""
    if isinstance(cotangent, ad.Zero):
        t_bar: Tangent = ad.Zero(t.aval)
    else:
        t_bar = mask_to_zero_p.bind(cotangent, *where, band=band)
    return [t_bar, *(None for _ in where)]


def mask_to_zero_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], *, band: Band | None
) -> tuple[Array, int]:
    """The band masks the last two dimensions, which stay where they are."""
    return mask_to_zero_p.bind(*move_batch_to_front(operands, dims), band=band), 0


def mask_to_zero_lowering(t: Array, *where: Array, band: Band | None) -> Array:
    """A select."""
    mask = operand_mask(t.shape, where[0] if where else None, band)
    assert mask is not None, "without a mask there is no primitive"
    return select(mask, t, 0)


mask_to_zero_p = define_primitive(
    "softmax2p_mask_to_zero",
    params=("band",),
    abstract_eval=mask_to_zero_abstract_eval,
    jvp_rule=mask_to_zero_jvp_rule,
    transpose_rule=mask_to_zero_transpose_rule,
    batch_rule=mask_to_zero_batch_rule,
    lowering=mask_to_zero_lowering,
)
