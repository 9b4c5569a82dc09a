"""Scale, bias and masks along axes that are not the last, in every shape in which they broadcast."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import assert_close, exact, normal

import jax_softmax2p as s2p

pytestmark = pytest.mark.long

FUNCTIONS = {"softmax": s2p.softmax, "log_softmax": s2p.log_softmax, "logsumexp": s2p.logsumexp}
# Several matrices in a panel, and several panels in a matrix; a tail of rows; dimensions beside the axis.
LAYOUTS = [((3, 20, 4, 5), 1), ((33, 3, 100), 0), ((40, 2, 7), -2), ((2, 17, 300), 1)]


def broadcast_shapes(shape):
    """All shapes that broadcast to that one, without its own."""
    return [s for s in itertools.product(*((1, size) for size in shape)) if s != shape]


def cotangent_of(shape):
    return (np.arange(np.prod(shape)) * 7 % 11 - 5).reshape(shape) / 4


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
            found[name] = y, vjp(jnp.asarray(cotangent_of(y.shape), y.dtype))
        return found

    return jax.tree.map(np.asarray, jax.jit(run)(x, scale, bias, where))


@pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    [*((shape, axis, np.float32) for shape, axis in LAYOUTS), ((33, 3, 100), 0, jnp.bfloat16)],
)
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
    """Of results and VJPs, where some columns are masked throughout and masked elements are not finite."""
    x, bias = normal(*shape).astype(dtype), (5 * normal(*shape[1:], seed=1)).astype(dtype)
    where = normal(*shape, seed=2) < 0.5
    where &= normal(*shape[: axis % len(shape)], 1, *shape[axis % len(shape) + 1 :], seed=3) < 1
    x = np.where(where, x, np.resize([np.nan, np.inf, -np.inf], shape)).astype(dtype)
    to_rows = lambda a: np.moveaxis(a, axis, -1)
    z, mask = to_rows(np.where(where, dtype(0.5) * x, 0) + bias), to_rows(where)
    p = exact("softmax", z, mask)
    for name, (y, (gradient,)) in results(x, dtype(0.5), bias, where, axis).items():
        cotangent = cotangent_of(y.shape)
        if name == "logsumexp":
            t = cotangent[..., None]
            expected = p * t
        else:
            y, t = to_rows(y), np.where(mask, to_rows(cotangent), 0)
            sums = np.sum((p if name == "softmax" else 1) * t, -1, keepdims=True)
            expected = p * (t - sums) if name == "softmax" else t - p * sums
        assert_close(name, y, exact(name, z, mask), dtype, z)
        # The gradient of softmax is made of probabilities that have been rounded.
        error = np.abs(to_rows(gradient) - 0.5 * expected).max(-1)
        largest = np.abs(t).max(-1) + (np.abs(sums[..., 0]) if name == "log_softmax" else 0)
        assert (error <= 4 * jnp.finfo(dtype).eps * largest).all(), name
        assert not to_rows(gradient)[~mask].any()
