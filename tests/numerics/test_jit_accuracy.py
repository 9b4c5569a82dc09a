"""The numerical contract inside jit: logarithms, softmax with operands, and gradients."""

import functools

import cases
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from jax_softmax2p import (
    Band,
    log_softmax,
    logsumexp,
    native,
    softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    sum_exp,
)

pytestmark = pytest.mark.long

FLOATS = [np.float32, np.float64]

# Lengths on both sides of those at which the kernels change.
LENGTHS = [1, 2, 7, 16, 100, 128, 129, 2049, 4097, 40_000]


def rows(n, dtype):
    """One row of every class, and rows at offsets, where differences are exact and sums are not."""
    made = [cases.make(name, n, dtype) for name in cases.ROW_CLASSES]
    made += [(20 * cases.make("normal", n, np.float64) + at).astype(dtype) for at in (1e6, 5e7, 1e9, -5e7)]
    return np.stack(made)


ROWS = [*cases.ROW_CLASSES, "at 1e6", "at 5e7", "at 1e9", "at -5e7"]


def no_infinity(x):
    return np.where(np.isinf(x), np.array(-1e9, x.dtype), x)


def assert_logs(actual, exact, x, bound=1.0):
    """Asserts that every row's error is within the bound; the message names the rows that are not."""
    minimum = cases.MIN_LOG_ERROR[x.dtype]
    errors = {
        name: cases.log_error(*parts, minimum)
        for name, *parts in zip(ROWS, np.asarray(actual), exact, x.max(-1), strict=True)
    }
    assert not {name: error for name, error in errors.items() if not error <= bound}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", LENGTHS)
