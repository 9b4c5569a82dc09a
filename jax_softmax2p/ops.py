"""The public functions: axes, dtypes, masks and defaults, before the primitives take over."""

import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p import native, reference
from jax_softmax2p.primitives.common import native_refusal
from jax_softmax2p.primitives.softmax import softmax as bind_softmax

Array = jax.Array
Axis = int | Sequence[int] | None

_IMPLEMENTATIONS = (None, "native", "reference")


def softmax(
    x: jax.typing.ArrayLike,
    axis: Axis = -1,
    where: jax.typing.ArrayLike | None = None,
    *,
    algorithm: str = "auto",
    implementation: str | None = None,
) -> Array:
    r"""Softmax, by the two-pass algorithm.

    .. math:: \mathrm{softmax}(x)_i = \frac{\exp(x_i)}{\sum_j \exp(x_j)}

    A drop-in for :func:`jax.nn.softmax`, which it follows on every edge case: a row with a NaN or a +inf
    gives NaN throughout; -inf gives 0; a row of nothing but -inf gives NaN. Differentiable to any order
    in both modes.

    Args:
      x: array of logits, of any shape. float32 and float64 have native kernels on CPUs; float16,
        bfloat16 and complex are computed by the reference; float8 in float32. Integers are promoted as
        by jnp.exp, after their maximum has been subtracted exactly.
      axis: the axis or axes over which the result sums to 1: an integer, several, or None for all.
      where: boolean array that broadcasts to x's shape; positions where it is False take no part and
        give 0, and what x holds there, NaN included, harms nothing, in the gradient too. A row without
        a True gives zeros.
      algorithm: "auto", or by name "two_pass" (the second pass recomputes every exponential) or
        "two_pass_reload" (it loads what the first kept). All give the same bits.
      implementation: None runs a native kernel where one can run and the jax.numpy reference elsewhere;
        "native" is an error where none can; "reference" is the reference.

    Returns:
      Array of x's shape and (promoted) dtype. float32 results are within 2 ULP of the exact value, and
      float64 within 4, where a native kernel runs; subnormal results may be flushed to zero.

    Raises:
      TypeError: x is not an array of numbers, or axis no integer.
      ValueError: axis is out of range or given twice; where is not boolean or does not broadcast to x's
        shape; algorithm or implementation is unknown; implementation is "native" and cannot run.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p
      >>> y = jax_softmax2p.softmax(jnp.array([0.0, 0.0, jnp.nan]), where=jnp.array([True, True, False]))
      >>> y.tolist()
      [0.5, 0.5, 0.0]

    Source: M. Dukhan and A. Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438, Algorithm 3.
    """
    native.check_algorithm(algorithm)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None, 'native' or 'reference'; got {implementation!r}")
    x = _as_numeric_array(x)
    axes = _canonical_axes(axis, x.ndim)
    mask = None if where is None else _as_mask(where, x.shape)
    x = _as_inexact(x, axes, mask)
    dtype = x.dtype
    if _has_no_infinity(dtype):
        x = x.astype(jnp.float32)
    if implementation == "native" and (reason := native.reason_against(x.dtype)):
        raise ValueError(native_refusal(reason))

    if mask is not None:
        x = _fill_masked(x, axes, mask)
    merged, axis_of_merged = _merge_axes(x, axes)
    if implementation == "reference":
        y = reference.softmax(merged, axis_of_merged)
    else:
        y = bind_softmax(merged, axis=axis_of_merged, algorithm=algorithm, implementation=implementation)
    y = _split_axes(y, x.shape, axes).astype(dtype)
    return y if mask is None else jnp.where(mask, y, 0)


def _as_numeric_array(x: jax.typing.ArrayLike) -> Array:
    if not isinstance(x, (jax.Array, np.ndarray, np.generic, int, float, complex)) and not hasattr(
        x, "__jax_array__"
    ):
        raise TypeError(f"x must be an array or a number, got {type(x).__name__}")
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"x must be an array of numbers, got dtype {array.dtype}")
    return array


def _canonical_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes as negative integers, ascending."""
    if axis is None:
        return tuple(range(-ndim, 0))
    try:
        given = tuple(map(operator.index, axis)) if isinstance(axis, Sequence) else (operator.index(axis),)
    except TypeError:
        raise TypeError(f"axis must be an integer, several, or None; got {axis!r}") from None
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for an array of {ndim} dimensions")
    axes = tuple(sorted(a - ndim if a >= 0 else a for a in given))
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis names a dimension twice: {axis!r}")
    return axes


def _as_mask(where: jax.typing.ArrayLike, shape: tuple[int, ...]) -> Array:
    mask = jnp.asarray(where)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"where must be boolean, got dtype {mask.dtype}")
    try:
        fits = jnp.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"where must broadcast to x's shape {shape}, got shape {mask.shape}")
    return mask


def _as_inexact(x: Array, axes: tuple[int, ...], mask: Array | None) -> Array:
    """Integers as floats, less their maximum, which integers subtract exactly and floats may not."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    x_max = jnp.max(x, axes, keepdims=True, where=mask, initial=jnp.iinfo(x.dtype).min)
    # The difference may exceed the signed range, by wrapping into what is right as unsigned.
    unsigned = jnp.dtype(f"uint{jnp.iinfo(x.dtype).bits}")
    return -(x_max - x).astype(unsigned).astype(jax.eval_shape(jnp.exp, x).dtype)


def _has_no_infinity(dtype: np.dtype) -> bool:
    """Some formats of 8 bits and fewer have nothing below every number, to mask with."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def _fill_masked(x: Array, axes: tuple[int, ...], mask: Array) -> Array:
    """-inf where masked; 0 throughout a row without a True, lest it make NaNs on its way to zeros."""
    mask = jnp.broadcast_to(mask, x.shape)
    empty = ~jnp.any(mask, axes, keepdims=True)
    return jnp.where(mask, x, jnp.where(empty, 0, -jnp.inf).astype(x.dtype))


def _merge_axes(x: Array, axes: tuple[int, ...]) -> tuple[Array, int]:
    """The array with the axes merged into one, and where that is."""
    if len(axes) == 1:
        return x, axes[0]
    moved = jnp.moveaxis(x, axes, range(-len(axes), 0))
    batch = moved.shape[: x.ndim - len(axes)]
    return moved.reshape(*batch, math.prod(x.shape[a] for a in axes)), -1


def _split_axes(y: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Undoes _merge_axes."""
    if len(axes) == 1:
        return y
    moved = y.reshape(*y.shape[:-1], *(shape[a] for a in axes))
    return jnp.moveaxis(moved, range(-len(axes), 0), axes)
