"""Where a native call is faster than what XLA fuses: the measurements behind ``primitives/thresholds.py``.

    python -m benchmarks.thresholds [--only TEXT]

Every line is one operation on one shape, many times inside a compiled loop or once in a program: the time of
jax.nn, or of optax, by that of the native kernel, of the reference, and of what is chosen; and what that is.
A native call is worth it where the first ratio is above 1.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_softmax2p
from jax_softmax2p.measure import alternating_medians

Function = Callable[[jax.Array], jax.Array]

ROUNDS = 9
SECONDS = 0.1
"""How long the rounds of an implementation last."""

SHAPES = (
    *(((1, n), -1) for n in (3, 16, 64, 128, 256, 512, 1024)),
    *(((n, n), -1) for n in (8, 16, 32, 64, 128)),
    *(((rows, n), -1) for rows, n in ((256, 10), (1000, 3), (4000, 4), (10000, 5), (50000, 7), (4096, 16))),
    *(((n, n), 0) for n in (3, 8, 16, 32, 64, 128, 256)),
    ((8, 16, 64), 1),
    ((4, 21, 4096), 1),
    ((64, 256, 49), 1),
)
"""Shapes and axes."""


def _forward(function: Function, x: jax.Array, *, axis: int) -> jax.Array:
    """The results, in x's shape."""
    y = function(x)
    return y if y.ndim == x.ndim else jnp.broadcast_to(jnp.expand_dims(y, axis), x.shape)


def _gradient(function: Function, x: jax.Array, *, axis: int) -> jax.Array:
    """The gradient of a weighted sum of results; the value is part of what is computed."""
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(function(x) ** 2))(x)
    return gradient + 1e-6 * value


def _with_labels(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A cross-entropy as a function of the logits, with labels that differ from row to row."""

    def function(x: jax.Array, axis: int, **options: Any) -> jax.Array:
        rows = x.shape[:axis] + x.shape[axis:][1:]
        labels = np.arange(math.prod(rows), dtype=np.int32).reshape(rows) % x.shape[axis]
        return loss(x, labels, axis=axis, **options)

    return function


_FUNCTIONS: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "softmax": (jax.nn.softmax, jax_softmax2p.softmax),
    "logsumexp": (jax.nn.logsumexp, jax_softmax2p.logsumexp),
    "log_softmax": (jax.nn.log_softmax, jax_softmax2p.log_softmax),
    "cross-entropy": (
        _with_labels(optax.softmax_cross_entropy_with_integer_labels),
        _with_labels(jax_softmax2p.softmax_cross_entropy_with_integer_labels),
    ),
}
"""Theirs and ours."""

OPERATIONS = {
    f"{prefix}{name}": (name, form)
    for prefix, form in (("", _forward), ("gradient of ", _gradient))
    for name in _FUNCTIONS
}


def in_loop(f: Function, steps: int) -> Function:
    """Many calls, each of which needs the result of the one before."""
    return jax.jit(lambda x: jax.lax.fori_loop(0, steps, lambda _, x: 0.5 * x + 1e-3 * f(x), x))


def measure(operation: str, shape: tuple[int, ...], axis: int, *, loop: bool) -> str:
    """One line of the table."""
    name, form = OPERATIONS[operation]
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    steps = int(np.clip(2e5 / x.size, 4, 100)) if loop else 1
    axis -= len(shape) if axis >= 0 else 0

    def program(function: Callable[..., jax.Array], **options: Any) -> Function:
        f = functools.partial(form, functools.partial(function, axis=axis, **options), axis=axis)
        return in_loop(f, steps) if loop else jax.jit(f)

    theirs, ours = _FUNCTIONS[name]
    chosen = program(ours)
    programs = {
        "theirs": program(theirs),
        "native": program(ours, implementation="native"),
        "reference": program(ours, implementation="reference"),
        "chosen": chosen,
    }
    calls = {key: functools.partial(f, x) for key, f in programs.items()}
    of_theirs, *others = alternating_medians(calls, rounds=ROUNDS, seconds=SECONDS).values()
    ratios = "".join(f"{of_theirs / t:10.2f}" for t in others)
    kinds = "+".join(sorted({choice.implementation[0] for choice in jax_softmax2p.explain(chosen, x)}))
    where = "in a loop" if loop else "once"
    return f"{operation:26}{shape!s:16}{axis:3} {where:9}{1e6 * of_theirs / steps:10.2f} µs{ratios}  {kinds}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.thresholds", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="operations whose name contains TEXT")
    only = parser.parse_args().only
    print(f"{'theirs by':>68}{'native':>10}{'reference':>10}{'chosen':>10}")
    for operation, (shape, axis), loop in itertools.product(OPERATIONS, SHAPES, (True, False)):
        if only in operation:
            print(measure(operation, shape, axis, loop=loop), flush=True)


if __name__ == "__main__":
    main()
