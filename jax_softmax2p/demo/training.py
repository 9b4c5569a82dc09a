"""Training the demonstration's model, and the record of losses and times that any training keeps."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p.demo.model import Parameters, Size, Softmax, batch_loss, initial_parameters
from jax_softmax2p.demo.text import sample_batch

LEARNING_RATE = 3e-3


class StepRecord:
    """The loss and the time of every training step.

    Attributes:
      losses: of the steps so far.
      seconds: what each took.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def run(self, step: Callable[[], jax.Array]) -> None:
        """Runs and times one step, which returns its loss."""
        start = time.perf_counter()
        self.losses.append(float(step()))
        self.seconds.append(time.perf_counter() - start)

    def seconds_per_step(self) -> float:
        """The median of the steps without the first, which compiles."""
        return statistics.median(self.seconds[1:])


def largest_difference(losses: Sequence[float], other_losses: Sequence[float]) -> float:
    """The largest absolute difference of two trainings' losses of the same step."""
    return max(abs(a - b) for a, b in zip(losses, other_losses, strict=True))


def train(
    tokens: np.ndarray,
    vocabulary: int,
    size: Size,
    steps: int,
    softmax: Softmax,
    show: Callable[[str], None],
) -> StepRecord:
    """Trains the model with Adam (arXiv 1412.6980), always from the same seed and on the same batches.

    Args:
      tokens: a vector of token indices.
      vocabulary: how many different tokens there are.
      size: of the model and of a batch.
      steps: how many steps to train.
      softmax: as jax.nn.softmax.
      show: is called with lines that tell of the progress.
    """
    params = initial_parameters(jax.random.key(0), vocabulary, size)
    moments = jax.tree.map(jnp.zeros_like, (params, params))

    @jax.jit
    def adam_step(
        params: Parameters, moments: tuple[Parameters, Parameters], count: jax.Array, batch: jax.Array
    ) -> tuple[Parameters, tuple[Parameters, Parameters], jax.Array]:
        loss, gradient = jax.value_and_grad(batch_loss)(params, batch, size, softmax)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
        second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], gradient)
        rate = LEARNING_RATE * jnp.sqrt(1 - 0.99**count) / (1 - 0.9**count)
        params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, first, second)
        return params, (first, second), loss

    def step(count: int, batch: np.ndarray) -> jax.Array:
        nonlocal params, moments
        params, moments, loss = adam_step(params, moments, float(count), batch)
        return loss

    rng, record = np.random.default_rng(0), StepRecord()
    for count in range(1, steps + 1):
        batch = sample_batch(rng, tokens, size.batch, size.context)
        record.run(functools.partial(step, count, batch))
        if count == 1 or count % max(1, steps // 4) == 0:
            show(f"step {count:4d}  loss {record.losses[-1]:.4f}")
    return record
