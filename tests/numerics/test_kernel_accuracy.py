"""The numerical contract of the kernels: errors in ULP against a wider format."""

from fractions import Fraction

import cases
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from jax_softmax2p import native

pytestmark = pytest.mark.long

SMALL_LENGTHS = range(1, 140)
# Lengths around a block and a segment, and those at which PyTorch and others had errors.
ODD_LENGTHS = (255, 1000, 1023, 1024, 1025, 2049, 4097, 30576, 32767, 32769, 65537, 1_000_003)


def softmax_into(x, **options):
    y = np.empty_like(x)
    native.softmax_into(x, y, **options)
    return y


# The exact results take longer than the kernels: these tests compute them once for all instruction sets.
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.ROW_CLASSES)
def test_small_rows(name, dtype):
    for n in SMALL_LENGTHS:
        x = np.stack([cases.make(name, n, dtype, seed) for seed in range(8)])
        exact = cases.exact_softmax(x)
        for isa in native.supported_isas():
            for algorithm in native.ALGORITHMS:
                error = cases.ulp_error(softmax_into(x, isa=isa, algorithm=algorithm), exact)
                assert error <= cases.CONTRACT_ULP[dtype], (n, isa, algorithm)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.ROW_CLASSES)
def test_odd_lengths(name, dtype):
    for n in ODD_LENGTHS:
        x = cases.make(name, n, dtype)
        exact = cases.exact_softmax(x)
        for isa in native.supported_isas():
            for algorithm in ("auto", "three_pass_recompute"):  # The others give the same bits.
                y = softmax_into(x, isa=isa, threads=2, algorithm=algorithm)
                assert cases.ulp_error(y, exact) <= cases.CONTRACT_ULP[dtype], (n, isa, algorithm)


@pytest.mark.parametrize("name", cases.ROW_CLASSES)
def test_error_does_not_grow_with_length(name):
    x = cases.make(name, 2**24, np.float32)
    exact = cases.exact_softmax(x)
    for isa in native.supported_isas():
        for algorithm in ("auto", "three_pass_reload"):
            y = softmax_into(x, isa=isa, threads=2, algorithm=algorithm)
            assert cases.ulp_error(y, exact) <= 2, (isa, algorithm)


def test_the_longest_rows():
    x = cases.make("normal", 2**26, np.float32)
    exact = cases.exact_softmax(x)
    for isa in native.supported_isas():
        assert cases.ulp_error(softmax_into(x, isa=isa, threads=2), exact) <= 2, isa


@pytest.mark.parametrize("offset", [1e6, 4e6, 5e7, 1e9, 1e15, 1e20])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_offsets(dtype, sign, offset, isa):
    for n in (3, 64, 1000, 40_000):
        x = (cases.make("normal", n, np.float64) * 20 + sign * offset).astype(dtype)
        error = cases.ulp_error(softmax_into(x, isa=isa), cases.exact_softmax(x))
        assert error <= cases.CONTRACT_ULP[dtype], n


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_binade(dtype, isa):
    """Rows around every power of two, within and beyond the range that needs no third pass."""
    limits = jnp.finfo(dtype)
    for exponent in range(limits.minexp, limits.maxexp, 31 if dtype == np.float64 else 3):
        for sign in (1, -1):
            for n in (37, 333):
                x = (sign * np.ldexp(1.0, exponent) * np.linspace(1, 1.9, n)).astype(dtype)
                with np.errstate(under="ignore"):
                    error = cases.ulp_error(softmax_into(x, isa=isa), cases.exact_softmax(x))
                assert error <= cases.CONTRACT_ULP[dtype], (exponent, sign, n)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_against_mpmath(dtype, isa):
    mpmath.mp.dps = 50
    for name in cases.ROW_CLASSES:
        x = cases.make(name, 77, dtype)
        exponentials = [mpmath.exp(mpmath.mpf(float(v))) for v in x]
        total = mpmath.fsum(exponentials)
        y = softmax_into(x, isa=isa)
        for actual, e in zip(y, exponentials, strict=True):
            exact = e / total
            if actual == 0 and exact < float(np.finfo(dtype).tiny):
                continue
            error = abs(mpmath.mpf(float(actual)) - exact) / float(np.spacing(dtype(float(exact))))
            assert error <= cases.CONTRACT_ULP[dtype], name


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_dominating_element_is_exactly_one(dtype, isa):
    rng = np.random.default_rng(0)
    for n in (1, 2, 9, 100, 200):
        x = rng.uniform(-100, 0, (2000, n)).astype(dtype)
        x[:, -1] = rng.uniform(60, 3000, 2000)
        y = softmax_into(x, isa=isa)
        assert (y[:, -1] == 1).all(), n
        y = softmax_into(np.ascontiguousarray(x.T), axis=0, isa=isa)
        assert (y[-1] == 1).all(), n


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_give_the_rounding_of_one_over_n(dtype, isa, algorithm):
    for n in (*range(1, 140), 1000, 2048, 4096, 5000):
        for shape, axis in (((n,), -1), ((17, n), -1), ((n, 3), 0), ((n, 40), 0)):
            y = softmax_into(np.zeros(shape, dtype), axis=axis, isa=isa, algorithm=algorithm)
            np.testing.assert_array_equal(y, dtype(1) / dtype(n))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.ROW_CLASSES)
