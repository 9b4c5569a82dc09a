"""Losses whose logits are never stored, against the same with stored logits: times and temporaries.

    python -m benchmarks.linear_losses --rounds 7

All formulations run in one process, by turns. Ratios are medians over rounds.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_softmax2p as s2p
from benchmarks.options import positive_integer

SHAPES = ((1024, 256, 50257), (512, 768, 50257), (256, 64, 200000), (2048, 512, 32000))
"""Tokens, features and classes."""

PRODUCTS = ((5000, 2, 5000), (5000, 64, 5000))
"""Rows of a, features, and rows of b, of the logsumexp of products."""

Loss = Callable[..., jax.Array]


def cross_entropies(labels: jax.Array) -> dict[str, Loss]:
    """The mean loss by each formulation; stored logits first."""
    plain = s2p.softmax_cross_entropy_with_integer_labels
    stored = lambda loss: lambda x, w: loss(x @ w, labels).mean().astype(jnp.float32)
    linear = lambda **options: (
        lambda x, w: s2p.linear_softmax_cross_entropy(x, w, labels, **options).mean().astype(jnp.float32)
    )
    return {
        "optax": stored(optax.softmax_cross_entropy_with_integer_labels),
        "plain": stored(plain),
        "linear": linear(),
        "linear, recompute": linear(recompute=True),
    }


def logsumexps(_: jax.Array) -> dict[str, Loss]:
    """The mean logsumexp of products by each formulation."""
    return {
        "jax.nn": lambda a, b: jax.nn.logsumexp(a @ b, -1).mean(),
        "plain": lambda a, b: s2p.logsumexp(a @ b, -1).mean(),
        "of products": lambda a, b: s2p.logsumexp_of_products(a, b.T).mean(),
    }


def measure(losses: dict[str, Loss], x: jax.Array, w: jax.Array, rounds: int) -> dict[str, tuple[Any, int]]:
    """The seconds of each round, and the bytes of temporaries, of value and gradients by each formulation."""
    compiled = {
        name: jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w).compile() for name, loss in losses.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds + 1):  # The first is not counted.
        for name, call in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(call(x, w))
            seconds[name].append(time.perf_counter() - start)
    analyses: dict[str, Any] = {name: call.memory_analysis() for name, call in compiled.items()}
    temporaries = {name: analysis.temp_size_in_bytes for name, analysis in analyses.items()}
    return {name: (np.array(seconds[name][1:]), temporaries[name]) for name in compiled}


def report(title: str, measured: dict[str, tuple[Any, int]]) -> None:
    """Prints one line for each formulation, with ratios to the first one."""
    first, first_bytes = next(iter(measured.values()))
    for name, (seconds, size) in measured.items():
        ratio, memory = np.median(first / seconds), first_bytes / max(size, 1)
        print(
            f"{title} {name:>18} {1e3 * np.median(seconds):8.1f} ms  {ratio:5.2f}x  "
            f"{size / 1e6:7.1f} MB of temporaries, 1/{memory:.1f}",
            flush=True,
        )


def main() -> None:
    """Measures all shapes and dtypes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_losses", description=__doc__)
    parser.add_argument("--rounds", type=positive_integer, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    cases: list[tuple[Callable[..., dict[str, Loss]], tuple[int, int, int], str]] = [
        (cross_entropies, s, d) for d in ("float32", "bfloat16") for s in SHAPES
    ]
    cases += [(logsumexps, s, "float32") for s in PRODUCTS]
    for make, (n, d, v), dtype in cases:
        x = jnp.asarray(rng.standard_normal((n, d), np.float32), dtype)
        w = jnp.asarray(rng.standard_normal((d, v), np.float32) / np.sqrt(d), dtype)
        labels = jnp.asarray(rng.integers(0, v, n), jnp.int32)
        report(f"{(n, d, v)} {dtype}", measure(make(labels), x, w, options.rounds))


if __name__ == "__main__":
    main()
