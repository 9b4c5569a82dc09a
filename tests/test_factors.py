"""logsumexp(a, b=factors): sums of exponentials with factors of any sign."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import normal
from functions import FLOATS, HALVES, INF, NAN
from jax.experimental import jet
from jax.test_util import check_grads

from jax_softmax2p import Band, logsumexp


def exact(a, b, where=True):
    """The logarithm of |sum|, the sign of the sum, and the sum of all |b|·e^a relative to |sum|."""
    a, b = (v.astype(np.longdouble) for v in np.broadcast_arrays(a, b))
    takes_part = where & (b != 0)
    largest = np.where(takes_part, a + np.log(np.abs(np.where(b == 0, 1, b))), -INF).max(-1, keepdims=True)
    parts = np.sign(b) * np.exp(
        np.where(takes_part, a + np.log(np.abs(np.where(b == 0, 1, b))) - largest, -INF)
    )
    total = parts.sum(-1)
    return largest[..., 0] + np.log(np.abs(total)), np.sign(total), np.abs(parts).sum(-1) / np.abs(total)


def assert_within_contract(actual, a, b, where=True):
    """2 ULP of the result, or of the row's largest logit, and 4 ULP of what the sum is made of."""
    log, sign = (np.asarray(v) for v in actual)
    expected, expected_sign, condition = exact(a, b, where)
    unit = float(np.finfo(log.dtype).eps)
    largest = np.abs(np.where(where & (b != 0), a, 0)).max(-1)
    tolerance = 2 * unit * np.maximum(np.abs(expected), largest) + 4 * unit * condition
    np.testing.assert_array_equal(sign, expected_sign)
    np.testing.assert_array_less(np.abs(log - expected), tolerance)


class TestAccuracy:
    @pytest.mark.long
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("n", [1, 7, 300, 5000])
    @pytest.mark.parametrize("offset", [0.0, 1000.0])
    def test_factors_of_both_signs(self, n, dtype, offset, implementation):
        a, b = (4 * normal(6, n) + offset).astype(dtype), normal(6, n, seed=1).astype(dtype)
        b[0], b[1], b[2, ::3] = np.abs(b[0]), -np.abs(b[1]), 0
        if n == 1:
            b[2] = 1
        actual = logsumexp(a, -1, b, return_sign=True, implementation=implementation)
        assert_within_contract(actual, a, b)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("magnitude", [1e-37, 1e-20, 1e20, 1e38])
    def test_factors_of_every_magnitude(self, dtype, magnitude, implementation):
        """Neither factors nor exponentials overflow or underflow together."""
        a, b = (
            (30 * normal(6, 50)).astype(dtype),
            (magnitude * (1 + np.abs(np.sin(normal(6, 50))))).astype(dtype),
        )
        b[3:, ::2] *= -0.5
        actual = logsumexp(a, -1, b, return_sign=True, implementation=implementation)
        assert_within_contract(actual, a, b)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_factors_that_make_up_for_the_logits(self, dtype, implementation):
        """All terms are of one size, and the exponentials by themselves span the format."""
        a = (50 * normal(6, 50)).clip(-80, 80).astype(dtype)
        b = (np.exp(-a.astype(np.float64)) * np.sign(normal(6, 50, seed=1) + 0.3)).astype(dtype)
        actual = logsumexp(2 * a, -1, b, return_sign=True, implementation=implementation)
        assert_within_contract(actual, 2 * a, b)

    def test_logits_without_a_factor_do_not_count(self, implementation):
        """Those of a factor of 0 may be larger than all others, infinite or NaN."""
        a, b = np.array([[3e38, 1.0, 2.0, NAN, INF, -INF]], np.float32), np.array([0, -1, 2, 0, 0, 0])
        log, sign = logsumexp(a, -1, b, return_sign=True, implementation=implementation)
        np.testing.assert_allclose(log, np.log(2 * np.exp(2.0) - np.exp(1.0)), rtol=1e-5)
        assert sign == 1
        g = jax.jit(jax.grad(lambda a: logsumexp(a, -1, b, implementation=implementation)[0]))(a)
        np.testing.assert_array_equal(np.asarray(g)[0, b == 0], 0)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision_is_rounded_once(self, dtype):
        a, b = (3 * normal(5, 60)).astype(dtype), (normal(5, 60, seed=1) + 1).astype(dtype)
        log, sign = logsumexp(a, -1, b, return_sign=True)
        assert log.dtype == sign.dtype == dtype
        expected, expected_sign, _ = exact(a.astype(float), b.astype(float))
        np.testing.assert_array_equal(sign.astype(float), expected_sign)
        unit = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(log.astype(float), expected.astype(float), rtol=0.51 * unit, atol=1e-6)


