"""log_softmax and logsumexp, and what softmaxes have in common: scale, bias, masks and the band."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_softmax2p import Band, log_softmax, logsumexp, softmax

FLOATS = [np.float32, np.float64]
HALVES = [jnp.bfloat16, np.float16]
NAN, INF = float("nan"), float("inf")

# The kernels change at 128 elements, at 4096 and at 32768.
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


@pytest.fixture(params=FUNCTIONS)
def name(request):
    return request.param


def exact(name, z, mask=None):
    """The function of this name of logits along the last axis, in np.longdouble, by its definition.

    Rows without a True give zeros, or -inf for logarithms; rows of nothing but -inf are NaN.
    """
    mask = np.broadcast_to(True if mask is None else mask, z.shape)
    kept = np.where(mask, z, -INF).astype(np.longdouble)
    if name == "logsumexp":
        return cases.exact_logsumexp(kept)
    with np.errstate(invalid="ignore"):
        log = np.where(mask, cases.exact_log_softmax(kept), -INF)
    return np.exp(log) if name == "softmax" else log


def assert_close(name, actual, expected, dtype, z=None, implementation="native"):
    """Within what either implementation is good for: exact errors are numerics/'s to find.

    The reference rounds x - max(x), which costs an exponential as many ULP as it is large.
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


def special_rows(n, dtype):
    """Rows whose results are none of arithmetic's: (what it is, the row, log_softmax, logsumexp)."""
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
    """Rows at the edges of the format whose results are numbers."""
    limits = np.finfo(dtype)
    row = normal(n).astype(dtype)
    yield "all finfo.min", np.full(n, limits.min)
    yield "all finfo.max", np.full(n, limits.max)
    yield "all 0", np.zeros(n, dtype)
    yield "one kept among -inf", np.where(np.arange(n) == n - 1, row, -INF)
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


@every_length
class TestEdges:
    def test_log_softmax_of_special_rows(self, n, dtype, implementation):
        rows = list(special_rows(n, dtype))
        x, y = call_rows(log_softmax, rows, dtype, implementation=implementation)
        like_jax = np.asarray(jax.nn.log_softmax(x))
        for (what, _, expected, _), actual, theirs in zip(rows, y, like_jax, strict=True):
            np.testing.assert_array_equal(actual, np.full(n, expected), err_msg=what)
            np.testing.assert_array_equal(actual, theirs, err_msg=what)

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
        with np.errstate(over="ignore"):  # From finfo.max down to finfo.min it is further than that.
            expected = exact(name, x).astype(dtype)
        for (what, _), row, actual, wanted in zip(rows, x, y, expected, strict=True):
            assert actual.dtype == dtype
            largest = abs(float(row.max()))
            unit = float(np.finfo(dtype).eps)
            # Offsets are exact differences, and those not large.
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
def test_no_row_is_harmed_by_its_neighbours(n, dtype, name, implementation):
    """Short rows are computed together, and those that a guard takes out once more."""
    x = normal(40, n).astype(dtype)
    spoilt = x.copy()
    spoilt[3, 0], spoilt[4, n - 1], spoilt[11], spoilt[26], spoilt[39, n // 2] = NAN, INF, -INF, 3e38, NAN
    function = functools.partial(FUNCTIONS[name], implementation=implementation)
    kept = np.delete(np.arange(40), [3, 4, 11, 26, 39])
    np.testing.assert_array_equal(np.asarray(function(spoilt))[kept], np.asarray(function(x))[kept])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 16, 129, 5000])
