"""What only measures: single passes of the algorithms, plans, and the machine's caches."""

import math
from typing import Any

import numpy as np

from jax_softmax2p.native import library
from jax_softmax2p.native.names import DTYPE_NAMES, DTYPES, Algorithm, check_algorithm
from jax_softmax2p.native.numpy_kernels import check_is_array, checked_copies, checked_isa, checked_threads
from jax_softmax2p.scalars import as_index, as_number, as_soft_cap

PASSES = ("max", "sum_exp", "exp_store", "scale", "extended_sum", "extended_write")
"""The passes of which the algorithms consist, for :func:`pass_into`."""

_MAX_INTEGER = 2**56
"""More elements or keys than any array has."""


def pass_into(
    name: str,
    x: np.ndarray,
    out: np.ndarray,
    *,
    maximum: float,
    isa: str | None = None,
    threads: int = 1,
) -> float | None:
    """Runs one pass of an algorithm alone, over a row. For measurement.

    Args:
      name: one of :data:`PASSES`. ``"max"``, ``"sum_exp"`` and ``"extended_write"`` make up
        ``three_pass_recompute``; ``"max"``, ``"exp_store"`` and ``"scale"`` ``three_pass_reload``;
        ``"extended_sum"`` and ``"extended_write"`` ``two_pass``; ``two_pass_reload`` has a pass like
        ``"exp_store"`` that finds the maximum itself.
      x: C-contiguous float32 array of one dimension.
      out: as in :func:`softmax_into`. ``"extended_write"`` writes e^x·2^-k there, with k the largest integer
        not above maximum·log2 e; ``"scale"`` does so from what ``"exp_store"`` has left there.
      maximum: of ``x``; finite.
      isa: as in :func:`softmax_into`.
      threads: as in :func:`softmax_into`.

    Returns:
      The maximum or the sum of e^x, if the pass finds one.

    Raises:
      ImportError, TypeError, ValueError: as :func:`softmax_into`.

    Example:
      >>> x = np.zeros(4, np.float32)
      >>> pass_into("extended_sum", x, np.empty_like(x), maximum=0.0)
      4.0
    """
    kernels = _library()
    copies = checked_copies(x, out)
    if name not in PASSES:
        raise ValueError(f"name must be one of {', '.join(PASSES)}; got {name!r}")
    if x.dtype != np.float32 or x.ndim != 1:
        raise TypeError(f"x must be float32 of one dimension, got {x.dtype} of {x.ndim}")
    found = kernels.pass_into(
        name,
        x,
        out,
        copies,
        x.size,
        as_number(maximum, "maximum"),
        checked_isa(isa),
        checked_threads(threads),
    )
    return None if found is None else float(found)


