"""The operands that softmax, log_softmax and logsumexp share: where, Band, scale and bias."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import FLOATS, FUNCTIONS, HALVES, INF, NAN, assert_close, every_length, exact, natively, normal

from jax_softmax2p import Band, logsumexp, softmax


@pytest.fixture(params=FUNCTIONS)
def name(request):
    return request.param


def masked_input(shape, mask, dtype, seed=0):
    """Logits that are NaN, infinite or huge where they are masked, which must not affect any result."""
    x = normal(*shape, seed=seed).astype(dtype)
    masked_values = np.resize([NAN, INF, 1.0, -INF, 3e38], shape)
    return np.where(mask, x, masked_values).astype(dtype)


# Shapes that broadcast to (2, 3, n); 0 stands for n.
MASK_SHAPES = [(0,), (3, 1), (2, 1, 1), (3, 0), (2, 3, 0), (2, 1, 0), ()]


def merged(x, axis):
    """The array with the axes moved to the end and merged into one."""
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    moved = np.moveaxis(x, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)


def sized(shape, n):
    return tuple(size or n for size in shape)


class TestWhere:
    @pytest.mark.long
    @pytest.mark.parametrize("shape", MASK_SHAPES)
    @pytest.mark.parametrize(("implementation", "n"), [("reference", 7), ("native", 7), ("native", 300)])
    def test_broadcasts(self, shape, n, name, implementation):
        mask = np.random.default_rng(n).random(sized(shape, n)) < 0.6
        x = masked_input((2, 3, n), mask, np.float32)
        y = np.asarray(FUNCTIONS[name](x, where=mask, implementation=implementation))
        assert_close(name, y, exact(name, x, mask), np.float32, x, implementation)

    @every_length
    def test_mask_patterns(self, n, dtype, name, implementation):
        """Rows in which nothing, one element, the first half, the last half, a few or all are unmasked."""
        i = np.arange(n)
        mask = np.stack([i < 0, i == n // 2, i < n // 2, i >= n // 2, i % 7 == 3, i >= 0])
        x = masked_input((6, n), mask, dtype)
        y = np.asarray(FUNCTIONS[name](x, where=mask, implementation=implementation))
        assert_close(name, y, exact(name, x, mask), dtype, np.where(mask, x, 0), implementation)

    @pytest.mark.long
    @natively
    @pytest.mark.parametrize("axis", [0, 1, (0, 2), None])
    @pytest.mark.parametrize("shape", [(5,), (4, 1), (3, 4, 5)])
    def test_any_axis(self, axis, shape, name, implementation):
        mask = np.random.default_rng(0).random(shape) < 0.7
        x = masked_input((3, 4, 5), mask, np.float64)
        y = np.asarray(FUNCTIONS[name](x, axis=axis, where=mask, implementation=implementation))
        actual = y if name == "logsumexp" else merged(y, axis)
        expected = exact(name, merged(x, axis), merged(np.broadcast_to(mask, x.shape), axis))
        assert_close(name, actual, expected, np.float64, np.where(mask, x, 0))

    @pytest.mark.parametrize("n", [3, 200])
    def test_unmasked_special_values(self, n, implementation):
        """Rows that are -inf, NaN or +inf at unmasked positions."""
        x = np.zeros((4, n), np.float32)
        x[0], x[1, 1], x[2, 1], x[3] = -INF, NAN, INF, -INF
        mask = np.arange(n) != 2
        mask = np.stack([mask, mask, mask, np.zeros(n, bool)])
        with np.errstate(invalid="ignore"):
            y = {k: np.asarray(f(x, where=mask, implementation=implementation)) for k, f in FUNCTIONS.items()}
        np.testing.assert_array_equal(y["softmax"], np.where(mask, NAN, 0))
        np.testing.assert_array_equal(y["log_softmax"], np.where(mask, NAN, -INF))
        np.testing.assert_array_equal(y["logsumexp"], [-INF, NAN, INF, -INF])
        np.testing.assert_array_equal(y["softmax"], jax.nn.softmax(x, where=mask))
        np.testing.assert_array_equal(y["log_softmax"], jax.nn.log_softmax(x, where=mask))
        np.testing.assert_array_equal(y["logsumexp"], jax.nn.logsumexp(x, -1, where=mask))

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, dtype, name):
        mask = np.random.default_rng(0).random((3, 50)) < 0.5
        mask[1] = False
        x = masked_input((3, 50), mask, np.float32).clip(-1e4, 1e4).astype(dtype)
        y = np.asarray(FUNCTIONS[name](x, where=mask))
        np.testing.assert_allclose(
            y.astype(float), exact(name, x, mask).astype(float), rtol=jnp.finfo(dtype).eps
        )

    def test_integers(self, implementation):
        x, mask = np.array([[3, 1, 2, 100]]), np.array([True, True, True, False])
        for name in FUNCTIONS:
            y = FUNCTIONS[name](x, where=mask, implementation=implementation)
            np.testing.assert_allclose(y, exact(name, x.astype(float), mask).astype(float), rtol=1e-13)


SCALE_SHAPES = [(), (1,), (3, 1), (2, 1, 1), (2, 3, 1), (1, 3, 1)]
BIAS_SHAPES = [(0,), (3, 0), (2, 3, 0), (2, 1, 0), (1, 3, 1), (2, 1, 1), (), (2, 3, 1)]


class TestScaleAndBias:
    @pytest.mark.long
    @pytest.mark.parametrize("shape", SCALE_SHAPES)
    @pytest.mark.parametrize(("implementation", "n"), [("reference", 7), ("native", 7), ("native", 300)])
    def test_scale_broadcasts(self, shape, n, name, implementation):
        x, scale = normal(2, 3, n).astype(np.float32), (1 + 3 * normal(*shape)).astype(np.float32)
        y = np.asarray(FUNCTIONS[name](x, scale=scale, implementation=implementation))
        z = scale * x
        assert_close(name, y, exact(name, z), np.float32, z, "reference")

    @pytest.mark.long
    @pytest.mark.parametrize("shape", BIAS_SHAPES)
    @pytest.mark.parametrize(("implementation", "n"), [("reference", 7), ("native", 7), ("native", 300)])
    def test_bias_broadcasts(self, shape, n, name, implementation):
        x, bias = normal(2, 3, n).astype(np.float32), 5 * normal(*sized(shape, n)).astype(np.float32)
        y = np.asarray(FUNCTIONS[name](x, bias=bias, implementation=implementation))
        z = x + bias
        assert_close(name, y, exact(name, z), np.float32, z, implementation)

    @natively
    @pytest.mark.parametrize("scale_shape", [(), (3, 1), (2, 1, 1)])
    @pytest.mark.parametrize("bias_shape", [(0,), (2, 1, 0), (2, 3, 0), (3, 1)])
    def test_scale_and_bias_with_mask(self, scale_shape, bias_shape, name, implementation):
        """Scale, bias and mask each advance through the rows with different strides."""
        n = 40
        scale, bias = 1 + normal(*scale_shape), normal(*sized(bias_shape, n))
        for mask_shape in ((3, 1), (2, 1, 0)):
            mask = np.random.default_rng(1).random(sized(mask_shape, n)) < 0.6
            x = masked_input((2, 3, n), mask, np.float64)
            y = np.asarray(
                FUNCTIONS[name](x, where=mask, scale=scale, bias=bias, implementation=implementation)
            )
            with np.errstate(invalid="ignore", over="ignore"):
                z = scale * x + bias
            unmasked = np.where(mask, z, 0)
            assert_close(name, y, exact(name, z, mask), np.float64, unmasked, "reference")

    @every_length
    def test_every_length(self, n, dtype, name, implementation):
        """Scales are powers of two, so that every instruction set rounds z only once."""
        x, bias = 4 * normal(3, n).astype(dtype), normal(n, seed=1).astype(dtype)
        scale = np.array([[0.25], [2.0], [-1.0]], dtype)
        y = np.asarray(FUNCTIONS[name](x, scale=scale, bias=bias, implementation=implementation))
        z = scale * x + bias
        assert_close(name, y, exact(name, z), dtype, z, implementation)

    @pytest.mark.long
    @pytest.mark.parametrize("axis", [0, (0, 1), (1, 2), None])
    def test_any_axis(self, axis, name, implementation):
        x = normal(3, 4, 5)
        axes = (0, 1, 2) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        scale = 1 + normal(*(1 if i in axes else size for i, size in enumerate(x.shape)))
        # A bias varies along all of the axes, some of them, or none; a scale varies along none.
        for bias in (
            normal(5, seed=1),
            normal(4, 1, seed=1),
            normal(3, 1, 1, seed=1),
            normal(3, 4, 5, seed=1),
        ):
            y = FUNCTIONS[name](x, axis=axis, scale=scale, bias=bias, implementation=implementation)
            actual = np.asarray(y) if name == "logsumexp" else merged(np.asarray(y), axis)
            z = merged(scale * x + bias, axis)
            assert_close(name, actual, exact(name, z), np.float64, z, "reference")

    @pytest.mark.long
    @pytest.mark.parametrize("n", [4, 130, 5000])
    def test_minus_infinity_in_bias_masks(self, n, name, implementation):
        bias = np.where(np.random.default_rng(0).random((3, n)) < 0.5, 0, -INF).astype(np.float32)
        bias[1] = -INF
        bias[2, 0] = 0
        x = normal(3, n).astype(np.float32)
        y = np.asarray(FUNCTIONS[name](x, bias=bias, implementation=implementation))
        with np.errstate(invalid="ignore"):
            expected = exact(name, x + bias)
        expected[1] = -INF if name == "logsumexp" else NAN
        assert_close(name, y, expected, np.float32, x, implementation)
        # A bias of size 1 along the axis masks whole rows.
        y = np.asarray(FUNCTIONS[name](x, bias=bias[:, 1:2], implementation=implementation))
        masked_rows = np.isinf(bias[:, 1])
        expected = exact(name, x)
        expected[masked_rows] = -INF if name == "logsumexp" else NAN
        assert_close(name, y, expected, np.float32, x, implementation)

    def test_special_values(self, implementation):
        x = np.array([[1.0, 2.0, 3.0]] * 4)
        scale = np.array([[NAN], [INF], [0.0], [-INF]])
        with np.errstate(invalid="ignore"):
            z = scale * np.where(x == 0, 1, x)
        y = np.asarray(softmax(x, scale=scale, implementation=implementation))
        np.testing.assert_array_equal(y, jax.nn.softmax(z))
        y = np.asarray(logsumexp(x, -1, scale=scale, implementation=implementation))
        np.testing.assert_array_equal(y, jax.nn.logsumexp(z, -1))

    def test_overflow_of_the_product(self, implementation):
        """scale·x beyond the format is infinite, as in NumPy."""
        x = np.array([[1e38, 0.0, -1e38]], np.float32)
        y = logsumexp(x, -1, scale=np.float32(10), implementation=implementation)
        np.testing.assert_array_equal(y, [INF])
        y = softmax(-x[:, :2], scale=np.float32(10), implementation=implementation)
        np.testing.assert_array_equal(y, [[0, 1]])

    @pytest.mark.parametrize("x_dtype", [jnp.bfloat16, np.float16, np.float32, np.int32])
    @pytest.mark.parametrize("operand", [2, 2.5, np.float32(2), np.float64(2), np.int64(2), jnp.bfloat16(2)])
    def test_result_dtype_is_that_of_the_formula(self, x_dtype, operand, name):
        x = jax.ShapeDtypeStruct((1, 3), x_dtype)
        for function, formula in (
            (lambda x: FUNCTIONS[name](x, scale=operand), lambda x: jnp.exp(x * operand)),
            (lambda x: FUNCTIONS[name](x, bias=operand), lambda x: jnp.exp(x + operand)),
        ):
            assert jax.eval_shape(function, x).dtype == jax.eval_shape(formula, x).dtype

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision_is_computed_in_float32(self, dtype, name):
        x, bias = (3 * normal(5, 60)).astype(dtype), normal(60, seed=1).astype(dtype)
        scale = np.array([[0.5], [0.25], [1], [2], [-1]], dtype)
        y = np.asarray(FUNCTIONS[name](x, scale=scale, bias=bias))
        assert y.dtype == dtype
        z = scale.astype(np.float32) * x.astype(np.float32) + bias.astype(np.float32)
        assert cases.ulp_error(y, exact(name, z).astype(np.float64)) <= 0.51

    def test_integers(self, name, implementation):
        x = np.array([[3, 1, 2, 0]])
        y = FUNCTIONS[name](x, scale=0.5, bias=np.array([1, 0, 0, 2]), implementation=implementation)
        expected = exact(name, 0.5 * x + np.array([1, 0, 0, 2])).astype(float)
        np.testing.assert_allclose(y, expected, rtol=1e-13)


BANDS = [(None, 0), (2, 0), (0, 0), (None, None), (1, 3), (0, None), (None, 1000), (2, 2), (1000, 1)]


def band_mask(rows, n, before, after):
    i, j = np.arange(rows)[:, None], np.arange(n)
    inside = np.ones((rows, n), bool)
    if before is not None:
        inside &= j >= i - before
    if after is not None:
        inside &= j <= i + after
    return inside


class TestBand:
    @pytest.mark.long
    @pytest.mark.parametrize(("before", "after"), BANDS)
    @pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
    def test_equals_the_explicit_mask(self, shape, before, after, name, implementation):
        mask = band_mask(*shape, before, after)
        x = masked_input(shape, mask, np.float32)
        y = np.asarray(FUNCTIONS[name](x, where=Band(before, after), implementation=implementation))
        assert_close(name, y, exact(name, x, mask), np.float32, np.where(mask, x, 0), implementation)

    def test_the_default_is_causal(self, name, implementation):
        x = masked_input((4, 4), np.tri(4, dtype=bool), np.float64)
        y = np.asarray(FUNCTIONS[name](x, where=Band(), implementation=implementation))
        assert_close(name, y, exact(name, x, np.tri(4, dtype=bool)), np.float64)
        assert Band() == Band(before=None, after=0)

    @natively
    @pytest.mark.parametrize(
        ("rows", "n", "before", "after"),
        [(3, 5000, 0, 4500), (3, 40_000, None, 39_990), (200, 130, 3, 0)],
    )
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_long_rows(self, rows, n, before, after, dtype, name, implementation):
        mask = band_mask(rows, n, before, after)
        x = masked_input((rows, n), mask, dtype)
        y = np.asarray(FUNCTIONS[name](x, where=Band(before, after), implementation=implementation))
        assert_close(name, y, exact(name, x, mask), dtype, np.where(mask, x, 0), implementation)

    @natively
    @pytest.mark.parametrize("bias_shape", [(7,), (6, 7), (3, 6, 7), (2, 1, 6, 7), (6, 1), (3, 1, 1)])
    def test_with_scale_and_bias_in_batches(self, bias_shape, name, implementation):
        mask = band_mask(6, 7, 3, 1)
        x = masked_input((2, 3, 6, 7), mask, np.float64)
        scale, bias = 1 + normal(3, 1, 1), normal(*bias_shape)
        y = np.asarray(
            FUNCTIONS[name](x, where=Band(3, 1), scale=scale, bias=bias, implementation=implementation)
        )
        with np.errstate(invalid="ignore", over="ignore"):
            z = scale * x + bias
        assert_close(name, y, exact(name, z, mask), np.float64, np.where(mask, z, 0), "reference")

    def test_half_precision(self, name):
        mask = band_mask(6, 9, 2, 1)
        x = masked_input((6, 9), mask, np.float32).clip(-1e4, 1e4).astype(np.float16)
        y = np.asarray(FUNCTIONS[name](x, where=Band(2, 1)))
        np.testing.assert_allclose(y.astype(float), exact(name, x, mask).astype(float), rtol=1e-3)

    @pytest.mark.parametrize(
        ("limits", "words"),
        [
            ({"before": -1}, "before must be None or an integer from 0 on, got -1"),
            ({"after": 1.5}, "after must be None or an integer from 0 on, got 1.5"),
            ({"after": "all"}, "after must be None or an integer from 0 on, got 'all'"),
        ],
    )
    def test_invalid_limits(self, limits, words):
        with pytest.raises(ValueError, match=words):
            Band(**limits)


X = jnp.zeros((2, 3), jnp.float32)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"axis": 2}, ValueError, "axis 2 is out of range for an array of 2 dimensions"),
            ({"axis": (0, -2)}, ValueError, r"axis names a dimension twice: \(0, -2\)"),
            ({"axis": 1.0}, TypeError, "axis must be an integer, several, or None; got 1.0"),
            ({"where": jnp.ones((2, 3), int)}, ValueError, "where must be boolean, got dtype int64"),
            ({"where": jnp.ones(4, bool)}, ValueError, r"where must broadcast .*\(2, 3\), got .*\(4,\)"),
            ({"where": jnp.ones((5, 2, 3), bool)}, ValueError, r"where must broadcast .*\(5, 2, 3\)"),
            ({"where": Band(), "axis": 0}, ValueError, r"where=Band.* needs the last axis, got axes \(-2,\)"),
            ({"where": Band(), "axis": (0, 1)}, ValueError, r"where=Band.* needs the last axis"),
            ({"scale": jnp.ones((2, 3))}, ValueError, r"scale must have size 1 along axis -1, .*\(2, 3\)"),
            (
                {"scale": jnp.ones((2, 1)), "axis": (0, 1)},
                ValueError,
                r"scale must have size 1 along axis \(-2, -1\), .*\(2, 1\)",
            ),
            ({"scale": jnp.ones((3, 1))}, ValueError, r"scale must broadcast .*\(2, 3\), got .*\(3, 1\)"),
            ({"scale": jnp.ones((1, 1, 1))}, ValueError, r"scale must broadcast .*\(1, 1, 1\)"),
            ({"scale": 1j}, TypeError, "scale must be real, got dtype complex"),
            ({"scale": True}, TypeError, "scale must be an array of numbers, got dtype bool"),
            ({"scale": "2"}, TypeError, "scale must be an array or a number, got str"),
            ({"bias": jnp.ones(2)}, ValueError, r"bias must broadcast .*\(2, 3\), got .*\(2,\)"),
            ({"bias": jnp.ones((4, 2, 3))}, ValueError, r"bias must broadcast .*\(4, 2, 3\)"),
            ({"bias": [1.0, 2.0, 3.0]}, TypeError, "bias must be an array or a number, got list"),
            ({"bias": jnp.ones(3, bool)}, TypeError, "bias must be an array of numbers, got dtype bool"),
            ({"bias": jnp.ones(3, complex)}, TypeError, "bias must be real, got dtype complex"),
            ({"implementation": "cuda"}, ValueError, "implementation must be None, 'native' .*'cuda'"),
        ],
    )
    def test_errors_name_argument_and_value(self, arguments, error, words, name):
        with pytest.raises(error, match=words):
            FUNCTIONS[name](X, **arguments)

    def test_booleans(self, name):
        """Of all of these functions jax.nn's logsumexp alone takes them, as 0 and 1."""
        x = jnp.ones((2, 3), bool)
        if name == "logsumexp":
            np.testing.assert_allclose(FUNCTIONS[name](x), np.log(3 * np.e) * np.ones(2), rtol=1e-6)
            return
        with pytest.raises(TypeError, match=r"^x must be an array"):
            FUNCTIONS[name](x)

    @pytest.mark.parametrize("bad", [[1.0, 2.0], "text"])
    def test_errors_name_the_logits_argument(self, bad, name):
        with pytest.raises(TypeError, match=f"^{'a' if name == 'logsumexp' else 'x'} must be an array"):
            FUNCTIONS[name](bad)

    def test_band_needs_two_dimensions(self, name):
        with pytest.raises(ValueError, match=r"needs . of two dimensions at least, got shape \(3,\)"):
            FUNCTIONS[name](X[0], where=Band())

    def test_scalar_with_an_axis(self, name):
        with pytest.raises(ValueError, match="axis -1 is out of range for an array of 0 dim"):
            FUNCTIONS[name](jnp.float32(1))

    def test_native_error_gives_the_reason(self, name):
        with pytest.raises(ValueError, match="implementation='native' cannot run: "):
            FUNCTIONS[name](jnp.zeros(3, jnp.complex64), implementation="native")
