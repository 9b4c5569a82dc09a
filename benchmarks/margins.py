"""Cross-entropies where a label is nearly certain: how exact each is, and what it takes.

    python -m benchmarks.margins

Each row's label stands by a margin above the largest of the other logits. The table has, for each margin, the
worst relative error of the losses and of all entries of their gradients; an error of 1 is a 0 that should not
be one. Then the times of value and gradient, with ordinary and with nearly certain rows, by turns in one
process.
"""

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_softmax2p as s2p
from benchmarks.options import positive_integer
from jax_softmax2p.demo.environment import describe_environment, format_environment
from jax_softmax2p.measure import alternating_medians

MARGINS = (0, 5, 10, 15, 17, 20, 25, 30, 40, 60, 80)

Rows = np.ndarray[Any, Any]
LossAndGradient = Callable[[Rows, Rows], tuple[Rows, Rows]]


def rows_with_margin(margin: float, shape: tuple[int, int]) -> tuple[Rows, Rows]:
    """Logits, float32 [rows, classes], and the labels, int32 [rows], anywhere in the rows."""
    rng = np.random.default_rng(int(margin))
    logits = 4 * rng.random(shape, np.float32)
    labels = rng.integers(shape[1], size=shape[0], dtype=np.int32)
    np.put_along_axis(logits, labels[:, None], np.float32(4 + margin), -1)
    return logits, labels


def exact(logits: Rows, labels: Rows) -> tuple[Rows, Rows]:
    """The losses of rows and their gradients in long double; no digits cancel."""
    at = labels[:, None]
    z = logits.astype(np.longdouble)
    ratios = np.exp(z - np.take_along_axis(z, at, -1))
    np.put_along_axis(ratios, at, 0, -1)
    others = ratios.sum(-1, keepdims=True)
    gradient = ratios / (1 + others)
    np.put_along_axis(gradient, at, -others / (1 + others), -1)
    return np.log1p(others)[:, 0], gradient


def differentiated(loss: Callable[[Any, Any], Any]) -> LossAndGradient:
    """Losses of rows and their gradients by a JAX function, jitted."""

    @jax.jit
    def compute(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, pull = jax.vjp(lambda z: loss(z, labels), logits)
        return losses, pull(jnp.ones_like(losses))[0]

    return compute


def in_float64(compute: LossAndGradient) -> LossAndGradient:
    """The same of logits cast to float64."""

    def wide(logits: Rows, labels: Rows) -> tuple[Rows, Rows]:
        with jax.enable_x64(True):
            return compute(logits.astype(np.float64), labels)

    return wide


def by_torch(logits: Any, labels: Any) -> tuple[Rows, Rows]:
    """torch's losses and gradients."""
    torch = importlib.import_module("torch")
    z = torch.tensor(logits, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(z, torch.tensor(labels, dtype=torch.long), reduction="none")
    losses.sum().backward()
    return losses.detach().numpy(), z.grad.numpy()


def formulations() -> dict[str, LossAndGradient]:
    """Those that can run here."""
    ours = s2p.softmax_cross_entropy_with_integer_labels
    optax_loss = differentiated(optax.softmax_cross_entropy_with_integer_labels)
    named: dict[str, LossAndGradient] = {
        "ours": differentiated(ours),
        "ours, reference": differentiated(functools.partial(ours, implementation="reference")),
        "optax": optax_loss,
        "optax, float64": in_float64(optax_loss),
    }
    if importlib.util.find_spec("torch"):
        named["torch"] = by_torch
    return named


def worst_relative_error(actual: Any, of: Rows) -> float:
    """The largest |actual - of| / |of|."""
    return float(np.max(np.abs(np.asarray(actual, np.longdouble) - of) / np.abs(of)))


def report_errors(shape: tuple[int, int]) -> None:
    """Prints the worst relative errors of losses and of gradients, a line for each margin."""
    named = formulations()
    print("| margin | loss |", " | ".join(f"{name}: loss, gradient" for name in named), "|")
    print(f"|{'---|' * (2 + len(named))}")
    for margin in MARGINS:
        logits, labels = rows_with_margin(margin, shape)
        losses, gradients = exact(logits, labels)
        cells = [str(margin), f"{float(losses.min()):.1e}"]
        for compute in named.values():
            results = zip(compute(logits, labels), (losses, gradients), strict=True)
            cells.append(", ".join(f"{worst_relative_error(actual, of):.1e}" for actual, of in results))
        print("|", " | ".join(cells), "|")


def report_times(shape: tuple[int, int], rounds: int) -> None:
    """Prints the times of losses with gradients, of optax by ours, and of nearly certain rows by ordinary."""
    named = formulations()
    calls = {
        f"{name}, margin {margin}": functools.partial(
            named[name], *jax.device_put(rows_with_margin(margin, shape))
        )
        for name in ("ours", "optax")
        for margin in (0, 40)
    }
    medians = alternating_medians(calls, rounds=rounds)
    for margin in (0, 40):
        ours, theirs = (medians[f"{name}, margin {margin}"] for name in ("ours", "optax"))
        print(f"{shape}, margin {margin}: ours {1e3 * ours:.3f} ms, optax / ours {theirs / ours:.2f}")
    ratio = medians["ours, margin 40"] / medians["ours, margin 0"]
    print(f"{shape}: ours, margin 40 / margin 0: {ratio:.2f}")


def main() -> None:
    """Prints the environment, the errors and the times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.margins", description=__doc__)
    parser.add_argument("--rounds", type=positive_integer, default=31, help="%(default)s by default")
    rounds = parser.parse_args().rounds
    print(format_environment(describe_environment()))
    report_errors((64, 1000))
    for shape in ((4096, 16), (4096, 1000), (64, 50257)):
        report_times(shape, rounds)


if __name__ == "__main__":
    main()
