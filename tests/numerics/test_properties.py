"""Errors, and properties that need no oracle, of rows that Hypothesis generates.

``pytest tests/numerics/test_properties.py --hypothesis-profile=long`` searches longer, with other rows.
"""

import cases
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from hypothesis import assume, given

from jax_softmax2p import Band, SumExp, log_softmax, logsumexp, native, softmax, sum_exp

# Values that programs use as masks, and values at which the kernels change their path.
SPECIALS = [
    -np.inf,
    -3.4028235e38,
    3.4028235e38,
    -1e30,
    1e30,
    -1e9,
    -9e4,
    9e4,
    88.7,
    -103.9,
    0.0,
    -0.0,
    1e-40,
]

dtypes = st.sampled_from(cases.DTYPES)
lengths = st.integers(1, 300) | st.sampled_from([1023, 1025, 2049, 4100, 33_000])
values = st.sampled_from(SPECIALS) | st.floats(-200, 200) | st.floats(allow_nan=False, allow_infinity=False)
scales = st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0, 1e4, 1e30]) | st.floats(0, 300)
offsets = st.just(0.0) | st.floats(-1e3, 1e3) | st.sampled_from([1e5, -1e5, 5e7, -1e9, 1e20])


def finite_or_masked(x, dtype):
    """x in the dtype; numbers beyond its range become finfo.max, not +inf."""
    with np.errstate(over="ignore"):
        return np.minimum(np.asarray(x).astype(dtype), jnp.finfo(dtype).max)


def finite(x, dtype):
    """As finite_or_masked, and -inf becomes finfo.min."""
    return np.maximum(finite_or_masked(x, dtype), jnp.finfo(dtype).min)


