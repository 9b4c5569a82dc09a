"""softmax as users call it: jax.nn's semantics in every edge case, and error messages."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_softmax2p
from jax_softmax2p import softmax

FLOATS = [jnp.float32, jnp.float64]
HALVES = [jnp.bfloat16, jnp.float16]
NAN, INF = float("nan"), float("inf")


def check(x, expected, implementation, **options):
    y = softmax(x, implementation=implementation, **options)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(y, np.float64), np.asarray(expected, np.float64))
    np.testing.assert_array_equal(np.asarray(y, np.float64), np.asarray(jax.nn.softmax(x), np.float64))


# Rows within one vector, across two, across blocks, and across the segments that threads share.
@pytest.mark.parametrize("n", [3, 21, 3000, 70_000])
@pytest.mark.parametrize("dtype", FLOATS)
class TestEdges:
    @pytest.mark.long(where="middle", dtype=np.float32)
    @pytest.mark.parametrize("special", [NAN, INF])
    @pytest.mark.parametrize("where", ["first", "middle", "last"])
    def test_nan_or_infinity_makes_the_row_nan(self, where, special, dtype, n, implementation):
        position = {"first": 0, "middle": n // 2, "last": n - 1}[where]
        x = jnp.zeros((2, n), dtype).at[0, position].set(special)
        check(x, np.stack([np.full(n, NAN), np.full(n, dtype(1) / dtype(n))]), implementation)

    @pytest.mark.long(dtype=np.float32)
    def test_nan_among_minus_infinity(self, dtype, n, implementation):
        x = jnp.full(n, -INF, dtype).at[n // 2].set(NAN)
        check(x, np.full(n, NAN), implementation)

    def test_all_nan(self, dtype, n, implementation):
        check(jnp.full(n, NAN, dtype), np.full(n, NAN), implementation)

    def test_all_minus_infinity(self, dtype, n, implementation):
        check(jnp.full(n, -INF, dtype), np.full(n, NAN), implementation)

    def test_one_finite_among_minus_infinity(self, dtype, n, implementation):
        x = jnp.full(n, -INF, dtype).at[n - 1].set(-4.5)
        check(x, np.eye(n)[n - 1] if n < 5000 else np.arange(n) == n - 1, implementation)

    @pytest.mark.parametrize("extreme", ["min", "max"])
    def test_all_at_the_format_limit(self, extreme, dtype, n, implementation):
        x = jnp.full(n, getattr(jnp.finfo(dtype), extreme), dtype)
        check(x, np.full(n, dtype(1) / dtype(n)), implementation)

    def test_the_whole_range_of_the_format(self, dtype, n, implementation):
        limits = jnp.finfo(dtype)
        x = jnp.full(n, limits.min, dtype).at[1].set(limits.max).at[0].set(0)
        check(x, np.arange(n) == 1, implementation)

    def test_large_and_opposite(self, dtype, n, implementation):
        x = jnp.zeros(n, dtype).at[0].set(1e30).at[1].set(-1e30)
        check(x, np.arange(n) == 0, implementation)

    @pytest.mark.parametrize("fill", [float(np.finfo(np.float32).min), -2.38e38, -1e30, -1e9, -INF])
    def test_large_negative_logits_give_zero(self, fill, dtype, n, implementation):
        unmasked = np.arange(n) % 3 == 0
        x = np.where(unmasked, cases.make("normal", n, np.float64), fill).astype(dtype)
        y = np.asarray(softmax(x, implementation=implementation))
        assert (y[~unmasked] == 0).all()
        assert cases.ulp_error(y[unmasked], cases.exact_softmax(x[unmasked])) <= 16


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
@pytest.mark.parametrize("offset", [1e6, 5e7, 1e9, 1e20])
def test_offset_keeps_exact_differences(offset, dtype, implementation):
    if dtype in HALVES:
        offset = min(offset, 3e4)
        implementation = None
    # The format holds multiples of this unit exactly at that offset.
    unit = float(jnp.finfo(dtype).eps) * 2.0 ** np.ceil(np.log2(offset))
    x = jnp.asarray(offset + unit * np.array([0, 1, 2, 5, 3]), dtype)
    y = softmax(x, implementation=implementation)
    np.testing.assert_allclose(
        np.asarray(y, np.float64),
        np.asarray(jax.nn.softmax(x.astype(jnp.float64)), np.float64),
        rtol=2 * float(jnp.finfo(dtype).eps),
        atol=float(jnp.finfo(dtype).tiny),
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [*FLOATS, jnp.bfloat16])
def test_empty(shape, dtype, implementation):
    implementation = None if dtype == jnp.bfloat16 else implementation
    for axis in range(len(shape)):
        y = softmax(jnp.zeros(shape, dtype), axis, implementation=implementation)
        assert y.shape == shape
        assert y.dtype == dtype


@pytest.mark.long
@pytest.mark.parametrize("shape", [(4, 5, 6), (33, 2049), (2, 1, 7, 3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_axes(shape, dtype, implementation):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    ndim = len(shape)
    for axis in [
        *range(-ndim, ndim),
        (0, 1),
        (-1, 0),
        (1, -ndim),
        tuple(range(ndim)),
        (),
        None,
        [0],
    ]:
        jax_axis = tuple(axis) if isinstance(axis, list) else axis
        expected = jax.nn.softmax(x.astype(np.float64), jax_axis)
        y = softmax(x, axis, implementation=implementation)
        rtol = 16 * np.finfo(dtype).eps
        np.testing.assert_allclose(y, expected, rtol=rtol, err_msg=str(axis))


def test_scalar_over_no_axes(implementation):
    assert softmax(jnp.float32(3), axis=None, implementation=implementation) == 1


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_rounded_once(dtype):
    x = jnp.asarray(cases.make("normal", 3001, np.float32) * 4, dtype)
    wide = softmax(x.astype(jnp.float32), implementation="reference")
    np.testing.assert_array_equal(softmax(x), wide.astype(dtype))
    np.testing.assert_array_equal(softmax(x, implementation="reference"), wide.astype(dtype))


@pytest.mark.long(dtype="int32")
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint64"])
def test_integers_promote_as_in_jax_nn(dtype, implementation):
    limits = np.iinfo(dtype)
    x = np.array([[3, 1, 2, 0], [limits.max, limits.max - 1, limits.min, limits.min]], dtype)
    y = softmax(x, implementation=implementation)
    assert y.dtype == jax.nn.softmax(x).dtype
    exact = [jax.nn.softmax(jnp.array(row)) for row in ([3.0, 1, 2, 0], [0.0, -1, -INF, -INF])]
    np.testing.assert_allclose(y, exact, atol=1e-50 if limits.bits > 8 else 1e-70)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3fnuz])
def test_float8_is_rounded_once(dtype):
    x, mask = jnp.array([1.0, 2.0, 4.0, 0.5], dtype), jnp.array([True, True, False, True])
    for where in (None, mask):
        wide = jax.nn.softmax(x.astype(jnp.float32), where=where)
        y = softmax(x, where=where)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.astype(jnp.float32), wide.astype(dtype).astype(jnp.float32))


def test_complex_takes_the_reference():
    x = jnp.arange(4.0)
    y = softmax(x + 1j)
    np.testing.assert_allclose(y, jax.nn.softmax(x + 1j), rtol=1e-6)


class TestWhere:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_equals_softmax_of_unmasked_elements(self, dtype, implementation):
        x = cases.make("normal", 301, dtype)
        mask = np.arange(301) % 4 != 1
        y = np.asarray(softmax(x, where=mask, implementation=implementation))
        assert (y[~mask] == 0).all()
        np.testing.assert_allclose(
            y[mask], softmax(x[mask], implementation=implementation), rtol=4 * np.finfo(dtype).eps
        )

    @pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
    def test_fully_masked_rows_are_zero(self, dtype, implementation):
        implementation = None if dtype in HALVES else implementation
        x = jnp.asarray([[1, 2, NAN], [1, NAN, INF], [-INF, -INF, 5]], dtype)
        mask = jnp.array([[True, True, False], [False, False, False], [True, True, False]])
        y = softmax(x, where=mask, implementation=implementation)
        np.testing.assert_array_equal(y[1], [0, 0, 0])
        np.testing.assert_allclose(np.asarray(y[0], float), [0.2689, 0.7311, 0], rtol=1e-2)
        # A row in which every unmasked logit is -inf gives NaN, as in jax.nn.
        np.testing.assert_array_equal(np.isnan(np.asarray(y[2], float)), [True, True, False])

    @pytest.mark.long(implementation="native")
    def test_broadcasts(self, implementation):
        x = np.random.default_rng(0).standard_normal((2, 3, 4))
        for mask in (np.arange(4) > 0, np.array(True), np.array([[[True]], [[False]]])):
            for axis in (0, 1, -1, (1, 2), None):
                y = softmax(x, axis, mask, implementation=implementation)
                expected = jax.nn.softmax(x, axis, where=mask)
                np.testing.assert_allclose(y, expected, rtol=1e-14)

    def test_masked_values_do_not_reach_gradients(self, implementation):
        x = jnp.array([[1.0, 2.0, NAN, 3.0], [1e4, INF, NAN, -INF]])
        mask = jnp.array([[True, True, False, True], [False] * 4])
        t = jnp.array([1.0, 5.0, NAN, -2.0])

        def f(x):
            y = softmax(x, where=mask, implementation=implementation)
            return jnp.sum(y * jnp.where(mask, t, 0))

        g = jax.jit(jax.grad(f))(x)
        y = jax.nn.softmax(jnp.array([1.0, 2.0, 3.0]))
        unmasked_t = t[jnp.array([0, 1, 3])]
        expected = y * (unmasked_t - y @ unmasked_t)
        np.testing.assert_allclose(g[0], jnp.insert(expected, 2, 0), rtol=1e-12)
        np.testing.assert_array_equal(g[1], 0)
        assert jnp.isfinite(jax.jit(jax.hessian(f))(x)).all()

    def test_debug_nans_finds_none(self, implementation):
        x, mask = (
            jnp.array([[NAN, 1.0, 2.0], [3.0, NAN, NAN]]),
            jnp.array([[False, True, True], [False] * 3]),
        )
        with jax.debug_nans(True):
            softmax(jnp.nan_to_num(x), where=mask, implementation=implementation)
            jax.jit(jax.grad(lambda x: softmax(x, where=mask, implementation=implementation)[0, 1]))(
                jnp.nan_to_num(x)
            )


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"x": jnp.float32(1)}, ValueError, "axis -1 is out of range for an array of 0 dim"),
            ({"axis": 2}, ValueError, "axis 2 is out of range for an array of 2 dimensions"),
            ({"axis": -3}, ValueError, "axis -3 is out of range"),
            ({"axis": (0, -2)}, ValueError, r"axis names a dimension twice: \(0, -2\)"),
            ({"axis": 1.0}, TypeError, "axis must be an integer, several, or None; got 1.0"),
            ({"axis": "last"}, TypeError, "axis must be an integer"),
            (
                {"x": jnp.ones((2, 3), bool)},
                TypeError,
                "x must be an array of numbers, got dtype bool",
            ),
            ({"x": [1.0, 2.0]}, TypeError, "x must be an array or a number, got list"),
            ({"x": "text"}, TypeError, "x must be an array or a number, got str"),
            (
                {"where": jnp.ones((2, 3), int)},
                ValueError,
                "where must be boolean, got dtype int64",
            ),
            (
                {"where": jnp.ones(4, bool)},
                ValueError,
                r"where must broadcast .*\(2, 3\), got .*\(4,\)",
            ),
            ({"where": jnp.ones((5, 2, 3), bool)}, ValueError, "where must broadcast"),
            (
                {"algorithm": "four_pass"},
                ValueError,
                "algorithm must be one of auto, two_pass, .*'four_pass'",
            ),
            ({"algorithm": None}, ValueError, "algorithm must be one of"),
            (
                {"implementation": "cuda"},
                ValueError,
                "implementation must be None, 'native' .*'cuda'",
            ),
        ],
    )
    def test_errors_name_argument_and_value(self, arguments, error, words):
        with pytest.raises(error, match=words):
            softmax(**{"x": jnp.zeros((2, 3), jnp.float32), **arguments})

    def test_native_error_gives_the_reason(self):
        reason = "implementation='native' cannot run: .*no native kernel for dtype complex64"
        with pytest.raises(ValueError, match=reason):
            softmax(jnp.zeros(3, jnp.complex64), implementation="native")


def test_public_names():
    for name in jax_softmax2p.__all__:
        assert getattr(jax_softmax2p, name) is not None
    assert jax_softmax2p.__version__.count(".") >= 2