def test_no_log_probability_is_above_zero(n, dtype, implementation):
    """As in jax.nn: users take sqrt(-y) and log(-y). A dominating element's is 0, as its probability is 1."""
    x = normal(40, n).astype(dtype)
    x[:, n // 2] = np.random.default_rng(0).uniform(100, 3000, 40)
    y = np.asarray(log_softmax(x, implementation=implementation))
    np.testing.assert_array_equal(y[:, n // 2], 0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n", [7, 300, 5000])
def test_half_precision_is_rounded_once(dtype, n, name):
    x = (3 * normal(4, n)).astype(dtype)
    y = np.asarray(FUNCTIONS[name](x))
    assert y.dtype == dtype
    # A float32's error is 2**-13 of a unit of float16; a result near 0 has some of the largest logit's.
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


@pytest.mark.parametrize("axis", AXES)
def test_log_softmax_along_any_axis(axis, implementation):
    x = normal(4, 5, 6).astype(np.float32)
    axes = tuple(range(3)) if axis is None else axis
    wide = x.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axes, keepdims=True))
    y = log_softmax(x, axis, implementation=implementation)
    assert_close("log_softmax", y, expected, np.float32, x)


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
    # The logarithm of an empty sum; an empty batch has none.
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(total, np.log(np.exp(x).sum(axis)))
    assert total.dtype == dtype


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_empty_with_operands(shape, name, implementation):
    """Rows without elements, no rows, and a scale, a bias and masks of no size."""
    x, mask = np.zeros(shape, np.float32), np.ones(shape, bool)
    y = FUNCTIONS[name](x, where=mask, scale=2.0, bias=x, implementation=implementation)
    banded = FUNCTIONS[name](x, where=Band(), implementation=implementation)
    expected = np.full(shape[:1], -INF) if name == "logsumexp" else x
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(banded, expected)


# jax.nn's own: it takes -inf for the maximum of no integers.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
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


class TestArgumentsOfLogsumexp:
    @pytest.mark.parametrize("axis", [None, 0, (0, 1)])
    def test_signs(self, axis, implementation):
        x = np.array([[1.0, -INF, NAN, INF], [2.0, -INF, 0.0, 1.0]])
        actual = logsumexp(x, axis, return_sign=True, implementation=implementation)
        for ours, theirs in zip(actual, jax.nn.logsumexp(x, axis, return_sign=True), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=1e-14)

    @pytest.mark.parametrize("b", [-0.5, np.array([1.0, -2, 0, 3]), np.array([[2.0], [-1]])])
    @pytest.mark.parametrize("return_sign", [False, True])
    def test_factors(self, b, return_sign):
        x = normal(2, 4)
        for options in ({}, {"where": np.array([True, False, True, True])}, {"keepdims": True}):
            actual = logsumexp(x, -1, b, return_sign=return_sign, **options)
            expected = jax.nn.logsumexp(x, -1, b, return_sign=return_sign, **options)
            jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs), actual, expected)

    def test_factors_with_scale_and_bias(self):
        x, bias, b = normal(2, 4), normal(4, seed=1), np.abs(normal(4, seed=2))
        expected = np.log((b * np.exp(3 * x + bias)).sum(-1))
        np.testing.assert_allclose(logsumexp(x, -1, b, scale=3, bias=bias), expected, rtol=1e-13)
        lower = np.log((b * np.exp(x) * np.tri(2, 4)).sum(-1))
        np.testing.assert_allclose(logsumexp(x, -1, b, where=Band()), lower, rtol=1e-13)

    def test_factors_have_no_native_kernel(self):
        with pytest.raises(ValueError, match=r"implementation='native' cannot run: .*with b"):
            logsumexp(normal(3), b=2.0, implementation="native")


def masked_input(shape, mask, dtype, seed=0):
    """Logits, with what may harm nothing behind the mask."""
    x = normal(*shape, seed=seed).astype(dtype)
    hidden = np.resize([NAN, INF, 1.0, -INF, 3e38], shape)
    return np.where(mask, x, hidden).astype(dtype)


# Shapes against (2, 3, n); 0 stands for n.
MASK_SHAPES = [(0,), (3, 1), (2, 1, 1), (3, 0), (2, 3, 0), (2, 1, 0), ()]


def merged(x, axis):
    """The axes at the end, as one."""
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    moved = np.moveaxis(x, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)


def sized(shape, n):
    return tuple(size or n for size in shape)


