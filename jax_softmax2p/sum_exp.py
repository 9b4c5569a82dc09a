"""Sums of exponentials as the paper's pair, which can be added whatever their size, for data in chunks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p.arguments import Axis, Where, as_logits, as_real_array
from jax_softmax2p.eager import jit_when_eager
from jax_softmax2p.ops import logsumexp_of_logits
from jax_softmax2p.primitives.dispatch import Implementation
from jax_softmax2p.reference import Lse

Array = jax.Array

_LN2_TERMS = 7
_BITS_PER_TERM = 7


class SumExp(NamedTuple):
    """A sum of exponentials, mantissa·2^exponent: a monoid under :meth:`combine`, or ``+``, and a pytree.

    Attributes:
      mantissa: array, not negative.
      exponent: array of the same shape and dtype, of integers. From 2^24 on in float32, for logits beyond
        1.1e7, and from 2^53 on in float64, they are rounded: the logarithm is then right to 4 ULP. Beyond
        ±2.36e38, or ±1.24e308, it is finfo.max or finfo.min, and its gradient 0.
    """

    mantissa: Array
    exponent: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...] = (), dtype: jax.typing.DTypeLike = jnp.float32) -> "SumExp":
        """The sum of nothing, which changes nothing that it is combined with.

        Args:
          shape: of the sums.
          dtype: float32, or float64 where that is enabled.

        Raises:
          TypeError: the dtype is another.
        """
        if jnp.dtype(dtype) not in (jnp.float32, jax.dtypes.canonicalize_dtype(jnp.float64)):
            raise TypeError(
                f"dtype must be float32, or float64 where that is enabled, got {jnp.dtype(dtype)}"
            )
        return cls(jnp.zeros(shape, dtype), jnp.full(shape, jnp.finfo(dtype).min, dtype))

    @jit_when_eager("self", "other")
    def combine(self, other: "SumExp") -> "SumExp":
        """The sum of both, which may broadcast."""
        exponent = jnp.maximum(self.exponent, other.exponent)
        mantissa = self.mantissa * _power_of_two(self.exponent - exponent)
        other_mantissa = other.mantissa * _power_of_two(other.exponent - exponent)
        return SumExp(mantissa + other_mantissa, exponent)

    def __add__(self, other: "SumExp") -> "SumExp":  # type: ignore[override]
        """As :meth:`combine`, where tuples would be joined."""
        return self.combine(other) if isinstance(other, SumExp) else NotImplemented

    def __mul__(self, other: object) -> "SumExp":
        """A TypeError, where tuples would be repeated."""
        return NotImplemented

    def __rmul__(self, other: object) -> "SumExp":
        """As :meth:`__mul__`."""
        return NotImplemented

    @jit_when_eager("self")
    def reduce(self, axis: int | tuple[int, ...] | None = None) -> "SumExp":
        """The sum of all along an axis, several, or, with None, all axes."""
        highest = jnp.max(self.exponent, axis, keepdims=True, initial=jnp.finfo(self.exponent.dtype).min)
        mantissa = jnp.sum(self.mantissa * _power_of_two(self.exponent - highest), axis)
        return SumExp(mantissa, jnp.squeeze(highest, axis))

    @jit_when_eager("self")
    def log(self) -> Array:
        """The natural logarithm: -inf of an empty sum."""
        limits = jnp.finfo(self.exponent.dtype)
        log = total = jnp.log(self.mantissa)
        for term in reversed(_ln2_terms()):
            total = total + self.exponent * term
        # The exponent is clipped to the dtype's largest and smallest number.
        total = jnp.where(self.exponent == limits.max, jnp.where(log < limits.max, limits.max, log), total)
        return jnp.where(self.exponent == limits.min, jnp.where(log > limits.min, limits.min, log), total)


@jit_when_eager("x", "where")
def sum_exp(
    x: jax.typing.ArrayLike,
    axis: Axis = -1,
    where: Where = None,
    *,
    implementation: Implementation | None = None,
) -> SumExp:
    r"""The sum of exponentials as a pair (mantissa, exponent), which never overflows.

    .. math:: \sum_j \exp(x_j) = mantissa · 2^{exponent}

    Args:
      x: array of logits, as in :func:`softmax`, but real.
      axis: the axis or axes to reduce; None for all.
      where: as in :func:`softmax`; what is masked adds nothing.
      implementation: as in :func:`softmax`.

    Returns:
      :class:`SumExp` of arrays of x's shape without the axes, float64 for float64 and float32 for others.
      However a row is split into chunks, their sums combine to that of the row, but for rounding.

    Raises:
      TypeError, ValueError: as :func:`softmax`.

    Example:
      logsumexp of data that arrives in chunks:

      >>> import jax, jax.numpy as jnp
      >>> import jax_softmax2p as s2p
      >>> chunks = jnp.full((3, 4), 1000.0)
      >>> step = lambda total, chunk: (total.combine(s2p.sum_exp(chunk)), None)
      >>> total, _ = jax.lax.scan(step, s2p.SumExp.empty(), chunks)
      >>> float(total.log()) == float(s2p.logsumexp(chunks))
      True

      The decoupled loss for many positives: each positive against the negatives, not against one another.

      >>> positives, negatives = jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])
      >>> pairs = s2p.sum_exp(positives[:, None]).combine(s2p.sum_exp(negatives))
      >>> [round(loss, 3) for loss in (pairs.log() - positives).tolist()]
      [0.408, 1.551]

    Source: arXiv 2001.04438, section 4.
    """
    x = as_real_array(x, "x")
    logits = as_logits(x, axis, where, implementation=implementation, shift_invariant=False)
    # The NaN of a chunk of -inf would reach the gradients of all chunks that it is combined with.
    return _from_lse(logsumexp_of_logits(logits, zero_at_minus_infinity=True))


def _from_lse(lse: Lse) -> SumExp:
    """e^(hi + lo) as a mantissa of about 1 and an exponent, both of hi's shape and dtype."""
    hi, lo = lse
    limits = jnp.finfo(hi.dtype)
    rounded = jnp.round(jax.lax.stop_gradient(hi) * np.log2(np.e).astype(hi.dtype))
    exponent = jnp.clip(rounded, limits.min, limits.max)
    # Where the exponent itself is rounded, hi - exponent·ln 2 has no digit right.
    limit = 2.0 ** (limits.nmant + 1)
    small = (exponent > -limit) & (exponent < limit)
    # Infinities are replaced before they are subtracted: their difference is a NaN that JAX's checks report.
    finite = jnp.isfinite(hi)
    rest = jnp.where(finite, hi, 0)
    rest = jnp.where(small, rest, rest - jax.lax.stop_gradient(rest))
    for term in _ln2_terms():
        rest = rest - jnp.where(small, exponent, 0) * term
    # No branch may overflow where it is not taken: its derivative would be NaN.
    mantissa = jnp.exp(jnp.where(finite, rest + lo, hi))
    return SumExp(mantissa, exponent)


@functools.cache
def _ln2_terms() -> tuple[float, ...]:
    """ln 2 as a sum of terms of so few bits that their products with exponents are exact, largest first."""
    terms, rest = [], float(np.log(2))
    for i in range(1, _LN2_TERMS + 1):
        unit = 2.0 ** (-i * _BITS_PER_TERM)
        term = np.floor(rest / unit) * unit if i < _LN2_TERMS else rest
        terms.append(float(term))
        rest -= term
    return tuple(terms)


def _power_of_two(exponent: Array) -> Array:
    """2^exponent for integers from 0 down; 0 below the normal range. Exact, which XLA's exp2 is not."""
    bias, digits = {4: (127, 23), 8: (1023, 52)}[exponent.dtype.itemsize]
    integer = {4: jnp.int32, 8: jnp.int64}[exponent.dtype.itemsize]
    biased = jnp.maximum(exponent, -bias).astype(integer) + bias
    return jax.lax.bitcast_convert_type(biased << digits, exponent.dtype)
