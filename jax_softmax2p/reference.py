"""The semantics in plain jax.numpy: what runs where no native kernel does, and what those must match.

The functions work along one axis of arrays of one rank. float16, bfloat16 and float8 are computed in float32
and rounded once, as the native kernels do. Throughout, z are the logits scale·x + bias
(:class:`ScaleBiasMask`); elements that ``where`` masks take no part. "Rows" are the slices along ``axis``,
and an array "of rows" has x's shape without it.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p.exact_sums import (
    at_labels,
    exact_sum,
    log_of_sum,
    rounded_sum,
    sum_of_blocks,
    sums,
    two_sum_error,
)

Array = jax.Array
T = TypeVar("T")


class ScaleBiasMask(NamedTuple, Generic[T]):
    """What is applied to x on the way to its logits. Each is None where it is not given.

    Attributes:
      scale: x is multiplied by it; broadcasts to x, with size 1 along the axis.
      bias: is added to scale·x; broadcasts to x.
      where: boolean, broadcasts to x; where it is False, an element is masked.
    """

    scale: T | None = None
    bias: T | None = None
    where: T | None = None


class Lse(NamedTuple):
    """log(sum(exp(z))) of rows as an unevaluated sum of two floats: hi is its rounding, lo what that leaves.

    For float32 it is good to 2^-42, so that exp(z - hi - lo) is as exact as a softmax: with hi alone, an lse
    of 100 would cost 32 ULP. Both arrays have x's shape without the axis, in the dtype that x is computed in.
    """

    hi: Array
    lo: Array


def softmax(x: Array, operands: ScaleBiasMask[Array], *, axis: int) -> Array:
    """exp(z - max(z)) / sum(exp(z - max(z))), of x's shape and dtype; 0 where masked.

    Within 4 ULP in float32, for rows of up to 1,024 elements; on accelerators within 8.
    """
    p = _exp_of_shifted(_logits(x, operands, axis), x.dtype, axis).p
    y = (p / rounded_sum(p, axis)).astype(x.dtype)
    return y if operands.where is None else select(operands.where, y, 0)


def log_softmax(
    x: Array, operands: ScaleBiasMask[Array], *, axis: int, differentiable: bool = False
) -> tuple[Array, Array, Array]:
    """z - log(sum(exp(z))), of x's shape and dtype, -inf where masked; then hi and lo of the lse.

    Args:
      x: the logits before scale, bias and mask.
      operands: these.
      axis: along which the rows lie.
      differentiable: whether the derivatives that JAX makes of this are to be exact near certainty, for which
        XLA computes a little more.
    """
    z = _logits(x, operands, axis)
    if differentiable and x.shape[axis] != 0 and not jnp.iscomplexobj(z):
        z = relative_to(z, _majority(jax.lax.stop_gradient(z), x.dtype, axis), axis)
    terms = _exp_of_shifted(z, x.dtype, axis)
    y = terms.shifted - log_of_sum(terms.p, axis)
    y = (y if terms.rounding is None else y + terms.rounding).astype(x.dtype)
    y = y if operands.where is None else select(operands.where, y, -jnp.inf)
    return y, *logsumexp(x, operands, axis=axis, exact=True)


def logsumexp(
    x: Array,
    operands: ScaleBiasMask[Array],
    *,
    axis: int,
    exact: bool = False,
    zero_at_minus_infinity: bool = False,
    for_derivative: str | None = None,
) -> Lse:
    """log(sum(exp(z))) of rows; -inf of a row without an element that takes part.

    Args:
      x: the logits before scale, bias and mask.
      operands: these.
      axis: along which the rows lie.
      exact: whether hi + lo is to be so near that its difference from the largest logit is within 4 ULP of
        itself, however small.
      zero_at_minus_infinity: whether derivatives of rows of nothing but -inf are 0 rather than NaN, if exact.
      for_derivative: which derivative is computed as well, that shares the sums: see
        :func:`logsumexp_vjp`.
    """
    z = _logits(x, operands, axis, fully_masked=-jnp.inf)
    if exact:
        terms = _exp_of_shifted(z, x.dtype, axis)
        p = terms.p
        if zero_at_minus_infinity:
            p = select(terms.z_max == -jnp.inf, jnp.ones_like(p), p)
        shift, log = (jnp.squeeze(part, axis) for part in (terms.z_max, log_of_sum(p, axis)))
        # Of infinities alone, not of NaN: XLA's maximum of a row with a NaN may be a number.
        log = select(jnp.isinf(shift), jnp.zeros_like(log), log)
    else:
        shift, _, total = _exp_and_sum(z, axis, in_blocks=for_derivative is not None)
        if operands.where is None:
            log = jnp.log(total)
        else:  # A row of which nothing takes part has a derivative of 0. JAX's checks would report a NaN.
            has_terms = (total != 0) | jnp.any(operands.where, axis)
            log = select(has_terms, jnp.log(select(has_terms, total, 1)), -jnp.inf)
    hi = shift + log
    # Infinities are replaced before they are added: a NaN is reported by JAX's checks.
    finite = jnp.isfinite(hi)
    lo = two_sum_error(*(select(finite, part, 0) for part in (shift, log, hi)))
    return Lse(hi, jax.lax.stop_gradient(lo))


def maximum(x: Array, operands: ScaleBiasMask[Array], *, axis: int) -> Array:
    """The largest logit of rows, NaN if there is one; -inf of a row without an element that takes part."""
    return jnp.squeeze(_maximum(_logits(x, operands, axis, fully_masked=-jnp.inf), axis), axis)


def subtract_lse(x: Array, lse: Lse, operands: ScaleBiasMask[Array], *, axis: int) -> Array:
    """z - lse, of x's shape and dtype, -inf where masked: log_softmax(z) from the lse of rows."""
    hi, lo = (jnp.expand_dims(part, axis) for part in lse)
    y = (_logits(x, operands, axis) - hi) - lo
    y = select(hi != jnp.inf, y, jnp.nan).astype(x.dtype)
    return y if operands.where is None else select(operands.where, y, -jnp.inf)


