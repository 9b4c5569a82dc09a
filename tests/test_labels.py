"""Integer labels of every dtype name the class of their value, or no class, wherever they are compared.

The expected losses and gradients are computed by NumPy in float64 from the labels as Python integers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import values_and_gradient

from jax_softmax2p import softmax_cross_entropy_with_integer_labels

DTYPES = [
    name for bits in (2, 4, 8, 16, 32, 64) for name in (f"int{bits}", f"uint{bits}") if hasattr(jnp, name)
]
BATCH_MULTIPLE = 8
"""The number of labels is a multiple of it, so that tests can shard them."""


def edges(dtype, num_classes):
    """The labels of a dtype at which a comparison in the wrong type goes wrong, as Python integers."""
    limits = jnp.iinfo(dtype)
    lowest, highest = int(limits.min), int(limits.max)
    near_classes = [0, 1, num_classes - 1, num_classes, -1, -num_classes, -num_classes - 1, 127, 128]
    near_wrapping = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, -(2**31), -(2**32), -(2**32) - 1, 2**63]
    near_limits = [lowest, lowest + 1, highest - 1, highest]
    candidates = near_classes + near_wrapping + near_limits
    labels = sorted({label for label in candidates if lowest <= label <= highest})
    return labels + [0] * (-len(labels) % BATCH_MULTIPLE)


def jax_array(integers, dtype):
    """The integers as an array of JAX's of the dtype."""
    unsigned = jnp.issubdtype(dtype, jnp.unsignedinteger)
    return jnp.asarray(np.array(integers, np.uint64 if unsigned else np.int64).astype(getattr(jnp, dtype)))


def logits_for(integers, num_classes):
    return np.random.default_rng(num_classes).standard_normal((len(integers), num_classes)).astype(np.float32)


def expected(x, integers):
    """Losses, and the gradient of their sum, to which labels out of range, whose loss is NaN, add no term."""
    x = x.astype(np.float64)
    unnormalized = np.exp(x - x.max(-1, keepdims=True))
    sums = unnormalized.sum(-1, keepdims=True)
    losses, gradient = np.full(len(integers), np.nan), unnormalized / sums
    n = x.shape[-1]
    for row, label in enumerate(integers):
        if -n <= label < n:
            losses[row] = np.log(sums[row, 0]) + x[row].max() - x[row, label]
            gradient[row, label] -= 1
    return losses, gradient


def check(function, integers, dtype, num_classes):
    x = logits_for(integers, num_classes)
    actual = function(x, jax_array(integers, dtype))
    for array, exact in zip(actual, expected(x, integers), strict=True):
        np.testing.assert_allclose(array, exact, rtol=2e-6, atol=2e-6)


@pytest.fixture
def loss(implementation):
    return functools.partial(softmax_cross_entropy_with_integer_labels, implementation=implementation)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [3, 300])
def test_edges_of_the_dtype(dtype, num_classes, loss):
    """There are fewer or more classes than the dtype can count."""
    check(jax.jit(values_and_gradient(loss)), edges(dtype, num_classes), dtype, num_classes)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int64"])
def test_eager(dtype, loss):
    check(values_and_gradient(loss), edges(dtype, 200), dtype, 200)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
def test_vmap(dtype, loss):
    """Both logits and labels are mapped over, or labels alone."""
    check(jax.jit(jax.vmap(values_and_gradient(loss))), edges(dtype, 200), dtype, 200)
    integers = edges(dtype, 200)
    x = logits_for([0], 200)
    losses = jax.jit(jax.vmap(loss, (None, 0)))(x[0], jax_array(integers, dtype))
    exact, _ = expected(np.repeat(x, len(integers), 0), integers)
    np.testing.assert_allclose(losses, exact, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_along_another_axis(dtype, implementation):
    loss = functools.partial(softmax_cross_entropy_with_integer_labels, axis=0, implementation=implementation)
    function = jax.jit(values_and_gradient(lambda x, labels: loss(x.T, labels)))
    check(function, edges(dtype, 200), dtype, 200)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_64_bits_of_numpy_without_x64(dtype, loss):
    """JAX would cut them down to 32 bits, which make class 0 of 2^32."""
    limits = np.iinfo(dtype)
    integers = [0, 2, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 2, limits.max, limits.min]
    x = logits_for(integers, 3)
    with jax.enable_x64(False):
        losses, gradient = values_and_gradient(loss)(x, np.array(integers, dtype))
    exact_losses, exact_gradient = expected(x, integers)
    np.testing.assert_allclose(losses, exact_losses, rtol=2e-6)
    np.testing.assert_allclose(gradient, exact_gradient, atol=2e-6)


def test_more_classes_than_int32_can_count():
    shapes = jax.ShapeDtypeStruct((1, 2**31), np.float32), jax.ShapeDtypeStruct((1,), np.int32)
    with pytest.raises(ValueError, match="no more than 2147483647 classes, got 2147483648"):
        jax.eval_shape(softmax_cross_entropy_with_integer_labels, *shapes)


@pytest.mark.parametrize("label", [2**31, 2**40, -(2**63), 10**30])
def test_numbers_beyond_32_bits_name_no_class(label, loss):
    assert np.isnan(loss(jnp.zeros(3), label))
    np.testing.assert_allclose(loss(jnp.zeros(3), -1), np.log(3), rtol=1e-6)


def test_a_boolean_is_no_label(loss):
    with pytest.raises(TypeError, match="labels must be integers, got dtype bool"):
        loss(jnp.zeros(3), True)
