"""The table of cases, one line for each."""

import math
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """An operation of ``benchmarks.operations`` over one axis of an array, filled as ``data`` says."""

    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "float32"
    operation: str = "softmax"
    data: str = "normal"

    @property
    def name(self) -> str:
        """The name in tables."""
        axis = "" if self.axis == -1 else f" axis {self.axis}"
        operation = "" if self.operation == "softmax" else f"{self.operation} "
        data = "" if self.data == "normal" else f" {self.data}"
        return f"{operation}({','.join(map(str, self.shape))}){axis} {self.dtype}{data}"

    @property
    def elements(self) -> int:
        """The number of elements of the input."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size of the input."""
        return self.elements * np.dtype(self.dtype).itemsize


def fill(x: np.ndarray, data: str) -> None:
    """Fills x with reproducible numbers: ``"normal"``, ``"uniform"`` (±1000) or ``"ramp"`` (−90 to 90)."""
    rng = np.random.default_rng(0)
    if data == "normal" and x.dtype == np.float32:
        rng.standard_normal(dtype=np.float32, out=x)
    elif data == "normal":
        x[:] = rng.standard_normal(x.shape, np.float32)
    elif data == "uniform":
        rng.random(dtype=np.float32, out=x)
        x -= 0.5
        x *= 2000
    else:
        x[:] = np.linspace(-90, 90, x.shape[-1], dtype=np.float32)


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

_ATTENTION_SHAPES = (
    (4, 1024, 12, 64),
    (1, 4096, 8, 64),
    (3, 1000, 12, 64),
    (16, 197, 12, 64),
    (1, 300, 8, 128),
    (40, 60, 4, 16),
)
"""Long sequences, in whole tiles and not, images of 197 patches, and short sequences."""

_GROUPED_SHAPE = (1, 900, 24, 96)

SMALL_CALL = Case((1, 1024))
"""The case in which the cost of a call is compared with that of jit(x + 1)."""

SHORT_ROWS = Case((1000000, 8))


def _in_both_dtypes(operation: str, *shapes: tuple[int, ...]) -> tuple[Case, ...]:
    """Cases in float32 and bfloat16, the dtypes in which networks are trained."""
    return tuple(
        Case(shape, dtype=dtype, operation=operation) for dtype in ("float32", "bfloat16") for shape in shapes
    )


_LENGTHS = (*(1024 * m * 10**k for k in range(5) for m in (1, 2, 5)), 1024 * 10**5)
"""Lengths from 10^3 to 10^8 as in the paper, rounded to whole cache lines."""

_POWERS_OF_FOUR = tuple(4**k for k in range(2, 14))


def _rows(n: int) -> int:
    """The number of rows of length n, so many that the largest error does not depend on a single row."""
    return max(1, 2**16 // n)


CASES = {
    "jit": tuple(Case(shape, dtype=dtype) for dtype in ("float32", "bfloat16") for shape in _TEN_SHAPES),
    "fresh memory": (
        *(Case(shape) for shape in ((1024, 1024), (49152, 512), (64, 128256), (1, 2**26))),
        Case((512, 32000), operation="cross-entropy and gradient"),
        Case(_ATTENTION_SHAPES[0], operation="attention"),
        Case(_ATTENTION_SHAPES[0], operation="gradient of attention"),
    ),
    "layouts": (
        Case((64, 1024, 256), axis=1),
        Case((4096, 1000), axis=0),
        Case((256, 1000, 3), axis=1),
        SHORT_ROWS,
    ),
    "logsumexp": _in_both_dtypes("logsumexp", (256, 128256), (512, 32000)),
    "cross-entropy": _in_both_dtypes("cross-entropy and gradient", (512, 32000), (256, 128256), (256, 1000)),
    "gradient": _in_both_dtypes("softmax and VJP", (1024, 1024), (49152, 512), (64, 128256)),
    "masked": _in_both_dtypes("masked softmax", (8, 12, 512, 512)),
    "attention": (
        *(
            Case(shape, operation=operation)
            for operation in ("attention", "causal attention")
            for shape in _ATTENTION_SHAPES
        ),
        Case(_GROUPED_SHAPE, operation="causal attention, 4 heads a key"),
        *(Case(shape, dtype="bfloat16", operation="attention") for shape in _ATTENTION_SHAPES),
    ),
    "gradient of attention": (
        *(
            Case(shape, operation=operation)
            for operation in ("gradient of attention", "gradient of causal attention")
            for shape in _ATTENTION_SHAPES
        ),
        Case(_GROUPED_SHAPE, operation="gradient of causal attention, 4 heads a key"),
        *(Case(shape, dtype="bfloat16", operation="gradient of attention") for shape in _ATTENTION_SHAPES),
    ),
    "decode": (
        *_in_both_dtypes("decode", (4, 7000, 16, 64), (1, 500, 12, 64)),
        *_in_both_dtypes("decode, 4 heads a key", (1, 4000, 8, 128)),
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
    "paper": tuple(Case((1, n), data="uniform") for n in _LENGTHS),
    "passes": tuple(Case((1, n), data="uniform") for n in (10240, 102400, 1024000, 10240000, 51200000)),
    "peers": (
        Case((1024, 1024)),
        Case((49152, 512)),
        Case((64, 128256)),
        Case((1, 2**26)),
    ),
    "peers, log_softmax": tuple(
        Case(shape, operation="log_softmax") for shape in ((1024, 1024), (64, 128256))
    ),
    "peers, logsumexp": tuple(Case(shape, operation="logsumexp") for shape in ((1024, 1024), (64, 128256))),
    "peers, cross-entropy": tuple(
        Case(shape, operation="cross-entropy") for shape in ((1024, 1024), (64, 128256))
    ),
    "peers, attention": (Case(_ATTENTION_SHAPES[0], operation="attention"),),
    "accuracy": (
        *(Case((_rows(n), n)) for n in _POWERS_OF_FOUR),
        *(Case((_rows(n), n), data="ramp") for n in _POWERS_OF_FOUR[:-1]),
    ),
    "scaling in n": tuple(Case((1, n)) for n in _LENGTHS[::2]),
    "scaling in batch": tuple(Case((4**k, 1024)) for k in range(9)),
}
"""The cases of each table of ``benchmarks.sections``."""
