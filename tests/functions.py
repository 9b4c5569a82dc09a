"""softmax, log_softmax and logsumexp by name, with their exact results."""

import functools

import cases
import jax.numpy as jnp
import numpy as np
import pytest

from jax_softmax2p import log_softmax, logsumexp, softmax

FLOATS = [np.float32, np.float64]
HALVES = [jnp.bfloat16, np.float16]
NAN, INF = float("nan"), float("inf")

# The kernels change at 128, 4096 and 32768 elements.
LENGTHS = [1, 7, 16, 100, 129, 512, 5000, 40_000]

# The reference is the same code for every length, and float64's kernels change where float32's do.
every_length = pytest.mark.parametrize(
    ("implementation", "n", "dtype"),
    [
        ("reference", 7, np.float64),
        *(("native", n, np.float64) for n in (7, 129, 5000)),
        *(("native", n, np.float32) for n in LENGTHS),
    ],
)
natively = pytest.mark.parametrize("implementation", ["native"])


def last_axis(function):
    return functools.partial(function, axis=-1)


FUNCTIONS = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": last_axis(logsumexp)}


def exact(name, z, mask=None):
    """The named function of logits along the last axis, in np.longdouble, by its definition.

    Fully masked rows give zeros, or -inf for logarithms; rows in which every logit is -inf give NaN.
    """
    mask = np.broadcast_to(True if mask is None else mask, z.shape)
    masked = np.where(mask, z, -INF).astype(np.longdouble)
    if name == "logsumexp":
        return cases.exact_logsumexp(masked)
    with np.errstate(invalid="ignore"):
        log = np.where(mask, cases.exact_log_softmax(masked), -INF)
    return np.exp(log) if name == "softmax" else log


def assert_close(name, actual, expected, dtype, z=None, implementation="native"):
    """Asserts an error that both implementations stay within; numerics/ measures the exact errors.

    The reference rounds x - max(x), which costs an exponential as many ULP as that difference is large.
    """
    assert actual.dtype == dtype
    spread = 1 if z is None else 1 + float(np.abs(z[np.isfinite(z)]).max(initial=0))
    unit = float(jnp.finfo(dtype).eps)
    tolerance = 8 * unit * (spread if name != "softmax" or implementation == "reference" else 1)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        np.asarray(expected, np.float64),
        rtol=tolerance,
        atol=tolerance if name != "softmax" else 1e-37,
    )


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)