class TestWhere:
    @pytest.mark.parametrize("shape", MASK_SHAPES)
    @pytest.mark.parametrize(("implementation", "n"), [("reference", 7), ("native", 7), ("native", 300)])
    def test_broadcasts(self, shape, n, name, implementation):
        mask = np.random.default_rng(n).random(sized(shape, n)) < 0.6
        x = masked_input((2, 3, n), mask, np.float32)
        y = np.asarray(FUNCTIONS[name](x, where=mask, implementation=implementation))
        assert_close(name, y, exact(name, x, mask), np.float32, x, implementation)

    @every_length
    def test_masks_of_every_kind(self, n, dtype, name, implementation):
        """Rows that keep nothing, one element, the first half, the last half, a few, and all."""
        i = np.arange(n)
        mask = np.stack([i < 0, i == n // 2, i < n // 2, i >= n // 2, i % 7 == 3, i >= 0])
        x = masked_input((6, n), mask, dtype)
        y = np.asarray(FUNCTIONS[name](x, where=mask, implementation=implementation))
        assert_close(name, y, exact(name, x, mask), dtype, np.where(mask, x, 0), implementation)

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
    def test_special_values_that_are_not_masked(self, n, implementation):
        """The mask of a row that is -inf, NaN or +inf where it is kept."""
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
    @pytest.mark.parametrize("shape", SCALE_SHAPES)
    @pytest.mark.parametrize(("implementation", "n"), [("reference", 7), ("native", 7), ("native", 300)])
    def test_scale_broadcasts(self, shape, n, name, implementation):
        x, scale = normal(2, 3, n).astype(np.float32), (1 + 3 * normal(*shape)).astype(np.float32)
        y = np.asarray(FUNCTIONS[name](x, scale=scale, implementation=implementation))
        z = scale * x
        assert_close(name, y, exact(name, z), np.float32, z, "reference")

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
    def test_together_with_a_mask(self, scale_shape, bias_shape, name, implementation):
        """Each with strides of its own through the rows."""
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
            kept = np.where(mask, z, 0)
            assert_close(name, y, exact(name, z, mask), np.float64, kept, "reference")

    @every_length
    def test_every_length(self, n, dtype, name, implementation):
        """A power of two for a scale, so that z is rounded but once whatever the instruction set."""
        x, bias = 4 * normal(3, n).astype(dtype), normal(n, seed=1).astype(dtype)
        scale = np.array([[0.25], [2.0], [-1.0]], dtype)
        y = np.asarray(FUNCTIONS[name](x, scale=scale, bias=bias, implementation=implementation))
        z = scale * x + bias
        assert_close(name, y, exact(name, z), dtype, z, implementation)

    @pytest.mark.parametrize("axis", [0, (0, 1), (1, 2), None])
    def test_any_axis(self, axis, name, implementation):
        x = normal(3, 4, 5)
        axes = (0, 1, 2) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        scale = 1 + normal(*(1 if i in axes else size for i, size in enumerate(x.shape)))
        # The one varies along all of the axes or a part of them, the other along none.
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

    @pytest.mark.parametrize("n", [4, 130, 5000])
    def test_minus_infinity_in_the_bias_masks(self, n, name, implementation):
        bias = np.where(np.random.default_rng(0).random((3, n)) < 0.5, 0, -INF).astype(np.float32)
        bias[1] = -INF
        bias[2, 0] = 0
        x = normal(3, n).astype(np.float32)
        y = np.asarray(FUNCTIONS[name](x, bias=bias, implementation=implementation))
        with np.errstate(invalid="ignore"):
            expected = exact(name, x + bias)
        expected[1] = -INF if name == "logsumexp" else NAN
        assert_close(name, y, expected, np.float32, x, implementation)
        # Of size 1 along the axis it takes out whole rows.
        y = np.asarray(FUNCTIONS[name](x, bias=bias[:, 1:2], implementation=implementation))
        lost = np.isinf(bias[:, 1])
        expected = exact(name, x)
        expected[lost] = -INF if name == "logsumexp" else NAN
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
    def test_the_result_has_the_dtype_of_the_formula(self, x_dtype, operand, name):
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
    @pytest.mark.parametrize(("before", "after"), BANDS)
    @pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
    def test_is_the_mask_that_it_describes(self, shape, before, after, name, implementation):
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
    def test_bad_limits(self, limits, words):
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
    def test_say_which_argument_and_value(self, arguments, error, words, name):
        with pytest.raises(error, match=words):
            FUNCTIONS[name](X, **arguments)

    @pytest.mark.parametrize("bad", [jnp.ones((2, 3), bool), [1.0, 2.0], "text"])
    def test_logits_go_by_their_name(self, bad, name):
        with pytest.raises(TypeError, match=f"^{'a' if name == 'logsumexp' else 'x'} must be an array"):
            FUNCTIONS[name](bad)

    def test_band_of_a_vector(self, name):
        with pytest.raises(ValueError, match=r"needs . of two dimensions at least, got shape \(3,\)"):
            FUNCTIONS[name](X[0], where=Band())

    def test_scalar_with_an_axis(self, name):
        with pytest.raises(ValueError, match="axis -1 is out of range for an array of 0 dim"):
            FUNCTIONS[name](jnp.float32(1))

    def test_native_says_why_not(self, name):
        with pytest.raises(ValueError, match="implementation='native' cannot run: "):
            FUNCTIONS[name](jnp.zeros(3, jnp.complex64), implementation="native")
