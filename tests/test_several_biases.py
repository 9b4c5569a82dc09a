"""bias=(f, g): several biases, of which those of rows reach no kernel, and the formula's results."""

import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import FLOATS, FUNCTIONS, HALVES, INF, NAN, assert_close, exact, normal
from jax.experimental import jet
from jax.test_util import check_grads
from versions import since

from jax_softmax2p import Band, log_softmax, logsumexp, softmax

JAX_NN = {
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": lambda z, axis=-1, where=None: jax.nn.logsumexp(z, axis, where=where),
}


@pytest.fixture(params=FUNCTIONS)
def name(request):
    return request.param


# Shapes of terms that broadcast to (2, 3, n); 0 stands for n.
SHAPES = [
    [(3, 1), (0,)],
    [(0,), (2, 1, 1), (), (1, 3, 1)],
    [(2, 3, 1)],
    [(1, 0), (2, 1, 0)],
    [(3, 0), (2, 1, 0), (2, 1, 1)],
    [(), ()],
    [],
]


def terms(shapes, n, dtype=np.float64):
    return tuple(
        4 * normal(*(size or n for size in shape), seed=i).astype(dtype) for i, shape in enumerate(shapes)
    )


def weighted_sum(y):
    return jnp.sum(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape) * y)


class TestValues:
    @pytest.mark.long
    @pytest.mark.parametrize("shapes", SHAPES, ids=str)
    @pytest.mark.parametrize(
        ("implementation", "n", "dtype"),
        [("reference", 7, np.float64), ("native", 7, np.float64), ("native", 300, np.float32)],
    )
    def test_broadcast_by_themselves(self, shapes, n, dtype, name, implementation):
        x, biases = normal(2, 3, n).astype(dtype), terms(shapes, n, dtype)
        for scale in (None, np.array([[1], [0.5], [-2]], dtype)):
            y = FUNCTIONS[name](x, scale=scale, bias=biases, implementation=implementation)
            z = x.astype(np.longdouble) * (1 if scale is None else scale) + sum(biases)
            assert_close(name, np.asarray(y), exact(name, z), dtype, z, "reference")

    @pytest.mark.long
    @pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (2, 0), None, ()])
    @pytest.mark.parametrize("masked", [False, True])
    def test_any_axis(self, axis, masked, name, implementation):
        x, where = normal(3, 4, 5), normal(4, 5, seed=1) < 0.7 if masked else None
        biases = normal(3, 1, 1), normal(4, 1, seed=1), normal(5, seed=2), np.float64(0.5)
        y = FUNCTIONS[name](x, axis=axis, bias=biases, where=where, implementation=implementation)
        expected = JAX_NN[name](x + sum(biases), axis=axis, where=where)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)

    def test_band(self, name, implementation):
        x, f, g = normal(4, 5), normal(4, 1), normal(5)
        y = FUNCTIONS[name](x, bias=(f, g), where=Band(1, 1), implementation=implementation)
        mask = np.abs(np.subtract.outer(np.arange(4), np.arange(5))) <= 1
        np.testing.assert_allclose(y, JAX_NN[name](x + f + g, where=mask), rtol=1e-12)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
    def test_lse_that_a_row_bias_cancels(self, dtype, size):
        """hi + lo resolve it, where logits that hold the bias would be rounded to units of its size."""
        x = (size * normal(50, 40)).astype(dtype)
        total = cases.exact_logsumexp(x.astype(np.longdouble))
        f = (-total * (1 + 1e-4 * normal(50))).astype(dtype)
        y = np.asarray(logsumexp(x, -1, bias=(f[:, None],), implementation="native"))
        expected = (total + f).astype(np.float64)
        tolerance = 2 * np.finfo(dtype).eps * np.abs(expected) + cases.MIN_LOG_ERROR[np.dtype(dtype)]
        np.testing.assert_array_less(np.abs(y - expected), tolerance)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision_is_rounded_once(self, dtype, name):
        x, f, g = (3 * normal(5, 60)).astype(dtype), normal(5, 1).astype(dtype), normal(60).astype(dtype)
        y = np.asarray(FUNCTIONS[name](x, bias=(f, g), implementation="native"))
        assert y.dtype == dtype
        z = sum(v.astype(np.float32) for v in (x, f, g))
        assert cases.ulp_error(y, exact(name, z).astype(np.float64)) <= 0.51

    def test_integers(self, name, implementation):
        x = np.array([[3, 1, 2, 0]])
        y = FUNCTIONS[name](x, bias=(np.array([[2]]), np.arange(4)), implementation=implementation)
        np.testing.assert_allclose(y, exact(name, (x + 2.0) + np.arange(4)).astype(float), rtol=1e-13)

    @pytest.mark.parametrize("x_dtype", [jnp.bfloat16, np.float16, np.float32, np.int32])
    @pytest.mark.parametrize("f", [2, 2.5, np.float32(2), np.float64(2), np.int64(2), jnp.bfloat16(2)])
    def test_dtype_is_that_of_the_formula(self, x_dtype, f, name):
        x, g = jax.ShapeDtypeStruct((1, 3), x_dtype), jax.ShapeDtypeStruct((3,), jnp.bfloat16)
        for function, formula in (
            (lambda x, g: FUNCTIONS[name](x, bias=(f,)), lambda x, g: jnp.exp(x + f)),
            (lambda x, g: FUNCTIONS[name](x, bias=(f, g)), lambda x, g: jnp.exp(x + f + g)),
            (lambda x, g: FUNCTIONS[name](x, bias=(g, f)), lambda x, g: jnp.exp(x + g + f)),
        ):
            assert jax.eval_shape(function, x, g).dtype == jax.eval_shape(formula, x, g).dtype

    def test_complex_takes_them(self, name):
        x, f, g = normal(3, 4) + 1j * normal(3, 4, seed=1), normal(3, 1), normal(4)
        np.testing.assert_allclose(FUNCTIONS[name](x, bias=(f, g)), JAX_NN[name](x + f + g), rtol=1e-12)

    @pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
    def test_empty(self, shape, name, implementation):
        x, f = np.zeros(shape), np.full((shape[0], 1), NAN)
        y = FUNCTIONS[name](x, bias=(f, np.zeros(shape[1])), implementation=implementation)
        np.testing.assert_array_equal(y, np.full(shape[0], -INF) if name == "logsumexp" else x)


