"""Sums of exponentials whose roundings do not show: of one that is 1 beside many small ones, too."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

MAX_PLAIN_LENGTH = 4
"""So many exponentials are summed plainly in derivatives, within 4 ULP of the largest entry.

Of longer rows, each small exponential beside a large one may cost an ULP: of 31, up to 13 were lost.
"""

MAX_PAIRWISE_LENGTH = 32
"""So many sums of blocks are added in pairs: more would make a loop of too many operations."""

MAX_STACKED_LENGTH = 64
"""Of rows of so many elements, several sums are one reduction; longer ones XLA adds faster by themselves."""

MAX_STACKED_SIZE = 2**12
"""The same for the size of the arrays: of larger ones the copies would be written to memory."""

MAX_EXACT_LENGTH = 2**12
"""Rows whose length is symbolic, in exported programs, are summed exactly up to this length."""


_IN_LOOP = contextvars.ContextVar("_IN_LOOP", default=False)


@contextlib.contextmanager
def in_loop(value: bool) -> Iterator[None]:
    """Whether what is traced meanwhile is the body of a loop: few loops inside it are worth more operations.

    Elsewhere nothing is sliced: XLA's CPU backend aborts on slices of exponentials in the computations of
    reductions and scatters, for which the reference is traced too.
    """
    token = _IN_LOOP.set(value)
    try:
        yield
    finally:
        _IN_LOOP.reset(token)


_ON_ACCELERATOR = contextvars.ContextVar("_ON_ACCELERATOR", default=False)


@contextlib.contextmanager
def on_accelerator(value: bool) -> Iterator[None]:
    """Whether what is traced meanwhile, and not differentiated, is lowered for another platform than CPUs.

    XLA's kernels for GPUs hold no more than one reduction of a row, and what several have in common is
    written to memory. So there are fewer than elsewhere: see :func:`rounded_sum` and :func:`at_labels`.
    """
    token = _ON_ACCELERATOR.set(value)
    try:
        yield
    finally:
        _ON_ACCELERATOR.reset(token)


def two_sum_error(a: Array, b: Array, total: Array) -> Array:
    """a + b - total, exactly, for the rounded sum.

    Source: TwoSum in Knuth, The Art of Computer Programming, volume 2, section 4.2.2.
    """
    b_part = total - a
    return (a - (total - b_part)) + (b - b_part)


def sums(terms: Sequence[Array], axis: int) -> Sequence[Array]:
    """The sums of several arrays of one shape along the axis, which stays with size 1.

    Small ones in loops are stacked. XLA then computes once what they have in common, by vectors: the
    derivative of a log_softmax of 16 elements takes 0.4 times as long (Zen 4, AVX-512).
    """
    shape = terms[0].shape
    is_static = all(isinstance(size, int) for size in shape)
    is_short = _IN_LOOP.get() and is_static and MAX_PLAIN_LENGTH < shape[axis] <= MAX_STACKED_LENGTH
    if is_short and math.prod(shape) <= MAX_STACKED_SIZE:
        return list(jnp.sum(jnp.stack(terms), axis % len(shape) + 1, keepdims=True))
    return [jnp.sum(term, axis, keepdims=True) for term in terms]


def exact_sum(p: Array, axis: int) -> tuple[Array, Array]:
    """The sum of exponentials p, each from 0 to 1, along the axis, which stays with size 1.

    Every p is divided into a multiple of a power of two so large that multiples are added exactly, and the
    rest. Added one after another, an exponential of 1 and a thousand small ones would lose 7 ULP. In loops,
    very few are added in pairs instead.

    Returns:
      The sum, rounded; and its error, which matters where all but one of the exponentials are small.
    """
    if jnp.iscomplexobj(p):
        return jnp.sum(p, axis, keepdims=True), jnp.zeros((), p.dtype)
    n = p.shape[axis] if isinstance(p.shape[axis], int) else MAX_EXACT_LENGTH
    if _IN_LOOP.get() and 0 < n <= MAX_PLAIN_LENGTH:
        return _rounded(*_sum_of_pairs(p, jnp.zeros_like(p), axis))
    bits = jnp.finfo(p.dtype).nmant + 1 - math.ceil(math.log2(max(n, 1)))
    unit = np.asarray(2.0 ** -max(bits, 0), p.dtype)
    multiple = jax.lax.round(p * (1 / unit), jax.lax.RoundingMethod.TO_NEAREST_EVEN) * unit
    return _rounded(*sums([multiple, p - multiple], axis))


def rounded_sum(p: Array, axis: int) -> Array:
    """The sum of exponentials p along the axis, which stays with size 1: exact, but for accelerators.

    There many threads share a row, so that a plain sum loses few ULP. XLA makes one kernel of a softmax with
    one, and six with exact sums, that take 1.5 to 2.9 times as long (H200).
    """
    return jnp.sum(p, axis, keepdims=True) if _ON_ACCELERATOR.get() else exact_sum(p, axis)[0]


def at_labels(x: Array, labels: Array, is_label: Array, axis: int) -> Array:
    """The elements of x at the labels, of which each row has one, or 0; the axis stays with size 1.

    On accelerators they are read one by one, elsewhere with the rows, which XLA reads anyway. The gradient of
    a cross-entropy of 32,000 classes takes 0.86 of the time so (H200).

    Args:
      x: of any shape.
      labels: int32, of x's shape without the axis; the size of the axis where a row has none.
      is_label: boolean, of x's shape: True at the labels.
      axis: along which labels count.
    """
    if _ON_ACCELERATOR.get():
        indices = jnp.expand_dims(labels, axis)
        return jnp.take_along_axis(x, indices, axis, mode="fill", fill_value=0)
    return jnp.sum(jax.lax.select(is_label, x, jnp.zeros_like(x)), axis, keepdims=True)


def sum_of_blocks(p: Array, axis: int) -> Array:
    """As :func:`exact_sum`, but blocks of up to MAX_PLAIN_LENGTH are summed plainly before; within 4 ULP.

    So there is one addition of each p, where the exact sum has two. The elements of a block are far apart,
    so that XLA adds vectors. In loops, what is left of short rows is summed in pairs. The gradient of a
    hidden Markov model of 128 states takes 0.85 of the time that it takes with the exact sum (Zen 4).
    """
    n = p.shape[axis]
    if isinstance(n, int) and n <= MAX_PLAIN_LENGTH:
        return jnp.sum(p, axis, keepdims=True)
    size = _block_size(n) if isinstance(n, int) else 1
    if size > 1:
        axis %= p.ndim
        p = jnp.sum(p.reshape(*p.shape[:axis], size, n // size, *p.shape[axis + 1 :]), axis)
    if _IN_LOOP.get() and isinstance(n, int) and n // size <= MAX_PAIRWISE_LENGTH:
        return _rounded(*_sum_of_pairs(p, jnp.zeros_like(p), axis))[0]
    return exact_sum(p * (1 / MAX_PLAIN_LENGTH), axis)[0] * MAX_PLAIN_LENGTH


def _block_size(n: int) -> int:
    """Into blocks of what size rows of n elements are divided: many blocks, of few elements each."""
    return max(size for size in range(1, MAX_PLAIN_LENGTH + 1) if n % size == 0 and size**2 <= 2 * n)


def _sum_of_pairs(p: Array, errors: Array, axis: int) -> tuple[Array, Array]:
    """The sum of halves and their halves, and that of what additions lost: one loop of XLA, if p is short.

    Args:
      p: what is summed, not empty.
      errors: what its elements lack.
      axis: along which.
    """
    n = p.shape[axis]
    if n == 1:
        return p, errors
    part = lambda a, first, last: jax.lax.slice_in_dim(a, first, last, axis=axis)
    half = n // 2
    halves = [[part(a, 0, half), part(a, half, 2 * half)] for a in (p, errors)]
    total, error = _sum_of_pairs(*_add(*halves), axis)
    return _add((total, part(p, n - 1, n)), (error, part(errors, n - 1, n))) if n % 2 else (total, error)


def _rounded(larger: Array, smaller: Array) -> tuple[Array, Array]:
    """Their sum, rounded, and its error. Of an infinite sum the smaller one is NaN, and left out."""
    total = larger + jax.lax.select(larger != np.inf, smaller, jnp.zeros_like(smaller))
    return total, smaller - (total - larger)


def _add(terms: Sequence[Array], errors: Sequence[Array]) -> tuple[Array, Array]:
    """The sum of two terms, and what it lacks, with what these lack, which has no derivative."""
    first, second = terms
    total = first + second
    error = two_sum_error(*(jax.lax.stop_gradient(a) for a in (first, second, total)))
    return total, (errors[0] + errors[1]) + error


def log_of_sum(p: Array, axis: int) -> Array:
    """log(sum(p)) of exponentials of which the largest is 1; the axis stays with size 1.

    It is exact however small the sum of the others is.
    """
    total, error = exact_sum(p, axis)
    return jnp.log(total) + jax.lax.stop_gradient(error / jnp.maximum(total, 1))