def test_rows_sum_to_one(name, dtype, isa):
    """Rounding a 16-bit element costs half an eps of it, or half the smallest subnormal."""
    y = softmax_into(cases.make(name, 100_003, dtype), isa=isa).astype(np.longdouble)
    limits = jnp.finfo(dtype)
    assert abs(y.sum() - 1) <= 2 * limits.eps + y.size * float(limits.smallest_subnormal) / 2


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_monotonic(dtype, isa):
    x = np.sort(cases.make("normal", 5000, dtype))
    assert (np.diff(softmax_into(x, isa=isa)) >= 0).all()


def exact_jacobian(y, t):
    dot = sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(y, t, strict=True))
    return np.array(
        [float(Fraction(float(a)) * (Fraction(float(b)) - dot)) for a, b in zip(y, t, strict=True)]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", cases.ROW_CLASSES)
def test_jacobian_is_within_4_ulp_of_the_largest_entry(name, dtype, isa):
    """Cotangents have different sizes, or are nearly constant, so that t - <y, t> cancels."""
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 33, 129, 2000):
        y = softmax_into(cases.make(name, n, dtype))
        for t in (rng.standard_normal(n), 1 + 1e-6 * rng.standard_normal(n), 1e4 * y):
            t = t.astype(dtype)
            out = np.empty_like(t)
            native.softmax_jacobian_into(y, t, out, isa=isa)
            exact = exact_jacobian(y, t)
            unit = np.spacing(np.maximum(np.abs(exact).max(), np.finfo(dtype).tiny).astype(dtype))
            # The dot product has twice the working precision, reduced by the rounding of 2000 additions.
            floor = 64 * np.finfo(dtype).eps ** 2 * np.abs(t).max()
            assert np.abs(out - exact).max() <= 4 * unit + floor, n


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("name", cases.ROW_CLASSES)
def test_jacobian_of_16_bit_elements_is_rounded_once(name, dtype, isa):
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 33, 129, 2000):
        y = softmax_into(cases.make(name, n, dtype))
        t = rng.standard_normal(n).astype(dtype)
        out = np.empty_like(t)
        native.softmax_jacobian_into(y, t, out, isa=isa)
        exact = exact_jacobian(y, t)
        # The error of float32 arithmetic and of a dot product with twice its precision.
        floor = 2.0**-20 * np.abs(exact).max() + 2.0**-40 * np.abs(t.astype(float)).max()
        spacing = np.maximum(np.abs(exact) * float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny))
        assert (np.abs(out.astype(float) - exact) <= spacing / 2 + floor).all(), n
