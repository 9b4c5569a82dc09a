"""How time and memory scale with size, and at which sizes ``auto`` changes how it computes."""

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.results import Figure, Row
from jax_softmax2p import native

MAX_ELEMENTS = 2**28
"""The largest size at which :func:`crossovers` looks."""


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent k of y ~ x^k, by least squares of the logarithms.

    Raises:
      ValueError: there are fewer than two different x, or x and y differ in length.
    """
    if len(set(x)) < 2 or len(x) != len(y):
        raise ValueError(f"a slope needs pairs of at least two different x, got x {list(x)} and y {list(y)}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slopes(rows: Sequence[Row], what: str, min_elements: int) -> list[Figure]:
    """The slope of each backend over the cases of at least that many elements that measured more than 0."""
    figures = []
    for name in rows[0].samples if rows else ():
        points = [(row.case.elements, row.medians[name]) for row in rows if row.case.elements >= min_elements]
        points = [(x, y) for x, y in points if y > 0]
        if len(points) >= 2:
            x, y = zip(*points, strict=True)
            figures.append(Figure(f"{what} of {name}", "slope", slope(x, y)))
    return figures


def crossovers(shape: Callable[[int], tuple[int, int, int]]) -> list[int]:
    """The sizes, in elements, from which on ``auto`` computes differently.

    Args:
      shape: maps a length to the sizes outside, along and inside of the axis.
    """
    sizes = []
    length, elements = 1, lambda length: int(np.prod(shape(length)))
    while elements(2 * length) <= MAX_ELEMENTS:
        if (first := native.softmax_plan(shape(length))) != native.softmax_plan(shape(2 * length)):
            low, high = length, 2 * length
            while high - low > 1:
                middle = (low + high) // 2
                same = native.softmax_plan(shape(middle)) == first
                low, high = (middle, high) if same else (low, middle)
            sizes.append(elements(high))
        length *= 2
    return sizes
