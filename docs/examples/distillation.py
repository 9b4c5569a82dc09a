"""Distillation with a temperature for every row.

A teacher that is sure of some examples and not of others is softened by one temperature too much here and too
little there. Here each row has the temperature at which the teacher's distribution has a given entropy. As
``scale`` it goes into the softmax and the log-softmax, and no array of scaled logits is made.

    python docs/examples/distillation.py --steps 200
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import jax_softmax2p as s2p

EXAMPLES, FEATURES, CLASSES, ENTROPY = 512, 32, 100, 2.0


def row_temperatures(logits: jax.Array, entropy: float) -> jax.Array:
    """The temperature of every row, (rows, 1), at which its softmax has that entropy, by bisection."""

    def halve(_, bounds):
        low, high = bounds
        middle = jnp.sqrt(low * high)
        log_p = s2p.log_softmax(logits, scale=1 / middle)
        too_soft = -jnp.sum(jnp.exp(log_p) * log_p, -1, keepdims=True) > entropy
        return jnp.where(too_soft, low, middle), jnp.where(too_soft, middle, high)

    ones = jnp.ones((len(logits), 1))
    low, high = jax.lax.fori_loop(0, 25, halve, (1e-3 * ones, 1e3 * ones))
    return jnp.sqrt(low * high)


def distillation_loss(student: jax.Array, teacher: jax.Array, temperature: jax.Array) -> jax.Array:
    """Hinton et al., arXiv 1503.02531, whose factor T² keeps gradients alike at all temperatures."""
    soft = s2p.softmax(teacher, scale=1 / temperature)
    log_p = s2p.log_softmax(student, scale=1 / temperature)
    return jnp.mean(temperature**2 * -jnp.sum(soft * log_p, -1, keepdims=True))


def main(steps: int) -> tuple[list[float], float]:
    """Trains a linear student; its losses, and the share of rows in which it agrees with the teacher."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((EXAMPLES, FEATURES)), jnp.float32)
    sureness = rng.lognormal(0, 1, (EXAMPLES, 1))
    teacher = jnp.asarray(sureness * (inputs @ rng.standard_normal((FEATURES, CLASSES))), jnp.float32)
    temperature = row_temperatures(teacher, ENTROPY)
    print(f"temperatures from {float(temperature.min()):.2f} to {float(temperature.max()):.2f}")

    loss = lambda weights: distillation_loss(temperature * (inputs @ weights), teacher, temperature)
    step = jax.jit(jax.value_and_grad(loss))
    weights, losses = jnp.zeros((FEATURES, CLASSES)), []
    for i in range(steps):
        value, gradient = step(weights)
        weights -= 0.05 * gradient
        losses.append(float(value))
        if i % 20 == 0:
            print(f"step {i:4}  loss {losses[-1]:.4f}")
    agreement = float(jnp.mean(jnp.argmax(inputs @ weights, -1) == jnp.argmax(teacher, -1)))
    print(f"the student's most probable class is the teacher's in {100 * agreement:.0f}% of the rows")
    return losses, agreement


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
