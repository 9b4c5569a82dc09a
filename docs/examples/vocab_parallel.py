"""Training with a vocabulary that is sharded over four devices of this host.

Each device has a quarter of the classes' weights, and computes a quarter of the logits. The loss takes one
all-gather, and its gradient no further collective for the softmax.

    python docs/examples/vocab_parallel.py --steps 50
"""

import argparse
import functools
import os

# Before JAX starts: four devices on one CPU. On real devices this is not needed.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_softmax2p import softmax_cross_entropy_with_integer_labels

CLASSES, FEATURES, BATCH = 20_000, 32, 64


def mean_loss(weights: jax.Array, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss as each device computes it: weights are those of its own classes, labels count all of them."""
    logits = inputs @ weights
    return softmax_cross_entropy_with_integer_labels(logits, labels, axis_name="vocab").mean()


def make_step(mesh: jax.sharding.Mesh, rate: float):
    """The jitted step(weights, inputs, labels) -> weights, loss."""
    specs = P(None, "vocab"), P(), P()
    loss = jax.shard_map(mean_loss, mesh=mesh, in_specs=specs, out_specs=P())

    @functools.partial(jax.jit, donate_argnums=0)
    def step(weights, inputs, labels):
        value, gradient = jax.value_and_grad(loss)(weights, inputs, labels)
        return weights - rate * gradient, value

    return step


def main(steps: int) -> list[float]:
    """Trains, and returns the losses."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("vocab",), axis_types=(AxisType.Auto,))
    weights = jax.device_put(jnp.zeros((FEATURES, CLASSES)), NamedSharding(mesh, P(None, "vocab")))
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((BATCH, FEATURES)), jnp.float32)
    labels = jnp.asarray(rng.integers(CLASSES, size=BATCH), jnp.int32)
    step, losses = make_step(mesh, rate=10.0), []
    print(f"{devices} devices, {CLASSES // devices} of {CLASSES} classes on each")
    for i in range(steps):
        weights, loss = step(weights, inputs, labels)
        losses.append(float(loss))
        if i % 10 == 0:
            print(f"step {i:4}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
