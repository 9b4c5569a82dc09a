"""Optimal transport: Sinkhorn's iterations in log space, along both axes in turn."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs.program import Program, normal

ITERATIONS = 50


def sinkhorn(shape, rng):
    """Regularised transport cost between uniform marginals, from a cost matrix of that shape."""
    rows, columns = shape
    epsilon = 0.05

    def transport_cost(cost):
        log_a, log_b = -np.log(rows).astype(cost.dtype), -np.log(columns).astype(cost.dtype)

        def iterate(_, potentials):
            f, g = potentials
            f = epsilon * (log_a - jax.nn.logsumexp((g[None, :] - cost) / epsilon, axis=1))
            g = epsilon * (log_b - jax.nn.logsumexp((f[:, None] - cost) / epsilon, axis=0))
            return f, g

        zeros = jnp.zeros(rows, cost.dtype), jnp.zeros(columns, cost.dtype)
        f, g = jax.lax.fori_loop(0, ITERATIONS, iterate, zeros)
        plan = jnp.exp((f[:, None] + g[None, :] - cost) / epsilon)
        return jnp.sum(plan * cost)

    return transport_cost, (rng.random(shape, np.float32),)


def sinkhorn_of_points(shape, rng):
    """Potentials between two clouds of points, updated by what marginals lack. Shape: points of each."""
    epsilon = 0.05

    def potentials(x, y):
        squared = lambda points: (points**2).sum(-1)
        cost = squared(x)[:, None] + squared(y)[None, :] - 2 * x @ y.T
        log_a, log_b = (-np.log(size).astype(cost.dtype) for size in cost.shape)

        def log_marginal(f, g, axis):
            return jax.scipy.special.logsumexp((f[:, None] + g[None, :] - cost) / epsilon, axis=axis)

        def iterate(_, potentials):
            f, g = potentials
            g = g + epsilon * (log_b - log_marginal(f, g, 0))
            f = f + epsilon * (log_a - log_marginal(f, g, 1))
            return f, g

        zeros = tuple(jnp.zeros(size, cost.dtype) for size in cost.shape)
        return jax.lax.fori_loop(0, ITERATIONS, iterate, zeros)

    first, second = shape
    return potentials, (normal(rng, first, 3, scale=0.3), normal(rng, second, 3, scale=0.3))


PROGRAMS = {
    "Sinkhorn": Program(sinkhorn, ((128, 128), (2048, 2048)), (12, 10), tolerance=1e-5),
    "gradient of Sinkhorn": Program(sinkhorn, ((128, 128),), (12, 10), differentiates=True, tolerance=1e-5),
    "Sinkhorn of points": Program(
        sinkhorn_of_points, ((1000, 1000), (2000, 2000), (4000, 4000)), (12, 10), tolerance=1e-5
    ),
}