class TestLogarithms:
    """Errors are within 2 ULP of the exact value, or 1 ULP of the row's largest logit."""

    def test_log_softmax(self, n, dtype):
        x = rows(n, dtype)
        with np.errstate(over="ignore"):  # finfo.min minus the maximum is beyond the format.
            assert_logs(jax.jit(log_softmax)(x), cases.exact_log_softmax(x), x)

    def test_logsumexp(self, n, dtype):
        x = rows(n, dtype)
        assert_logs(jax.jit(lambda x: logsumexp(x, -1))(x), cases.exact_logsumexp(x), x)

    def test_sum_exp(self, n, dtype):
        """The logarithm of mantissa and exponent is within twice the bound of logsumexp."""
        x = rows(n, dtype)
        assert_logs(jax.jit(lambda x: sum_exp(x).log())(x), cases.exact_logsumexp(x), x, bound=2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_log_softmax_near_certainty(dtype):
    """log(1 - p), for p from 1/2 to below the format, is within its own ULP or the rounding of the sum."""
    gaps = np.concatenate([np.linspace(0, 30, 500), np.linspace(30, 100, 100)])
    for n in (2, 200):
        x = np.full((gaps.size, n), -3000, dtype)
        x[:, 0], x[:, -1] = 0, -gaps.astype(dtype)
        exact, largest = cases.exact_log_softmax(x), x.max(-1)[:, None]
        assert cases.log_error(np.asarray(log_softmax(x)), exact, largest, minimum=2.0**-50) <= 1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("n", [2, 33, 200, 3000])
def test_log_softmax_keeps_its_digits_near_certainty(n, axis):
    """Within 4 ULP of itself up to a margin of 80, whatever the largest logit."""
    rng = np.random.default_rng(n)
    margins = np.arange(0, 82, 2)
    x = rng.standard_normal((margins.size, n)).astype(np.float32) * np.float32(0.1)
    at = rng.integers(n, size=margins.size)
    x[np.arange(margins.size), at] += margins + 3 * rng.standard_normal(margins.size).astype(np.float32)
    exact = cases.exact_log_softmax(x)[np.arange(margins.size), at]
    actual = log_softmax(np.moveaxis(x, 1, axis), axis=axis, implementation="native")
    actual = np.moveaxis(np.asarray(actual), axis, 1)
    relative = np.abs(actual[np.arange(margins.size), at] - exact) / -exact
    assert relative.max() <= 4 * 2.0**-23, margins[relative.argmax()]


@pytest.mark.parametrize("dtype", FLOATS)
def test_logarithms_of_single_elements(dtype):
    """logsumexp of one element is that element, and its log_softmax is 0."""
    x = np.random.default_rng(0).uniform(-1, 1, (500, 1)).astype(dtype)
    assert cases.log_error(np.asarray(logsumexp(x, -1)), x[:, 0].astype(np.longdouble), x[:, 0]) <= 1
    assert cases.log_error(np.asarray(log_softmax(x)), np.zeros((500, 1), np.longdouble), x) <= 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_logsumexp_near_zero(dtype):
    """The maximum and the logarithm of the scaled sum cancel."""
    rng = np.random.default_rng(0)
    for n in (4, 150):
        x = (rng.standard_normal((300, n)) * 3).astype(dtype)
        x -= cases.exact_logsumexp(x)[:, None].astype(dtype)
        minimum = cases.MIN_LOG_ERROR[x.dtype]
        error = cases.log_error(np.asarray(logsumexp(x, -1)), cases.exact_logsumexp(x), x.max(-1), minimum)
        assert error <= 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_against_mpmath(dtype):
    mpmath.mp.dps = 50
    x = rows(77, dtype)
    logs, totals = np.asarray(log_softmax(x)), np.asarray(logsumexp(x, -1))
    for row, log_row, total in zip(x, logs, totals, strict=True):
        z = [mpmath.mpf(float(v)) for v in row]
        exact_total = mpmath.log(mpmath.fsum(mpmath.exp(v) for v in z))
        allowed = float(np.spacing(abs(row.max())))

        def error(actual, exact, allowed=allowed):
            allowed = max(allowed, 2 * float(np.spacing(dtype(abs(float(exact))))))
            return float(abs(mpmath.mpf(float(actual)) - exact)) / allowed

        assert error(total, exact_total) <= 1
        with np.errstate(over="ignore"):
            errors = [error(y, v - exact_total) for v, y in zip(z, log_row, strict=True) if np.isfinite(y)]
        assert max(errors) <= 1


# The portable kernels have no FMA and round the product as well, unless the scale is a power of two.
SCALES = [0.125, -2.0, *([] if native.active_isa() == "portable" else [0.3, -1.7])]


class TestSoftmaxWithOperands:
    @pytest.mark.parametrize("n", LENGTHS)
    def test_scale_and_bias(self, n):
        x = no_infinity(rows(n, np.float32))
        bias = (3 * cases.make("normal", n, np.float64)).astype(np.float32)
        fused = jax.jit(lambda x, scale, bias: softmax(x, scale=scale, bias=bias))
        for scale in np.float32(SCALES):
            with np.errstate(over="ignore"):
                z = cases.rounded_logits(x, np.float64(scale), bias)
            # finfo.min times -2 is +inf, which makes the row NaN.
            finite = ~np.isinf(z.max(-1))
            assert finite.sum() >= 8
            error = cases.ulp_error(np.asarray(fused(x, scale, bias))[finite], cases.exact_softmax(z[finite]))
            assert error <= 2, scale

    @pytest.mark.parametrize("n", LENGTHS)
    def test_scale_of_every_row(self, n):
        x = no_infinity(rows(n, np.float32))
        scale = np.abs(cases.make("normal", x.shape[0], np.float32))[:, None]
        with np.errstate(over="ignore"):
            z = x * scale
        assert np.isfinite(z.max(-1)).all()
        y = jax.jit(lambda x, scale: softmax(x, scale=scale))(x, scale)
        assert cases.ulp_error(np.asarray(y), cases.exact_softmax(z)) <= 2

    @pytest.mark.parametrize("n", LENGTHS)
    def test_float64(self, n):
        """Logits are rounded once with only a scale or bias, or with a scale that is a power of two."""
        x = no_infinity(rows(n, np.float64))
        bias = cases.make("normal", n, np.float64)
        fused = jax.jit(lambda x, scale, bias: softmax(x, scale=scale, bias=bias))
        for scale, shift in ((0.3, 0 * bias), (0.25, bias), (2.0, bias)):
            z = x * scale + shift
            y = np.asarray(fused(x, scale, shift))
            assert cases.ulp_error(y, cases.exact_softmax(z)) <= 4, scale

    @pytest.mark.parametrize("n", [7, 129, 5000])
    def test_masks(self, n):
        """Masked elements do not change the error of the others."""
        x = rows(n, np.float32)
        mask = np.random.default_rng(0).random(x.shape) < 0.7
        mask[np.arange(len(x)), x.argmax(-1)] = True
        masked = np.where(mask, x, -np.inf)
        y = np.asarray(jax.jit(lambda x, mask: softmax(x, where=mask))(x, mask))
        assert cases.ulp_error(y, cases.exact_softmax(masked)) <= 2

    @pytest.mark.parametrize("n", [7, 129, 5000])
    def test_band(self, n):
        x = np.stack([cases.make(name, n, np.float32) for name in ("normal", "spike", "drift by 3000")])
        y = np.asarray(jax.jit(lambda x: softmax(x, where=Band(after=n - 3)))(x))
        masked = np.where(np.arange(n) <= np.arange(3)[:, None] + n - 3, x, -np.inf)
        assert cases.ulp_error(y, cases.exact_softmax(masked)) <= 2

    @pytest.mark.parametrize("n", [5, 129, 5000])
    def test_logarithms(self, n):
        """Bounds refer to the rounded logits scale·x + bias and their maximum, not to x."""
        x = no_infinity(rows(n, np.float32))
        bias = cases.make("normal", n, np.float32)
        z = cases.rounded_logits(x, 0.5, bias)
        log = np.asarray(jax.jit(lambda x: log_softmax(x, scale=0.5, bias=bias))(x))
        total = np.asarray(jax.jit(lambda x: logsumexp(x, -1, scale=0.5, bias=bias))(x))
        with np.errstate(over="ignore"):
            assert cases.log_error(log, cases.exact_log_softmax(z), z.max(-1)[:, None]) <= 1
        assert cases.log_error(total, cases.exact_logsumexp(z), z.max(-1)) <= 1


# Where one probability is just below 1, where ULPs are of 2^-53, gradients of float64 err by up to 6.2 of
# them natively, and by up to 8 in the reference (40 rows each of 16, 129 and 5,000 elements): they are
# e^(x - lse), of an lse that is itself good to some 2^-50, and the roundings of e^x and its factors add up.
NEARLY_CERTAIN = ("dominated", "one far above")


def assert_gradient(actual, exact, largest, bound=4):
    """Asserts errors in ULP of the largest entry of the row, or of the terms whose difference it is."""
    actual = np.asarray(actual)
    excepted = NEARLY_CERTAIN if actual.dtype == np.float64 else ()
    limits = np.finfo(actual.dtype)
    unit = np.spacing(np.maximum(largest.max(-1, keepdims=True).astype(actual.dtype), limits.tiny))
    errors = dict(zip(ROWS, (np.abs(actual - exact) / unit).max(-1), strict=True))
    assert not {name: float(e) for name, e in errors.items() if not e <= bound and name not in excepted}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 16, 129, 5000])
