"""A small transformer in flax whose attention is this package's.

It learns to continue arithmetic progressions modulo 17, such as 3 5 7 9: the next number follows from the
last two, so that attention has to find the last but one.

    python docs/examples/attention_flax.py --steps 200
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_softmax2p as s2p
from jax_softmax2p import integrations

NUMBERS, WIDTH, HEADS, CONTEXT, BATCH = 17, 32, 2, 16, 32


class Block(nnx.Module):
    """Attention and a multilayer perceptron, each of normalised inputs and added to them."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, decode=False, attention_fn=integrations.flax_attention, rngs=rngs
        )
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Array of x's shape, (batch, context, width)."""
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Model(nnx.Module):
    """Logits of the next number, for numbers of shape (batch, context)."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(NUMBERS, WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.block = Block(rngs)
        self.head = nnx.Linear(WIDTH, NUMBERS, rngs=rngs)

    def __call__(self, numbers: jax.Array) -> jax.Array:
        """Array of shape (batch, context, NUMBERS)."""
        x = self.embedding(numbers) + self.position(jnp.arange(numbers.shape[1]))
        return self.head(self.block(x))


def mean_loss(model: Model, batch: jax.Array) -> jax.Array:
    """The cross-entropy of each number, given those before it."""
    return s2p.softmax_cross_entropy_with_integer_labels(model(batch[:, :-1]), batch[:, 1:]).mean()


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    """One step of training."""
    loss, gradient = nnx.value_and_grad(mean_loss)(model, batch)
    optimizer.update(model, gradient)
    return loss


def main(steps: int) -> list[float]:
    """Trains, and returns the losses."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    rng, losses = np.random.default_rng(0), []
    for i in range(steps):
        start, stride = rng.integers(NUMBERS, size=(2, BATCH, 1))
        batch = (start + stride * np.arange(CONTEXT + 1)) % NUMBERS
        losses.append(float(step(model, optimizer, jnp.asarray(batch, jnp.int32))))
        if i % 20 == 0:
            print(f"step {i:4}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
