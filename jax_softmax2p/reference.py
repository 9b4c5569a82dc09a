"""The semantics in plain jax.numpy: what runs where no native kernel does, and what those must match.

The functions take an unmasked array and one axis; ``ops`` does the rest. They compute float16, bfloat16
and float8 in float32 and round once, as the native kernels do.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def softmax(x: Array, axis: int) -> Array:
    """exp(x - max(x)) / sum(exp(x - max(x))) along ``axis``."""
    x_wide = _widen(x)
    x_max = jnp.max(x_wide, axis, keepdims=True, initial=-jnp.inf)
    unnormalized = jnp.exp(x_wide - jax.lax.stop_gradient(x_max))
    return (unnormalized / jnp.sum(unnormalized, axis, keepdims=True)).astype(x.dtype)


def softmax_jacobian(y: Array, t: Array, axis: int) -> Array:
    """The symmetric Jacobian of softmax at the output y, applied to t: y·(t - <y, t>)."""
    y_wide, t_wide = _widen(y), _widen(t)
    return (y_wide * (t_wide - _dot(y_wide, t_wide, axis))).astype(y.dtype)


def softmax_jacobian_derivative(y: Array, t: Array, y_dot: Array, axis: int) -> Array:
    """The derivative of :func:`softmax_jacobian` with respect to y, applied to y_dot."""
    y_wide, t_wide, y_dot_wide = _widen(y), _widen(t), _widen(y_dot)
    centred = t_wide - _dot(y_wide, t_wide, axis)
    return (y_dot_wide * centred - y_wide * _dot(y_dot_wide, t_wide, axis)).astype(y.dtype)


def _dot(a: Array, b: Array, axis: int) -> Array:
    return jnp.sum(a * b, axis, keepdims=True)


def _widen(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32:
        return x.astype(jnp.float32)
    return x