def product(a: np.ndarray, b: np.ndarray, *, isa: str | None = None) -> np.ndarray:
    """The matrix product by the micro-kernel of attention, on one thread. For tests and measurement.

    Args:
      a: C-contiguous float32 or float64 array of two dimensions.
      b: array like ``a``, with as many rows as that has columns.
      isa: as in :func:`softmax_into`.

    Raises:
      ImportError: the compiled library cannot be loaded.
      TypeError, ValueError: an argument is not as described.

    Example:
      >>> product(np.ones((2, 3)), np.ones((3, 1))).tolist()
      [[3.0], [3.0]]
    """
    kernels = _library()
    for name, x in (("a", a), ("b", b)):
        _check_array(name, x, 2)
        if x.dtype not in (np.float32, np.float64) or x.dtype != a.dtype:
            raise TypeError(f"{name} must be float32 or float64 as a, got {x.dtype}")
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"b must have {a.shape[1]} rows, got {b.shape[0]}")
    out = np.empty((a.shape[0], b.shape[1]), a.dtype)
    kernels.product_into(a, b, out, DTYPE_NAMES[a.dtype], *a.shape, b.shape[1], checked_isa(isa))
    return out


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    cotangent: np.ndarray | None = None,
    *,
    before: int | None = None,
    after: int | None = None,
    soft_cap: float | None = None,
    dropout_mask: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    isa: str | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, ...]:
    """Fused attention of NumPy arrays with the scale 1/sqrt(H). For tests and measurement.

    Args:
      query: C-contiguous array (B, T, N, H) of one of :data:`DTYPES`; no size may be 0.
      key: array (B, S, K, H) of the same kind, where K divides N.
      value: array (B, S, K, H').
      cotangent: array (B, T, N, H'), or None.
      before: how many keys before the i-th query i attends to; None for all.
      after: how many after it; None for all.
      soft_cap: as logits_soft_cap in :func:`jax_softmax2p.dot_product_attention`.
      dropout_mask: C-contiguous boolean array (T, S), False for the weights that become 0, or None. Nothing
        is divided by the probability with which weights are kept.
      sinks: C-contiguous array (N,) of float32, or of float64 for float64, or None.
      isa: as in :func:`softmax_into`.
      threads: as in :func:`softmax_into`.

    Returns:
      The output and the lse, (B, T, N); and with a cotangent the gradients in query, key and value.

    Raises:
      ImportError: the compiled library cannot be loaded.
      TypeError, ValueError: an argument is not as described.
    """
    kernels = _library()
    arrays = {"query": query, "key": key, "value": value}
    if cotangent is not None:
        arrays["cotangent"] = cotangent
    for name, x in arrays.items():
        _check_array(name, x, 4)
    (b, t, n, h), (s, k), w = query.shape, key.shape[1:3], value.shape[3]
    shapes = {"query": (b, t, n, h), "key": (b, s, k, h), "value": (b, s, k, w), "cotangent": (b, t, n, w)}
    for name, x in arrays.items():
        if x.dtype not in DTYPE_NAMES or x.dtype != query.dtype:
            raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, as query; got {x.dtype}")
        if x.shape != shapes[name] or not x.size:
            raise ValueError(f"{name} must have shape {shapes[name]} and not be empty, got {x.shape}")
    if n % k:
        raise ValueError(f"query must have a multiple of key's {k} heads, got {n}")
    wide = np.float64 if query.dtype == np.float64 else np.float32
    for name, operand, dtype, shape in (
        ("dropout_mask", dropout_mask, np.dtype(bool), (t, s)),
        ("sinks", sinks, np.dtype(wide), (n,)),
    ):
        if operand is not None:
            _check_array(name, operand, len(shape))
            if operand.dtype != dtype or operand.shape != shape:
                got = f"{operand.dtype} of shape {operand.shape}"
                raise ValueError(f"{name} must be {dtype} of shape {shape}, got {got}")
    for name, limit in (("before", before), ("after", after)):
        if limit is not None:
            _check_integer(name, limit, 0)
    results = [np.empty((b, t, n, w), query.dtype), np.empty((b, t, n), wide)]
    if cotangent is not None:
        results += [np.empty_like(x) for x in (query, key, value)]
    as_integers = lambda x: None if x is None else x.view(np.uint16) if x.dtype.itemsize == 2 else x
    limits = (-1 if limit is None else limit for limit in (before, after))
    kernels.attention_into(
        *map(as_integers, (query, key, value, cotangent)),
        [as_integers(x) for x in results],
        DTYPE_NAMES[query.dtype],
        [b, t, s, n, k, h, w],
        1 / np.sqrt(h),
        *limits,
        as_soft_cap(soft_cap, "soft_cap") or 0.0,
        dropout_mask,
        sinks,
        checked_isa(isa),
        checked_threads(threads),
    )
    return tuple(results)


def softmax_plan(
    shape: tuple[int, int, int],
    *,
    dtype: np.dtype | type = np.float32,
    algorithm: Algorithm = "auto",
    isa: str | None = None,
) -> dict[str, bool]:
    """How an algorithm computes an array. For tests and measurement.

    Args:
      shape: the sizes of what lies outside, along and inside of the axis, none 0.
      dtype: one of :data:`DTYPES`.
      algorithm: one of :data:`ALGORITHMS`.
      isa: as in :func:`softmax_into`.

    Returns:
      Whether the maximum comes first (``"maximum_first"``), whether the exponentials of pass 1 are kept
      (``"reload"``), and whether the result is written past the caches (``"stream"``).

    Raises:
      ImportError: the compiled library cannot be loaded.
      TypeError, ValueError: an argument is not one of those listed.

    Example:
      >>> softmax_plan((1, 1000, 1), algorithm="two_pass")
      {'maximum_first': False, 'reload': False, 'stream': False}
    """
    kernels = _library()
    check_algorithm(algorithm)
    for name, size in zip(("shape[0]", "shape[1]", "shape[2]"), shape, strict=True):
        _check_integer(name, size, 1)
    if math.prod(shape) > _MAX_INTEGER:
        raise ValueError(f"shape must have at most {_MAX_INTEGER} elements, got {shape}")
    if (dtype := np.dtype(dtype)) not in DTYPE_NAMES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}; got {dtype}")
    return dict(kernels.softmax_plan(DTYPE_NAMES[dtype], *shape, algorithm, checked_isa(isa)))


def cache_bytes() -> tuple[int, int]:
    """The sizes of the second-level and of the last cache that the kernels go by.

    Raises:
      ImportError: the compiled library cannot be loaded.
    """
    second, last = _library().cache_bytes()
    return second, last


def _check_array(name: str, x: Any, ndim: int) -> None:
    check_is_array(name, x)
    if x.ndim != ndim or not x.flags.c_contiguous or not x.flags.aligned:
        raise ValueError(f"{name} must be C-contiguous, with {ndim} dimensions, got shape {x.shape}")


def _check_integer(name: str, value: Any, least: int) -> None:
    if as_index(value) is None or value < least:
        raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
    if value > _MAX_INTEGER:
        raise ValueError(f"{name} must be at most {_MAX_INTEGER}, got {value!r}")


def _library() -> Any:
    """The part of the library that only measures."""
    return library.require().measurement
