"""Measuring speed and error: for the demonstration, the benchmarks and the tests alone.

Nothing that users call imports this module.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def cpu_name() -> str:
    """The CPU's name, as its maker gave it, where the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def alternating_medians(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 7, seconds: float = 0.2
) -> dict[str, float]:
    """Median time of a call of each function, in seconds.

    The functions are called alternately, so that a machine that slows down or is shared does so for all. Only
    ratios of times within one call of this function mean something.

    Args:
      functions: what to call, by name. Results are waited for (``jax.block_until_ready``).
      rounds: how often each function is timed.
      seconds: how long all rounds of a function last, about.
    """
    calls = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        once = _seconds_per_call(function, 1)
        calls[name] = max(1, round(seconds / rounds / max(once, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds_per_call(function, calls[name]))
    return {name: statistics.median(rounds_of_one) for name, rounds_of_one in times.items()}


def _seconds_per_call(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (time.perf_counter() - start) / calls


def exact_softmax(x: np.ndarray) -> np.ndarray:
    """Softmax along the last axis in ``np.longdouble`` for float64, in float64 for all others."""
    wide: Any = x.astype(np.longdouble if x.dtype == np.float64 else np.float64)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ulp_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the last place of the exact value, rounded to actual's format.

    Results below the normal range of float32 or float64, in which they are computed, may be zero.
    """
    # A part at a time, whose temporary arrays stay in the caches.
    part = 2**16
    parts = zip(*(np.split(a.ravel(), range(part, a.size, part)) for a in (actual, exact)), strict=True)
    return float(np.max([_ulp_error(*arrays) for arrays in parts]))  # A NaN, if there is one.


def _ulp_error(actual: np.ndarray, exact: np.ndarray) -> float:
    limits = jnp.finfo(actual.dtype)
    tiny = float(limits.tiny)
    rounded = np.abs(exact).astype(actual.dtype).astype(exact.dtype)
    _, exponent = np.frexp(np.maximum(rounded, tiny))
    spacing = np.ldexp(exact.dtype.type(1), exponent - 1 - limits.nmant)
    error = np.abs(actual.astype(exact.dtype) - exact) / spacing
    flushed = (actual == 0) & (np.abs(exact) <= tiny) & (limits.minexp <= np.finfo(np.float32).minexp)
    return float(np.where(flushed, 0, error).max(initial=0))
