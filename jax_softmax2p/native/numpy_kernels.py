"""Kernels on NumPy arrays, without XLA: for tests and measurement."""

import math

import numpy as np

from jax_softmax2p.native import library
from jax_softmax2p.native.names import DTYPE_NAMES, DTYPES, check_algorithm


def softmax_into(
    x: np.ndarray,
    out: np.ndarray,
    *,
    axis: int = -1,
    algorithm: str = "auto",
    isa: str | None = None,
    threads: int = 1,
) -> None:
    """Runs a softmax kernel over an axis of a NumPy array. For tests and measurement.

    Args:
      x: C-contiguous array of one of :data:`DTYPES`.
      out: writable array like ``x``, for the result; may be ``x`` itself. Or several of them, stacked along a
        new first axis: the kernel runs once for each, without Python in between.
      axis: the axis of ``x`` whose elements sum to one.
      algorithm: one of :data:`ALGORITHMS`.
      isa: one of :func:`supported_isas`; None is :func:`active_isa`.
      threads: how many threads share the work, the caller's included; no more than 64 do.

    Raises:
      ImportError: the compiled library cannot be loaded.
      TypeError: ``x`` or ``out`` is not such an array.
      ValueError: shapes differ, or an argument is not one of those listed.

    Example:
      >>> x = np.zeros((2, 4), np.float32)
      >>> softmax_into(x, x)
      >>> x[0].tolist()
      [0.25, 0.25, 0.25, 0.25]
    """
    kernels = library.require()
    copies = checked_copies(x, out)
    check_algorithm(algorithm)
    kernels.softmax_into(
        _as_integers(x),
        _as_integers(out),
        DTYPE_NAMES[x.dtype],
        copies,
        *_layout(x, axis),
        algorithm,
        checked_isa(isa),
        checked_threads(threads),
    )


def softmax_jacobian_into(
    y: np.ndarray,
    t: np.ndarray,
    out: np.ndarray,
    *,
    axis: int = -1,
    isa: str | None = None,
    threads: int = 1,
) -> None:
    """Runs the kernel of J(y, t) = y·(t - <y, t>) over an axis of NumPy arrays.

    Args:
      y: C-contiguous array of one of :data:`DTYPES`, a softmax along the axis.
      t: array like ``y``, a tangent or cotangent.
      out: writable array like ``y``, for the result; may be ``y`` or ``t`` itself.
      axis: as in :func:`softmax_into`.
      isa: as in :func:`softmax_into`.
      threads: as in :func:`softmax_into`.

    Raises:
      ImportError, TypeError, ValueError: as :func:`softmax_into`.
    """
    kernels = library.require()
    _check_arrays(y=y, t=t, out=out)
    arrays = (_as_integers(y), _as_integers(t), _as_integers(out))
    kernels.softmax_jacobian_into(
        *arrays, DTYPE_NAMES[y.dtype], *_layout(y, axis), checked_isa(isa), checked_threads(threads)
    )


def _layout(x: np.ndarray, axis: int) -> tuple[int, int, int]:
    """The sizes of what lies outside, along and inside of an axis."""
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be an integer from {-x.ndim} to {x.ndim - 1}, got {axis!r}")
    return math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis:][1:])


def _as_integers(array: np.ndarray) -> np.ndarray:
    """Of 16-bit elements: the buffer protocol has no name for bfloat16."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def check_is_array(name: str, array: object) -> None:
    """TypeError for what is no array of NumPy."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")


def _check_arrays(**arrays: np.ndarray) -> None:
    shape, dtype = None, None
    for name, array in arrays.items():
        check_is_array(name, array)
        if array.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}; got {array.dtype}")
        if not array.flags.c_contiguous or not array.flags.aligned:
            raise ValueError(f"{name} must be C-contiguous and aligned to its elements")
        if array.ndim == 0:
            raise ValueError(f"{name} must have one dimension at least, got a scalar")
        shape, dtype = shape or array.shape, dtype or array.dtype
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} must have shape {shape} and dtype {dtype} as the others, "
                f"got {array.shape} and {array.dtype}"
            )
    out = arrays["out"]
    for name, array in arrays.items():
        if array is out or not np.may_share_memory(array, out):
            continue
        if array.ctypes.data != out.ctypes.data:
            raise ValueError(f"out must be {name} itself or share no memory with it, got a partial overlap")
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")


def checked_copies(x: np.ndarray, out: np.ndarray) -> int:
    """How many arrays like ``x`` there are in ``out``; an error where these are no such arrays."""
    arrays = isinstance(x, np.ndarray) and isinstance(out, np.ndarray)
    if not arrays or out.ndim != x.ndim + 1 or len(out) == 0:
        _check_arrays(x=x, out=out)
        return 1
    _check_arrays(x=x, out=out[0])
    if not out.flags.c_contiguous or np.may_share_memory(x, out):
        raise ValueError("out must be C-contiguous and share no memory with x, where it is a stack of arrays")
    return len(out)


def checked_isa(isa: str | None) -> str:
    """The instruction set to run, :func:`active_isa` for None; ValueError for one that is not supported."""
    if isa is None:
        return library.active_isa()
    if isa not in library.supported_isas():
        raise ValueError(f"isa must be one of {', '.join(library.supported_isas())}; got {isa!r}")
    return isa


def checked_threads(threads: int) -> int:
    """The number of threads; ValueError for one out of range."""
    if not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(f"threads must be an integer from 1 to 1024, got {threads!r}")
    return threads