@st.composite
def noise(draw, dtype, shape, masked=True):
    """Normal numbers of any scale and offset, some of them replaced; each row has a finite element."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * draw(scales) + draw(offsets)
    for value in draw(st.lists(values, max_size=3)):
        x[rng.random(shape) < draw(st.sampled_from([0.01, 0.3, 0.9]))] = value
    x[..., 0] = np.maximum(x[..., 0], -1e4)
    return (finite_or_masked if masked else finite)(rng.permuted(x, axis=-1), dtype)


def softmax_by_isa(x, **options):
    """Results by instruction set, in the order of native.supported_isas()."""
    results = {isa: np.empty_like(x) for isa in native.supported_isas()}
    for isa, y in results.items():
        native.softmax_into(x, y, isa=isa, **options)
    return results


def mpmath_softmax(x):
    """The exact softmax of one row, in np.longdouble."""
    with mpmath.workdps(40):
        exponentials = [mpmath.exp(mpmath.mpf(float(v))) for v in x]
        total = mpmath.fsum(exponentials)
        high = [float(e / total) for e in exponentials]
        low = [float(e / total - h) for e, h in zip(exponentials, high, strict=True)]
    return np.array(high, np.longdouble) + np.array(low, np.longdouble)


def assert_within_contract(x, exact, results, algorithm="auto"):
    allowed = cases.CONTRACT_ULP[x.dtype.type]
    if x.dtype == np.float32 and algorithm in cases.THREE_PASS:
        allowed = 2.5  # docs/numerics.md states this limit.
    for isa, y in results.items():
        assert cases.ulp_error(y, exact) <= allowed, isa


class TestSoftmax:
    @given(st.data())
    def test_error_against_mpmath(self, data):
        dtype = data.draw(dtypes)
        x = finite_or_masked(data.draw(st.lists(values, min_size=1, max_size=40)), dtype)
        assume(x.max() > -np.inf)
        assert_within_contract(x, mpmath_softmax(x), softmax_by_isa(x))

    @given(st.data(), st.sampled_from(native.ALGORITHMS))
    def test_error_and_sum(self, data, algorithm):
        x = data.draw(noise(data.draw(dtypes), data.draw(lengths)))
        results = softmax_by_isa(x, algorithm=algorithm)
        assert_within_contract(x, cases.exact_softmax(x), results, algorithm)
        limits = jnp.finfo(x.dtype)
        # Rounding an element of a 16-bit format costs up to half the smallest subnormal.
        allowed = 2 * limits.eps + x.size * float(limits.smallest_subnormal) / 2
        for isa, y in results.items():
            assert abs(y.astype(np.longdouble).sum() - 1) <= allowed, isa

    @given(st.data())
    def test_layouts(self, data):
        outer, n, inner = (data.draw(st.integers(1, most)) for most in (9, 70, 40))
        rows = data.draw(noise(data.draw(dtypes), (outer, inner, n)))
        x = np.ascontiguousarray(rows.swapaxes(1, 2))
        threads = data.draw(st.integers(1, 3))
        for isa, y in softmax_by_isa(x, axis=1, threads=threads).items():
            error = cases.ulp_error(y.swapaxes(1, 2), cases.exact_softmax(rows))
            assert error <= cases.CONTRACT_ULP[x.dtype.type], isa

    @given(st.data())
    def test_isas_agree_within_the_contract(self, data):
        x = data.draw(noise(data.draw(dtypes), data.draw(lengths)))
        best, *others = softmax_by_isa(x).values()
        wide = best.astype(cases.exact_softmax(x).dtype)
        for y in others:
            # 16-bit results on either side of a tie differ by one unit.
            assert cases.ulp_error(y, wide) <= max(1, 2 * cases.CONTRACT_ULP[x.dtype.type])

    @given(st.data(), offsets)
    def test_shift(self, data, offset):
        """A row that is shifted by a constant exactly has the same exact softmax."""
        x = data.draw(noise(data.draw(dtypes), data.draw(lengths), masked=False))
        shifted = finite(x.astype(np.float64) + offset, x.dtype)
        wide = shifted.astype(np.longdouble) - offset
        with np.errstate(over="ignore"):
            x = wide.astype(x.dtype)
        x, shifted = (row[x == wide] for row in (x, shifted))
        if x.size:
            assert_within_contract(x, cases.exact_softmax(x), softmax_by_isa(shifted))

    @given(st.data())
    def test_monotonic(self, data):
        """Order is kept among neighbours in the format as well."""
        dtype = data.draw(dtypes)
        if data.draw(st.booleans()):
            x = data.draw(noise(dtype, data.draw(lengths)))
        else:
            integers = f"i{np.dtype(dtype).itemsize}"
            first = np.array(data.draw(st.floats(-90, 90)), dtype).view(integers)
            x = (first + np.arange(data.draw(st.integers(1, 300)))).astype(integers).view(dtype)
        order = np.argsort(x.astype(np.float64))  # np.sort of float16 misplaces -inf in numpy 2.4.
        for isa, y in softmax_by_isa(x[order]).items():
            assert (y[:-1] <= y[1:]).all(), isa

    @given(st.data(), st.sampled_from([np.nan, np.inf, -np.inf]))
    def test_non_finite_rows(self, data, value):
        x = data.draw(noise(data.draw(dtypes), (3, data.draw(lengths))))
        expected = softmax_by_isa(x)
        x[1, data.draw(st.integers(0, x.shape[1] - 1)) if value != -np.inf else slice(None)] = value
        for isa, y in softmax_by_isa(x).items():
            assert np.isnan(y[1]).all(), isa
            np.testing.assert_array_equal(y[::2], expected[isa][::2])


# Each shape is compiled, so there are few, on both sides of the lengths at which the kernels change.
SHAPES = [(3, 7), (3, 129), (3, 4100)]
BANDS = [Band(), Band(before=2, after=1), Band(before=None, after=5)]

shapes = st.sampled_from(SHAPES)
floats = st.sampled_from([np.float32, np.float64])

masked_softmax = jax.jit(lambda x, where: softmax(x, where=where))
banded_softmax = jax.jit(lambda x, band: softmax(x, where=band), static_argnums=1)
scaled_softmax = jax.jit(lambda x, scale, bias: softmax(x, scale=scale, bias=bias))
jitted_log_softmax = jax.jit(log_softmax)
jitted_logsumexp = jax.jit(lambda x: logsumexp(x, -1))


class TestInsideJit:
    """Operations that only JAX programs reach, with the active instruction set."""

    @given(st.data())
    def test_masks(self, data):
        x = data.draw(noise(data.draw(floats), data.draw(shapes)))
        where = np.random.default_rng(data.draw(st.integers(0, 99))).random(x.shape) < data.draw(
            st.sampled_from([0.1, 0.9])
        )
        where[0] = False
        where[1:, -1] = True
        x[1:, -1] = np.maximum(x[1:, -1], -1e4)
        masked = np.where(where, x, np.array(-np.inf, x.dtype))
        filled = np.where(where, x, finite_or_masked(data.draw(st.just(np.nan) | values), x.dtype))
        y = np.asarray(masked_softmax(filled, where))
        assert (y[0] == 0).all()
        assert cases.ulp_error(y[1:], cases.exact_softmax(masked[1:])) <= cases.CONTRACT_ULP[x.dtype.type]

    @given(st.data(), st.sampled_from(BANDS))
    def test_bands(self, data, band):
        x = data.draw(noise(data.draw(floats), data.draw(shapes), masked=False))
        rows, columns = np.ogrid[: x.shape[0], : x.shape[1]]
        inside = columns <= rows + band.after
        if band.before is not None:
            inside &= columns >= rows - band.before
        masked = np.where(inside, x, np.array(-np.inf, x.dtype))
        y = np.asarray(banded_softmax(x, band))
        assert (y[~inside] == 0).all()
        assert cases.ulp_error(y, cases.exact_softmax(masked)) <= cases.CONTRACT_ULP[x.dtype.type]

    @given(st.data(), st.sampled_from([0.125, 1.0, -2.0]), st.booleans())
    def test_scale_and_bias(self, data, scale, repeated):
        """Scales are powers of two, so that products are exact and every build rounds logits once."""
        x, bias = (data.draw(noise(np.float32, (3, 129), masked=False)) for _ in range(2))
        bias = bias[:1] if repeated else bias
        with np.errstate(over="ignore"):
            z = cases.rounded_logits(x, scale, bias)
        y = np.asarray(scaled_softmax(x, np.float32(scale), bias))
        proper = np.isfinite(z.max(-1))
        assert np.isnan(y[~proper]).all()
        assert cases.ulp_error(y[proper], cases.exact_softmax(z[proper])) <= 2

    @given(st.data())
    def test_logarithms(self, data):
        """Permuting a row changes logsumexp by at most 1 ULP of itself or of the largest logit."""
        x = data.draw(noise(data.draw(floats), data.draw(shapes)))
        y, total = np.asarray(jitted_log_softmax(x)), np.asarray(jitted_logsumexp(x))
        minimum = cases.MIN_LOG_ERROR[x.dtype]
        largest = x.max(-1)
        with np.errstate(over="ignore"):
            assert cases.log_error(y, cases.exact_log_softmax(x), largest[:, None], minimum) <= 1
        assert cases.log_error(total, cases.exact_logsumexp(x), largest, minimum) <= 1
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        permuted = np.asarray(jitted_logsumexp(rng.permuted(x, axis=-1)))
        with np.errstate(over="ignore"):
            unit = np.spacing(np.maximum(np.abs(total), np.abs(largest)))
        assert (np.abs(permuted - total) <= unit).all()


@jax.jit
def sums_in_both_orders(x):
    """Sums of three parts in both associations, of two in both orders, and of one with the empty sum."""
    a, b, c = (sum_exp(part) for part in x)
    empty = SumExp.empty(a.mantissa.shape, a.mantissa.dtype)
    left, right = a.combine(b).combine(c), a.combine(b.combine(c))
    return left, right, b.combine(a), a.combine(b), a.combine(empty), a


@given(st.data())
def test_sums_of_exponentials_are_a_monoid(data):
    x = np.stack([data.draw(noise(dtype, (3, 7))) for dtype in [data.draw(floats)] * 3])
    x[data.draw(st.integers(0, 2)), 0] = -np.inf  # An empty sum.
    left, right, commuted, both, with_empty, alone = sums_in_both_orders(x)
    for actual, expected in ((commuted, both), (with_empty, alone)):
        np.testing.assert_array_equal(actual.mantissa, expected.mantissa)
        np.testing.assert_array_equal(actual.log(), expected.log())
    # The exponent is the maximum of three in both associations; mantissas are rounded twice.
    np.testing.assert_array_equal(left.exponent, right.exponent)
    np.testing.assert_allclose(left.mantissa, right.mantissa, rtol=2 * jnp.finfo(x.dtype).eps)
    whole = x.transpose(1, 0, 2).reshape(3, -1)
    minimum = 2 * cases.MIN_LOG_ERROR[x.dtype]
    for total in (left, right):
        error = cases.log_error(np.asarray(total.log()), cases.exact_logsumexp(whole), whole.max(-1), minimum)
        assert error <= 2
