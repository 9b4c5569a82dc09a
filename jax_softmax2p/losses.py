"""Cross-entropies of logits, with optax's signatures and results."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_softmax2p import reference
from jax_softmax2p.arguments import (
    as_array,
    as_boolean_array,
    as_floating_array,
    as_logits,
    broadcast_along_all_or_none,
    canonical_axes,
    merge_axes,
)
from jax_softmax2p.eager import jit_when_eager
from jax_softmax2p.labels import as_class_indices, as_labels, saturate_known_labels
from jax_softmax2p.logits import logit_at_label
from jax_softmax2p.ops import logsumexp_of_logits
from jax_softmax2p.primitives import collectives
from jax_softmax2p.primitives.collectives import AxisNames
from jax_softmax2p.primitives.dispatch import Implementation, choose_path
from jax_softmax2p.primitives.log_softmax import log_softmax_jvp
from jax_softmax2p.primitives.logsumexp import keeps_derivative, logsumexp
from jax_softmax2p.primitives.logsumexp_derivatives import jvp_of_kept, logsumexp_jvp, no_labels
from jax_softmax2p.primitives.mask_to_zero import mask_to_zero
from jax_softmax2p.primitives.thresholds import Operation
from jax_softmax2p.reference import Lse, compute_dtype
from jax_softmax2p.sharding import sharded_cross_entropy

Array = jax.Array
_Params = tuple[tuple[str, Any], ...]


@jit_when_eager("logits", "labels", "where", prepare={"labels": saturate_known_labels})
def softmax_cross_entropy_with_integer_labels(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: jax.typing.ArrayLike | None = None,
    *,
    axis_name: AxisNames | None = None,
    implementation: Implementation | None = None,
) -> Array:
    r"""Cross-entropy of softmax(logits) and classes, given by their numbers.

    .. math:: \ell = \log \sum_j \exp(x_j) - x_{label}

    A drop-in for :func:`optax.softmax_cross_entropy_with_integer_labels`. It reads the logits once; its
    gradient reads them once more and writes the result. Meanwhile only the logsumexp of each row is kept.

    Args:
      logits: floating-point array.
      labels: array of integers of any dtype, of the logits' shape without the axis, or with sizes that
        broadcast with that shape. Those below 0 count from the end, as in NumPy; one out of range makes the
        loss NaN, and no contribution of its own to the gradient.
      axis: the axis of the classes, or several, which are flattened in that order.
      where: boolean array, of the logits' shape or of the labels', or with sizes that broadcast with these;
        masked logits take no part in the sum, and rows without a True give 0.
      axis_name: as in :func:`softmax`; labels count the classes of all shards, and are the same on all
        devices along the mesh axes. The axis must be one integer.
      implementation: as in :func:`softmax`.

    Returns:
      Array of the shape to which the labels and the logits without the axis broadcast, of the logits' dtype.

    Raises:
      TypeError: logits are not floating-point numbers, or labels not integers.
      ValueError: labels do not have one dimension less than logits, or do not broadcast with them; or as
        :func:`softmax`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p
      >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 3])
      >>> jax_softmax2p.softmax_cross_entropy_with_integer_labels(logits, labels).round(3)
      Array([1.386, 1.386], dtype=float32)

    Source: pass 1 of Algorithm 3 of arXiv 2001.04438; optax's documentation for the semantics.
    """
    logits = as_floating_array(logits, "logits")
    labels = as_labels(labels)
    if axis is None:
        raise ValueError("axis must be an integer or a tuple of integers, got None")
    axes = canonical_axes(axis, logits.ndim)
    if where is not None:
        where = _as_element_mask(where, axes, logits.shape)
    if isinstance(axis, Sequence):
        if axis_name is not None:
            raise ValueError(f"axis must be one integer where axis_name is given, got {axis}")
        order = tuple(axis)
        if where is not None:
            where = merge_axes(broadcast_along_all_or_none(where, logits.shape, axes), order)[0]
        logits, axis = merge_axes(logits, order)
    (axis,) = canonical_axes(axis, logits.ndim)
    dtype = logits.dtype
    logits, labels = _broadcast_rows(logits, labels, where, axis)
    row_has_many_labels = _without_axis(logits.shape, axis) != labels.shape
    if row_has_many_labels and axis_name is not None:
        logits, row_has_many_labels = _repeat_rows(logits, labels.shape, axis), False
    elif row_has_many_labels:
        # The terms of a row's gradient, one of each label, are added before they are rounded to the dtype.
        logits = logits.astype(compute_dtype(dtype))
    prepared = as_logits(
        logits, axis, where, axis_name=axis_name, implementation=implementation, name="logits"
    )
    labels = as_class_indices(labels, logits.shape[axis] * collectives.num_shards(prepared.axis_name))
    match choose_path(prepared.implementation, axis_name):
        case "sharded":
            return sharded_cross_entropy(prepared, labels).astype(dtype)
        case "primitive" if not row_has_many_labels:
            x, *operands = prepared.operands
            params = tuple(prepared.params.items())
            loss = _lse_minus_label_logit(params, x, labels, *operands)
        case _:
            x, *operands = prepared.operands
            if row_has_many_labels:
                x = x_relative = reference.relative_to_majority(
                    *prepared.reference_operands(), axis=prepared.axis
                )
            else:
                x_relative = reference.relative_to(x, labels, prepared.axis)
                # At a label's logit of -inf, what is relative to it has no derivative.
                x = reference.select(x == -jnp.inf, x, jax.lax.stop_gradient(x))
            lse = logsumexp_of_logits(dataclasses.replace(prepared, operands=(x_relative, *operands)))
            loss = _subtract_label_logit(lse, x, labels, prepared.axis)
    loss = loss.astype(dtype)
    return loss if where is None else jnp.where(jnp.any(where, axis), loss, 0)


@jit_when_eager("logits", "labels", "where")
def softmax_cross_entropy(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: jax.typing.ArrayLike | None = None,
    *,
    implementation: Implementation | None = None,
) -> Array:
    r"""Cross-entropy of softmax(logits) and distributions over the classes.

    .. math:: \ell = -\sum_j y_j \log \mathrm{softmax}(x)_j

    A drop-in for :func:`optax.softmax_cross_entropy`, differentiable in both arguments.

    Args:
      logits: floating-point array.
      labels: array that broadcasts with the logits, such as probabilities that sum to 1 along the axis.
      axis: the axis or axes of the classes; None for all, and for the sum over those of the labels, too.
      where: boolean array, of the logits' shape or of that without the axis; what is masked takes no part.
      implementation: as in :func:`softmax`.

    Returns:
      Array of the shape to which logits, labels and mask broadcast, without the axes, of the dtype to which
      logits and labels promote.

    Raises:
      TypeError: logits are not floating-point numbers.
      ValueError: labels do not broadcast with logits; or as :func:`softmax`.

    Example:
      Distillation with a temperature (Hinton et al., arXiv 1503.02531): soft labels from the teacher's
      logits, the student's scaled alike.

      >>> import jax.numpy as jnp
      >>> import jax_softmax2p as s2p
      >>> teacher, student, temperature = jnp.array([[4.0, 0.0]]), jnp.array([[0.0, 0.0]]), 4.0
      >>> soft = s2p.softmax(teacher, scale=1 / temperature)
      >>> s2p.softmax_cross_entropy(student / temperature, soft).round(3)
      Array([0.693], dtype=float32)

    Source: optax's documentation for the semantics.
    """
    logits = as_floating_array(logits, "logits")
    labels = as_array(labels, "labels")
    _check_labels_broadcast(logits.shape, labels.shape)
    axes = canonical_axes(axis, logits.ndim)
    mask = None if where is None else _as_element_mask(where, axes, logits.shape)
    if mask is not None:
        logits = jnp.broadcast_to(logits, jnp.broadcast_shapes(logits.shape, mask.shape))
    dtype = jnp.result_type(logits, labels)
    if dtype != logits.dtype:  # Neither values nor the terms of gradients are rounded to fewer bits.
        logits = logits.astype(compute_dtype(logits.dtype))
    prepared = as_logits(logits, axis, mask, implementation=implementation, name="logits")
    if choose_path(prepared.implementation, None) == "reference":
        x, operands = prepared.reference_operands()
        x = x.astype(compute_dtype(x.dtype))
        merged, *_ = reference.log_softmax(x, operands, axis=prepared.axis, differentiable=True)
    else:
        merged = _log_probabilities(tuple(prepared.params.items()), *prepared.operands)
    log_p = dataclasses.replace(prepared, dtype=merged.dtype).restore(merged)
    if mask is not None:  # Of a row without a True the lse is -inf, and 0 times that NaN.
        log_p = jnp.where(mask, log_p, 0)
    wide = compute_dtype(dtype)
    terms = labels.astype(wide) * log_p.astype(wide)
    total = -terms.sum(None if axis is None else axes, where=mask)
    return total.astype(dtype)


def _as_element_mask(where: jax.typing.ArrayLike, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """A mask of rows, or of elements where it has more dimensions, as one that broadcasts with elements.

    Args:
      where: as users pass it.
      axes: of the classes, negative.
      shape: of the logits.

    Raises:
      ValueError: it is not boolean, has more dimensions than the logits, or does not broadcast with them.
    """
    where, ndim = as_boolean_array(where, "where"), len(shape)
    if where.ndim > ndim:
        raise ValueError(f"where must have at most the logits' {ndim} dimensions, got shape {where.shape}")
    rows = tuple(size for i, size in enumerate(shape) if i - ndim not in axes)
    of_rows = where.ndim <= len(rows)
    missing = (len(rows) if of_rows else ndim) - where.ndim
    mask = where.reshape((1,) * missing + where.shape)
    mask = jnp.expand_dims(mask, axes) if of_rows else mask
    try:
        jnp.broadcast_shapes(mask.shape, shape)
    except ValueError:
        raise ValueError(
            f"where must broadcast with the logits' shape {shape} or, with at most {len(rows)} dimensions, "
            f"with the shape of their rows, {rows}, got shape {where.shape}"
        ) from None
    return mask


def _broadcast_rows(logits: Array, labels: Array, where: Array | None, axis: int) -> tuple[Array, Array]:
    """Labels of all rows, and logits that are repeated only where a mask makes the repeated rows differ.

    Args:
      logits: as users pass them.
      labels: as users pass them.
      where: a mask of elements, or None.
      axis: of the classes, negative.

    Returns:
      Logits of a shape to which the mask broadcasts, and labels of the shape to which logits, labels and mask
      broadcast without the axis.

    Raises:
      ValueError: labels do not have one dimension less than logits, or do not broadcast with them.
    """
    rows = _without_axis(logits.shape, axis)
    message = f"labels must have a shape that broadcasts with the logits' without the axis, {rows}, got "
    if labels.ndim != len(rows):
        raise ValueError(f"{message}{labels.shape}")
    try:
        if where is not None:
            rows = jnp.broadcast_shapes(rows, _without_axis(where.shape, axis))
        shape = jnp.broadcast_shapes(rows, labels.shape)
    except ValueError:
        raise ValueError(f"{message}{labels.shape}") from None
    return _repeat_rows(logits, rows, axis), jnp.broadcast_to(labels, shape)


def _repeat_rows(logits: Array, rows: tuple[int, ...], axis: int) -> Array:
    """The logits, broadcast to a shape that is ``rows`` without the axis."""
    i = axis + logits.ndim
    return jnp.broadcast_to(logits, (*rows[:i], logits.shape[axis], *rows[i:]))


def _without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of rows, from that of elements and a negative axis."""
    i = axis + len(shape)
    return shape[:i] + shape[i + 1 :]


