"""Biases of rows: one number a row that is added to logits, and that no kernel has to see.

A logsumexp changes by that number, which add_row_bias_p adds to hi and lo, and a softmax does not change. A
sum of biases of rows and of columns then needs no array of the logits' size.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.interpreters import ad

from jax_softmax2p import reference
from jax_softmax2p.primitives.collectives import add_max
from jax_softmax2p.primitives.interpreters import define_interpreter_rules
from jax_softmax2p.primitives.mask_to_zero import mask_to_zero
from jax_softmax2p.primitives.operands import Band, OperandSpec, Tangent, move_batch_to_front
from jax_softmax2p.primitives.registration import bind, define_primitive
from jax_softmax2p.reference import Lse, select

Array = jax.Array

_PARAMS = ("axis", "spec")


def apply_invariant_bias(
    x: Array, operands: dict[str, Array], row_biases: Sequence[Array], band: Band | None
) -> tuple[Array, dict[str, Array]]:
    """x and operands of the softmax of logits + row_biases, which is NaN in rows where these are not finite.

    The derivative in the biases is 0, and that in x and scale is what it is without them.

    Args:
      x: as in :func:`softmax`.
      operands: scale, bias and where, by name, as in :func:`softmax`.
      row_biases: one or more arrays like a scale.
      band: of the softmax.
    """
    total = jax.lax.stop_gradient(sum(row_biases[1:], row_biases[0]))
    # Of a constant NaN, JAX's checks for NaNs would report that it is one.
    zero_or_nan = 0 * total
    if "where" in operands or band is not None:
        x = bind(mask_cotangent_p, x, *(operands[name] for name in ("where",) if name in operands), band=band)
    return x, operands | {"scale": operands.get("scale", 1) + zero_or_nan}


def add_row_bias(
    x: Array, lse: Lse, row_bias: Array, *operands: Array, axis: int, spec: OperandSpec, **_: Any
) -> Lse:
    """The lse of logits + row_bias.

    Args:
      x: as in :func:`logsumexp`.
      lse: of the logits.
      row_bias: of x's rank, broadcasts to x, with size 1 along the axis; in the dtype of the lse.
      operands: as in :func:`logsumexp`, as are axis and spec.
    """
    return Lse(*bind(add_row_bias_p, x, *lse, row_bias, *operands, axis=axis, spec=spec))


def add_row_bias_abstract_eval(
    x: ShapedArray, hi: ShapedArray, lo: ShapedArray, row_bias: ShapedArray, *_: ShapedArray, **params: Any
) -> tuple[ShapedArray, ShapedArray]:
    """Two of rows."""
    return hi, lo


def add_row_bias_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, axis: int, spec: OperandSpec
) -> tuple[Lse, tuple[Tangent, ad.Zero]]:
    """The derivative is that of hi + row_bias; NaN where the formula's is, and 0 for masked rows."""
    x, hi, lo, row_bias, *operands = primals
    lse = add_row_bias(x, Lse(hi, lo), row_bias, *operands, axis=axis, spec=spec)
    f = jnp.squeeze(row_bias, axis)
    # A row of nothing but -inf counts as one that is masked, if any can be: masks are not read for it.
    may_be_masked = "where" in spec.names or spec.band is not None or x.shape[axis] == 0

    def factor(summand: Array) -> Array:
        """1, or NaN where the summand is not finite."""
        if not may_be_masked:
            return 1 + 0 * summand
        return jnp.where(hi == -jnp.inf, 0, 1 + 0 * summand)

    terms: list[Array] = []
    if not isinstance(tangents[1], ad.Zero):
        terms.append(tangents[1] * factor(f))
    if not isinstance(tangents[3], ad.Zero):
        terms.append(jnp.squeeze(tangents[3], axis) * factor(f + hi))
    no_dot = ad.Zero(jax.typeof(lse.lo).to_tangent_aval())
    return lse, (sum(terms[1:], terms[0]) if terms else no_dot, no_dot)


def add_row_bias_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Sequence[Array], tuple[int, int]]:
    """One more dimension at the front, of size 1 where x is not batched: x is not repeated."""
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    x, hi, lo, *rest = (
        jnp.expand_dims(x, 0) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(operands, dims, strict=True)
    )
    hi, lo = (jnp.broadcast_to(part, (size, *part.shape[1:])) for part in (hi, lo))
    return add_row_bias_p.bind(x, hi, lo, *rest, **params), (0, 0)


def add_finite_row_bias(
    x: Array, hi: Array, lo: Array, row_bias: Array, *_: Array, axis: int, **params: Any
) -> Lse:
    """The results where the row bias is neither NaN nor +inf."""
    return add_max(jnp.squeeze(row_bias, axis), hi, lo)


def add_row_bias_lowering(
    x: Array, hi: Array, lo: Array, row_bias: Array, *operands: Array, axis: int, spec: OperandSpec
) -> Lse:
    """Elementwise, of rows; the logits are read only if a number that is added is NaN or +inf.

    Then the lse is the largest logit: NaN or +inf, or -inf where nothing takes part. The lse of the others
    does not tell which, since -inf plus +inf is NaN.
    """
    f = jnp.squeeze(row_bias, axis)
    total = add_finite_row_bias(x, hi, lo, row_bias, axis=axis)
    is_special = jnp.broadcast_to(~(f < jnp.inf), hi.shape)

    def of_all_logits() -> Array:
        unpacked = spec.unpack_with_band((x, *operands))
        bias = row_bias if unpacked.bias is None else unpacked.bias.astype(row_bias.dtype) + row_bias
        z_max = reference.maximum(x, unpacked._replace(bias=bias), axis=axis)
        return select(is_special, z_max + hi, total.hi)

    return Lse(jax.lax.cond(jnp.any(is_special), of_all_logits, lambda: total.hi), total.lo)


def mask_cotangent_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, band: Band | None
) -> tuple[Array, Tangent]:
    """The tangent is 0 where x is masked: there, a NaN in the scale would make the cotangent NaN."""
    x, *where = primals
    y = mask_cotangent_p.bind(x, *where, band=band)
    if isinstance(tangents[0], ad.Zero):
        return y, tangents[0]
    return y, mask_to_zero(tangents[0], where[0] if where else None, band)


def mask_cotangent_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Array, int]:
    """The band masks the last two dimensions, which stay where they are."""
    return mask_cotangent_p.bind(*move_batch_to_front(operands, dims), **params), 0


mask_cotangent_p = define_primitive(
    "softmax2p_mask_cotangent",
    params=("band",),
    abstract_eval=lambda x, *_, **params: x,
    jvp_rule=mask_cotangent_jvp_rule,
    batch_rule=mask_cotangent_batch_rule,
    lowering=lambda x, *_, **params: x,
)

add_row_bias_p = define_primitive(
    "softmax2p_add_row_bias",
    params=_PARAMS,
    multiple_results=True,
    abstract_eval=add_row_bias_abstract_eval,
    jvp_rule=add_row_bias_jvp_rule,
    batch_rule=add_row_bias_batch_rule,
    lowering=add_row_bias_lowering,
)
# jet knows no branches.
define_interpreter_rules(add_row_bias_p, add_finite_row_bias)
