"""From which sizes on a native kernel is faster than the reference, which XLA fuses with what surrounds it.

A call of a native kernel takes some 0.5 to 1.1 µs inside a compiled loop, in which XLA runs a whole small
reduction with its neighbours in 0.1 µs. Outside loops every part of a program costs about as much, XLA's
loops as well as native calls, and a native call is one part where the reference is three to seven: there,
softmax, logsumexp and log_softmax of any size are native (8 elements: 1.01 to 1.13 times as fast as jax.nn's,
(256,10): 2.2 to 3.0).
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
      rows: along the last axis, for rows of fewer than 16, 64 and 256 elements, and for longer ones.
      other_axes: along an axis that is not the last.
    """

    rows: tuple[int, int, int, int]
    other_axes: int


_ROW_LENGTHS = (16, 64, 256)

_FORWARD = ("softmax", "logsumexp", "log_softmax")

# In loops; of derivatives, elsewhere as well. Beside each: the time of jax.nn by that of the native kernel,
# in float32 on a Zen 4 with AVX-512, of shapes on both sides of thresholds. benchmarks/thresholds.py
# measures them.
THRESHOLDS: dict[Operation, Threshold] = {
    # (1000,3) 0.49, (256,10) 1.5; (16,16) 1.8, (1,128) 0.26, (1,256) 1.5; axis 0 of (16,16) 1.3
    "softmax": Threshold(rows=(2**11, 2**8, 2**8, 2**8), other_axes=2**8),
    # (256,10) 1.0, (4000,4) 1.1; (16,16) 1.3, (1,128) 0.35, (1,256) 2.5; axis 0 of (32,32) 0.6, (64,64) 1.3
    "logsumexp": Threshold(rows=(2**13, 2**8, 2**8, 2**8), other_axes=2**11),
    # (256,10) 0.79, (4000,4) 1.04; (16,16) 1.3, (1,128) 0.46, (1,256) 2.2; axis 0 of (64,64) 1.15
    "log_softmax": Threshold(rows=(2**11, 2**8, 2**8, 2**8), other_axes=2**12),
    # With softmax: (50000,7) 0.99; (4096,16) 1.3, (32,32) 0.96, (64,64) 0.97; axis 0 of (256,256) 0.91
    "derivative of softmax": Threshold(rows=(2**18, 2**15, 2**15, 2**15), other_axes=2**18),
    # With logsumexp: (50000,7) 0.61; (32,32) 1.3, (4096,16) 1.2; (128,128) 0.66, (8192,64) 1.0; (1,1024) 1.5;
    # axis 0 of (1024,1024) 0.8, axis 1 of (4,21,128,128) 0.74, axis 0 of (2000,1500) 1.2
    "derivative of logsumexp": Threshold(rows=(2**20, 2**10, 2**18, 2**16), other_axes=2**21),
    # The loss outside loops, the time of the reference by that of the native kernel: (8,3) 0.95, (32,10) 1.4,
    # (100,4) 1.1 to 1.4, (1000,3) 0.9, (4000,4) 1.4, (50000,7) 2.7, (200,16) 1.1, (100,100) 1.3, (2048,100)
    # 1.25, (200,300) 1.6. Other axes as logsumexp.
    "derivative of cross-entropy": Threshold(rows=(2**9, 2**10, 2**10, 2**14), other_axes=2**21),
    # With log_softmax: (32,32) 0.71, (2048,18) 1.6; (128,1000) 2.1; axis 0 of (1024,1024) 1.0, axis 0 of
    # (2000,1500) 1.8. Outside loops, the time of the reference by that of the native kernel: (32,10) 1.5,
    # (256,10) 2.0 to 2.6, (4000,4) 1.9, (50000,7) 2.2, (100,100) 1.2 to 1.5, (2048,100) 1.0 to 1.2
    "derivative of log_softmax": Threshold(rows=(2**9, 2**14, 2**13, 2**16), other_axes=2**20),
}


COMPOSED_ELEMENTS = 2**23
"""The size of x below which log_softmax is a native logsumexp and a subtraction.

XLA fuses that with what uses it, often a few elements of each row. The gradient of a focal loss on (8192,81),
with log_softmax by its own kernel, took 1.5 times jax.nn's time, and takes 1.1 so (Zen 4). By itself it takes
0.44 times the kernel's time along axis 0 of (2000,1500), 0.5 along axis 1, 0.8 for (100000,64), and then 2.3
for (20000,512) and 2.6 for (64,200000), whose results no longer fit the caches.
"""


def least_elements(operation: Operation, shape: tuple[int, ...], axis: int, *, in_loop: bool) -> int:
    """The number of elements from which on an operation is native.

    Args:
      operation: what is computed.
      shape: of the array that is worked on, after batching.
      axis: along which the rows lie, negative.
      in_loop: whether it is in the body of a loop.
    """
    if operation in _FORWARD and not in_loop:
        return 0
    threshold = THRESHOLDS[operation]
    if math.prod(shape[axis:][1:]) > 1:
        return threshold.other_axes
    return threshold.rows[sum(shape[axis] >= length for length in _ROW_LENGTHS)]
