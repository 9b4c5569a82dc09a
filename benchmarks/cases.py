"""The case table: one line a case."""

import math
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """An operation of ``benchmarks.operations`` over one axis of an array."""

    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "float32"
    operation: str = "softmax"

    @property
    def name(self) -> str:
        """As it appears in tables."""
        axis = "" if self.axis == -1 else f" axis {self.axis}"
        operation = "" if self.operation == "softmax" else f"{self.operation} "
        return f"{operation}({','.join(map(str, self.shape))}){axis} {self.dtype}"

    @property
    def bytes(self) -> int:
        """Size of the input."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


_TEN_SHAPES = (
    (1, 1024),
    (64, 64),
    (128, 1024),
    (1024, 1024),
    (49152, 512),
    (256, 32000),
    (64, 128256),
    (1, 2**20),
    (1, 2**24),
    (1, 2**26),
)

_ATTENTION_SHAPES = ((4, 1024, 12, 64), (1, 4096, 8, 64))

SMALL_CALL = Case((1, 1024))
"""Where the cost of a call is held against that of jit(x + 1)."""

SHORT_ROWS = Case((1000000, 8))


def _of(operation: str, *shapes: tuple[int, ...]) -> tuple[Case, ...]:
    """In both of the dtypes that networks are trained in."""
    return tuple(
        Case(shape, dtype=dtype, operation=operation) for dtype in ("float32", "bfloat16") for shape in shapes
    )


CASES = {
    "jit": tuple(Case(shape, dtype=dtype) for dtype in ("float32", "bfloat16") for shape in _TEN_SHAPES),
    "layouts": (
        Case((64, 1024, 256), axis=1),
        Case((4096, 1000), axis=0),
        Case((256, 1000, 3), axis=1),
        SHORT_ROWS,
    ),
    "logsumexp": _of("logsumexp", (256, 128256), (512, 32000)),
    "cross-entropy": _of("cross-entropy and gradient", (512, 32000), (256, 128256), (256, 1000)),
    "gradient": _of("softmax and VJP", (1024, 1024), (49152, 512), (64, 128256)),
    "masked": _of("masked softmax", (8, 12, 512, 512)),
    "attention": tuple(
        Case(shape, operation=operation)
        for operation in ("attention", "causal attention")
        for shape in _ATTENTION_SHAPES
    ),
    "gradient of attention": tuple(
        Case(shape, operation=operation)
        for operation in ("gradient of attention", "gradient of causal attention")
        for shape in _ATTENTION_SHAPES
    ),
    "kernels, out of cache": (Case((1, 2**26)),),
    "kernels, in cache": (
        Case((1, 2**12)),
        Case((1, 2**16)),
    ),
    "kernels, against a copy": (Case((49152, 512)),),
    "kernels, 2 threads in cache": (
        Case((1024, 1024)),
        Case((128, 4096)),
        Case((16, 65536)),
        Case((2**17, 8)),
    ),
    "kernels, 2 threads out of cache": (
        Case((49152, 512)),
        Case((64, 128256)),
        Case((1, 2**26)),
    ),
    "peers": (
        Case((1024, 1024)),
        Case((49152, 512)),
        Case((64, 128256)),
        Case((1, 2**26)),
    ),
}
"""What each table of ``benchmarks.sections`` measures."""
