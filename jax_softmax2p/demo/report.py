"""The two parts of the report: both trainings, and speed and error of softmax by itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_softmax2p
from jax_softmax2p import measure
from jax_softmax2p.demo.model import Size
from jax_softmax2p.demo.text import character_tokens
from jax_softmax2p.demo.training import largest_difference, train

SIZE = Size(layers=2, width=64, heads=4, context=128, batch=16)
SHAPES = ((1, 1024), (128, 1024), (8, 12, 512, 512), (64, 128256), (1, 2**24))
LOSS_TOLERANCE = 1e-3

Show = Callable[[str], None]


def train_both(steps: int, show: Show) -> dict[str, Any]:
    """Trains the model with either softmax, from one seed.

    Args:
      steps: how many steps to train each.
      show: is called with the lines of the report.

    Returns:
      Losses and seconds per step by softmax, the largest difference of the losses, and whether they agree.
    """
    tokens, vocabulary = character_tokens()
    show(
        f"\nTraining a causal attention model of {SIZE.layers} layers on {len(tokens):,} characters "
        f"(CPython's pydoc_data.topics),\n"
        f"{steps} steps of {SIZE.batch} × {SIZE.context} characters:\n"
    )
    results: dict[str, Any] = {}
    for name, softmax in (("jax_softmax2p", jax_softmax2p.softmax), ("jax.nn", jax.nn.softmax)):
        record = train(tokens, vocabulary, SIZE, steps, softmax, partial(_show_named, show, name))
        results[name] = {"losses": record.losses, "seconds_per_step": record.seconds_per_step()}
    ours, theirs = results["jax_softmax2p"], results["jax.nn"]
    gap = largest_difference(ours["losses"], theirs["losses"])
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


def _show_named(show: Show, name: str, line: str) -> None:
    show(f"  {name:>14}  {line}")


def measure_shapes(show: Show) -> list[dict[str, Any]]:
    """Measures softmax over the last axis, float32, in jit: this package's and jax.nn's.

    Returns:
      For each of SHAPES the seconds and the error in ULP by softmax, and how many times as fast ours is.
    """
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
