"""``python -m benchmarks.grokking``: does a network generalise once its training data is certain?

A network learns a + b modulo 113 from 80% of all pairs, by full-batch Adam without weight decay, in float32.
It soon knows its training data and grows more certain of them. By optax's cross-entropy the gradients of
samples whose logit stands 17 to 20 above the rest are exactly 0 at the label ("softmax collapse"), and
training stops. The program trains once with each loss and seed: optax's, this package's, optax's of logits
cast to float64, and StableMax, and prints the accuracies and the share of training samples whose gradient at
the label is exactly 0. It needs ``pip install '.[bench]'``.

Source: Prieto, Barsbey, Mediano and Birdal, "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jax_softmax2p
from benchmarks import plots
from benchmarks.options import positive_integer
from jax_softmax2p.demo.environment import describe_environment, format_environment

MODULUS = 113
TRAINING_SHARE = 0.8

GRADIENT_SCALE = 2.0**60
"""Adam does not see it but for its eps, and the squares of small gradients stay in the range of float32."""

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Weights = dict[str, jax.Array]


class Setting(NamedTuple):
    """What all trainings share.

    Attributes:
      steps: full-batch steps of a training.
      interval: steps from one record to the next.
      seeds: how many networks are trained with each loss.
      width: of the two hidden layers.
      learning_rate: of Adam.
    """

    steps: int
    interval: int
    seeds: int
    width: int
    learning_rate: float


FULL = Setting(steps=6_000, interval=100, seeds=2, width=200, learning_rate=5e-3)
QUICK = Setting(steps=100, interval=50, seeds=1, width=32, learning_rate=2e-3)


def stablemax(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of s(x)/sum(s(x)), with x + 1 for x >= 0 and 1/(1 - x) below in place of exp(x)."""
    s = jnp.where(logits >= 0, logits + 1, 1 / (1 - jnp.minimum(logits, 0)))
    at_label = jnp.take_along_axis(s, labels[:, None], -1)[:, 0]
    return jnp.log(s.sum(-1)) - jnp.log(at_label)


def float64_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """optax's cross-entropy of logits that are cast to float64."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float64), labels)


LOSSES: dict[str, Loss] = {
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "ours": jax_softmax2p.softmax_cross_entropy_with_integer_labels,
    "optax, float64": float64_cross_entropy,
    "StableMax": stablemax,
}


def pairs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (a, b), shuffled, as arrays [pairs, 2]: those to train with, and the others."""
    every = np.stack(np.divmod(np.arange(MODULUS**2), MODULUS), 1).astype(np.int32)
    np.random.default_rng(seed).shuffle(every)
    training = round(TRAINING_SHARE * len(every))
    return every[:training], every[training:]


def sums(x: jax.Array) -> jax.Array:
    """The labels of pairs [n, 2]."""
    return x.sum(-1) % MODULUS


def initial_weights(width: int, seed: int) -> Weights:
    """Uniform within 1/sqrt(inputs), as torch initialises linear layers."""
    shapes = {"a": (MODULUS, width), "b": (MODULUS, width), "hidden": (width, width), "out": (width, MODULUS)}
    inputs = {"a": 2 * MODULUS, "b": 2 * MODULUS, "hidden": width, "out": width}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.uniform(key, shape, jnp.float32, -1, 1) / np.float32(np.sqrt(inputs[name]))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def logits_of(weights: Weights, x: jax.Array) -> jax.Array:
    """Of a network with two hidden layers for one-hot inputs; float32 [n, MODULUS] for pairs [n, 2]."""
    h = jax.nn.relu(weights["a"][x[:, 0]] + weights["b"][x[:, 1]])
    return jax.nn.relu(h @ weights["hidden"]) @ weights["out"]


def statistics(loss: Loss, weights: Weights, x: jax.Array, others: jax.Array) -> dict[str, jax.Array]:
    """The mean loss, both accuracies, and the share of gradients at the label that are exactly 0."""
    logits, labels = logits_of(weights, x), sums(x)
    gradients = jax.grad(lambda z: loss(z, labels).sum())(logits)
    accuracy = lambda z, y: (z.argmax(-1) == y).mean()
    return {
        "loss": loss(logits, labels).mean(),
        "training accuracy": accuracy(logits, labels),
        "test accuracy": accuracy(logits_of(weights, others), sums(others)),
        "gradients of 0": (jnp.take_along_axis(gradients, labels[:, None], -1) == 0).mean(),
    }