def _check_labels_broadcast(shape: tuple[int, ...], labels_shape: tuple[int, ...]) -> None:
    try:
        jnp.broadcast_shapes(shape, labels_shape)
    except ValueError:
        raise ValueError(
            f"labels must broadcast with the logits' shape {shape}, got {labels_shape}"
        ) from None


def _subtract_label_logit(lse: Lse, x: Array, labels: Array, axis: int) -> Array:
    """The lse minus the logit at the label, of rows, in the dtype of the lse.

    Args:
      lse: of x.
      x: logits.
      labels: as :func:`as_class_indices` returns them, of a shape to which the rows broadcast. The result is
        NaN for no class.
      axis: of the classes, negative.
    """
    spec, labels_spec = jax.typeof(x).sharding.spec, jax.typeof(labels).sharding.spec
    rows_are_shared = _without_axis(x.shape, axis) != labels.shape
    gathers = spec[axis] is None and not (rows_are_shared and any(labels_spec))
    if gathers and x.shape[axis] != 0:
        logit = jnp.take_along_axis(x, jnp.expand_dims(labels, axis), axis).squeeze(axis)
    else:  # JAX gathers neither along an explicitly sharded axis nor from a row that sharded labels share,
        # and from rows of no classes a 0.
        logit = logit_at_label(x, labels, axis)
    return (lse.hi - logit.astype(lse.hi.dtype)) + lse.lo


