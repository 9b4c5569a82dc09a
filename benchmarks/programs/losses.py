"""Losses of classifiers, rows in a batch, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs.program import Program, integers, normal, with_gradient

TEMPERATURE = 4.0

IGNORED = 255
"""The label of pixels that the loss leaves out."""


def contrastive(shape, rng):
    """Cross-entropies of pairs along both axes, as in CLIP. Shape: that of the logits, square."""
    import optax

    def loss(logits, labels):
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)).mean() / 2

    return loss, (normal(rng, *shape, scale=5), np.arange(shape[0], dtype=np.int32))


def contrastive_by_log_softmax(shape, rng):
    """The same, from log-probabilities on the diagonal."""

    def loss(logits):
        of_rows = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
        of_columns = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
        return -(of_rows + of_columns).mean() / 2

    return loss, (normal(rng, *shape, scale=5),)


def segmentation(shape, rng):
    """Cross-entropy of pixels. Shape: batch, classes, height, width."""
    import optax

    batch, classes, height, width = shape

    def loss(logits, labels):
        counts = labels != IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, labels, 0), axis=1)
        return jnp.where(counts, losses, 0).sum() / counts.sum()

    labels = integers(rng, classes, batch, height, width)
    labels[rng.random(labels.shape) < 0.1] = IGNORED
    return loss, (normal(rng, *shape), labels)


def distillation(shape, rng):
    """A teacher's probabilities at a temperature, and the labels. Shape: batch, classes."""
    import optax

    def loss(student, teacher, labels):
        soft = jax.nn.softmax(teacher / TEMPERATURE)
        of_teacher = optax.softmax_cross_entropy(student / TEMPERATURE, soft) * TEMPERATURE**2
        of_labels = optax.softmax_cross_entropy_with_integer_labels(student, labels)
        return (0.9 * of_teacher + 0.1 * of_labels).mean()

    batch, classes = shape
    return loss, (normal(rng, *shape, scale=3), normal(rng, *shape, scale=3), integers(rng, classes, batch))


def distillation_by_divergence(shape, rng):
    """The Kullback-Leibler divergence from a teacher at a temperature. Shape: batch, classes."""
    import optax

    def loss(student, teacher):
        log_student = jax.nn.log_softmax(student / TEMPERATURE)
        soft = jax.nn.softmax(teacher / TEMPERATURE)
        return optax.kl_divergence(log_student, soft).mean() * TEMPERATURE**2

    return loss, (normal(rng, *shape, scale=3), normal(rng, *shape, scale=3))


def label_smoothing(shape, rng):
    """Cross-entropy with smoothed labels. Shape: batch, classes."""
    import optax

    batch, classes = shape

    def loss(logits, labels):
        soft = optax.smooth_labels(jax.nn.one_hot(labels, classes, dtype=logits.dtype), 0.1)
        return optax.softmax_cross_entropy(logits, soft).mean()

    return loss, (normal(rng, *shape), integers(rng, classes, batch))


def sampled_softmax(shape, rng):
    """Cross-entropy of the label against a sample of an eighth of the classes. Shape: batch, samples."""
    import optax

    batch, samples = shape
    classes, features = 8 * samples, 64

    def loss(weights, inputs, labels, drawn):
        of_labels = jnp.sum(inputs * weights[labels], -1, keepdims=True)
        of_drawn = inputs @ weights[drawn].T - jnp.log(samples / classes).astype(inputs.dtype)
        of_drawn = jnp.where(drawn == labels[:, None], -1e9, of_drawn)
        logits = jnp.concatenate([of_labels, of_drawn], -1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros_like(labels)).mean()

    return loss, (
        normal(rng, classes, features, scale=0.2),
        normal(rng, batch, features),
        integers(rng, classes, batch),
        integers(rng, classes, samples),
    )


def z_loss(shape, rng):
    """Cross-entropy and the square of the normaliser's logarithm, as in PaLM. Shape: tokens, vocabulary."""
    import optax

    def loss(logits, labels):
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (cross_entropy + 1e-4 * jax.nn.logsumexp(logits, axis=-1) ** 2).mean()

    tokens, vocabulary = shape
    return loss, (normal(rng, *shape), integers(rng, vocabulary, tokens))


def focal(shape, rng):
    """Focal loss of several classes, from log-probabilities. Shape: boxes, classes."""

    def loss(logits, labels):
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)[:, 0]
        return -((1 - jnp.exp(log_p)) ** 2 * log_p).mean()

    boxes, classes = shape
    return loss, (normal(rng, *shape), integers(rng, classes, boxes))


def gaussian_mixture(shape, rng):
    """Negative log-likelihood of points in the plane. Shape: points, components."""
    points, components = shape

    def loss(parameters, points):
        scales = jnp.exp(parameters["log_scales"])
        of_axes = jax.scipy.stats.norm.logpdf(points[:, None, :], parameters["means"], scales)
        joint = jax.nn.log_softmax(parameters["weights"]) + of_axes.sum(-1)
        return -jax.nn.logsumexp(joint, axis=-1).mean()

    parameters = {
        "weights": normal(rng, components),
        "means": normal(rng, components, 2),
        "log_scales": normal(rng, components, 2, scale=0.3),
    }
    return loss, (parameters, normal(rng, points, 2))


def _gradient(build, shapes, small_shape, has_our_losses=True) -> Program:
    return Program(build, shapes, small_shape, differentiates=True, has_our_losses=has_our_losses)


PROGRAMS = {
    "contrastive": _gradient(contrastive, ((1024, 1024),), (9, 9)),
    "contrastive by log_softmax": _gradient(contrastive_by_log_softmax, ((1024, 1024),), (9, 9), False),
    "segmentation": _gradient(segmentation, ((4, 21, 128, 128),), (2, 5, 4, 6)),
    "distillation": _gradient(distillation, ((128, 1000),), (6, 11)),
    "distillation by divergence": _gradient(distillation_by_divergence, ((128, 1000),), (6, 11), False),
    "label smoothing": _gradient(label_smoothing, ((256, 1000),), (6, 11)),
    "sampled softmax": _gradient(sampled_softmax, ((256, 4096),), (6, 11)),
    "z-loss": _gradient(z_loss, ((512, 32000),), (6, 50)),
    "focal loss": _gradient(focal, ((8192, 81),), (6, 11), False),
    **with_gradient("Gaussian mixture", Program(gaussian_mixture, ((10000, 5),), (50, 3))),
}
