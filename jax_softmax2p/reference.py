"""The semantics in plain jax.numpy: what runs where no native kernel does, and what those must match.

The functions work along one axis; ``ops`` does the rest. They compute float16, bfloat16 and float8 in float32
and round once, as the native kernels do. Logits are scale·x + bias, all of one rank; what
``where`` masks takes no part.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def softmax(
    x: Array, axis: int, scale: Array | None = None, bias: Array | None = None, where: Array | None = None
) -> Array:
    """exp(z - max(z)) / sum(exp(z - max(z))) along ``axis`` for logits z; 0 where masked."""
    z = _logits(x, axis, scale, bias, where)
    unnormalized = jnp.exp(z - jax.lax.stop_gradient(_maximum(z, axis)))
    y = (unnormalized / jnp.sum(unnormalized, axis, keepdims=True)).astype(x.dtype)
    return y if where is None else jnp.where(where, y, 0)


def log_softmax(
    x: Array, axis: int, scale: Array | None = None, bias: Array | None = None, where: Array | None = None
) -> tuple[Array, Array, Array]:
    """z - log(sum(exp(z))) along ``axis`` for logits z, -inf where masked; and the logsumexp as two."""
    z = _logits(x, axis, scale, bias, where)
    shifted = z - jax.lax.stop_gradient(_maximum(z, axis))
    y = (shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis, keepdims=True))).astype(x.dtype)
    y = y if where is None else jnp.where(where, y, -jnp.inf)
    return y, *logsumexp(x, axis, scale, bias, where)


def subtract_lse(
    x: Array,
    hi: Array,
    lo: Array,
    axis: int,
    scale: Array | None = None,
    bias: Array | None = None,
    where: Array | None = None,
) -> Array:
    """z - hi - lo for logits z, -inf where masked: log_softmax(z) from the logsumexp."""
    hi, lo = jnp.expand_dims(hi, axis), jnp.expand_dims(lo, axis)
    y = (_logits(x, axis, scale, bias, where) - hi) - lo
    y = jnp.where(hi == jnp.inf, jnp.nan, y).astype(x.dtype)
    return y if where is None else jnp.where(where, y, -jnp.inf)


def log_softmax_vjp(
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    t: Array,
    axis: int,
    scale: Array | None = None,
    bias: Array | None = None,
    where: Array | None = None,
) -> Array:
    """t - softmax(z)·sum(t) along ``axis``; 0 where masked."""
    p = _probabilities(x, hi, lo, axis, scale, bias, where)
    y = (_widen(t) - p * jnp.sum(_widen(t), axis, keepdims=True, where=where)).astype(t.dtype)
    return y if where is None else jnp.where(where, y, 0)


def logsumexp(
    x: Array, axis: int, scale: Array | None = None, bias: Array | None = None, where: Array | None = None
) -> tuple[Array, Array]:
    """log(sum(exp(z))) along ``axis`` for logits z, as a sum of two: its rounding, and what that leaves."""
    z = _logits(x, axis, scale, bias, where, empty=-jnp.inf)
    z_max = jax.lax.stop_gradient(_maximum(z, axis))
    z_max = jnp.where(jnp.isfinite(z_max), z_max, 0)
    log = jnp.log(jnp.sum(jnp.exp(z - z_max), axis))
    z_max = jnp.squeeze(z_max, axis)
    hi = z_max + log
    lo = jnp.where(jnp.isfinite(hi), (z_max - hi) + log, 0)
    return hi, jax.lax.stop_gradient(lo)


def logsumexp_vjp(
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    factor: Array,
    axis: int,
    scale: Array | None = None,
    bias: Array | None = None,
    where: Array | None = None,
) -> Array:
    """factor·(exp(z - hi - lo) - one_hot(labels)) along ``axis``; 0 where masked, but for the labels."""
    y = _probabilities(x, hi, lo, axis, scale, bias, where)
    factor = jnp.expand_dims(factor, axis)
    counts = where
    if where is not None:
        y = jnp.where(where, y, 0)
    if labels.size:
        at_label = one_hot(labels, x.shape, axis)
        y = y - at_label
        counts = None if where is None else where | at_label
    y = (factor * y).astype(x.dtype)
    return y if counts is None else jnp.where(counts, y, 0)


def logsumexp_jvp(
    x: Array,
    hi: Array,
    lo: Array,
    labels: Array,
    t: Array,
    axis: int,
    scale: Array | None = None,
    bias: Array | None = None,
    where: Array | None = None,
) -> Array:
    """sum(softmax(z)·t) along ``axis``, less t at the labels: what logsumexp_vjp transposes."""
    p = _probabilities(x, hi, lo, axis, scale, bias, where)
    t = _widen(t)
    result = jnp.sum(p * t, axis, where=where)
    if labels.size:
        result = result - jnp.sum(jnp.where(one_hot(labels, x.shape, axis), t, 0), axis)
    return result


def softmax_jacobian(
    y: Array, t: Array, axis: int, *, total: Callable[[Array], Array] = lambda dot: dot
) -> Array:
    """The symmetric Jacobian of softmax at the output y, applied to t: y·(t - <y, t>).

    Of rows that are parts of longer ones, ``total`` makes <y, t> of the part that of the whole.
    """
    y_wide, t_wide = _widen(y), _widen(t)
    return (y_wide * (t_wide - total(_dot(y_wide, t_wide, axis)))).astype(y.dtype)


def softmax_jacobian_derivative(y: Array, t: Array, y_dot: Array, axis: int) -> Array:
    """The derivative of :func:`softmax_jacobian` with respect to y, applied to y_dot."""
    y_wide, t_wide, y_dot_wide = _widen(y), _widen(t), _widen(y_dot)
    centred = t_wide - _dot(y_wide, t_wide, axis)
    return (y_dot_wide * centred - y_wide * _dot(y_dot_wide, t_wide, axis)).astype(y.dtype)


def one_hot(labels: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Where along ``axis`` the labels are: below 0 from the end, out of range nowhere."""
    labels = jnp.expand_dims(jnp.where(labels < 0, labels + shape[axis], labels), axis)
    return jax.lax.broadcasted_iota(labels.dtype, shape, axis % len(shape)) == labels


def _logits(
    x: Array,
    axis: int,
    scale: Array | None,
    bias: Array | None,
    where: Array | None,
    empty: float = 0,
) -> Array:
    """scale·x + bias; -inf where masked, or ``empty`` throughout a row without a True."""
    # Masked before it is scaled: 0 times what stands there would be NaN in scale's derivative.
    z = _widen(x if where is None else jnp.where(where, x, 0))
    if scale is not None:
        z = z * scale
    if bias is not None:
        z = z + _widen(bias)
    if where is None:
        return z
    masked = jnp.where(jnp.any(where, axis, keepdims=True), -jnp.inf, empty).astype(z.dtype)
    return jnp.where(where, z, masked)


def _probabilities(
    x: Array,
    hi: Array,
    lo: Array,
    axis: int,
    scale: Array | None,
    bias: Array | None,
    where: Array | None,
) -> Array:
    z = _logits(x, axis, scale, bias, where)
    return jnp.exp((z - jnp.expand_dims(hi, axis)) - jnp.expand_dims(lo, axis))


def _maximum(z: Array, axis: int) -> Array:
    return jnp.max(z, axis, keepdims=True, initial=-jnp.inf)


def _dot(a: Array, b: Array, axis: int) -> Array:
    return jnp.sum(a * b, axis, keepdims=True)


def _widen(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32:
        return x.astype(jnp.float32)
    return x
