"""Operands and comparisons for tests of other libraries' layers, which compute in float32."""

import comparison
import jax
import jax.numpy as jnp
import numpy as np
from comparison import weighted_sum as weighted_sum


def normal(*shape, seed=0, dtype=np.float32):
    """A JAX array of normal numbers, the same ones for the same shape and seed."""
    return jnp.asarray(comparison.normal(*shape, seed=seed).astype(dtype))


def assert_close(actual, expected, tolerance=2e-6):
    """Compares two pytrees of one structure, their dtypes included."""
    comparison.assert_close(actual, expected, tolerance)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)


def uses_this_package(function, *operands):
    """Whether the function calls a primitive of this package when it is traced now.

    It is wrapped in a new function, since JAX does not trace a known function again.
    """
    return "softmax2p" in str(jax.make_jaxpr(lambda *operands: function(*operands))(*operands))
