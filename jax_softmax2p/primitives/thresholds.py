"""From which sizes on a native kernel is faster than the reference, which XLA fuses with what surrounds it.

A call of a native kernel takes some 0.5 to 1.1 µs inside a compiled loop, in which XLA runs a whole small
reduction with its neighbours in 0.1 µs. Outside loops every part of a program costs about as much, XLA's
loops as well as native calls, and a native call is one part where the reference is three to seven: there all
is native (8 elements: 0.9 to 1.1 times as fast as jax.nn's, on a Cascade Lake 0.7 to 0.8; (256,10): 2.2 to
3.0, and with its derivative 1.5 to 4.3; axis 0 of (64,64) with its derivative 1.1 to 2.5). The one exception
are derivatives of logsumexp below the threshold of loops: they keep the softmax, since the loop may be one
around them, and it is of no use to keep one that XLA cannot fuse.
"""

import math
from typing import Literal, NamedTuple

Operation = Literal[
    "softmax",
    "logsumexp",
    "log_softmax",
    "derivative of softmax",
    "derivative of logsumexp",
    "derivative of cross-entropy",
    "derivative of log_softmax",
]
"""What a primitive computes. A logsumexp that is differentiated counts as part of its derivative."""


class Threshold(NamedTuple):
    """The numbers of elements from which on an operation is native.

    Attributes:
      rows: along the last axis, for rows of fewer than 4, 16, 64 and 256 elements, and for longer ones.
      other_axes: along an axis that is not the last.
    """

    rows: tuple[int, int, int, int, int]
    other_axes: int


_ROW_LENGTHS = (4, 16, 64, 256)

# In loops. Beside each: the time of jax.nn by that of the native kernel, in float32 on a Zen 4 with AVX-512,
# of shapes on both sides of thresholds; after a slash, the same of the reference. benchmarks/thresholds.py
# measures them.
THRESHOLDS: dict[Operation, Threshold] = {
    # (1000,3) 0.49, (256,10) 1.5; (16,16) 1.8, (1,128) 0.26, (1,256) 1.5; axis 0 of (16,16) 1.3
    "softmax": Threshold(rows=(2**12, 2**11, 2**8, 2**8, 2**8), other_axes=2**8),
    # (256,10) 1.0, (4000,4) 1.1; (16,16) 1.3, (1,128) 0.35, (1,256) 2.5; axis 0 of (32,32) 0.6, (64,64) 1.3
    "logsumexp": Threshold(rows=(2**13, 2**13, 2**8, 2**8, 2**8), other_axes=2**11),
    # (256,10) 0.79, (4000,4) 1.04; (16,16) 1.3, (1,128) 0.46, (1,256) 2.2; axis 0 of (64,64) 1.15
    "log_softmax": Threshold(rows=(2**12, 2**11, 2**8, 2**8, 2**8), other_axes=2**12),
    # With softmax: (1000,3) 0.49/0.68, (4000,3) 2.3; (256,10) 1.7/1.6, (500,8) 0.8/1.2, (1000,5) 1.9;
    # (100,16) 1.6/1.6, (32,32) 1.4/1.7, (1024,16) 1.4/0.85; (32,64) 1.7/1.7; (8,256) 1.6/1.5; axis 0 of
    # (64,64) 1.0/0.95, (256,256) 0.79/0.56
    "derivative of softmax": Threshold(rows=(2**12, 2**12, 2**13, 2**11, 2**11), other_axes=2**12),
    # With logsumexp: (1000,3) 0.34/1.1, (4000,3) 0.86/1.0; (32,10) 1.2/1.0, (256,10) 1.0/0.94, (1000,5)
    # 0.85/0.67; (32,32) 1.1/1.0; (64,128) 0.68/0.86, (1024,100) 1.0/0.59; (8,256) 1.1/0.95; axis 0 of (64,64)
    # 0.69/0.94, (128,128) 0.74/0.88, (256,256) 1.3/0.71
    "derivative of logsumexp": Threshold(rows=(2**12, 2**8, 2**10, 2**13, 2**11), other_axes=2**15),
    # (1000,3) 0.35/0.43, (4000,3) 0.84; (32,10) 1.3/0.48; (32,32) 1.2; (8,64) 0.79/0.94, (64,128) 0.75;
    # (8,256) 1.1/0.70; axis 0 of (64,64) 0.74/0.47, (256,256) 1.1/0.85
    "derivative of cross-entropy": Threshold(rows=(2**12, 2**8, 2**10, 2**10, 2**11), other_axes=2**11),
    # With log_softmax: (1000,3) 0.22/0.24, (4000,3) 0.79; (32,10) 1.0/0.39; (32,32) 0.88/0.77; (8,64)
    # 0.49/0.55, (64,128) 0.60; (8,256) 0.90/0.38; axis 0 of (64,64) 0.59/0.30, (256,256) 0.83/0.46
    "derivative of log_softmax": Threshold(rows=(2**12, 2**8, 2**10, 2**12, 2**11), other_axes=2**11),
}


COMPOSED_ELEMENTS = 2**23
"""The size of x below which log_softmax is a native logsumexp and a subtraction.

XLA fuses that with what uses it, often a few elements of each row. The gradient of a focal loss on (8192,81),
with log_softmax by its own kernel, took 1.5 times jax.nn's time, and takes 1.1 so (Zen 4). By itself it takes
0.44 times the kernel's time along axis 0 of (2000,1500), 0.5 along axis 1, 0.8 for (100000,64), and then 2.3
for (20000,512) and 2.6 for (64,200000), whose results no longer fit the caches.
"""


MAX_KEPT_LOSS = 2**9
"""Of a cross-entropy the derivative in fewer elements is kept, computed with the loss.

Then XLA takes the exponentials once. In loops, the time of optax by that with the kept derivative and without
it: (1,3) 1.0/0.78, (1,10) 0.95/0.61, (1,128) 0.43/0.35, axis 0 of (16,16) 1.4/0.77; but (8,64) 0.90/0.97,
(256,3) 0.33/0.49. Outside, axis 0 of (32,32) 0.65/1.3 (Zen 4).
"""


def keeps_derivative(operation: Operation, shape: tuple[int, ...], axis: int) -> bool:
    """Whether a derivative is kept, rather than computed again, as small ones are: it may be a loop that they
    are in.

    Args:
      operation: a derivative.
      shape: as in :func:`min_elements`.
      axis: as shape.
    """
    most = MAX_KEPT_LOSS if operation == "derivative of cross-entropy" else math.inf
    return math.prod(shape) < min(most, min_elements(operation, shape, axis, in_loop=True))


def min_elements(operation: Operation, shape: tuple[int, ...], axis: int, *, in_loop: bool) -> int:
    """The number of elements from which on an operation is native.

    Args:
      operation: what is computed.
      shape: of the array that is worked on, after batching.
      axis: along which the rows lie, negative.
      in_loop: whether it is in the body of a loop.
    """
    if not in_loop and operation != "derivative of logsumexp":
        return 0
    threshold = THRESHOLDS[operation]
    if math.prod(shape[axis:][1:]) > 1:
        return threshold.other_axes
    return threshold.rows[sum(shape[axis] >= length for length in _ROW_LENGTHS)]
