"""Rows of which one element has nearly all of the probability, and what losses are there, exactly."""

import numpy as np

from jax_softmax2p import native

# Margins between the largest logit and the others. Beyond the last of them results are subnormal.
MARGINS = {np.float32: np.linspace(0, 80, 21), np.float64: np.linspace(0, 700, 36)}
ULPS = 4


def rows_of(n, dtype):
    """Rows whose largest element lies by a margin above the others, first, in the middle and last; two that
    are equally far above; and rows in which the label is far below."""
    rng = np.random.default_rng(n)
    rows, labels = [], []
    for margin in MARGINS[dtype]:
        for place in {0, n // 2, n - 1}:
            row = 2 * rng.random(n)
            row[place] = row.max() + margin
            rows += [row, row - 100, row + 1000 / (1 + margin)]
            labels += [place] * 3
            other = (place + 1) % n
            tie = row.copy()
            tie[other] = tie[place]
            rows += [tie, row]
            labels += [place, other]
    return np.stack(rows).astype(dtype), np.array(labels)


def terms_of(z):
    """Of rows, in np.longdouble: log p, p, and 1 - p, of which none has lost a digit."""
    z = z.astype(np.longdouble)
    at = z.argmax(-1)[:, None]
    largest = np.take_along_axis(z, at, -1)
    exponentials = np.exp(z - largest)
    np.put_along_axis(exponentials, at, 0, -1)
    others = exponentials.sum(-1, keepdims=True)
    log_p = (z - largest) - np.log1p(others)
    np.put_along_axis(exponentials, at, 1, -1)
    p = exponentials / (1 + others)
    one_minus_p = 1 - p
    np.put_along_axis(one_minus_p, at, others / (1 + others), -1)
    return log_p, p, one_minus_p


def exact_loss(z, labels):
    """The losses of rows and their gradients, p less 1 at the label."""
    log_p, p, one_minus_p = terms_of(z)
    at = labels[:, None]
    np.put_along_axis(p, at, -np.take_along_axis(one_minus_p, at, -1), -1)
    return -np.take_along_axis(log_p, at, -1)[:, 0], p


def assert_exact(actual, exact, dtype, ulps=ULPS):
    """Within some ULP of each element's own size, or, of subnormal numbers, of the least normal one."""
    limits = np.finfo(dtype)
    actual = np.asarray(actual)
    assert actual.dtype == dtype
    unit = np.maximum(np.spacing(np.abs(exact).astype(dtype)), limits.tiny * limits.eps)
    error = np.abs(actual.astype(np.longdouble) - exact)
    if native.active_isa() == "portable":
        # Without an FMA, products that are added may underflow, and from 700 on x - lse is rounded.
        error, ulps = np.maximum(error - 4 * limits.tiny, 0), 1.5 * ulps
    error = np.where(np.abs(exact) < 2 * limits.tiny, np.maximum(error - 2 * limits.tiny, 0), error) / unit
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= ulps, (worst, actual[worst], exact[worst])


def take(array, labels):
    return np.take_along_axis(array, labels[:, None], -1)[:, 0]
