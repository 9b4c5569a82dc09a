"""log_softmax and logsumexp as users call them."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import FLOATS, FUNCTIONS, HALVES, INF, NAN, assert_close, every_length, exact, natively, normal

from jax_softmax2p import Band, log_softmax, logsumexp


@pytest.fixture(params=FUNCTIONS)
def name(request):
    return request.param


def special_rows(n, dtype):
    """Rows whose results are not finite: (description, row, log_softmax, logsumexp)."""
    row = normal(n).astype(dtype)

    def put(*values, into=row):
        changed = into.copy()
        for value, at in values:
            changed[at] = value
        return changed

    for at in {0, n // 2, n - 1}:
        yield f"NaN at {at}", put((NAN, at)), NAN, NAN
        yield f"+inf at {at}", put((INF, at)), NAN, INF
        yield f"NaN among -inf at {at}", put((NAN, at), into=np.full(n, -INF, dtype)), NAN, NAN
        yield f"+inf among -inf at {at}", put((INF, at), into=np.full(n, -INF, dtype)), NAN, INF
        if n > 1:
            yield f"+inf at {at} and NaN", put((INF, at), (NAN, at - 1)), NAN, NAN
            yield f"+inf at {at} and -inf", put((INF, at), (-INF, at - 1)), NAN, INF
    yield "all NaN", np.full(n, NAN, dtype), NAN, NAN
    yield "all +inf", np.full(n, INF, dtype), NAN, INF
    yield "all -inf", np.full(n, -INF, dtype), NAN, -INF


def ordinary_rows(n, dtype):
    """Rows at the limits of the format, whose results are finite: (description, row)."""
    limits = np.finfo(dtype)
    row = normal(n).astype(dtype)
    yield "all finfo.min", np.full(n, limits.min)
    yield "all finfo.max", np.full(n, limits.max)
    yield "all 0", np.zeros(n, dtype)
    yield "one finite among -inf", np.where(np.arange(n) == n - 1, row, -INF)
    for at in {0, n // 2, n - 1}:
        elsewhere = np.arange(n) != at
        yield f"finfo.max at {at}, finfo.min elsewhere", np.where(elsewhere, limits.min, limits.max)
        yield f"1e30 at {at}, -1e30 elsewhere", np.where(elsewhere, -1e30, 1e30)
        for fill in (-INF, limits.min, 0.7 * limits.min, -1e30, -1e9):
            yield f"{fill} but at {at}", np.where((np.arange(n) % 3 == 1) & elsewhere, fill, row)
    unit = 2.0 ** (np.ceil(np.log2(1e9)) - limits.nmant)
    for offset in (1e6, 5e7, 1e9, -1e9):
        yield f"offset {offset}", offset + unit * np.round(3 * row)


def call_rows(function, rows, dtype, **options):
    x = np.stack([row for _, row, *_ in rows]).astype(dtype)
    return x, np.asarray(function(x, **options))


@pytest.mark.long(n=33, dtype=np.float32)
@pytest.mark.parametrize("n", [3, 5, 33, 100, 128, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logsumexp_with_its_gradient_of_special_rows_in_a_loop(n, dtype):
    """Small rows in loops take the reference, whose value and derivative share a sum."""
    rows = list(special_rows(n, dtype))
    x = np.stack([row for _, row, *_ in rows])
    values, gradients = jax.lax.map(jax.value_and_grad(lambda row: logsumexp(row, -1)), x)
    theirs = jax.lax.map(jax.grad(jax.nn.logsumexp), x)
    for (what, *_, expected), value, gradient, of_jax in zip(rows, values, gradients, theirs, strict=True):
        np.testing.assert_array_equal(value, expected, err_msg=what)
        np.testing.assert_array_equal(gradient, of_jax, err_msg=what)


@every_length
class TestEdges:
    def test_log_softmax_of_special_rows(self, n, dtype, implementation):
        rows = list(special_rows(n, dtype))
        x, y = call_rows(log_softmax, rows, dtype, implementation=implementation)
        like_jax = np.asarray(jax.nn.log_softmax(x))
        for (what, _, expected, _), actual, theirs in zip(rows, y, like_jax, strict=True):
            np.testing.assert_array_equal(actual, np.full(n, expected), err_msg=what)
            np.testing.assert_array_equal(actual, theirs, err_msg=what)

    @pytest.mark.long
    def test_logsumexp_of_special_rows(self, n, dtype, implementation):
        rows = list(special_rows(n, dtype))
        x, y = call_rows(logsumexp, rows, dtype, axis=-1, implementation=implementation)
        like_jax = np.asarray(jax.nn.logsumexp(x, -1))
        for (what, *_, expected), actual, theirs in zip(rows, y, like_jax, strict=True):
            np.testing.assert_array_equal(actual, expected, err_msg=what)
            np.testing.assert_array_equal(actual, theirs, err_msg=what)

    def test_ordinary_rows(self, n, dtype, name, implementation):
        rows = list(ordinary_rows(n, dtype))
        x, y = call_rows(FUNCTIONS[name], rows, dtype, implementation=implementation)
        with np.errstate(over="ignore"):  # finfo.max - finfo.min is beyond the format.
            expected = exact(name, x).astype(dtype)
        for (what, _), row, actual, wanted in zip(rows, x, y, expected, strict=True):
            assert actual.dtype == dtype
            largest = abs(float(row.max()))
            unit = float(np.finfo(dtype).eps)
            # At an offset the differences between logits are exact, and small.
            if name == "softmax":
                tolerance = {"rtol": 64 * unit, "atol": 1e-37}
            elif name == "log_softmax":
                tolerance = {"rtol": 8 * unit, "atol": 8 * unit if largest < 1e5 else 16 * unit}
            else:
                tolerance = {"rtol": 4 * unit, "atol": 4 * unit}
            np.testing.assert_allclose(actual, wanted, **tolerance, err_msg=what)


@natively
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [2, 100, 5000])
def test_rows_do_not_affect_each_other(n, dtype, name, implementation):
    """Small rows are computed together, and rows that the guard finds are computed again."""
    x = normal(40, n).astype(dtype)
    changed = x.copy()
    changed[3, 0], changed[4, n - 1], changed[11], changed[26], changed[39, n // 2] = (
        NAN,
        INF,
        -INF,
        3e38,
        NAN,
    )
    function = functools.partial(FUNCTIONS[name], implementation=implementation)
    others = np.delete(np.arange(40), [3, 4, 11, 26, 39])
    np.testing.assert_array_equal(np.asarray(function(changed))[others], np.asarray(function(x))[others])


@pytest.mark.long(n=16, dtype=np.float32)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 16, 129, 5000])
def test_log_softmax_is_never_positive(n, dtype, implementation):
    """As in jax.nn, since users take sqrt(-y) and log(-y)."""
    x = normal(40, n).astype(dtype)
    x[:, n // 2] = np.random.default_rng(0).uniform(100, 3000, 40)
    y = np.asarray(log_softmax(x, implementation=implementation))
    assert (y <= 0).all()
    # That of the dominating element, with which the probability of all others is below e^-90.
    assert (y[:, n // 2] > -1e-38).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n", [7, 300, 5000])
def test_half_precision_is_rounded_once(dtype, n, name):
    x = (3 * normal(4, n)).astype(dtype)
    y = np.asarray(FUNCTIONS[name](x))
    assert y.dtype == dtype
    # The float32 error is 2**-13 units of float16; a result near 0 carries some of the largest logit's error.
    error = cases.ulp_error(y, exact(name, x).astype(np.float64))
    assert error <= 0.51


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_edges(dtype):
    x = np.array([[1, NAN, 2], [1, INF, 2], [-INF, -INF, -INF], [1, -INF, 1]], dtype)
    np.testing.assert_array_equal(logsumexp(x, -1)[:3].astype(float), [NAN, INF, -INF])
    y = np.asarray(log_softmax(x), float)
    assert np.isnan(y[:3]).all()
    np.testing.assert_allclose(y[3], [-np.log(2), -INF, -np.log(2)], rtol=1e-2)


AXES = [*range(-3, 3), (0, 1), (-1, 0), (1, -3), (0, 1, 2), None, ()]


@pytest.mark.long
@pytest.mark.parametrize("axis", AXES)
def test_log_softmax_along_any_axis(axis, implementation):
    x = normal(4, 5, 6).astype(np.float32)
    axes = tuple(range(3)) if axis is None else axis
    wide = x.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axes, keepdims=True))
    y = log_softmax(x, axis, implementation=implementation)
    assert_close("log_softmax", y, expected, np.float32, x)


@pytest.mark.long(axis=1)
@pytest.mark.parametrize("axis", AXES)
def test_logsumexp_along_any_axis(axis, implementation):
    x = normal(4, 5, 6).astype(np.float32)
    for keepdims in (False, True):
        expected = np.log(np.exp(x.astype(np.float64)).sum(axis, keepdims=keepdims))
        y = logsumexp(x, axis, keepdims=keepdims, implementation=implementation)
        assert y.shape == expected.shape
        assert_close("logsumexp", y, expected, np.float32, x)


@pytest.mark.parametrize("shape", [(2, 300, 7), (5000, 2), (1, 4, 1)])
def test_long_axes_that_are_not_last(shape, name, implementation):
    x = normal(*shape).astype(np.float32)
    axis = len(shape) - 2
    y = np.asarray(FUNCTIONS[name](x, axis=axis, implementation=implementation))
    expected = exact(name, np.moveaxis(x, axis, -1))
    expected = expected if name == "logsumexp" else np.moveaxis(expected, -1, axis)
    assert_close(name, y, expected, np.float32, x, implementation)


def test_scalars_over_no_axes(implementation):
    assert log_softmax(jnp.float32(3), axis=None, implementation=implementation) == 0
    assert logsumexp(jnp.float32(3), implementation=implementation) == 3
    assert logsumexp(3.0, implementation=implementation) == 3


@pytest.mark.parametrize(
    ("shape", "axis"), [((0,), 0), ((3, 0), 1), ((3, 0), 0), ((2, 0, 3), 1), ((2, 0, 3), 2), ((2, 0), None)]
)
def test_empty(shape, axis, implementation):
    dtype = np.float64 if axis == 0 else np.float32
    x = np.zeros(shape, dtype)
    y = log_softmax(x, axis, implementation=implementation)
    assert (y.shape, y.dtype) == (shape, dtype)
    total = logsumexp(x, axis, implementation=implementation)
    # An empty axis gives the logarithm of an empty sum; an empty batch gives no result.
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(total, np.log(np.exp(x).sum(axis)))
    assert total.dtype == dtype


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_empty_with_operands(shape, name, implementation):
    """Rows without elements and arrays without rows, with scale, bias and masks of no elements."""
    x, mask = np.zeros(shape, np.float32), np.ones(shape, bool)
    y = FUNCTIONS[name](x, where=mask, scale=2.0, bias=x, implementation=implementation)
    banded = FUNCTIONS[name](x, where=Band(), implementation=implementation)
    expected = np.full(shape[:1], -INF) if name == "logsumexp" else x
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(banded, expected)


# The warning is jax.nn's, which takes -inf as the maximum of no integers.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.long(dtype="int32")
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint64"])
def test_integers_promote_as_in_jax_nn(dtype, implementation):
    limits = np.iinfo(dtype)
    x = np.array([[3, 1, 2, 0], [limits.max, limits.max - 1, limits.min, limits.min]], dtype)
    y = log_softmax(x, implementation=implementation)
    assert y.dtype == jax.eval_shape(jax.nn.log_softmax, x).dtype
    near = np.array([[3.0, 1, 2, 0], [0, -1, -INF, -INF]])
    expected = exact("log_softmax", near)
    expected[1, 2:] = expected[1, 0] - (float(limits.max) - float(limits.min))
    np.testing.assert_allclose(y, expected.astype(float), rtol=4e-3 if limits.bits == 8 else 1e-6)

    total = logsumexp(x, -1, implementation=implementation)
    assert total.dtype == jax.nn.logsumexp(x, -1).dtype
    expected = exact("logsumexp", near) + np.array([0, float(limits.max)])
    np.testing.assert_allclose(total, expected.astype(float), rtol=4e-3 if limits.bits == 8 else 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_float8_is_rounded_once(dtype, name):
    x = jnp.array([1.0, 2.0, 4.0, 0.5], dtype)
    y = FUNCTIONS[name](x)
    assert y.dtype == dtype
    expected = exact(name, np.asarray(x, np.float64)).astype(np.float64)
    np.testing.assert_array_equal(y.astype(jnp.float32), jnp.asarray(expected, dtype).astype(jnp.float32))


def test_complex():
    x = jnp.asarray(normal(3, 4) + 1j * normal(3, 4, seed=1))
    np.testing.assert_allclose(log_softmax(x), jax.nn.log_softmax(x), rtol=1e-12)
    np.testing.assert_allclose(logsumexp(x, -1), jax.nn.logsumexp(x, -1), rtol=1e-12)


class TestLogsumexpArguments:
    @pytest.mark.parametrize("axis", [None, 0, (0, 1)])
    def test_return_sign(self, axis, implementation):
        x = np.array([[1.0, -INF, NAN, INF], [2.0, -INF, 0.0, 1.0]])
        actual = logsumexp(x, axis, return_sign=True, implementation=implementation)
        for ours, theirs in zip(actual, jax.nn.logsumexp(x, axis, return_sign=True), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=1e-14)

    @pytest.mark.long
    @pytest.mark.parametrize("b", [-0.5, np.array([1.0, -2, 0, 3]), np.array([[2.0], [-1]])])
    @pytest.mark.parametrize("return_sign", [False, True])
    def test_b(self, b, return_sign):
        x = normal(2, 4)
        for options in ({}, {"where": np.array([True, False, True, True])}, {"keepdims": True}):
            actual = logsumexp(x, -1, b, return_sign=return_sign, **options)
            expected = jax.nn.logsumexp(x, -1, b, return_sign=return_sign, **options)
            jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs), actual, expected)

    def test_b_with_scale_and_bias(self):
        x, bias, b = normal(2, 4), normal(4, seed=1), np.abs(normal(4, seed=2))
        expected = np.log((b * np.exp(3 * x + bias)).sum(-1))
        np.testing.assert_allclose(logsumexp(x, -1, b, scale=3, bias=bias), expected, rtol=1e-13)
        lower = np.log((b * np.exp(x) * np.tri(2, 4)).sum(-1))
        np.testing.assert_allclose(logsumexp(x, -1, b, where=Band()), lower, rtol=1e-13)
