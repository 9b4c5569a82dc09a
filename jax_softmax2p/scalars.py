"""Arguments that are one number, known when a function is traced, for all layers."""

import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np


def as_index(value: Any) -> int | None:
    """An integer of Python or NumPy; None for anything else, booleans among it."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_positive_integer(value: Any, name: str) -> int:
    """An integer of Python or NumPy from 1 on; a ValueError names the argument."""
    number = as_index(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
    return number


def as_number(value: Any, name: str) -> float:
    """A finite number that is known when the function is traced; a ValueError names the argument."""
    number = _known_number(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number that is known outside of jit, got {value!r}")
    return number


MAX_SOFT_CAP = 1e30
"""A larger cap is none: the kernels divide by it, and float32 would lose what is left of logits."""


def as_soft_cap(soft_cap: Any, name: str) -> float | None:
    """A positive finite number that is known when the function is traced, or None; a ValueError names it.

    None, too, where the cap is so large that c·tanh(z / c) is z for all logits but absurd ones.
    """
    if soft_cap is None:
        return None
    number = math.nan if isinstance(soft_cap, bool | np.bool_) else _known_number(soft_cap)
    # Arithmetic in float32 must neither divide by 0 nor multiply by infinity.
    limits = np.finfo(np.float32)
    if not limits.tiny <= number <= limits.max:
        raise ValueError(
            f"{name} must be None or a positive finite number that is known outside of jit, got {soft_cap!r}"
        )
    return None if number > MAX_SOFT_CAP else number


def _known_number(value: Any) -> float:
    """The value of a real scalar of Python, NumPy or JAX; NaN for anything else, tracers among it."""
    try:
        array = np.asarray(value)
        is_real = array.ndim == 0 and (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number))
        return float(array) if is_real and not np.iscomplexobj(array) else math.nan
    except (TypeError, ValueError, OverflowError):  # Tracers, too, raise a TypeError.
        return math.nan