def log_softmax_vjp(
    x: Array, hi: Array, lo: Array, labels: Array, t: Array, operands: ScaleBiasMask[Array], *, axis: int
) -> Array:
    """t - softmax(z)·sum(t), of t's shape, which is x's, and dtype; 0 where masked.

    Args:
      x: the operand of the log_softmax.
      hi: of its lse, and lo.
      lo: as hi.
      labels: not used; there are none.
      t: cotangent of the log_softmax.
      operands: of the log_softmax.
      axis: of the log_softmax.
    """
    p = _mask_to_zero(_probabilities(x, Lse(hi, lo), operands, axis), operands.where)
    t_wide = _mask_to_zero(_widen(t), operands.where)
    # Of the element that has more than half of a row, if there is one, t - p·sum(t) is made of the others.
    # Two that are equal may both be above half by their roundings.
    most = p > 0.6
    total, others_p, others_t = sums([t_wide, *(select(~most, a, 0) for a in (p, t_wide))], axis)
    total = select(jnp.expand_dims(hi, axis) != jnp.inf, total, jnp.nan)
    y = select(most, total * others_p - others_t, t_wide - p * total).astype(t.dtype)
    return y if operands.where is None else select(operands.where, y, 0)


def logsumexp_vjp(
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    factor: Array,
    operands: ScaleBiasMask[Array],
    *,
    axis: int,
    shares_forward: bool = False,
) -> Array:
    """factor·(exp(z - lse) - one_hot(labels)), of x's shape and dtype; 0 where masked, but for the labels.

    Args:
      x: the operand of the logsumexp.
      hi: of its lse, and lo.
      lo: as hi.
      labels: as :func:`one_hot` takes them, or an empty array, with which there is no one_hot.
      factor: cotangent of rows.
      operands: of the logsumexp.
      axis: of the logsumexp.
      shares_forward: whether the exponentials are those of the logsumexp, which XLA then computes once where
        it finds both in one program, rather than computed from the lse. With labels, that of an exact
        logsumexp, without operands.
    """
    at_label = one_hot(labels, x.shape, axis) if labels.size else None
    if shares_forward:
        y = _derivative_of_shared(x, at_label, operands, axis)
    else:
        y = _probabilities(x, Lse(hi, lo), operands, axis)
    factor = jnp.expand_dims(factor, axis)
    counts = operands.where
    if operands.where is not None:
        y = select(operands.where, y, 0)
    if at_label is not None and not shares_forward:
        log_p, _ = _log_probabilities(x, Lse(hi, lo), operands, axis)
        if operands.where is not None:
            log_p = select(operands.where, log_p, -jnp.inf)
        y = select(at_label, jnp.expm1(at_labels(log_p, labels, at_label, axis)), y)
        counts = None if operands.where is None else operands.where | at_label
    y = (factor * y).astype(x.dtype)
    return y if counts is None else select(counts, y, 0)