def train(loss: Loss, setting: Setting, seed: int, advance: Callable[[], Any]) -> dict[str, list[float]]:
    """Trains one network; calls ``advance()`` after every interval.

    Returns:
      The figures of :func:`statistics` after each interval, and "step".
    """
    x, others = (jnp.asarray(part) for part in pairs(seed))
    labels = sums(x)
    weights = initial_weights(setting.width, seed)
    # By optax's own eps of 1e-8 small gradients would hardly move the weights. The paper has 1e-25 and less.
    optimizer = optax.adam(setting.learning_rate, b2=0.99, eps=1e-30 * GRADIENT_SCALE)

    def scaled_loss(weights: Weights) -> jax.Array:
        return loss(logits_of(weights, x), labels).mean().astype(jnp.float32) * GRADIENT_SCALE

    def step(state: Any, _: None) -> tuple[Any, None]:
        weights, moments = state
        gradients = jax.grad(scaled_loss)(weights)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(weights, updates), moments), None

    @functools.partial(jax.jit, donate_argnums=0)
    def interval(state: Any) -> tuple[Any, dict[str, jax.Array]]:
        state, _ = jax.lax.scan(step, state, length=setting.interval)
        return state, statistics(loss, state[0], x, others)

    state = (weights, optimizer.init(weights))
    record: dict[str, list[float]] = {"step": []}
    for number in range(setting.interval, setting.steps + 1, setting.interval):
        state, figures = interval(state)
        record["step"].append(number)
        for name, value in figures.items():
            record.setdefault(name, []).append(float(value))
        advance()
    return record


def run(setting: Setting) -> dict[str, list[dict[str, list[float]]]]:
    """Trains with every loss and seed; returns the records by loss."""
    trainings = len(LOSSES) * setting.seeds
    records: dict[str, list[dict[str, list[float]]]] = {name: [] for name in LOSSES}
    with tqdm(total=trainings * (setting.steps // setting.interval), unit="interval", disable=None) as bar:
        for seed in range(setting.seeds):
            for name, loss in LOSSES.items():
                bar.set_postfix_str(f"{name}, seed {seed}")
                records[name].append(train(loss, setting, seed, bar.update))
    return records


def report(records: dict[str, list[dict[str, list[float]]]]) -> None:
    """Prints the last figures of every training."""
    print(f"{'loss':>16}  seed  training  test     mean loss  gradients of 0 at the label")
    for name, of_seeds in records.items():
        for seed, record in enumerate(of_seeds):
            last = {key: values[-1] for key, values in record.items()}
            print(
                f"{name:>16}  {seed:4}  {last['training accuracy']:8.2%}  {last['test accuracy']:7.2%}"
                f"  {last['loss']:9.1e}  {last['gradients of 0']:8.2%}"
            )


def main() -> None:
    """Trains, prints the figures and draws the accuracies."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grokking", description=__doc__)
    parser.add_argument("--steps", type=positive_integer, help=f"training steps; {FULL.steps} by default")
    parser.add_argument(
        "--seeds", type=positive_integer, help=f"networks for each loss; {FULL.seeds} by default"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("results/grokking.png"),
        metavar="FILE",
        help="where to draw the accuracies (%(default)s)",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few steps, to try it out")
    options = parser.parse_args()
    setting = QUICK if options.quick else FULL
    if options.steps is not None:
        setting = setting._replace(steps=options.steps, interval=min(setting.interval, options.steps))
    if options.seeds is not None:
        setting = setting._replace(seeds=options.seeds)
    if setting.steps < 1 or setting.seeds < 1:
        parser.error(f"--steps and --seeds must be at least 1, got {setting.steps} and {setting.seeds}")

    # For the loss in float64; all else is float32 explicitly.
    jax.config.update("jax_enable_x64", True)
    environment = describe_environment()
    print(format_environment(environment))
    started = time.monotonic()
    records = run(setting)
    report(records)
    print(f"\n{time.monotonic() - started:.0f} s")
    plots.draw_grokking(records, options.output)
    print(f"The curves are in {options.output}.")
    if options.json:
        figures = {"environment": environment, "setting": setting._asdict(), "records": records}
        options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