class TestGradients:
    def test_logsumexp(self, n, dtype):
        x = rows(n, dtype)
        g = jax.jit(jax.grad(lambda x: logsumexp(x, -1).sum()))(x)
        assert g.dtype == dtype
        p = exact_probabilities(x)
        assert_gradient(g, p, p)

    @pytest.mark.parametrize("label", ["likely", "any"])
    def test_cross_entropy_with_integer_labels(self, label, n, dtype):
        x = rows(n, dtype)
        labels = x.argmax(-1) if label == "likely" else np.random.default_rng(0).integers(n, size=len(x))
        weights = cases.make("normal", len(x), dtype)  # In a mean, for example, they are 1/n.
        loss = lambda x, labels: (weights * softmax_cross_entropy_with_integer_labels(x, labels)).sum()
        g = jax.jit(jax.grad(loss))(x, labels)
        assert g.dtype == dtype
        wide = weights[:, None].astype(np.longdouble)
        assert_gradient(g, wide * exact_difference(x, labels), np.abs(wide))

    def test_cross_entropy_with_soft_labels(self, n, dtype):
        x = no_infinity(rows(n, dtype))
        labels = np.random.default_rng(0).dirichlet(np.ones(n), len(x)).astype(dtype)
        g = jax.jit(jax.grad(lambda x: softmax_cross_entropy(x, labels).sum()))(x)
        assert g.dtype == dtype
        wide, p = labels.astype(np.longdouble), exact_probabilities(x)
        assert_gradient(g, p * wide.sum(-1, keepdims=True) - wide, np.maximum(p, wide))

    @pytest.mark.parametrize("cotangent", ["normal", "positive", "one"])
    def test_log_softmax(self, cotangent, n, dtype):
        x = no_infinity(rows(n, dtype))
        t = np.random.default_rng(1).standard_normal(x.shape).astype(dtype)
        if cotangent == "positive":
            t = np.abs(t)
        elif cotangent == "one":  # This is the cotangent of the negative log-likelihood of a class.
            t = np.where(np.arange(n) == n // 2, -1, np.zeros_like(t))
        wide = t.astype(np.longdouble)
        second = exact_probabilities(x) * wide.sum(-1, keepdims=True)
        # XLA adds the cotangents one by one, where small arrays take its code.
        for implementation, bound in (("native", 4), (None, 16)):
            f = functools.partial(log_softmax, implementation=implementation)
            g = jax.jit(lambda x, t, f=f: jax.vjp(f, x)[1](t)[0])(x, t)
            assert g.dtype == dtype
            assert_gradient(g, wide - second, np.maximum(np.abs(wide), np.abs(second)), bound)


def exact_probabilities(x):
    return cases.exact_softmax(x.astype(np.longdouble))


def exact_difference(x, labels):
    """softmax(x) - one_hot(labels) in np.longdouble; the label's entry is minus the sum of the others."""
    p = exact_probabilities(x)
    at = labels[:, None]
    np.put_along_axis(p, at, 0, -1)
    np.put_along_axis(p, at, -p.sum(-1, keepdims=True), -1)
    return p


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("n", [16, 129, 5000])
def test_half_precision_losses_are_rounded_once(dtype, n):
    x = (3 * np.random.default_rng(n).standard_normal((6, n))).astype(dtype)
    labels = np.arange(6) * n // 6
    wide = x.astype(np.float64)
    exact = cases.exact_logsumexp(wide) - wide[np.arange(6), labels]
    loss = np.asarray(softmax_cross_entropy_with_integer_labels(x, labels))
    assert loss.dtype == dtype
    assert cases.ulp_error(loss, exact.astype(np.float64)) <= 0.51
    g = np.asarray(jax.jit(jax.grad(lambda x: softmax_cross_entropy_with_integer_labels(x, labels).sum()))(x))
    assert g.dtype == dtype
    # A subnormal of float16 is rounded to a multiple of the smallest subnormal.
    error = np.abs(g.astype(np.float64) - exact_difference(wide, labels))
    unit = np.maximum(
        np.abs(g.astype(np.float64)) * float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    )
    assert (error <= 0.51 * unit).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_entropy_of_likely_labels(dtype):
    """Small losses stay exact beside large logits: the rounding of the logsumexp does not enter them."""
    rng = np.random.default_rng(0)
    gaps = rng.uniform(1, 30, 200)
    x = np.stack([np.zeros(200), -gaps, -gaps - 1], -1).astype(dtype)
    for offset in (0, 8, 1000):
        at = x + dtype(offset)
        loss = np.asarray(softmax_cross_entropy_with_integer_labels(at, np.zeros(200, int)))
        exact = -cases.exact_log_softmax(at)[:, 0]
        np.testing.assert_allclose(
            loss, exact.astype(float), rtol=4 * np.finfo(dtype).eps, atol=cases.MIN_LOG_ERROR[x.dtype]
        )