SPECIAL = (NAN, INF, -INF, 0.0)


def special_logits():
    """Rows of x with every combination of special values in two places, and with every special row bias."""
    rows = [
        [a, b, 1.0, -2.0, f] for a, b, f in itertools.product((*SPECIAL, -3e38), SPECIAL, (*SPECIAL, 2.0))
    ]
    rows += [[v] * 4 + [f] for v, f in itertools.product(SPECIAL, (*SPECIAL, 2.0))]
    table = np.array(rows)
    return table[:, :4], table[:, 4:]


MASKS = {
    "none": None,
    "elements": np.array([True, False, True, True]),
    "rows": np.arange(120)[:, None] % 3 > 0,
    "everything": np.array(False),
}


class TestSpecialValues:
    """Infinities and NaNs in x, in a row bias and in a bias of columns give what their sum gives."""

    @pytest.mark.long
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("column", [None, *SPECIAL])
    def test_equal_those_of_the_formula(self, column, mask, name, implementation):
        x, f = special_logits()
        where = MASKS[mask]
        where = where if where is None or where.ndim < 2 else where[: len(x)]
        g = None if column is None else np.array([0.5, column, 0.0, 1.0])
        biases = (f,) if g is None else (f, g)
        y = FUNCTIONS[name](x, where=where, bias=biases, implementation=implementation)
        with np.errstate(invalid="ignore"):
            z = x + sum(biases)
        expected = JAX_NN[name](z, where=where)
        np.testing.assert_allclose(y, expected, rtol=1e-12)

    @pytest.mark.parametrize("column", [None, INF, -INF])
    def test_under_vmap(self, column):
        x, f = special_logits()
        g = np.array([0.5, 0.0 if column is None else column, 0.0, 1.0])
        y = jax.jit(jax.vmap(lambda f: logsumexp(x, -1, bias=(f, g))))(np.stack([f, f]))
        with np.errstate(invalid="ignore"):
            z = x + f + g
        np.testing.assert_allclose(y, np.stack([jax.nn.logsumexp(z, -1)] * 2), rtol=1e-12)

    def test_two_row_biases(self, implementation):
        x, f = special_logits()
        for other in (INF, -INF, NAN):
            y = logsumexp(x, -1, bias=(f, np.float64(other)), implementation=implementation)
            with np.errstate(invalid="ignore"):
                z = x + f + other
            np.testing.assert_allclose(y, jax.nn.logsumexp(z, -1), rtol=1e-12)

    def test_gradients_of_rows_that_are_not_finite(self, name):
        """NaN, as in jax.nn, and the other rows keep theirs."""
        x, g = normal(6, 5), normal(5)
        f = np.array([0, INF, -INF, NAN, 1, NAN])[:, None]
        where = np.arange(6)[:, None] < 5
        ours = jax.jit(
            jax.grad(lambda x: weighted_sum(_finite(FUNCTIONS[name](x, where=where, bias=(f, g)))))
        )(x)
        assert np.isnan(ours[1:4]).all()
        expected = jax.jit(jax.grad(lambda x: weighted_sum(_finite(JAX_NN[name](x + f + g, where=where)))))(x)
        np.testing.assert_allclose(ours[np.array([0, 4])], expected[np.array([0, 4])], rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(ours[5], 0)

    def test_gradient_of_a_row_bias(self):
        """NaN where the logsumexp is not finite, and 0 of a masked row, whatever is added to it."""
        x = np.array([[1.0, 2.0], [NAN, 1.0], [INF, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
        f = np.array([0.5, 0.0, 0.0, INF, NAN, 1.0])[:, None]
        for where in (None, np.array([True] * 4 + [False] * 2)[:, None]):
            total = lambda f, where=where: _finite(logsumexp(x, -1, where=where, bias=(f,))).sum()
            masked = 0.0 if where is not None else None
            g = jax.jit(jax.grad(lambda f, t=total: t(f)))(f)[:, 0]
            np.testing.assert_array_equal(g[:4], [1, NAN, NAN, NAN])
            np.testing.assert_array_equal(g[4:], [NAN, 1] if masked is None else [0, 0])


def _finite(y):
    """-inf, the logarithm of what is masked, replaced: its cotangent is 0."""
    return jnp.where(y == -INF, 0, y)


class TestTransforms:
    @pytest.mark.long
    @pytest.mark.parametrize("options", [{}, {"where": Band(1, 1)}, {"axis": 0}], ids=str)
    def test_derivatives_of_two_orders(self, options, name):
        g = jax.jit(lambda x, scale, f, g: _finite(FUNCTIONS[name](x, scale=scale, bias=(f, g), **options)))
        operands = normal(3, 4), np.float64(1.5), normal(3, 1), normal(4, seed=1)
        check_grads(g, operands, order=2, modes=("fwd", "rev"))

    @pytest.mark.long
    @pytest.mark.parametrize("axis", [0, 1, (1, 2), None])
    def test_gradients_have_the_shapes_of_the_terms(self, axis, name, implementation):
        operands = normal(2, 3, 5), normal(3, 1), normal(5), normal(2, 1, 1), np.float64(0.5)
        options = {"axis": axis, "implementation": implementation}
        ours = lambda x, *biases: weighted_sum(FUNCTIONS[name](x, bias=biases, **options))
        formula = lambda x, *biases: weighted_sum(JAX_NN[name](x + sum(biases), axis=axis))
        every = tuple(range(5))
        actual_gradients = jax.jit(jax.grad(ours, every))(*operands)
        expected_gradients = jax.jit(jax.grad(formula, every))(*operands)
        for actual, expected in zip(actual_gradients, expected_gradients, strict=True):
            assert actual.shape == expected.shape
            np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-13)

    @pytest.mark.parametrize("in_axes", [(None, 0, None), (0, None, None), (None, None, 0), (1, 2, 0)])
    def test_vmap(self, in_axes, name):
        shapes = (3, 4), (3, 1), (4,)
        operands = [
            normal(*shape) if axis is None else normal(*shape[:axis], 2, *shape[axis:])
            for shape, axis in zip(shapes, in_axes, strict=True)
        ]
        actual = jax.jit(jax.vmap(lambda x, f, g: FUNCTIONS[name](x, bias=(f, g)), in_axes))(*operands)
        expected = jax.jit(jax.vmap(lambda x, f, g: JAX_NN[name](x + f + g), in_axes))(*operands)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)

    def test_jet(self, name):
        x, f, g, where = normal(3, 4), normal(3, 1), normal(4), normal(3, 4) < 1
        series = [normal(3, 1, seed=2), normal(3, 1, seed=3)]
        ours = lambda f: FUNCTIONS[name](x + f**2, bias=(f, g), where=where)
        theirs = lambda f: JAX_NN[name](x + f**2 + f + g, where=where)
        taylor = lambda function: jax.jit(lambda f: jet.jet(function, (f,), (series,)))(f)
        results = (jax.tree.leaves(taylor(function)) for function in (ours, theirs))
        for actual, expected in zip(*results, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)

    def test_export(self, name):
        x, f, g = (np.asarray(v, np.float32) for v in (normal(3, 4), normal(3, 1), normal(4)))
        rows, columns = jax.export.symbolic_shape("rows, columns")
        shapes = [
            jax.ShapeDtypeStruct(shape, np.float32) for shape in ((rows, columns), (rows, 1), (columns,))
        ]
        call = jax.jit(lambda x, f, g: FUNCTIONS[name](x, bias=(f, g)))
        y = jax.export.export(call)(*shapes).call(x, f, g)
        np.testing.assert_allclose(y, JAX_NN[name](x + f + g), rtol=1e-6, atol=1e-6)

    def test_eagerly_one_program(self, name):
        x, f, g = (jnp.asarray(v, jnp.float32) for v in (normal(3, 4), normal(3, 1), normal(4)))
        call = lambda f: FUNCTIONS[name](x, bias=(f, g, 0.5, normal(3, 1).astype("f")))
        np.testing.assert_allclose(call(f), jax.jit(call)(f), rtol=1e-6)
        with jax.disable_jit():
            np.testing.assert_allclose(call(f), jax.jit(call)(f), rtol=1e-6)

    def test_no_nan_on_the_way(self, name):
        x, f, g = normal(3, 4), normal(3, 1), normal(4)
        with jax.debug_nans(True), jax.debug_infs(True):
            FUNCTIONS[name](x, bias=(f, g))
            with jax.disable_jit():
                FUNCTIONS[name](x, bias=(f, g))


class TestMemory:
    N = (512, 1024)

    @since(jax, "0.10", "fusions that store nothing of this size")
    @pytest.mark.parametrize("axis", [0, 1])
    def test_no_array_of_the_logits_size(self, axis):
        """Neither the sum of both biases is made, nor, in the gradients of x and of the rows' bias, more."""
        x, f, g = normal(*self.N).astype("f"), normal(self.N[0], 1).astype("f"), normal(self.N[1]).astype("f")
        lse = lambda x, f, g: logsumexp(x, axis, scale=2.0, bias=(f, g), implementation="native")
        total = lambda *operands: lse(*operands).sum()
        row_bias = 1 if axis else 2
        twice = [np.stack([v, v]) if i == row_bias else v for i, v in enumerate((x, f, g))]
        of_two = jax.vmap(lse, [0 if i == row_bias else None for i in range(3)])
        for function, operands in (
            (lse, (x, f, g)),
            (jax.grad(total), (x, f, g)),
            (jax.grad(total, row_bias), (x, f, g)),
            (of_two, twice),
        ):
            compiled = jax.jit(function).lower(*operands).compile()
            assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 16

    @pytest.mark.parametrize("function", [softmax, log_softmax])
    def test_softmax_needs_none(self, function):
        x, f, g = normal(*self.N).astype("f"), normal(self.N[0], 1).astype("f"), normal(self.N[1]).astype("f")
        softmaxes = jax.jit(lambda x, f, g: function(x, bias=(f, g), implementation="native"))
        temporaries = softmaxes.lower(x, f, g).compile().memory_analysis().temp_size_in_bytes
        assert temporaries < x.nbytes / 16


class TestErrors:
    @pytest.mark.parametrize(
        ("bias", "error", "words"),
        [
            ((1.0, jnp.ones(2)), ValueError, r"bias\[1\] must broadcast to .'s shape \(2, 3\), got .*\(2,\)"),
            ((jnp.ones((4, 2, 3)), 1.0), ValueError, r"bias\[0\] must broadcast .*\(4, 2, 3\)"),
            ((1.0, 2.0, "text"), TypeError, r"bias\[2\] must be an array or a number, got str"),
            ((None,), TypeError, r"bias\[0\] must be an array or a number, got NoneType"),
            (((1.0, 2.0),), TypeError, r"bias\[0\] must be an array or a number, got tuple"),
            ((1.0, jnp.ones(3, bool)), TypeError, r"bias\[1\] must be an array of numbers, got dtype bool"),
            ((1j,), TypeError, r"bias\[0\] must be real, got dtype complex"),
        ],
    )
    def test_name_the_term(self, bias, error, words, name):
        x = jnp.ones((2, 3))
        for function in (FUNCTIONS[name], jax.jit(FUNCTIONS[name], static_argnames="bias")):
            if function is not FUNCTIONS[name] and any(isinstance(b, jax.Array) for b in bias):
                continue
            with pytest.raises(error, match=words):
                function(x, bias=bias)
