"""Scale, bias and masks along axes that are not the last: in every shape in which they broadcast, on panels."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import assert_close, exact, normal

import jax_softmax2p as s2p

FUNCTIONS = {"softmax": s2p.softmax, "log_softmax": s2p.log_softmax, "logsumexp": s2p.logsumexp}
# Several matrices in a panel, and several panels in a matrix; a tail of rows; dimensions beside the axis.
LAYOUTS = [((3, 20, 4, 5), 1), ((33, 3, 100), 0), ((40, 2, 7), -2), ((2, 17, 300), 1)]


def broadcast_shapes(shape):
    """All shapes that broadcast to that one, without its own."""
    return [s for s in itertools.product(*((1, size) for size in shape)) if s != shape]


def results(x, scale, bias, where, axis):
    """Each function's result and its VJP in x."""

    def run(x, scale, bias, where):
        found = {}
        for name, function in FUNCTIONS.items():
            y, vjp = jax.vjp(
                lambda x, f=function: f(
                    x, axis=axis, where=where, scale=scale, bias=bias, implementation="native"
                ),
                x,
            )
            cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
            found[name] = y, vjp(cotangent)
        return found

    return jax.tree.map(np.asarray, jax.jit(run)(x, scale, bias, where))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_operands_that_broadcast_have_the_bits_of_those_in_full(shape, axis, dtype):
    x = jnp.asarray(normal(*shape), dtype)
    of_column = tuple(1 if i == axis % len(shape) else size for i, size in enumerate(shape))
    scale = jnp.asarray(1 + np.abs(normal(*of_column, seed=1)), np.float32).astype(dtype)
    biases = broadcast_shapes(shape)
    for bias_shape, where_shape in zip(biases, reversed(biases), strict=True):
        bias = jnp.asarray(normal(*bias_shape, seed=2), dtype)
        where = normal(*where_shape, seed=3) < 1
        actual = results(x, scale, bias, where, axis)
        expected = results(x, scale, jnp.broadcast_to(bias, shape), np.broadcast_to(where, shape), axis)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_accuracy(shape, axis, dtype):
    """Of results and, against float64, of their VJPs, where some columns are masked throughout."""
    x, bias = normal(*shape).astype(dtype), (5 * normal(*shape[1:], seed=1)).astype(dtype)
    where = normal(*shape, seed=2) < 0.5
    where = where & (np.moveaxis(np.moveaxis(where, axis, 0)[:1], 0, axis) | (shape[axis] > 20))
    x = np.where(where, x, np.resize([np.nan, np.inf, -np.inf], shape)).astype(dtype)
    actual = results(x, dtype(0.5), bias, where, axis)
    to_rows = lambda a: np.moveaxis(a, axis, -1)
    z = np.where(where, dtype(0.5) * x, 0) + bias
    for name, (y, _) in actual.items():
        y = y if name == "logsumexp" else to_rows(y)
        assert_close(name, y, exact(name, to_rows(z), to_rows(where)), dtype, to_rows(z))
    wide = {
        "softmax": jax.nn.softmax,
        "log_softmax": jax.nn.log_softmax,
        "logsumexp": jax.nn.logsumexp,
    }
    for name, (y, (gradient,)) in actual.items():
        cotangent = np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape).astype(dtype)
        if name != "logsumexp":
            cotangent = np.where(where, cotangent, 0)
        f = lambda x, name=name: wide[name](0.5 * x + bias, axis, where=where)
        safe = jnp.asarray(np.where(where, x, 0), np.float64)
        exact_gradient = np.where(where, jax.vjp(f, safe)[1](jnp.asarray(cotangent, np.float64))[0], 0)
        if name != "logsumexp":
            exact_gradient = np.where(np.any(where, axis, keepdims=True), exact_gradient, 0)
        assert not gradient[~where].any()
        largest = np.abs(exact_gradient).max(axis, keepdims=True)
        error = np.abs(gradient - np.nan_to_num(exact_gradient)) / np.where(largest == 0, 1, largest)
        assert error.max() <= 16 * jnp.finfo(dtype).eps, name
