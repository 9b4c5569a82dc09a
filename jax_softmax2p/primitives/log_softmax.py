"""log_softmax_p: the logarithm of the softmax of logits along one axis; and the primitives of its derivative.

It has hi and lo of the lse as two more results. The derivative is recomputed from x and these, which is more
exact than from the result, whose rounding an exponential multiplies.

log_softmax_jvp_p and log_softmax_vjp_p are linear in t and each other's transposes:

    log_softmax_jvp(t) = t - sum(p·t)        log_softmax_vjp(t) = t - p·sum(t)

There are no labels. See ``primitives.logsumexp_derivatives``.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.interpreters import ad

from jax_softmax2p import jax_compat, native, reference
from jax_softmax2p.primitives.collectives import reduce_lse
from jax_softmax2p.primitives.logsumexp import logsumexp, lse_aval
from jax_softmax2p.primitives.logsumexp_derivatives import (
    PARAMS,
    define_lse_derivative,
    logsumexp_jvp,
    logsumexp_vjp,
    lse_attributes,
    no_labels,
)
from jax_softmax2p.primitives.mask_to_zero import mask_to_zero, tangent_from_operands
from jax_softmax2p.primitives.operands import OperandSpec, Tangent, move_batch_to_front, reference_rule
from jax_softmax2p.primitives.registration import NativeLowering, bind, define_primitive
from jax_softmax2p.reference import Lse

Array = jax.Array

MIN_IN_PLACE_SIZE = 2**21
"""From how many elements on the gradient takes the memory of its cotangent.

The gradient of the sum of squares along axis 0 of (2000,1500) takes 0.88 of the time then, of (4096,2048)
0.58. Of smaller ones it takes as long; and where two gradients share a cotangent, which XLA copies for one of
them, longer: 1.2 times in a contrastive loss of (1024,1024) (Cascade Lake).
"""


def log_softmax(x: Array, *operands: Array, **params: Any) -> tuple[Array, Array, Array]:
    """The logarithm of the softmax of logits, of x's shape and dtype; then hi and lo of the lse.

    Float32 and float64 results are within 2 ULP, or 1 ULP of the row's largest logit, whichever is more,
    where they are native; near 0 they are within 4 ULP.

    Args:
      x: of an inexact dtype.
      operands: those of ``spec``, see ``primitives.operands``.
      params: axis (negative), spec, implementation.
    """
    y, hi, lo = bind(log_softmax_p, x, *operands, **params)
    return y, hi, lo


def log_softmax_jvp(
    x: Array, hi: Array, lo: Array, labels: Array, t: Array, *operands: Array, **params: Any
) -> Array:
    """The derivative of log_softmax along t, a tangent of the logits; all of x's shape, as the result."""
    return bind(log_softmax_jvp_p, x, hi, lo, labels, t, *operands, **params)


def log_softmax_vjp(
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    t: Array,
    *operands: Array,
    in_place: bool | None = None,
    **params: Any,
) -> Array:
    """The transpose of :func:`log_softmax_jvp`, for a cotangent t; all of x's shape, as the result.

    ``in_place`` says that t is probably not needed afterwards, so that the result may take its memory; None:
    unless it is an argument, which XLA would copy.
    """
    in_place = not jax_compat.is_argument(t) if in_place is None else in_place
    return bind(log_softmax_vjp_p, x, hi, lo, labels, t, *operands, in_place=in_place, **params)


def subtract_lse(x: Array, lse: Lse, *operands: Array, axis: int, spec: OperandSpec, **_: Any) -> Array:
    """The logits minus the lse of whole rows, of x's shape; -inf where masked, NaN in rows with a +inf."""
    return reference.subtract_lse(x, lse, spec.unpack_with_band((x, *operands)), axis=axis)


def log_softmax_abstract_eval(
    x: ShapedArray, *operands: ShapedArray, axis: int, **_: Any
) -> tuple[ShapedArray, ShapedArray, ShapedArray]:
    """One of x's shape and dtype, and two of rows."""
    aval = lse_aval(x, axis)
    return x.update(weak_type=False), aval, aval


def log_softmax_jvp_rule(
    primals: Sequence[Array], tangents: Sequence[Tangent], *, spec: OperandSpec, **params: Any
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, ad.Zero]]:
    """Of y and of hi; lo has none."""
    x, *operands = primals
    y, hi, lo = log_softmax(*primals, spec=spec, **params)
    t = tangent_from_operands(primals, tangents, spec)
    derivative_operands = (x, hi, lo, no_labels(), t, *operands)
    hi_dot = logsumexp_jvp(*derivative_operands, spec=spec, **params)
    y_dot = log_softmax_jvp(*derivative_operands, spec=spec, **params)
    # Its transpose wants cotangents that are 0 where logits are masked.
    y_dot = mask_to_zero(y_dot, spec.unpack(primals).where, spec.band)
    return (y, hi, lo), (y_dot, hi_dot, ad.Zero(jax.typeof(lo).to_tangent_aval()))