SPECIAL = (NAN, INF, -INF, 0.0, 2.0)


class TestSpecialValues:
    @pytest.mark.long
    @pytest.mark.parametrize("where", [None, np.array([True, True, False]), np.array(False)], ids=str)
    @pytest.mark.parametrize("return_sign", [False, True])
    def test_equal_those_of_jax_nn(self, where, return_sign, implementation):
        """Every combination of special values in two logits and their factors, beside a third one."""
        rows = list(itertools.product(SPECIAL, SPECIAL, (*SPECIAL, -1.0), (*SPECIAL, -2.0)))
        a = np.array([[0.5, r[0], r[1]] for r in rows])
        b = np.array([[1.0, r[2], r[3]] for r in rows])
        options = {"where": where, "return_sign": return_sign}
        actual = logsumexp(a, -1, b, implementation=implementation, **options)
        expected = jax.nn.logsumexp(a, -1, b, **options)
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-15)

    @pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
    def test_empty(self, shape, implementation):
        a = np.zeros(shape)
        log, sign = logsumexp(a, 1, 2.0, return_sign=True, implementation=implementation)
        np.testing.assert_array_equal(log, np.full(shape[0], -INF))
        np.testing.assert_array_equal(sign, np.zeros(shape[0]))

    def test_sum_of_0(self, implementation):
        log, sign = logsumexp(
            np.ones(4), b=np.array([1, -1, 2, -2]), return_sign=True, implementation=implementation
        )
        assert (log, sign) == (-INF, 0)


class TestArguments:
    @pytest.mark.long
    @pytest.mark.parametrize("axis", [0, -1, (0, 2), None, ()])
    @pytest.mark.parametrize("b", [(), (4,), (2, 1, 1), (2, 3, 4)])
    def test_any_axis(self, axis, b, implementation):
        a, b, where = normal(2, 3, 4), normal(*b), normal(3, 4) < 1
        options = {"where": where, "return_sign": True}
        actual = logsumexp(a, axis, b, implementation=implementation, **options)
        total = np.sum(b * np.exp(a), axis, where=where)
        with np.errstate(divide="ignore"):
            expected = np.log(np.abs(total)), np.sign(total)
        for ours, exact in zip(actual, expected, strict=True):
            assert ours.shape == exact.shape
            np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("axis", [0, -1, (0, 2), None, ()])
    def test_keepdims(self, axis):
        a = jax.ShapeDtypeStruct((2, 3, 4), np.float64)
        kept = lambda f: jax.eval_shape(lambda a, b: f(a, axis, b, keepdims=True, return_sign=True), a, a)
        assert kept(logsumexp) == kept(jax.nn.logsumexp)

    @pytest.mark.parametrize("where", [None, Band(1, 0)], ids=str)
    @pytest.mark.parametrize("f", [0.5, INF, -INF, NAN])
    def test_scale_and_biases(self, where, f, implementation):
        a, b, g = normal(3, 4), normal(4) + 1, normal(4, seed=1)
        f = np.array([[0.25], [f], [1.0]])
        actual = logsumexp(
            a, -1, b, scale=3, bias=(f, g), where=where, return_sign=True, implementation=implementation
        )
        mask = None if where is None else np.tri(3, 4, dtype=bool) & ~np.tri(3, 4, -2, dtype=bool)
        expected = jax.nn.logsumexp(3 * a + f + g, -1, b, where=mask, return_sign=True)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)

    def test_masked_factors_do_not_count(self, implementation):
        """NaN and infinities at masked positions of a and b affect neither results nor gradients."""
        mask = np.tri(3, 4, dtype=bool)
        a, b = normal(3, 4), normal(3, 4, seed=1)
        filled = np.where(mask, a, NAN), np.where(mask, b, [NAN, INF, -INF, NAN])
        for where in (Band(), mask):
            total = lambda f, a, b, w=where, **o: f(a, -1, b, return_sign=True, where=w, **o)[0].sum()
            ours = lambda a, b, t=total: t(logsumexp, a, b, implementation=implementation)
            actual = jax.jit(jax.value_and_grad(ours, (0, 1)))(*filled)
            expected = jax.jit(
                jax.value_and_grad(lambda a, b, t=total: t(jax.nn.logsumexp, a, b, mask), (0, 1))
            )(a, b)
            for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)

    @pytest.mark.long
    @pytest.mark.parametrize("a", [np.float32, np.float16, jnp.bfloat16, np.int32, np.int8, bool])
    @pytest.mark.parametrize("b", [2, 2.5, np.float32, np.float64, np.int32, jnp.bfloat16, bool])
    def test_dtype_is_that_of_jax_nn(self, a, b, implementation):
        array = np.ones((2, 3), a)
        factors = b if isinstance(b, (int, float)) and not isinstance(b, bool) else np.ones(3, b)
        ours = lambda a: logsumexp(a, -1, factors, return_sign=True, implementation=implementation)
        theirs = lambda a: jax.nn.logsumexp(a, -1, factors, return_sign=True)
        like_jax = jnp.exp(array).dtype if a is bool else a
        assert jax.eval_shape(ours, array) == jax.eval_shape(theirs, array.astype(like_jax))

    def test_complex_factors(self):
        a, b = normal(3, 4), normal(3, 4) + 1j
        np.testing.assert_array_equal(logsumexp(a, -1, b), jax.nn.logsumexp(a, -1, b))
        with pytest.raises(ValueError, match=r"implementation='native' cannot run: .*complex"):
            logsumexp(a, -1, b, implementation="native")

    def test_native_is_one_call(self):
        f = jax.jit(lambda a, b: logsumexp(a, -1, b, implementation="native"))
        assert f.lower(normal(3, 4), normal(3, 4)).as_text().count("stablehlo.custom_call @jax_soft") == 1


