"""``python -m benchmarks.train_lm``: a small language model, trained with jax.nn and with this package.

A causal transformer of flax.nnx learns the text of CPython's pydoc_data.topics byte by byte, two models from
one seed: one with the functions of flax and optax, and one with this package's attention and loss. Their
steps alternate, so that a machine that slows down does so for both. Prints the losses, tokens per second and
the share of a step that attention, softmax and loss take; draws the losses. Needs ``pip install '.[bench]'``.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jax_softmax2p
from benchmarks import plots
from jax_softmax2p import integrations, measure
from jax_softmax2p.__main__ import describe_environment

VOCABULARY = 256
LEARNING_RATE = 1e-3


class Size(NamedTuple):
    """The sizes of the model and of a batch."""

    layers: int = 4
    width: int = 256
    heads: int = 8
    context: int = 256
    batch: int = 16


QUICK = Size(layers=2, width=64, heads=4, context=64, batch=4)


class Backend(NamedTuple):
    """The functions that a model uses.

    Attributes:
      attention: flax's ``attention_fn``; None is flax's default.
      softmax: with the signature of jax.nn.softmax.
      loss: with the signature of optax.softmax_cross_entropy_with_integer_labels.
    """

    attention: Callable[..., jax.Array] | None
    softmax: Callable[..., jax.Array]
    loss: Callable[..., jax.Array]


BACKENDS = {
    "jax.nn": Backend(None, jax.nn.softmax, optax.softmax_cross_entropy_with_integer_labels),
    "jax_softmax2p": Backend(
        integrations.flax_attention,
        jax_softmax2p.softmax,
        jax_softmax2p.softmax_cross_entropy_with_integer_labels,
    ),
}


class Layer(nnx.Module):
    """A pre-norm transformer layer: attention, then a feed-forward network."""

    def __init__(self, size: Size, attention: Callable[..., jax.Array] | None, rngs: nnx.Rngs):
        attention = attention or nnx.dot_product_attention
        self.attention = nnx.MultiHeadAttention(
            size.heads, size.width, decode=False, attention_fn=attention, rngs=rngs
        )
        self.norms = nnx.List([nnx.LayerNorm(size.width, rngs=rngs) for _ in range(2)])
        self.up = nnx.Linear(size.width, 4 * size.width, rngs=rngs)
        self.down = nnx.Linear(4 * size.width, size.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps an array of shape (batch, context, width) to another of this shape."""
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Model(nnx.Module):
    """A causal transformer over bytes."""

    def __init__(self, size: Size, attention: Callable[..., jax.Array] | None, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, size.width, rngs=rngs)
        self.position = nnx.Embed(size.context, size.width, rngs=rngs)
        self.layers = nnx.List([Layer(size, attention, rngs) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits of the next byte at every position."""
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[-1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Training:
    """A model, its optimizer, and the losses and times of its steps."""

    def __init__(self, backend: Backend, size: Size):
        model = Model(size, backend.attention, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adamw(LEARNING_RATE), wrt=nnx.Param)
        self.losses: list[float] = []
        self.seconds: list[float] = []

        def loss_of(model: Model, batch: jax.Array) -> jax.Array:
            return backend.loss(model(batch[:, :-1]), batch[:, 1:]).mean()

        @nnx.jit
        def step(model: Model, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
            loss, gradient = nnx.value_and_grad(loss_of)(model, batch)
            optimizer.update(model, gradient)
            return loss

        self._step = functools.partial(step, model, optimizer)

    def step(self, batch: jax.Array) -> None:
        """Takes a step and times it."""
        start = time.perf_counter()
        self.losses.append(float(self._step(batch)))
        self.seconds.append(time.perf_counter() - start)

    def seconds_per_step(self) -> float:
        """The median time of all steps but the first, which compiles."""
        return statistics.median(self.seconds[1:])


def load_text() -> np.ndarray:
    """The bytes of the text."""
    from pydoc_data.topics import topics

    return np.frombuffer("\n".join(topics.values()).encode(), np.uint8).astype(np.int32)


def train(size: Size, steps: int) -> dict[str, Training]:
    """Trains all backends on the same batches."""
    text, rng = load_text(), np.random.default_rng(0)
    trainings = {name: Training(backend, size) for name, backend in BACKENDS.items()}
    with tqdm(range(steps), unit="step", disable=None) as bar:
        for _ in bar:
            starts = rng.integers(len(text) - size.context - 1, size=(size.batch, 1))
            batch = jnp.asarray(text[starts + np.arange(size.context + 1)])
            for training in trainings.values():
                training.step(batch)
            bar.set_postfix({name: f"{training.losses[-1]:.4f}" for name, training in trainings.items()})
    return trainings


def seconds_of_parts(size: Size) -> dict[str, dict[str, float]]:
    """Seconds that a step spends in its parts, value and gradient, each measured alone at its shapes.

    Returns:
      {part: {backend: seconds}}. The softmax is measured as if attention called it as a separate operation.
    """
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    heads = normal(size.batch, size.context, size.heads, size.width // size.heads)
    scores = normal(size.batch, size.heads, size.context, size.context)
    logits, labels = normal(size.batch, size.context, VOCABULARY), jnp.zeros((size.batch, size.context), int)
    causal = jnp.tri(size.context, dtype=bool)

    def attention(backend: Backend) -> tuple[Callable[..., jax.Array], jax.Array]:
        function = backend.attention or nnx.dot_product_attention
        return lambda x: function(x, x, x, is_causal=True), heads

    def softmax(backend: Backend) -> tuple[Callable[..., jax.Array], jax.Array]:
        ours = backend.softmax is jax_softmax2p.softmax
        where = jax_softmax2p.Band() if ours else causal
        return lambda x: backend.softmax(x, where=where), scores

    def loss(backend: Backend) -> tuple[Callable[..., jax.Array], jax.Array]:
        return lambda x: backend.loss(x, labels), logits

    parts = {"attention": (attention, size.layers), "softmax": (softmax, size.layers), "loss": (loss, 1)}
    seconds = {}
    for part, (make, times) in parts.items():
        calls = {name: _value_and_gradient(*make(backend)) for name, backend in BACKENDS.items()}
        medians = measure.alternating_medians(calls)
        seconds[part] = {name: times * median for name, median in medians.items()}
    return seconds


def _value_and_gradient(function: Callable[..., jax.Array], x: jax.Array) -> Callable[[], Any]:
    weights = jnp.cos(jnp.arange(function(x).size, dtype=x.dtype)).reshape(function(x).shape)
    return functools.partial(jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * function(x)))), x)


def run(size: Size, steps: int) -> dict[str, dict[str, Any]]:
    """Trains, prints the table and returns its figures, by backend."""
    print(f"{'model':>16}  {', '.join(f'{name} {n}' for name, n in size._asdict().items())}", flush=True)
    return report(train(size, steps), size)


def report(trainings: dict[str, Training], size: Size) -> dict[str, dict[str, Any]]:
    """Prints the table and returns its figures, by backend."""
    parts = seconds_of_parts(size)
    print(f"\n{'':>16}  {'loss':>8}  {'ms/step':>8}  {'tokens/s':>9}  " + "".join(f"{p:>16}" for p in parts))
    figures = {}
    for name, training in trainings.items():
        step = training.seconds_per_step()
        shares = {part: seconds[name] / step for part, seconds in parts.items()}
        tokens = size.batch * size.context / step
        print(
            f"{name:>16}  {training.losses[-1]:8.4f}  {step * 1e3:8.1f}  {tokens:9,.0f}  "
            + "".join(f"{parts[p][name] * 1e3:7.1f} ms {share:5.0%}" for p, share in shares.items())
        )
        figures[name] = {
            "losses": training.losses,
            "seconds_per_step": step,
            "tokens_per_second": tokens,
            "seconds_of_parts": {part: seconds[name] for part, seconds in parts.items()},
        }
    first, second = (np.array(training.losses) for training in trainings.values())
    print(f"\nLosses differ by {np.abs(first - second).max():.1e} at most.")
    return figures


def main() -> None:
    """Trains, prints and draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_lm", description=__doc__)
    parser.add_argument("--steps", type=int, help="training steps; 300 by default, 10 with --quick")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("results/train_lm.png"),
        metavar="FILE",
        help="where to draw the losses (%(default)s)",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps, to try it out")
    options = parser.parse_args()
    steps = options.steps if options.steps is not None else 10 if options.quick else 300
    if steps < 2:
        parser.error(f"--steps must be at least 2, got {steps}")
    size = QUICK if options.quick else Size()

    environment = describe_environment()
    for key, value in environment.items():
        print(f"{key:>16}  {value}")
    figures = run(size, steps)
    plots.draw_training(figures, options.output)
    print(f"The losses' curves are in {options.output}.")
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "size": size._asdict(), **figures}))


if __name__ == "__main__":
    main()
