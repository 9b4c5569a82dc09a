"""Arguments that are integers, for all layers."""

import operator
from typing import Any

import numpy as np


def as_index(value: Any) -> int | None:
    """An integer of Python or NumPy; None for anything else, booleans among it."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