def _derivative_of_shared(
    x: Array, at_label: Array | None, operands: ScaleBiasMask[Array], axis: int
) -> Array:
    """What :func:`logsumexp_vjp` multiplies by the factor, of the exponentials and sums of the logsumexp."""
    if at_label is None:
        _, p, total = _exp_and_sum(_logits(x, operands, axis, fully_masked=-jnp.inf), axis, in_blocks=True)
        return p / jnp.expand_dims(total, axis)
    terms = _exp_of_shifted(_logits(x, operands, axis), x.dtype, axis)
    total, error = exact_sum(terms.p, axis)
    # Minus the others at the label. Where these are few, its exponential is 1, and nothing is rounded.
    y = select(at_label, (terms.p - total) - error, terms.p) / total
    # In a row with +inf the derivative is NaN there alone.
    beside_infinity = (terms.z_max - x) == np.inf
    return select(beside_infinity, -at_label.astype(y.dtype), y)


def logsumexp_jvp(
    x: Array, hi: Array, lo: Array, labels: Array, t: Array, operands: ScaleBiasMask[Array], *, axis: int
) -> Array:
    """sum(softmax(z)·t) of rows, minus t at the labels: what :func:`logsumexp_vjp` transposes.

    Args:
      x: as in :func:`logsumexp_vjp`.
      hi: as in :func:`logsumexp_vjp`.
      lo: as in :func:`logsumexp_vjp`.
      labels: as in :func:`logsumexp_vjp`.
      t: tangent of the logits, of x's shape.
      operands: as in :func:`logsumexp_vjp`.
      axis: as in :func:`logsumexp_vjp`.
    """
    p = _probabilities(x, Lse(hi, lo), operands, axis)
    t = _widen(t)
    result = jnp.sum(_mask_to_zero(p * t, operands.where), axis)
    if labels.size:
        result = result - jnp.sum(select(one_hot(labels, x.shape, axis), t, 0), axis)
    return result


def softmax_jacobian(
    y: Array, t: Array, *, axis: int, reduce_shards: Callable[[Array], Array] = lambda dot: dot
) -> Array:
    """The symmetric Jacobian of softmax at the output y, applied to t: y·(t - <y, t>).

    Args:
      y: a softmax along the axis.
      t: its tangent or cotangent, of y's shape and dtype.
      axis: along which the rows lie.
      reduce_shards: of rows that are shards of longer ones, makes <y, t> of the shard that of the whole row.
    """
    y_wide, t_wide = _widen(y), _widen(t)
    return (y_wide * (t_wide - reduce_shards(_dot(y_wide, t_wide, axis)))).astype(y.dtype)


def softmax_jacobian_derivative(y: Array, t: Array, y_dot: Array, *, axis: int) -> Array:
    """The derivative of :func:`softmax_jacobian` with respect to y, applied to y_dot; all of y's shape."""
    y_wide, t_wide, y_dot_wide = _widen(y), _widen(t), _widen(y_dot)
    centred = t_wide - _dot(y_wide, t_wide, axis)
    return (y_dot_wide * centred - y_wide * _dot(y_dot_wide, t_wide, axis)).astype(y.dtype)