# Its derivative is that of log_softmax, which is exact where a probability is nearly 1. The values are fused
# with the labels' products, and nothing of x's size is written.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_probabilities(params: _Params, x: Array, *operands: Array) -> Array:
    """The logits minus their lse, masked ones, too, in the dtype of the lse; params as below."""
    named = dict(params)
    hi, lo = (jnp.expand_dims(part, named["axis"]) for part in logsumexp(x, *operands, exact=True, **named))
    return (x.astype(hi.dtype) - hi) - lo


@_log_probabilities.defjvp
def _log_probabilities_jvp(
    params: _Params, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    x, *operands = primals
    named = dict(params)
    spec = named["spec"]
    lse = logsumexp(x, *operands, exact=True, **named)
    hi, lo = (jnp.expand_dims(part, named["axis"]) for part in lse)
    where = spec.unpack(primals).where
    t = mask_to_zero(tangents[0], where, spec.band)
    y_dot = mask_to_zero(log_softmax_jvp(x, *lse, no_labels(), t, *operands, **named), where, spec.band)
    return (x.astype(hi.dtype) - hi) - lo, y_dot.astype(hi.dtype)


# Its derivative is one primitive, that of the lse with labels. JAX's own derivative would scatter the label's
# cotangent into an array of zeros of x's size, and add that.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _lse_minus_label_logit(params: _Params, x: Array, labels: Array, *operands: Array) -> Array:
    """The same from the primitives' operands; params are their parameters as a hashable value."""
    lse = logsumexp(x, *operands, exact=True, **dict(params))
    return _subtract_label_logit(lse, x, labels, dict(params)["axis"])


@_lse_minus_label_logit.defjvp
def _lse_minus_label_logit_jvp(
    params: _Params, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    x, labels, *operands = primals
    named = dict(params)
    operation: Operation = "derivative of cross-entropy"
    keeps = not operands and keeps_derivative(x, operation, **named)
    lse = logsumexp(x, *operands, exact=True, for_derivative=operation if keeps else None, **named)
    loss = _subtract_label_logit(lse, x, labels, named["axis"])
    if keeps:
        return loss, jvp_of_kept(x, lse, labels, tangents[0], **named)
    return loss, logsumexp_jvp(x, *lse, labels, tangents[0], *operands, **named)
