"""From which sizes on a native kernel is faster than the reference, which XLA fuses with what surrounds it.

A call of a native kernel takes some 0.5 to 1.1 µs inside a compiled loop, in which XLA runs a whole small
reduction with its neighbours in 0.1 µs.
"""

import math
from typing import Literal, NamedTuple

Operation = Literal["softmax", "logsumexp", "log_softmax", "derivative"]
"""What a primitive computes; the derivatives are alike in what they cost."""

SHORT_ROW = 16
"""Rows with fewer elements have a column of the table to themselves."""


class Threshold(NamedTuple):
    """The numbers of elements from which on an operation is native.

    Attributes:
      rows: of rows along the last axis.
      short_rows: the same, of rows with fewer than SHORT_ROW elements.
      other_axes: along an axis that is not the last.
    """

    rows: int
    short_rows: int
    other_axes: int


# Beside each: the time of jax.nn, which is that of the reference, by the native kernel's, in a loop, in
# float32 on a Zen 4 with AVX-512, of shapes on both sides of the threshold. benchmarks/thresholds.py
# measures them.
THRESHOLDS: dict[Operation, Threshold] = {
    # (1,128) 0.31, (16,16) 2.1; (1000,3) 0.50, (256,10) 1.8, (4000,4) 2.2; axis 0 of (32,32) 1.2
    "softmax": Threshold(rows=256, short_rows=2**13, other_axes=2**10),
    # (1,128) 0.37, (16,16) 1.7; (1000,3) 0.37, (4000,4) 1.1; axis 0 of (32,32) 0.67, (64,64) 1.06
    "logsumexp": Threshold(rows=256, short_rows=2**14, other_axes=2**12),
    # (1,128) 0.24, (16,16) 1.65; (1000,3) 0.29, (4000,4) 0.94, (10000,5) 1.3; axis 0 of (128,128) 0.8
    "log_softmax": Threshold(rows=256, short_rows=2**15, other_axes=2**15),
    # (1,128) 0.82, (32,32) 1.4, (4096,16) 1.4; (4000,4) 0.44, (10000,5) 0.9; axis 0 of (128,128) 0.8
    "derivative": Threshold(rows=2**10, short_rows=2**16, other_axes=2**15),
}


def least_elements(operation: Operation, shape: tuple[int, ...], axis: int) -> int:
    """The number of elements from which on an operation is native.

    Args:
      operation: what is computed.
      shape: of the array that is worked on, after batching.
      axis: along which the rows lie, negative.
    """
    threshold = THRESHOLDS[operation]
    if math.prod(shape[axis:][1:]) > 1:
        return threshold.other_axes
    return threshold.short_rows if shape[axis] < SHORT_ROW else threshold.rows
