"""Where a native call is faster than what XLA fuses: the measurements behind ``primitives/thresholds.py``.

    python -m benchmarks.thresholds [--only TEXT]

Every line is one operation on one shape, many times inside a compiled loop: jax.nn's time by that of the
native kernel, of the reference, and of what is chosen; and what that is. A native call is worth it where the
first ratio is above 1.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

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


def _forward(function: Function, x: jax.Array, axis: int) -> jax.Array:
    """The results, in x's shape."""
    y = function(x)
    return y if y.ndim == x.ndim else jnp.broadcast_to(jnp.expand_dims(y, axis), x.shape)


def _gradient(function: Function, x: jax.Array, axis: int) -> jax.Array:
    """The gradient of a weighted sum of results; the value is part of what is computed."""
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(function(x) ** 2))(x)
    return gradient + 1e-6 * value


OPERATIONS = {
    f"{prefix}{name}": (name, form)
    for prefix, form in (("", _forward), ("gradient of ", _gradient))
    for name in ("softmax", "logsumexp", "log_softmax")
}


def in_loop(function: Function, form: Callable[..., jax.Array], axis: int, steps: int) -> Function:
    """Many calls, each of which needs the result of the one before."""
    step = lambda _, x: 0.5 * x + 1e-3 * form(function, x, axis)
    return jax.jit(lambda x: jax.lax.fori_loop(0, steps, step, x))


def measure(operation: str, shape: tuple[int, ...], axis: int) -> str:
    """One line of the table."""
    name, form = OPERATIONS[operation]
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    steps = int(np.clip(2e5 / x.size, 4, 100))
    ours = getattr(jax_softmax2p, name)
    functions: dict[str, Function] = {
        "jax.nn": functools.partial(getattr(jax.nn, name), axis=axis),
        "native": functools.partial(ours, axis=axis, implementation="native"),
        "reference": functools.partial(ours, axis=axis, implementation="reference"),
        "chosen": functools.partial(ours, axis=axis),
    }
    loops = {key: functools.partial(in_loop(f, form, axis, steps), x) for key, f in functions.items()}
    theirs, *others = alternating_medians(loops, rounds=ROUNDS, seconds=SECONDS).values()
    ratios = "".join(f"{theirs / t:10.2f}" for t in others)
    explained = jax_softmax2p.explain(in_loop(functions["chosen"], form, axis, steps), x)
    chosen = "+".join(sorted({explanation.implementation[0] for explanation in explained}))
    return f"{operation:24}{shape!s:16}{axis:3}{1e6 * theirs / steps:10.2f} µs{ratios}  {chosen}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.thresholds", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="operations whose name contains TEXT")
    only = parser.parse_args().only
    print(f"{'jax.nn by':>56}{'native':>10}{'reference':>10}{'chosen':>10}")
    for operation in OPERATIONS:
        for shape, axis in SHAPES:
            if only in operation:
                print(measure(operation, shape, axis), flush=True)


if __name__ == "__main__":
    main()
