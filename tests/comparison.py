"""Random operands, and comparisons of results, for tests of functions of several arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import versions

QUICK_COMPILATION: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
"""XLA's options by which programs compile in half the time: for oracles, and where what XLA makes of programs
does not matter."""

if not versions.has(jax, "0.11"):
    QUICK_COMPILATION["xla_cpu_use_fusion_emitters"] = False

quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILATION)


def normal(*shape, seed=0):
    """Normal numbers of float64, the same ones for the same shape and seed."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def weighted_sum(y):
    """A sum of the elements with weights that make its gradient differ from element to element."""
    return jnp.sum(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape) * y)


def values_and_gradient(f):
    """(x, *others) -> f's values, and the gradient of their sum in x, infinite values included."""

    def both(x, *others):
        y, vjp = jax.vjp(lambda x: f(x, *others), x)
        return y, vjp(jnp.ones_like(y))[0]

    return both


def assert_close(actual, expected, tolerance=1e-12):
    """Compares two pytrees of one structure, with the tolerance both relative and absolute."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=tolerance, atol=tolerance
        )
