"""Rows of every kind by name, exact results, and measures of error: shared by all tests."""

import jax.numpy as jnp
import numpy as np

from jax_softmax2p.measure import exact_softmax as exact_softmax
from jax_softmax2p.measure import ulp_error as ulp_error

DTYPES = (np.float32, np.float64, jnp.bfloat16, np.float16)

CONTRACT_ULP = {np.float32: 2.0, np.float64: 4.0, jnp.bfloat16: 0.5 + 2**-15, np.float16: 0.5 + 2**-12}
"""The bound on the error of every output. 16-bit results are float32 results within 2 ULP, rounded once."""

MIN_LOG_ERROR = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-50}
"""The error of a logarithm, however small, that the rounding of the sum of exponentials causes.

Sums of float64 are not accumulated in a wider format.
"""

# All algorithms of a group give the same bits.
TWO_PASS = ("auto", "two_pass", "two_pass_reload")
THREE_PASS = ("three_pass_recompute", "three_pass_reload")


def algorithm_with_same_bits(algorithm):
    """The first algorithm of the same group."""
    return THREE_PASS[0] if algorithm in THREE_PASS else TWO_PASS[0]


def _normal(rng, n):
    return rng.standard_normal(n)


def _uniform_1000(rng, n):
    return rng.uniform(-1000, 1000, n)


def _spike(rng, n):
    """One element lies 17 above the others, so that each of these contributes half an ULP of the sum."""
    x = rng.standard_normal(n)
    x[rng.integers(n)] = 17.5
    return x


def _tall_spike(rng, n):
    x = rng.standard_normal(n)
    x[rng.integers(n)] = 60
    return x


def _ramp(rng, n):
    return np.linspace(-90, 90, n) + rng.uniform(-1e-3, 1e-3)


def _constant(rng, n):
    return np.full(n, rng.standard_normal())


def _drift(rng, n):
    return rng.standard_normal(n) + np.linspace(0, 3000, n)


def _masks(rng, n):
    """Some elements are large negative numbers, as programs write them into logits to mask them."""
    x = rng.standard_normal(n)
    lowest = float(np.finfo(np.float32).min)
    fills = np.array([lowest, 0.7 * lowest, -1e30, -1e9, -np.inf])
    chosen = rng.random(n) < 0.4
    chosen[rng.integers(n)] = False
    x[chosen] = rng.choice(fills, int(chosen.sum()))
    return x


def _masked_blocks(rng, n):
    """The first third and the last third of the row are masked."""
    x = rng.standard_normal(n)
    x[: n // 3] = -np.inf
    x[n - n // 3 :] = float(np.finfo(np.float32).min)
    return x


def _dominated(rng, n):
    """One element carries the whole sum: its error and that of every other element add up."""
    x = rng.uniform(0, 10, n)
    x[0] = rng.uniform(30, 40)
    return x


def _far_above(rng, n):
    """One element lies far above the others, by as much as makes them count or vanish."""
    x = rng.standard_normal(n)
    x[rng.integers(n)] = rng.uniform(12, 32)
    return x


def _two_values(rng, n):
    """Every element has the rounding error of one of two."""
    a, b = rng.uniform(0, 4, 2)
    return np.where(np.arange(n) // 8 % 2 == 0, a, b)


def _periodic(rng, n):
    """The elements of a lane are all the same, so that their rounding errors add up."""
    return rng.uniform(0, 1, 64)[np.arange(n) % (8 << rng.integers(4))]


ROW_CLASSES = {
    "normal": _normal,
    "uniform ±1000": _uniform_1000,
    "spike": _spike,
    "tall spike": _tall_spike,
    "ramp -90…90": _ramp,
    "constant": _constant,
    "drift by 3000": _drift,
    "masks": _masks,
    "masked blocks": _masked_blocks,
    "dominated": _dominated,
    "one far above": _far_above,
    "two values": _two_values,
    "periodic": _periodic,
}


def make(name, n, dtype, seed=0):
    """A row of ``n`` elements of the class ``name``, of :data:`ROW_CLASSES`."""
    rng = np.random.default_rng([seed, n])
    with np.errstate(over="ignore"):  # finfo(float32).min becomes -inf in float16, which masks as well.
        return ROW_CLASSES[name](rng, n).astype(dtype)


def rounded_logits(x, scale, bias):
    """scale·x + bias rounded once to float32, computed in float64, in which the product is exact."""
    return (x.astype(np.float64) * scale + bias).astype(np.float32)


def exact_logsumexp(z):
    """log(sum(exp(z))) along the last axis, in np.longdouble, for rows without NaN and +inf."""
    largest, rest = _maximum_and_rest(z)
    return largest[..., 0] + rest[..., 0]


def exact_log_softmax(z):
    """z - log(sum(exp(z))) along the last axis, in np.longdouble, for rows without NaN and +inf."""
    largest, rest = _maximum_and_rest(z)
    return (z.astype(np.longdouble) - largest) - rest


def _maximum_and_rest(z):
    """The maximum of each row, and the exact excess of its logsumexp over that, however small."""
    z = z.astype(np.longdouble)
    at = z.argmax(-1)[..., None]
    largest = np.take_along_axis(z, at, -1)
    finite = np.where(np.isinf(largest), 0, largest)
    others = np.exp(z - finite)
    np.put_along_axis(others, at, 0, -1)
    return largest, np.log1p(others.sum(-1, keepdims=True))


def log_error(actual, exact, largest, minimum=0.0):
    """The largest error of logarithms divided by the error that the contract allows.

    That is 2 ULP of the exact value, 1 ULP of the row's largest logit, or ``minimum``, whichever is largest.
    """
    with np.errstate(invalid="ignore"):
        error = np.abs(actual.astype(np.longdouble) - exact)
    allowed = np.maximum(np.maximum(2 * _ulp(exact, actual.dtype), _ulp(largest, actual.dtype)), minimum)
    return float(np.where(actual == exact.astype(actual.dtype), 0, error / allowed).max(initial=0))


def _ulp(exact, dtype):
    limits = jnp.finfo(dtype)
    rounded = np.abs(exact.astype(dtype).astype(np.longdouble))
    _, exponent = np.frexp(np.maximum(np.where(np.isinf(rounded), 0, rounded), float(limits.tiny)))
    return np.ldexp(np.longdouble(1), exponent - 1 - limits.nmant)


def at_offset(x, elements):
    """A copy of the array whose data begin ``elements`` elements after a 64-byte boundary."""
    size = x.dtype.itemsize
    buffer = np.empty(x.size + elements + 64 // size, x.dtype)
    skip = -buffer.ctypes.data % 64 // size + elements
    copy = buffer[skip : skip + x.size].reshape(x.shape)
    copy[...] = x
    return copy
