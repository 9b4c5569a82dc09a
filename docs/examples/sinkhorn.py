"""Entropic optimal transport in log space, without an array of the costs' size.

docs/sinkhorn.md explains it.

    python docs/examples/sinkhorn.py --points 1000
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import jax_softmax2p as s2p


def log_marginal(C, f, g, eps, axis):
    """log(P.sum(axis)): of shape (n,) for axis 1, and (m,) for axis 0."""
    return s2p.logsumexp(C, axis, scale=-1 / eps, bias=(f[:, None] / eps, g / eps))


def step(C, a, b, f, g, eps):
    """Potentials with which first the row sums are a, and then the column sums b."""
    f = f + eps * (jnp.log(a) - log_marginal(C, f, g, eps, axis=1))
    g = g + eps * (jnp.log(b) - log_marginal(C, f, g, eps, axis=0))
    return f, g


def sinkhorn(C, a, b, eps, steps):
    """The potentials after so many steps."""
    start = jnp.zeros_like(a), jnp.zeros_like(b)
    return jax.lax.fori_loop(0, steps, lambda _, potentials: step(C, a, b, *potentials, eps), start)


def marginal_error(C, a, f, g, eps):
    """The sum of |P.sum(1) - a|."""
    return jnp.abs(jnp.exp(log_marginal(C, f, g, eps, axis=1)) - a).sum()


def sinkhorn_until(C, a, b, eps, tolerance, steps_between=10, most=1000):
    """The potentials once the marginal error is below the tolerance, or after ``most`` rounds of steps."""

    def goes_on(state):
        rounds, _, _, error = state
        return (error > tolerance) & (rounds < most)

    def round_of_steps(state):
        rounds, f, g, _ = state
        f, g = jax.lax.fori_loop(0, steps_between, lambda _, p: step(C, a, b, *p, eps), (f, g))
        return rounds + 1, f, g, marginal_error(C, a, f, g, eps)

    start = 0, jnp.zeros_like(a), jnp.zeros_like(b), jnp.array(jnp.inf, C.dtype)
    _, f, g, _ = jax.lax.while_loop(goes_on, round_of_steps, start)
    return f, g


def transport_value(C, a, b, eps, tolerance=1e-6):
    """min (P * C).sum() + eps * (P * (log(P) - 1)).sum() over the plans with the marginals a and b."""
    f, g = jax.lax.stop_gradient(sinkhorn_until(*jax.lax.stop_gradient((C, a, b)), eps, tolerance))
    mass = jnp.exp(log_marginal(C, f, g, eps, axis=1)).sum()
    return f @ a + g @ b - eps * mass


def relative_step(C, a, b, f, g, eps):
    """The same step for a plan that is relative to a and b."""
    f = -eps * s2p.logsumexp(C, 1, b, scale=-1 / eps, bias=g / eps)
    g = -eps * s2p.logsumexp(C, 0, a[:, None], scale=-1 / eps, bias=f[:, None] / eps)
    return f, g


def log_marginal_of_points(x, y, f, g, eps, block):
    """log_marginal along axis 1 for C = |x - y|^2, from blocks of so many points y, which divide m."""

    def add_block(total, points):
        y, g = points
        C = jnp.sum((x[:, None] - y) ** 2, -1)
        return total.combine(s2p.sum_exp((g - C) / eps)), None

    blocks = y.reshape(-1, block, y.shape[-1]), g.reshape(-1, block)
    total, _ = jax.lax.scan(add_block, s2p.SumExp.empty(f.shape, x.dtype), blocks)
    return total.log() + f / eps


def main(points: int) -> tuple[float, float]:
    """Moves points of one Gaussian to those of another; the marginal error, and the transport's value."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((points, 2)), jnp.float32)
    y = jnp.asarray(rng.normal((3, 0), 1, (points, 2)), jnp.float32)
    C = jnp.sum((x[:, None] - y) ** 2, -1)
    a = b = jnp.full(points, 1 / points)
    eps, tolerance = 0.1, 1e-3
    f, g = jax.jit(sinkhorn_until)(C, a, b, eps, tolerance)
    error = float(marginal_error(C, a, f, g, eps))
    value, push = jax.jit(jax.value_and_grad(transport_value))(C, a, b, eps, tolerance)
    print(f"{points}² costs: the marginals are off by {error:.1e}, the value is {float(value):.3f}")
    print(f"the gradient in the costs is the plan, whose entries sum to {float(push.sum()):.4f}")
    return error, float(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1000)
    main(parser.parse_args().points)
