"""``python -m benchmarks.train_lm``: a small language model, trained with jax.nn and with this package.

A causal transformer of flax.nnx learns the text of CPython's pydoc_data.topics byte by byte. It is trained
twice at once from one seed: with the functions that flax and optax have, and with this package's attention
and loss. The steps of the two trainings alternate, so that a slower machine slows down both. The program
prints the losses, the tokens per second and the share of a step that attention, softmax and loss take, and
draws the losses. It needs ``pip install '.[bench]'``.
"""

import argparse
import functools
import json
import pathlib
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
from benchmarks.options import positive_integer
from jax_softmax2p import integrations, measure
from jax_softmax2p.demo.environment import describe_environment, format_environment
from jax_softmax2p.demo.model import Size
from jax_softmax2p.demo.text import documentation_text, sample_batch
from jax_softmax2p.demo.training import StepRecord, largest_difference

VOCABULARY = 256
LEARNING_RATE = 1e-3

FULL = Size(layers=4, width=256, heads=8, context=256, batch=16)
QUICK = Size(layers=2, width=64, heads=4, context=64, batch=4)


class Backend(NamedTuple):
    """The functions that a model uses.

    Attributes:
      attention: flax's ``attention_fn``.
      softmax: as jax.nn.softmax.
      causal_mask: (context) -> the causal mask, as the softmax's ``where``.
      loss: as optax.softmax_cross_entropy_with_integer_labels.
    """

    attention: Callable[..., jax.Array]
    softmax: Callable[..., jax.Array]
    causal_mask: Callable[[int], jax.Array | jax_softmax2p.Band]
    loss: Callable[..., jax.Array]


BACKENDS = {
    "jax.nn": Backend(
        nnx.dot_product_attention,
        jax.nn.softmax,
        lambda context: jnp.tri(context, dtype=bool),
        optax.softmax_cross_entropy_with_integer_labels,
    ),
    "jax_softmax2p": Backend(
        integrations.flax_attention,
        jax_softmax2p.softmax,
        lambda context: jax_softmax2p.Band(),
        jax_softmax2p.softmax_cross_entropy_with_integer_labels,
    ),
}


