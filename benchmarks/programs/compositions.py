"""Softmax and what surrounds it in short expressions, of which XLA keeps little or nothing in memory."""

import jax
import jax.numpy as jnp

from benchmarks.programs.program import Program, normal, with_gradient


def entropy(shape, rng):
    """Mean entropy of the rows' distributions. Shape: that of the logits, as in all that follows."""

    def mean_entropy(logits):
        return -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()

    return mean_entropy, (normal(rng, *shape),)


def chain(shape, rng):
    """Three softmax, each of the one before, as where distributions are sharpened."""

    def confidence(logits):
        for sharpness in (20.0, 20.0):
            logits = sharpness * jax.nn.softmax(logits)
        return jnp.sum(jax.nn.softmax(logits) ** 2)

    return confidence, (normal(rng, *shape),)


def several_axes(shape, rng):
    """The mean place of an object in a map, by a softmax over its rows and columns at once."""
    _, height, width = shape

    def distance(maps):
        weights = jax.nn.softmax(maps, axis=(-2, -1))
        y = (weights * jnp.linspace(-1, 1, height, dtype=maps.dtype)[:, None]).sum((-2, -1))
        x = (weights * jnp.linspace(-1, 1, width, dtype=maps.dtype)).sum((-2, -1))
        return jnp.sum(x**2 + y**2)

    return distance, (normal(rng, *shape, scale=3),)


def log_normaliser_of_several_axes(shape, rng):
    """Energies of whole maps, squared."""

    def energy(maps):
        return jnp.mean(jax.nn.logsumexp(maps, axis=(-2, -1)) ** 2)

    return energy, (normal(rng, *shape),)


def outer_axis(shape, rng):
    """Slots compete for inputs: a softmax along axis 0, then means of each slot."""

    def spread(logits):
        weights = jax.nn.softmax(logits, axis=0)
        return jnp.sum((weights / weights.sum(-1, keepdims=True)) ** 2)

    return spread, (normal(rng, *shape),)


def outer_log_softmax(shape, rng):
    """Squared log-probabilities along axis 0."""

    def loss(logits):
        return jnp.mean(jax.nn.log_softmax(logits, axis=0) ** 2)

    return loss, (normal(rng, *shape),)


def _both(name: str, build, *shapes, small_shape=(5, 9), tolerance=2e-6) -> dict[str, Program]:
    return with_gradient(name, Program(build, shapes, small_shape, tolerance=tolerance))


_MATRICES = ((1024, 1024), (4096, 4096))
_MAPS = ((64, 128, 128), (64, 512, 512))

PROGRAMS = {
    **_both("entropy of a softmax", entropy, *_MATRICES),
    **_both("chain of softmax", chain, *_MATRICES, tolerance=1e-5),
    **_both("softmax of two axes", several_axes, *_MAPS, small_shape=(2, 5, 6)),
    **_both("logsumexp of two axes", log_normaliser_of_several_axes, *_MAPS, small_shape=(2, 5, 6)),
    **_both("softmax along axis 0", outer_axis, (2000, 1500), (4096, 4096)),
    **_both("log_softmax along axis 0", outer_log_softmax, (2000, 1500), (4096, 4096)),
}