def one_hot(labels: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Boolean, of ``shape``: True at the labels.

    Args:
      labels: int32, of the shape without the axis, from 0 to the size of the axis, which stands for no class.
      shape: of the result.
      axis: along which labels count.
    """
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis % len(shape)) == jnp.expand_dims(labels, axis)


def relative_to(x: Array, labels: Array, axis: int) -> Array:
    """x, with the derivatives of x minus its elements at the labels, one in each row.

    What shifts of rows do not change has the same derivatives in these differences. That in the element at a
    label is then a sum over the others, and loses no digits where the label has nearly all of the
    probability.

    Args:
      x: of any shape.
      labels: int32, of x's shape without the axis. Rows whose label is out of range stay as they are.
      axis: along which labels count.
    """
    # With the explicit sharding of x, if it has one, which a select wants of its mask.
    is_label = one_hot(labels, x.shape, axis) & jax.lax.full_like(x, True, np.bool_)
    at_label = jnp.sum(select(is_label, x, 0), axis, keepdims=True)
    # 0 but for its derivative, and for what is not finite, which would make it NaN.
    zero = select(jnp.isfinite(at_label), at_label - jax.lax.stop_gradient(at_label), 0)
    return select(is_label, jax.lax.stop_gradient(x), x - zero)


def relative_to_majority(x: Array, operands: ScaleBiasMask[Array], *, axis: int) -> Array:
    """x, :func:`relative_to` the elements that have more than half of the probability of their row, if any.

    Args:
      x: the logits before scale, bias and mask; real.
      operands: these.
      axis: along which the rows lie.
    """
    if x.shape[axis] == 0:
        return x
    z = _logits(jax.lax.stop_gradient(x), operands, axis, fully_masked=-jnp.inf)
    return relative_to(x, _majority(z, x.dtype, axis), axis)


def select(mask: Array, x: Array, other: jax.typing.ArrayLike) -> Array:
    """x where the mask is True, and ``other``, in x's dtype, elsewhere; all broadcast.

    jnp.where is a jitted function, and so a function call in what is lowered, which XLA does not compile in
    all of the computations that the reference is part of.
    """
    return jax.lax.select(*jnp.broadcast_arrays(mask, x, jnp.asarray(other, x.dtype)))


def compute_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """What arrays of a dtype are computed in: float32 for shorter floats."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        return np.dtype(np.float32)
    return np.dtype(dtype)


def _logits(x: Array, operands: ScaleBiasMask[Array], axis: int, fully_masked: float = 0) -> Array:
    """scale·x + bias, of x's shape, in the dtype that it is computed in.

    -inf where masked, or, throughout a row without an element that takes part, ``fully_masked``.
    """
    scale, bias, where = operands
    # Masked before it is scaled: 0 times what stands there would be NaN in scale's derivative.
    z = _widen(x if where is None else select(where, x, 0))
    if scale is not None:
        z = z * scale
    if bias is not None:
        z = z + _widen(bias)
    if where is None:
        return z
    masked = select(jnp.any(where, axis, keepdims=True), jnp.array(-jnp.inf, z.dtype), fully_masked)
    return select(where, z, masked)


def _exp_and_sum(z: Array, axis: int, *, in_blocks: bool) -> tuple[Array, Array, Array]:
    """exp(z - shift) and its sum of rows, by the formula of jax.nn.logsumexp.

    Args:
      z: logits.
      axis: along which the rows lie.
      in_blocks: whether the sum is to be within 4 ULP, as derivatives want it. A logarithm does not show it.

    Returns:
      The shift of rows, which is the maximum or 0 where that is not finite; the exponentials; their sums.
    """
    z_max = jax.lax.stop_gradient(jnp.max(z, axis, initial=-jnp.inf))
    shift = select(jnp.isfinite(z_max), z_max, 0)
    p = jnp.exp(z - jnp.expand_dims(shift, axis))
    return shift, p, jnp.squeeze(sum_of_blocks(p, axis), axis) if in_blocks else jnp.sum(p, axis)


def _majority(z: Array, dtype: np.dtype, axis: int) -> Array:
    """The place in each row of the element that has more than half of its probability; the axis's size where
    there is none, as in rows of -inf. Of rows, int32."""
    total = jnp.sum(_exp_of_shifted(z, dtype, axis).p, axis)
    largest = jax.lax.argmax(z, axis % z.ndim, jnp.int32)
    return select((total > 0) & (total < 2), largest, z.shape[axis])


class _Exponentials(NamedTuple):
    """exp(z - max(z)) of rows.

    Attributes:
      z_max: the maximum of each row, with size 1 along the axis.
      shifted: z - max(z), or z where all logits are -inf.
      rounding: the error of that, which in a difference of -80 is 64 ULP of the exponential; None where the
        dtype of the results does not show it.
      p: exp(shifted + rounding).
    """

    z_max: Array
    shifted: Array
    rounding: Array | None
    p: Array


def _exp_of_shifted(z: Array, dtype: np.dtype, axis: int) -> _Exponentials:
    """Exponentials of logits z, for results of a dtype. In a program that takes several functions of one z,
    XLA computes them once."""
    z_max = jax.lax.stop_gradient(_maximum(z, axis))
    if jnp.iscomplexobj(z):
        shifted, rounding = z - z_max, None
    else:
        shift = select(z_max != -jnp.inf, z_max, 0)
        shifted = z - shift
        rounding = None if dtype != z.dtype else _rounding(z, shift, shifted)
    return _Exponentials(z_max, shifted, rounding, _exp(shifted, rounding))


def _rounding(z: Array, shift: Array, difference: Array) -> Array:
    """The error of the rounded difference z - shift, exactly; it has no derivative."""
    # JAX's checks report the difference of infinities. Of elements that are -inf the error does not matter.
    lowest = jnp.finfo(z.dtype).min
    minuend, rounded = (jnp.maximum(jax.lax.stop_gradient(a), lowest) for a in (z, difference))
    return two_sum_error(minuend, -jax.lax.stop_gradient(shift), rounded)


def _exp(shifted: Array, rounding: Array | None) -> Array:
    """exp(shifted + rounding), for a rounding that is small where the exponential is not 0."""
    y = jnp.exp(shifted)
    # That of a difference that overflows is negative and huge: times a cotangent it would be infinite.
    return y if rounding is None else y + y * jnp.maximum(rounding, -1)


def _mask_to_zero(x: Array, where: Array | None) -> Array:
    return x if where is None else select(where, x, 0)


def _probabilities(x: Array, lse: Lse, operands: ScaleBiasMask[Array], axis: int) -> Array:
    """exp(z - lse), of x's shape, in the dtype that it is computed in."""
    return _exp(*_log_probabilities(x, lse, operands, axis))


def _log_probabilities(
    x: Array, lse: Lse, operands: ScaleBiasMask[Array], axis: int
) -> tuple[Array, Array | None]:
    """z - lse, of x's shape, in the dtype that it is computed in, and the error of that, as _Exponentials has
    them."""
    z = _logits(x, operands, axis)
    hi, lo = (jnp.expand_dims(part, axis) for part in lse)
    minus_hi = z - hi
    shifted = minus_hi - lo
    if x.dtype != z.dtype:
        return shifted, None
    rounding = _rounding(z, select(jnp.isfinite(hi), hi, 0), minus_hi) + _rounding(minus_hi, lo, shifted)
    return shifted, rounding


def _maximum(z: Array, axis: int) -> Array:
    return jnp.max(z, axis, keepdims=True, initial=-jnp.inf)


def _dot(a: Array, b: Array, axis: int) -> Array:
    return jnp.sum(a * b, axis, keepdims=True)


def _widen(x: Array) -> Array:
    wide = compute_dtype(x.dtype)
    return x if x.dtype == wide else x.astype(wide)