class Layer(nnx.Module):
    """Attention and a multilayer perceptron, each of normalised inputs and added to them."""

    def __init__(self, size: Size, attention: Callable[..., jax.Array], rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(
            size.heads, size.width, decode=False, attention_fn=attention, rngs=rngs
        )
        self.norms = nnx.List([nnx.LayerNorm(size.width, rngs=rngs) for _ in range(2)])
        self.up = nnx.Linear(size.width, 4 * size.width, rngs=rngs)
        self.down = nnx.Linear(4 * size.width, size.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Array of x's shape, (batch, context, width)."""
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Model(nnx.Module):
    """A causal transformer over bytes."""

    def __init__(self, size: Size, attention: Callable[..., jax.Array], rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, size.width, rngs=rngs)
        self.position = nnx.Embed(size.context, size.width, rngs=rngs)
        self.layers = nnx.List([Layer(size, attention, rngs) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next byte, (batch, context, VOCABULARY), for tokens of shape (batch, context)."""
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[-1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Training:
    """A model, its optimizer, and the record of its steps."""

    def __init__(self, backend: Backend, size: Size):
        model = Model(size, backend.attention, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adamw(LEARNING_RATE), wrt=nnx.Param)
        self.record = StepRecord()

        def batch_loss(model: Model, batch: jax.Array) -> jax.Array:
            return backend.loss(model(batch[:, :-1]), batch[:, 1:]).mean()

        @nnx.jit
        def step(model: Model, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
            loss, gradient = nnx.value_and_grad(batch_loss)(model, batch)
            optimizer.update(model, gradient)
            return loss

        self._step = functools.partial(step, model, optimizer)

    def step(self, batch: jax.Array) -> None:
        """One step, timed."""
        self.record.run(lambda: self._step(batch))


def train(size: Size, steps: int) -> dict[str, StepRecord]:
    """Trains with each backend, on the same batches."""
    tokens = np.frombuffer(documentation_text().encode(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)
    trainings = {name: Training(backend, size) for name, backend in BACKENDS.items()}
    records = {name: training.record for name, training in trainings.items()}
    with tqdm(range(steps), unit="step", disable=None) as bar:
        for _ in bar:
            batch = jnp.asarray(sample_batch(rng, tokens, size.batch, size.context))
            for training in trainings.values():
                training.step(batch)
            bar.set_postfix({name: f"{record.losses[-1]:.4f}" for name, record in records.items()})
    return records


def seconds_by_operation(size: Size) -> dict[str, dict[str, float]]:
    """The seconds that a step spends in attention, softmax and loss, value and gradient.

    Each is measured by itself, at the shapes of a step, and multiplied by the number of layers that have it.

    Returns:
      {operation: {backend: seconds}}. The softmax is also a part of attention.
    """
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    heads = normal(size.batch, size.context, size.heads, size.width // size.heads)
    scores = normal(size.batch, size.heads, size.context, size.context)
    logits, labels = normal(size.batch, size.context, VOCABULARY), jnp.zeros((size.batch, size.context), int)

    def attention(backend: Backend) -> Callable[[], Any]:
        return _value_and_gradient(lambda x: backend.attention(x, x, x, is_causal=True), heads)

    def softmax(backend: Backend) -> Callable[[], Any]:
        where = backend.causal_mask(size.context)
        return _value_and_gradient(lambda x: backend.softmax(x, where=where), scores)

    def loss(backend: Backend) -> Callable[[], Any]:
        return _value_and_gradient(lambda x: backend.loss(x, labels), logits)

    seconds = {}
    for make_call, calls_per_step in ((attention, size.layers), (softmax, size.layers), (loss, 1)):
        calls = {name: make_call(backend) for name, backend in BACKENDS.items()}
        medians = measure.alternating_medians(calls)
        seconds[make_call.__name__] = {name: calls_per_step * median for name, median in medians.items()}
    return seconds


def _value_and_gradient(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> Callable[[], Any]:
    """A call of the jitted value and gradient of a weighted sum of the function's results."""
    y = function(x)
    weights = jnp.cos(jnp.arange(y.size, dtype=x.dtype)).reshape(y.shape)
    return functools.partial(jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * function(x)))), x)


def run(size: Size, steps: int) -> dict[str, dict[str, Any]]:
    """Trains, prints the table and returns its figures by backend."""
    print(f"{'model':>16}  {', '.join(f'{name} {n}' for name, n in size._asdict().items())}", flush=True)
    return report(train(size, steps), size)


def report(records: dict[str, StepRecord], size: Size) -> dict[str, dict[str, Any]]:
    """Prints the table; returns its figures by backend."""
    operations = seconds_by_operation(size)
    header = f"\n{'':>16}  {'loss':>8}  {'ms/step':>8}  {'tokens/s':>9}  "
    print(header + "".join(f"{operation:>16}" for operation in operations))
    figures = {}
    for name, record in records.items():
        step = record.seconds_per_step()
        tokens = size.batch * size.context / step
        seconds = {operation: by_backend[name] for operation, by_backend in operations.items()}
        print(
            f"{name:>16}  {record.losses[-1]:8.4f}  {step * 1e3:8.1f}  {tokens:9,.0f}  "
            + "".join(f"{s * 1e3:7.1f} ms {s / step:5.0%}" for s in seconds.values())
        )
        figures[name] = {
            "losses": record.losses,
            "seconds_per_step": step,
            "tokens_per_second": tokens,
            "seconds_of_parts": seconds,
        }
    print(f"\nLosses differ by {largest_difference(*(r.losses for r in records.values())):.1e} at most.")
    return figures


def main() -> None:
    """Trains, prints the figures and draws the losses."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_lm", description=__doc__)
    parser.add_argument(
        "--steps", type=positive_integer, help="training steps; 300 by default, 10 with --quick"
    )
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
    size = QUICK if options.quick else FULL

    environment = describe_environment()
    print(format_environment(environment))
    figures = run(size, steps)
    plots.draw_training(figures, options.output)
    print(f"The losses' curves are in {options.output}.")
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "size": size._asdict(), **figures}))


if __name__ == "__main__":
    main()
