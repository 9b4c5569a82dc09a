"""sum_exp and SumExp: logarithms, the monoid, and the ends of the format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import normal

from jax_softmax2p import SumExp, sum_exp

NAN, INF = float("nan"), float("inf")
FLOATS = [np.float32, np.float64]


def exact_log(x):
    """log(sum(exp(x))) of all elements, for x without NaN and +inf."""
    x = np.asarray(x, np.longdouble)
    top = x.max()
    return float(top + np.log(np.exp(x - top).sum())) if np.isfinite(top) else float(top)


def assert_logs_close(total, expected, dtype):
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(total.log(), expected, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("dtype", FLOATS)
class TestSumExp:
    @pytest.mark.long
    @pytest.mark.parametrize("size", [1, 50, 1e4, 9e4, 1e6, 5e7, 1e12])
    def test_log(self, size, dtype):
        """Logits of every size, one by one and together; float32 rounds the exponents from 90,000 on."""
        x = (size * np.random.default_rng(0).uniform(-1, 1, 200)).astype(dtype)
        eps = float(np.finfo(dtype).eps)
        np.testing.assert_allclose(sum_exp(x[:, None]).log(), x, rtol=2 * eps, atol=2 * eps)
        assert_logs_close(sum_exp(x), exact_log(x), dtype)

    def test_mantissa_and_exponent(self, dtype):
        x = (40 * normal(100, 3)).astype(dtype)
        total = sum_exp(x)
        for part in total:
            assert (part.shape, part.dtype) == ((100,), dtype)
        assert (np.asarray(total.exponent) == np.round(total.exponent)).all()
        wide = np.asarray(total.mantissa, np.longdouble) * np.exp2(np.asarray(total.exponent, np.longdouble))
        expected = np.exp(x.astype(np.longdouble)).sum(-1)
        np.testing.assert_allclose((wide / expected).astype(float), 1, rtol=64 * np.finfo(dtype).eps)
        leaves, tree = jax.tree.flatten(total)
        assert isinstance(jax.tree.unflatten(tree, leaves), SumExp)

    @pytest.mark.parametrize("dtype_of_x", [jnp.bfloat16, np.float16, np.int32])
    def test_narrow_dtypes_are_summed_in_float32(self, dtype_of_x, dtype):
        x = np.array([1, 2, 4]).astype(dtype_of_x)
        total = sum_exp(x)
        assert total.mantissa.dtype == total.exponent.dtype == np.float32
        np.testing.assert_allclose(total.log(), exact_log([1, 2, 4]), rtol=1e-6)

    @pytest.mark.long(dtype=np.float32)
    def test_any_split_has_the_same_sum(self, dtype):
        x = (100 * normal(60)).astype(dtype)
        expected = exact_log(x)
        for at in (0, 1, 30):
            parts = sum_exp(x[:at]).combine(sum_exp(x[at:]))
            assert_logs_close(parts, expected, dtype)
        assert_logs_close(sum_exp(x.reshape(5, 12)).reduce(), expected, dtype)
        assert_logs_close(sum_exp(x.reshape(12, 5)).reduce(0), expected, dtype)
        assert_logs_close(sum_exp(x.reshape(3, 4, 5)).reduce((0, 1)), expected, dtype)
        assert_logs_close(sum_exp(x.reshape(3, 20), axis=None), expected, dtype)

    def test_is_a_monoid(self, dtype):
        """Sums of any size, and empty ones, combine associatively and commutatively up to rounding."""
        rows = np.array([[0.5], [-800], [800], [3e4], [-INF], [-3e4], [801], [1e30], [-1e30]], dtype)
        a, b, c = np.broadcast_arrays(rows[:, None, None], rows[:, None], rows)
        a, b, c = (sum_exp(v) for v in (a, b, c))
        expected = a.combine(b).combine(c).log()
        for other in (a.combine(b.combine(c)), c.combine(a.combine(b)), b.combine(a).combine(c)):
            np.testing.assert_allclose(other.log(), expected, rtol=4 * np.finfo(dtype).eps)
        triples = np.stack(np.broadcast_arrays(rows[:, None, None], rows[:, None], rows))[..., 0]
        exact = [exact_log(triple) for triple in triples.reshape(3, -1).T]
        np.testing.assert_allclose(np.ravel(expected), exact, rtol=4 * np.finfo(dtype).eps)

    def test_operators_are_not_those_of_tuples(self, dtype):
        a, b = sum_exp(np.array([1, 2], dtype)), sum_exp(np.array([900], dtype))
        assert isinstance(a + b, SumExp)
        np.testing.assert_allclose((a + b).log(), 900, rtol=np.finfo(dtype).eps)
        assert_logs_close(jax.jit(lambda a, b: a + b)(a, a), exact_log([1, 1, 2, 2]), dtype)
        for operation in (lambda: a + tuple(b), lambda: a + 1, lambda: a * 2, lambda: 2 * a):
            with pytest.raises(TypeError, match="unsupported operand"):
                operation()

    def test_empty(self, dtype):
        empty = SumExp.empty((2,), dtype)
        assert empty.mantissa.shape == empty.exponent.shape == (2,)
        assert empty.mantissa.dtype == empty.exponent.dtype == dtype
        np.testing.assert_array_equal(empty.log(), -INF)
        np.testing.assert_array_equal(empty.combine(empty).log(), -INF)
        np.testing.assert_array_equal(sum_exp(np.zeros((2, 0), dtype)).log(), -INF)
        np.testing.assert_array_equal(sum_exp(np.full((2, 3), -INF, dtype)).log(), -INF)
        for value in (-3e4, -1.0, 0.0, 1e4, -INF, INF, NAN, np.finfo(dtype).max, np.finfo(dtype).min):
            total = sum_exp(np.full((2, 3), value, dtype))
            for combined in (empty.combine(total), total.combine(empty)):
                np.testing.assert_array_equal(combined.log(), total.log())

    def test_empty_of_another_dtype(self, dtype):
        for other in (jnp.bfloat16, np.float16, np.int32):
            with pytest.raises(TypeError, match=f"dtype must be float32, .* got {np.dtype(other)}"):
                SumExp.empty((2,), other)

    def test_empty_of_a_dtype_that_is_not_enabled(self, dtype):
        with jax.enable_x64(False):
            if dtype == np.float64:
                with pytest.raises(TypeError, match="float64 where that is enabled"):
                    SumExp.empty((2,), dtype)
            else:
                assert SumExp.empty((2,), dtype).exponent.dtype == dtype

    def test_reduce_of_empty(self, dtype):
        np.testing.assert_array_equal(SumExp.empty((2, 0), dtype).reduce(1).log(), [-INF, -INF])
        assert SumExp.empty((2, 0), dtype).reduce().log() == -INF

    def test_nan_and_infinities(self, dtype):
        x = np.array([[NAN, 0], [INF, 0], [NAN, INF], [-INF, 0], [NAN, -INF], [INF, -INF]], dtype)
        np.testing.assert_array_equal(sum_exp(x).log(), jax.nn.logsumexp(x, -1))
        parts = sum_exp(x[:, :1]).combine(sum_exp(x[:, 1:]))
        np.testing.assert_array_equal(parts.log(), jax.nn.logsumexp(x, -1))
        np.testing.assert_array_equal(sum_exp(x[:, :, None]).reduce(1).log(), jax.nn.logsumexp(x, -1))

    @pytest.mark.long(offset=800, dtype=np.float32)
    @pytest.mark.parametrize("offset", [0, 89, 800, -800])
    def test_gradients_of_large_logits(self, offset, dtype):
        x = jnp.asarray(normal(3, 4, seed=1) + offset, dtype)
        expected = jax.nn.softmax(x.ravel()).reshape(x.shape)
        for total in (
            lambda x: sum_exp(x).reduce(),
            lambda x: sum_exp(x[0]).combine(sum_exp(x[1:], None)),
            lambda x: jax.lax.scan(
                lambda t, row: (t.combine(sum_exp(row)), None), SumExp.empty((), dtype), x
            )[0],
        ):
            gradient = jax.jit(jax.grad(lambda x, total=total: total(x).log()))(x)
            np.testing.assert_allclose(gradient, expected, rtol=1e-4 if dtype == np.float32 else 1e-9)

    @pytest.mark.parametrize("is_masked", [False, True])
    def test_derivatives_beside_a_chunk_of_minus_infinity(self, is_masked, dtype, implementation):
        """It has none, masked or not, and does not harm those of the others."""
        x = jnp.asarray([[-INF, -INF], [1, 2], [-INF, 0.5]], dtype)

        def log(x):
            where = x > -INF if is_masked else None
            return sum_exp(x, where=where, implementation=implementation).reduce().log()

        p = np.asarray(jax.nn.softmax(x.ravel()), np.float64)
        hessian = np.diag(p) - np.outer(p, p)
        derivatives = jax.jit(lambda x: (jax.grad(log)(x), jax.hessian(log)(x), jax.jacrev(jax.grad(log))(x)))
        atol = 4 * np.finfo(dtype).eps
        for result, expected in zip(derivatives(x), (p, hessian, hessian), strict=True):
            np.testing.assert_allclose(result, expected.reshape(result.shape), atol=atol)

    def test_derivatives_of_the_pair(self, dtype, implementation):
        """Those of the mantissa in units of 2^exponent; the exponent has none."""
        x = jnp.asarray([0.5, 3, 40], dtype)
        total = lambda x: sum_exp(x, implementation=implementation)
        mantissa, exponent = lambda x: total(x).mantissa, lambda x: total(x).exponent
        derivatives = jax.jit(
            lambda x: (jax.grad(mantissa)(x), jax.hessian(mantissa)(x), jax.jacfwd(exponent)(x))
        )
        gradient, hessian, of_exponent = derivatives(x)
        unit = np.exp2(np.float64(total(x).exponent))
        exact, eps = np.exp(np.float64(x)), np.finfo(dtype).eps
        np.testing.assert_allclose(unit * gradient, exact, rtol=16 * eps)
        np.testing.assert_allclose(unit * hessian, np.diag(exact), rtol=16 * eps, atol=16 * eps * exact.min())
        np.testing.assert_array_equal(of_exponent, 0)

    @pytest.mark.long
    @pytest.mark.parametrize("value", [800, 8e4, 1e5, 1e30, 2.3e38, -8e4, -1e5, -1e30, -2.3e38])
    def test_huge_values_never_overflow(self, value, dtype):
        value = dtype(value)
        total = sum_exp(np.full((4, 3), value))
        for part in total:
            assert np.isfinite(part).all()
        for result, count in ((total, 3), (total.combine(total), 6), (total.reduce(), 12)):
            expected = float(np.longdouble(value) + np.log(np.longdouble(count)))
            np.testing.assert_allclose(result.log(), expected, rtol=4 * np.finfo(dtype).eps)

    def test_the_ends_of_the_format(self, dtype):
        """From 2**128·ln 2 on, which is 2.36e38 in float32, the logarithm is finfo.max, as documented."""
        limits = np.finfo(dtype)
        for value in (limits.max, limits.max * dtype(0.9)):
            total = sum_exp(np.full((4, 3), value))
            for result in (
                total,
                total.combine(total),
                total.reduce(),
                total.combine(SumExp.empty((), dtype)),
            ):
                assert np.isfinite(result.exponent).all()
                np.testing.assert_array_equal(result.log(), limits.max)
        # No such limit is documented for negative logits: their logarithm is exact, and not -inf.
        total = sum_exp(np.full((4, 3), limits.min))
        for result in (total, total.combine(total), total.reduce()):
            np.testing.assert_allclose(result.log(), limits.min, rtol=4 * limits.eps)

    def test_masks_and_axes(self, dtype):
        x = (10 * normal(3, 4, 5)).astype(dtype)
        mask = normal(3, 4, 5, seed=1) > 0
        for axis in (-1, 0, (0, 2), None):
            with np.errstate(divide="ignore"):  # Some rows are fully masked.
                expected = np.log(np.exp(x.astype(np.float64)).sum(axis, where=mask))
            total = sum_exp(np.where(mask, x, NAN).astype(dtype), axis, mask)
            assert_logs_close(total, expected, dtype)

    def test_combine_broadcasts(self, dtype):
        x, y = normal(3, 1, 4).astype(dtype), normal(5, 2).astype(dtype)
        both = sum_exp(x).combine(sum_exp(y))
        assert both.mantissa.shape == both.exponent.shape == (3, 5)
        expected = np.log(np.exp(x).sum(-1) + np.exp(y).sum(-1))
        assert_logs_close(both, expected, dtype)

    def test_implementations_agree(self, dtype, implementation):
        x = (10 * normal(4, 300)).astype(dtype)
        expected = [exact_log(row) for row in x]
        assert_logs_close(sum_exp(x, implementation=implementation), expected, dtype)


def test_complex_logits_are_an_error():
    with pytest.raises(TypeError, match="x must be real, got dtype complex64"):
        sum_exp(jnp.ones(3, jnp.complex64))
