"""``python -m jax_softmax2p``: what runs here, and a demonstration on real text.

Trains a small causal attention model on the text of Python's own documentation, character by character,
twice from one seed: with this package's softmax and with ``jax.nn.softmax``. Then a table of speed and
error for a few shapes.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_softmax2p
from jax_softmax2p import measure, native

SHAPES = ((1, 1024), (128, 1024), (8, 12, 512, 512), (64, 128256), (1, 2**24))
LOSS_TOLERANCE = 1e-3


class Size(NamedTuple):
    """Of the demonstration's model and of its training."""

    width: int = 64
    heads: int = 4
    layers: int = 2
    context: int = 128
    batch: int = 16
    steps: int = 120
    learning_rate: float = 3e-3


def main() -> int:
    """Prints the report; the exit status says whether both trainings agreed."""
    parser = argparse.ArgumentParser(prog="python -m jax_softmax2p", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--steps", type=int, default=Size().steps, help="training steps (%(default)s)")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")

    show = _say_nothing if options.json else _say
    report: dict[str, Any] = {"environment": describe_environment()}
    for key, value in report["environment"].items():
        show(f"{key:>16}  {value}")
    report["training"] = train_both(Size(steps=options.steps), show)
    report["shapes"] = measure_shapes(show)
    if options.json:
        print(json.dumps(report, indent=2))
    return 0 if report["training"]["agree"] else 1


def describe_environment() -> dict[str, str]:
    """What runs here, by name."""
    reason = native.unavailable_reason()
    facts = {
        "jax_softmax2p": jax_softmax2p.__version__,
        "jax / jaxlib": f"{jax.__version__} / {jax.lib.__version__}",
        "Python": platform.python_version(),
        "CPU": measure.cpu_name(),
        "threads": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "JAX platform": jax.default_backend(),
    }
    if reason is None:
        facts["runs"] = "native kernels"
        facts["instruction set"] = f"{native.active_isa()} (supported: {', '.join(native.supported_isas())})"
        facts["FFI API"] = ".".join(map(str, native.ffi_api_version()))
    else:
        facts["runs"] = f"the jax.numpy reference: {reason}"
    return facts


def train_both(size: Size, show: Callable[[str], None]) -> dict[str, Any]:
    """Trains the model with either softmax, from one seed. Returns losses and times."""
    text, vocabulary = load_text()
    show(
        f"\nTraining a causal attention model of {size.layers} layers on {len(text):,} characters "
        f"(CPython's pydoc_data.topics),\n{size.steps} steps of {size.batch} × {size.context} characters:\n"
    )
    results: dict[str, Any] = {}
    for name, softmax in (("jax_softmax2p", jax_softmax2p.softmax), ("jax.nn", jax.nn.softmax)):
        losses, seconds = train(text, vocabulary, size, softmax, partial(_say_of, show, name))
        results[name] = {"losses": losses, "seconds_per_step": seconds}
    ours, theirs = results["jax_softmax2p"], results["jax.nn"]
    gap = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    results["agree"] = bool(gap <= LOSS_TOLERANCE)
    results["largest_difference"] = gap
    show(f"\n  final loss       {ours['losses'][-1]:.5f} with ours, {theirs['losses'][-1]:.5f} with jax.nn")
    verdict = "agree" if results["agree"] else "DISAGREE"
    show(f"  largest gap      {gap:.1e} over all steps: they {verdict} (tolerance {LOSS_TOLERANCE:.0e})")
    show(
        f"  time per step    {ours['seconds_per_step'] * 1e3:.1f} ms with ours, "
        f"{theirs['seconds_per_step'] * 1e3:.1f} ms with jax.nn"
    )
    return results


def _say_of(show: Callable[[str], None], name: str, line: str) -> None:
    show(f"  {name:>14}  {line}")


def load_text() -> tuple[np.ndarray, int]:
    """The text as character numbers, and how many characters there are."""
    from pydoc_data.topics import topics

    characters = np.frombuffer("\n".join(topics.values()).encode("utf-32-le"), np.uint32)
    vocabulary, text = np.unique(characters, return_inverse=True)
    return text.astype(np.int32), len(vocabulary)