def log_softmax_batch_rule(
    operands: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[tuple[Array, Array, Array], tuple[int, int, int]]:
    """One more dimension at the front."""
    return log_softmax(*move_batch_to_front(operands, dims), **params), (0, 0, 0)


def log_softmax_composed(x: Array, *operands: Array, **params: Any) -> tuple[Array, Array, Array]:
    """The logits minus their lse."""
    lse = logsumexp(x, *operands, exact=True, **params)
    return subtract_lse(x, lse, *operands, **params), *lse


def log_softmax_sharded_rule(
    axis_names: tuple[str, ...], x: Array, *operands: Array, **params: Any
) -> tuple[Array, Array, Array]:
    """Two all-reduces, of one number a row and of two, for the lse of whole rows."""
    lse = reduce_lse(logsumexp(x, *operands, exact=True, **params), axis_names)
    return subtract_lse(x, lse, *operands, **params), *lse


def log_softmax_jvp_change(
    change: Array,
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    t: Array,
    *operands: Array,
    axis: int,
    **params: Any,
) -> Array:
    """-sum(p·change·t)."""
    weighted = (change * t).astype(t.dtype)
    dot = logsumexp_jvp(x, hi, lo, labels, weighted, *operands, axis=axis, **params)
    return jnp.broadcast_to(-jnp.expand_dims(dot, axis), t.shape).astype(t.dtype)


def log_softmax_jvp_lowering(
    x: Array, hi: Array, lo: Array, labels: Array, t: Array, *operands: Array, axis: int, **params: Any
) -> Array:
    """t - sum(p·t), by the primitive of that sum."""
    dot = logsumexp_jvp(x, hi, lo, labels, t, *operands, axis=axis, **params)
    return (t.astype(dot.dtype) - jnp.expand_dims(dot, axis)).astype(t.dtype)


def log_softmax_vjp_change(
    change: Array,
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    t: Array,
    *operands: Array,
    axis: int,
    in_place: bool,
    **params: Any,
) -> Array:
    """-p·change·sum(t)."""
    factor = jnp.sum(t.astype(hi.dtype), axis)
    weights = logsumexp_vjp(x, hi, lo, labels, factor, *operands, axis=axis, **params)
    return -(weights * change).astype(t.dtype)


def log_softmax_vjp_sharded_rule(
    axis_names: tuple[str, ...],
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    t: Array,
    *operands: Array,
    axis: int,
    in_place: bool,
    **params: Any,
) -> Array:
    """One all-reduce of one number a row, sum(t)."""
    total = jax.lax.psum(jnp.sum(t.astype(hi.dtype), axis), axis_names)
    weights = logsumexp_vjp(x, hi, lo, labels, total, *operands, axis=axis, **params)
    return (t - weights).astype(t.dtype)


def log_softmax_vjp_reused_operand(avals: Sequence[ShapedArray], *, in_place: bool, **_: Any) -> int | None:
    """A large result takes t's memory where t is not needed afterwards."""
    return 4 if in_place and math.prod(avals[0].shape) >= MIN_IN_PLACE_SIZE else None


log_softmax_p = define_primitive(
    "softmax2p_log_softmax",
    params=PARAMS,
    multiple_results=True,
    abstract_eval=log_softmax_abstract_eval,
    jvp_rule=log_softmax_jvp_rule,
    batch_rule=log_softmax_batch_rule,
    lowering=NativeLowering(
        operation="log_softmax",
        target=native.LOG_SOFTMAX_TARGET,
        composed=log_softmax_composed,
        attributes=lse_attributes,
        reference=reference_rule(reference.log_softmax),
        sharded_rule=log_softmax_sharded_rule,
    ),
)

log_softmax_jvp_p = define_lse_derivative(
    "softmax2p_log_softmax_jvp",
    apply=log_softmax_jvp,
    transposed=log_softmax_vjp,
    change_rule=log_softmax_jvp_change,
    abstract_eval=lambda x, *_: x,
    lowering=log_softmax_jvp_lowering,
)

log_softmax_vjp_p = define_lse_derivative(
    "softmax2p_log_softmax_vjp",
    apply=log_softmax_vjp,
    transposed=log_softmax_jvp,
    change_rule=log_softmax_vjp_change,
    abstract_eval=lambda x, *_: x,
    params=(*PARAMS, "in_place"),
    eager_params={"in_place": False},
    lowering=NativeLowering(
        operation="derivative of log_softmax",
        target=native.LOG_SOFTMAX_VJP_TARGET,
        attributes=lse_attributes,
        reference=reference_rule(reference.log_softmax_vjp),
        sharded_rule=log_softmax_vjp_sharded_rule,
        reused_operand=log_softmax_vjp_reused_operand,
    ),
)