class TestTransforms:
    @pytest.mark.parametrize(
        "where",
        [
            np.array([True, False, True, True]),
            *(pytest.param(w, marks=pytest.mark.long) for w in (None, Band(1, 1))),
        ],
        ids=str,
    )
    def test_derivatives_of_two_orders(self, where):
        b = normal(3, 4, seed=1) + np.array([[0], [2], [-2]])
        f = jax.jit(lambda a, b, f: logsumexp(a, -1, b, True, True, where, scale=1.5, bias=(f, 0.5))[0])
        check_grads(f, (normal(3, 4), b, normal(3, 1)), order=2, modes=("fwd", "rev"))

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("n", [7, 300])
    def test_gradients_are_those_of_jax_nn(self, n, dtype, implementation):
        a, b = normal(5, n), normal(n, seed=1)
        b[::3] = 0
        total = lambda f, a, b: (f(a, -1, b, return_sign=True)[0] * jnp.arange(1, 6, dtype=a.dtype)).sum()
        ours = lambda *o, **options: logsumexp(*o, implementation=implementation, **options)
        actual = jax.jit(jax.grad(lambda a, b: total(ours, a, b), (0, 1)))(a.astype(dtype), b.astype(dtype))
        expected = jax.jit(jax.grad(lambda a, b: total(jax.nn.logsumexp, a, b), (0, 1)))(a, b)
        for x, y in zip(actual, expected, strict=True):
            assert x.dtype == dtype
            np.testing.assert_allclose(x, y, rtol=0, atol=40 * np.finfo(dtype).eps * np.abs(y).max())

    @pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
    def test_derivatives_in_16_bits(self, dtype, implementation):
        """Without the factor they would be too small for float16, and times it too large."""
        a, b = jnp.zeros(1000, dtype), jnp.full(1000, 60000, dtype)
        f = lambda a: logsumexp(a, b=b, implementation=implementation)
        value, gradient = jax.jit(jax.value_and_grad(f))(a)
        assert value.dtype == gradient.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(float(value), np.log(1000 * float(b[0])), rtol=eps)
        np.testing.assert_allclose(gradient.astype(np.float64), 1e-3, rtol=eps)
        _, dot = jax.jvp(f, (a,), (jnp.full_like(a, 2),))
        np.testing.assert_allclose(float(dot), 2, rtol=eps)

    @pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (1, 0)])
    def test_vmap(self, in_axes):
        a = normal(4) if in_axes[0] is None else normal(2, 4) if in_axes[0] == 0 else normal(4, 2)
        b = normal(4) if in_axes[1] is None else normal(2, 4)
        actual = jax.jit(jax.vmap(lambda a, b: jnp.stack(logsumexp(a, b=b, return_sign=True)), in_axes))(a, b)
        expected = jax.jit(
            jax.vmap(lambda a, b: jnp.stack(jax.nn.logsumexp(a, b=b, return_sign=True)), in_axes)
        )(a, b)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)

    def test_jet(self, implementation):
        a, b = normal(3, 4), normal(4) + 1
        series = [normal(3, 4, seed=2), normal(3, 4, seed=3)]
        actual = jet.jet(lambda a: logsumexp(a, -1, b, implementation=implementation), (a,), (series,))
        expected = jet.jet(lambda a: jax.nn.logsumexp(a, -1, b), (a,), (series,))
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)