def train(
    text: np.ndarray, vocabulary: int, size: Size, softmax: Callable, show: Callable[[str], None]
) -> tuple[list[float], float]:
    """Trains with Adam (arXiv 1412.6980). Returns the loss of every step and the median time of a step."""
    params = initial_parameters(jax.random.key(0), vocabulary, size)
    moments = jax.tree.map(jnp.zeros_like, (params, params))

    @jax.jit
    def step(params, moments, count, batch):
        loss, gradient = jax.value_and_grad(batch_loss)(params, batch, size, softmax)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
        second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], gradient)
        rate = size.learning_rate * jnp.sqrt(1 - 0.99**count) / (1 - 0.9**count)
        params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, first, second)
        return params, (first, second), loss

    rng = np.random.default_rng(0)
    losses, seconds = [], []
    for count in range(1, size.steps + 1):
        starts = rng.integers(len(text) - size.context - 1, size=(size.batch, 1))
        batch = text[starts + np.arange(size.context + 1)]
        start = time.perf_counter()
        params, moments, loss = step(params, moments, float(count), batch)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        if count == 1 or count % max(1, size.steps // 4) == 0:
            show(f"step {count:4d}  loss {losses[-1]:.4f}")
    return losses, float(np.median(seconds[1:]))


def initial_parameters(key: jax.Array, vocabulary: int, size: Size) -> dict[str, Any]:
    """Random weights: embeddings, and two matrices of attention and two of the rest for each layer."""

    def normal(*shape: int) -> jax.Array:
        nonlocal key
        key, own = jax.random.split(key)
        return jax.random.normal(own, shape) / np.sqrt(shape[0])

    layer = {"qkv": 3 * size.width, "out": size.width, "up": 4 * size.width}
    return {
        "embedding": normal(vocabulary, size.width),
        "position": normal(size.context, size.width),
        "layers": [
            {name: normal(size.width, columns) for name, columns in layer.items()}
            | {"down": normal(4 * size.width, size.width)}
            for _ in range(size.layers)
        ],
        "head": normal(size.width, vocabulary),
    }


def batch_loss(params: dict[str, Any], batch: jax.Array, size: Size, softmax: Callable) -> jax.Array:
    """Mean cross-entropy of the next character."""
    logits = jax.vmap(lambda tokens: model(params, tokens, size, softmax))(batch[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], -1)
    return -jnp.mean(chosen)


def model(params: dict[str, Any], tokens: jax.Array, size: Size, softmax: Callable) -> jax.Array:
    """Logits of shape (context, vocabulary) for one sequence of tokens."""
    x = params["embedding"][tokens] + params["position"]
    for layer in params["layers"]:
        x = x + attention(layer, normalise(x), size, softmax)
        x = x + jax.nn.gelu(normalise(x) @ layer["up"]) @ layer["down"]
    return normalise(x) @ params["head"]


def attention(layer: dict[str, Any], x: jax.Array, size: Size, softmax: Callable) -> jax.Array:
    """Causal self-attention on x of shape (context, width)."""
    q, k, v = jnp.moveaxis((x @ layer["qkv"]).reshape(size.context, 3, size.heads, -1), 1, 0)
    logits = jnp.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones((size.context, size.context), bool))
    mixed = jnp.einsum("hts,shd->thd", softmax(logits, axis=-1, where=causal), v)
    return mixed.reshape(size.context, size.width) @ layer["out"]


def normalise(x: jax.Array) -> jax.Array:
    """Root-mean-square normalisation (arXiv 1910.07467)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def measure_shapes(show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time and error of softmax over the last axis, float32, in jit: ours and jax.nn's."""
    show(f"\n  {'float32':>18}  {'ours':>10}  {'jax.nn':>10}  {'ratio':>6}  {'ours':>8}  {'jax.nn':>6} ULP")
    rows = []
    for shape in SHAPES:
        x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
        functions = {"ours": jax.jit(jax_softmax2p.softmax), "jax.nn": jax.jit(jax.nn.softmax)}
        times = measure.alternating_medians({name: partial(f, x) for name, f in functions.items()})
        exact = measure.exact_softmax(np.asarray(x))
        errors = {name: measure.ulp_error(np.asarray(f(x)), exact) for name, f in functions.items()}
        ratio = times["jax.nn"] / times["ours"]
        rows.append({"shape": shape, "seconds": times, "ratio": ratio, "ulp": errors})
        show(
            f"  {'×'.join(map(str, shape)):>18}  {times['ours'] * 1e3:7.3f} ms  "
            f"{times['jax.nn'] * 1e3:7.3f} ms"
            f"  {ratio:5.2f}×  {errors['ours']:8.2f}  {errors['jax.nn']:6.2f}"
        )
    return rows


def _say(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
