"""Derivatives, batching and control flow of every function, in every operand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_softmax2p as s2p
from jax_softmax2p import Band, SumExp

NAN, INF = float("nan"), float("inf")


def array(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def assert_close(actual, expected, tolerance=1e-13):
    """Asserts errors relative to the largest number of the whole tree, since a sum of 0 is only nearly 0."""
    expected = jax.tree.map(lambda v: np.asarray(v, np.float64), expected)
    largest = max(np.abs(v).max(initial=1e-300) for v in jax.tree.leaves(expected))
    assert np.isfinite(largest)

    def check(actual, expected):
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=tolerance * largest, rtol=0)

    jax.tree.map(check, actual, expected)


def without_infinities(y):
    """Replaces -inf, the logarithm of masked elements, which has no numerical derivative."""
    return jnp.where(jnp.isinf(y), 0, y)


def logarithms(x, **options):
    return without_infinities(s2p.log_softmax(x, **options))


def logsumexps(x, axis=-1, **options):
    return without_infinities(s2p.logsumexp(x, axis, **options))


def sums(x, **options):
    return without_infinities(s2p.sum_exp(x, **options).log())


FUNCTIONS = {"softmax": s2p.softmax, "log_softmax": logarithms, "logsumexp": logsumexps}

# The same functions by jax.nn.
PLAIN = {
    "softmax": jax.nn.softmax,
    "log_softmax": lambda z, **options: without_infinities(jax.nn.log_softmax(z, **options)),
    "logsumexp": lambda z, axis=-1, where=None: without_infinities(jax.nn.logsumexp(z, axis, where=where)),
}


@pytest.fixture(params=FUNCTIONS)
def name(request):
    return request.param


@pytest.fixture
def f(name, implementation):
    return functools.partial(FUNCTIONS[name], implementation=implementation)


MASK = np.array([[True, False, True, True], [False] * 4, [True, True, False, True]])


# JAX itself differentiates implementation="reference"; these tests are of the rules of the primitives.
@pytest.mark.long
class TestCheckGrads:
    """Derivatives in all operands at once: a mistake in any of them shows in every direction."""

    @pytest.mark.parametrize(
        "options", [{}, {"where": MASK}, {"where": Band(1, 1), "axis": -1}, {"axis": 0}], ids=str
    )
    def test_with_respect_to_x_scale_and_bias(self, name, options):
        scale = 1 + (array(1, 4) if options.get("axis") == 0 else array(3, 1))
        g = jax.jit(lambda x, scale, bias: FUNCTIONS[name](x, scale=scale, bias=bias, **options))
        check_grads(g, (array(3, 4), scale, array(4, seed=1)), order=2, modes=("fwd", "rev"))

    @pytest.mark.parametrize("where", [None, MASK[2:]])
    def test_cross_entropy_with_respect_to_logits_and_labels(self, where):
        g = jax.jit(lambda x, labels: s2p.softmax_cross_entropy(x, labels, where=where))
        check_grads(g, (array(3, 4), array(3, 4, seed=1)), order=2, modes=("fwd", "rev"))

    @pytest.mark.parametrize("where", [None, MASK[2:]])
    def test_cross_entropy_with_integer_labels(self, where):
        loss = functools.partial(s2p.softmax_cross_entropy_with_integer_labels, where=where)
        g = jax.jit(lambda x: loss(x, np.array([0, -1, 3])))
        check_grads(g, (array(3, 4),), order=2, modes=("fwd", "rev"))

    def test_sum_exp(self):
        def g(x, y):
            total = (
                s2p.sum_exp(x, where=MASK).combine(s2p.sum_exp(20 * y)).combine(SumExp.empty((3,), x.dtype))
            )
            return total.reduce().log()

        check_grads(jax.jit(g), (array(3, 4), array(3, 4, seed=1)), order=2, modes=("fwd", "rev"))

    def test_logsumexp_with_factors(self):
        g = jax.jit(lambda x, b: s2p.logsumexp(x, -1, jnp.exp(b), scale=2.0))
        check_grads(g, (array(3, 4), array(4, seed=1)), order=2, modes=("fwd", "rev"))


def weighted_sum(y):
    """A sum with different weights, so that derivatives of different entries do not cancel."""
    return jnp.sum(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape) * y)


def gradients(function):
    return jax.jit(jax.grad(lambda *operands: weighted_sum(function(*operands)), (0, 1, 2)))


@pytest.mark.long
@pytest.mark.parametrize(("n", "masked"), [(7, False), (130, True), (5000, False), (5000, True)])
def test_float32_gradients_equal_those_of_the_formula(n, masked, name):
    f = FUNCTIONS[name]
    mask = np.random.default_rng(0).random((3, n)) < 0.7 if masked else None
    operands = [array(3, n), 1 + array(3, 1) / 2, array(n, seed=1)]
    expected = gradients(lambda x, scale, bias: PLAIN[name](scale * x + bias, where=mask))(*operands)
    actual = gradients(lambda x, scale, bias: f(x, scale=scale, bias=bias, where=mask))(
        *(v.astype(jnp.float32) for v in operands)
    )
    assert [g.dtype for g in actual] == [jnp.float32] * 3
    # The scale's gradient contains sums of n products.
    assert_close(actual, expected, 1e-6 * np.sqrt(n))


@pytest.mark.long
@pytest.mark.parametrize(
    ("scale_shape", "bias_shape"),
    [
        ((), (5,)),
        ((2, 1, 1), (3, 5)),
        ((2, 3, 1), ()),
        ((1, 3, 1), (2, 3, 1)),
    ],
)
def test_gradients_have_the_shapes_of_their_operands(scale_shape, bias_shape, name):
    """Gradients are summed over the dimensions along which an operand was broadcast."""
    operands = [array(2, 3, 5), 1 + array(*scale_shape) / 2, array(*bias_shape, seed=1)]
    expected = gradients(lambda x, scale, bias: PLAIN[name](scale * x + bias))(*operands)
    actual = gradients(lambda x, scale, bias: FUNCTIONS[name](x, scale=scale, bias=bias))(*operands)
    assert [g.shape for g in actual] == [v.shape for v in operands]
    assert_close(actual, expected)


@pytest.mark.parametrize("axis", [0, (0, 2)])
def test_gradients_along_any_axis(axis, name):
    f = FUNCTIONS[name]
    axes = axis if isinstance(axis, tuple) else (axis,)
    scale = 1 + array(*(1 if i in axes else size for i, size in enumerate((2, 3, 5)))) / 2
    operands = [array(2, 3, 5), scale, array(3, 1, seed=1)]
    mask = np.random.default_rng(0).random((3, 5)) < 0.7
    expected = gradients(lambda x, scale, bias: PLAIN[name](scale * x + bias, axis=axis, where=mask))(
        *operands
    )
    actual = gradients(lambda x, scale, bias: f(x, scale=scale, bias=bias, axis=axis, where=mask))(*operands)
    assert_close(actual, expected)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gradients(dtype, name):
    operands = [array(3, 20), 1 + array(3, 1) / 4, array(20, seed=1)]
    rounded = [v.astype(dtype) for v in operands]
    expected = gradients(lambda x, scale, bias: PLAIN[name](scale * x + bias))(
        *(v.astype(jnp.float64) for v in rounded)
    )
    actual = gradients(lambda x, scale, bias: FUNCTIONS[name](x, scale=scale, bias=bias))(*rounded)
    assert [g.dtype for g in actual] == [dtype] * 3
    assert_close(actual, expected, 16 * float(jnp.finfo(dtype).eps))


@pytest.mark.long
@pytest.mark.parametrize(("n", "kind"), [(6, "element"), (200, "element"), (6, "row"), (6, "band")])
def test_masked_values_do_not_reach_derivatives(n, kind, name):
    """NaN and infinities at masked positions of x and bias affect no first or second derivative."""
    if kind == "element":
        mask = np.random.default_rng(0).random((4, n)) < 0.6
        mask[1] = False
    elif kind == "row":
        mask = np.array([[True], [False], [True], [False]])
    else:
        mask = np.tri(4, n, dtype=bool)
    f = FUNCTIONS[name]
    where = Band() if kind == "band" else mask
    masked_values = np.resize([NAN, INF, -INF, 3e38], (4, n))
    clean = [array(4, n), 1 + array(4, 1) / 2, array(4, n, seed=1)]
    filled = [
        jnp.where(mask, clean[0], masked_values),
        clean[1],
        jnp.where(mask, clean[2], masked_values[::-1]),
    ]
    directions = [array(*v.shape, seed=2) for v in clean]

    def derivatives(g):
        first = jax.jvp(g, operands, directions)[1]
        return *jax.jvp(gradients(g), operands, directions), first

    operands = clean
    expected = jax.jit(lambda: derivatives(lambda x, s, b: PLAIN[name](s * x + b, where=mask)))()
    operands = filled
    actual = jax.jit(lambda: derivatives(lambda x, s, b: f(x, scale=s, bias=b, where=where)))()
    jax.tree.map(assert_close, actual, expected)
    for gradient in (actual[0][0], actual[0][2]):
        np.testing.assert_array_equal(np.where(mask, 0, gradient), 0)


class TestMaskedLosses:
    """Padding rows give a loss of 0 and no gradient, whatever they contain."""

    ELEMENTS = np.array([[True, True, False, True], [False] * 4, [True] * 4])
    ROWS = np.array([True, False, True])

    @pytest.mark.parametrize("where", [ELEMENTS, ROWS], ids=["elements", "rows"])
    def test_integer_labels(self, where, implementation):
        x, labels = array(3, 4), np.array([0, 1, 2])
        mask = where if where.ndim == 2 else where[:, None]
        loss = lambda x: s2p.softmax_cross_entropy_with_integer_labels(
            x, labels, where=where, implementation=implementation
        )

        def plain(x):
            rows = jax.nn.logsumexp(x, -1, where=mask) - x[np.arange(3), labels]
            return jnp.where(mask.any(-1), rows, 0)

        filled = jnp.where(mask, x, np.resize([NAN, INF, -INF], (3, 4)))
        for operand in (x, filled):
            assert_close(loss(operand), plain(x))
            g = jax.jit(jax.grad(lambda x: loss(x).sum()))(operand)
            assert_close(g, jax.jit(jax.grad(lambda x: plain(x).sum()))(x))

    @pytest.mark.parametrize("where", [ELEMENTS, ROWS], ids=["elements", "rows"])
    def test_soft_labels(self, where, implementation):
        x, labels = array(3, 4), array(3, 4, seed=1)
        mask = where if where.ndim == 2 else where[:, None]
        loss = lambda *v: s2p.softmax_cross_entropy(*v, where=where, implementation=implementation)

        def plain(x, labels):
            log = without_infinities(jax.nn.log_softmax(jnp.where(mask, x, -1e9)))
            return -jnp.sum(jnp.where(mask, labels * log, 0), -1)

        masked_values = np.resize([NAN, INF, -INF], (3, 4))
        for operands in ((x, labels), (jnp.where(mask, x, masked_values), labels)):
            assert_close(loss(*operands), plain(x, labels))
            gradient = jax.jit(jax.grad(lambda *v: loss(*v).sum()))(*operands)
            assert_close(gradient, jax.jit(jax.grad(lambda *v: plain(*v).sum()))(x, labels))

    @pytest.mark.parametrize("where", [ELEMENTS, ROWS], ids=["elements", "rows"])
    def test_gradient_of_labels(self, where, implementation):
        x, labels = array(3, 4), array(3, 4, seed=1)
        mask = where if where.ndim == 2 else where[:, None]
        loss = lambda x, labels: s2p.softmax_cross_entropy(
            x, labels, where=where, implementation=implementation
        ).sum()
        expected = jnp.where(mask, -jax.nn.log_softmax(jnp.where(mask, x, -1e9)), 0)
        for masked_value in (0.0, NAN):
            filled = jnp.where(mask, x, masked_value)
            assert_close(jax.jit(jax.grad(loss, 1))(filled, labels), expected)


def vmap_by_loop(function, in_axes, operands, size):
    """The result that vmap must have, computed by a Python loop."""
    results = [
        function(
            *(v if axis is None else jnp.take(v, i, axis) for v, axis in zip(operands, in_axes, strict=True))
        )
        for i in range(size)
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def batched_operands(shapes, in_axes, size=3):
    return [
        array(*shape[:axis], size, *shape[axis:], seed=i) if axis is not None else array(*shape, seed=i)
        for i, (shape, axis) in enumerate(zip(shapes, in_axes, strict=True))
    ]


class TestVmap:
    @pytest.mark.long
    @pytest.mark.parametrize(
        "in_axes",
        [
            (0, None, None, None),
            (None, 0, None, None),
            (None, None, 0, None),
            (None, None, None, 0),
            (2, 1, 0, 1),
        ],
    )
    def test_over_every_operand(self, in_axes, name):
        *operands, mask = batched_operands([(2, 4), (2, 1), (4,), (2, 4)], in_axes)
        operands.append(mask > -0.5)

        def g(x, scale, bias, mask):
            function = lambda x, scale, bias: FUNCTIONS[name](x, scale=scale, bias=bias, where=mask)
            return function(x, scale, bias), gradients(function)(x, scale, bias)

        assert_close(jax.jit(jax.vmap(g, in_axes))(*operands), vmap_by_loop(jax.jit(g), in_axes, operands, 3))

    def test_along_an_axis_that_is_not_last(self, name):
        in_axes = (1, None, 0)
        operands = batched_operands([(2, 4), (1, 4), (2, 1)], in_axes)
        g = lambda x, scale, bias: FUNCTIONS[name](x, axis=0, scale=scale, bias=bias)
        assert_close(jax.jit(jax.vmap(g, in_axes))(*operands), vmap_by_loop(g, in_axes, operands, 3))

    @pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (1, 1)])
    def test_over_operands_of_fewer_dimensions(self, in_axes, name):
        """The batch dimension of an operand must not be taken for a dimension of x."""
        scale, bias = batched_operands([(1,), (5,)], in_axes)
        x = array(2, 3, 5)
        g = jax.jit(lambda scale, bias: FUNCTIONS[name](x, scale=scale[0], bias=bias))
        assert_close(jax.jit(jax.vmap(g, in_axes))(scale, bias), vmap_by_loop(g, in_axes, [scale, bias], 3))

    def test_with_a_band(self, name):
        x, bias = array(3, 4, 5), array(3, 4, 5, seed=1)
        g = jax.jit(lambda x, bias: FUNCTIONS[name](x, bias=bias, where=Band(1, 0)))
        for in_axes in ((0, 0), (0, None), (None, 0)):
            operands = [v if axis is not None else v[0] for v, axis in zip((x, bias), in_axes, strict=True)]
            assert_close(jax.jit(jax.vmap(g, in_axes))(*operands), vmap_by_loop(g, in_axes, operands, 3))

    def test_nested(self, name):
        f = FUNCTIONS[name]
        x, scale, bias = array(2, 3, 4), 1 + array(3), array(2, 4)
        g = jax.vmap(
            jax.vmap(lambda x, scale, bias: f(x, scale=scale, bias=bias), (0, 0, None)), (0, None, 0)
        )
        assert_close(g(x, scale, bias), PLAIN[name](scale[:, None] * x + bias[:, None]))

    @pytest.mark.long(in_axes=(1, 0))
    @pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0), (1, 0), (2, 1)])
    def test_integer_labels(self, in_axes):
        loss = s2p.softmax_cross_entropy_with_integer_labels
        x = batched_operands([(2, 5)], in_axes[:1])[0]
        labels = jnp.arange(6).reshape(3, 2) - 1 if in_axes[1] == 0 else jnp.arange(6).reshape(2, 3) - 1
        labels = labels if in_axes[1] is not None else labels[:, 0]

        def g(x, labels):
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(loss(x, labels))))
            return loss(x, labels), gradient(x), jax.jvp(gradient, (x,), (jnp.cos(x),))[1]

        assert_close(
            jax.jit(jax.vmap(g, in_axes))(x, labels), vmap_by_loop(jax.jit(g), in_axes, [x, labels], 3)
        )

    @pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (1, 0)])
    def test_soft_labels(self, in_axes):
        loss = s2p.softmax_cross_entropy
        operands = batched_operands([(2, 5), (2, 5)], in_axes)

        def g(x, labels):
            return loss(x, labels), jax.grad(lambda *v: jnp.sum(loss(*v) ** 2), (0, 1))(x, labels)

        assert_close(jax.jit(jax.vmap(g, in_axes))(*operands), vmap_by_loop(jax.jit(g), in_axes, operands, 3))

    def test_over_cotangents_alone(self, name):
        f = FUNCTIONS[name]
        x, bias = array(2, 4), array(4, seed=1)
        y, pullback = jax.vjp(lambda x, bias: f(x, scale=2.0, bias=bias), x, bias)
        t = array(3, *y.shape, seed=2)
        assert_close(jax.jit(jax.vmap(pullback))(t), vmap_by_loop(pullback, (0,), [t], 3))

    def test_sum_exp(self):
        x, mask = array(3, 2, 5), array(3, 5, seed=1) > 0
        g = lambda x, mask: s2p.sum_exp(x, where=mask)
        for in_axes in ((0, 0), (0, None), (None, 0)):
            operands = [v if axis is not None else v[0] for v, axis in zip((x, mask), in_axes, strict=True)]
            assert_close(jax.jit(jax.vmap(g, in_axes))(*operands), vmap_by_loop(g, in_axes, operands, 3))


class TestControlFlow:
    def test_scan_over_chunks(self):
        """A scan that carries a SumExp has the value and the derivatives of logsumexp over all chunks."""
        x = 50 * array(6, 3, 4)

        def total(chunks):
            step = lambda total, chunk: (total.combine(s2p.sum_exp(chunk)), None)
            return jax.lax.scan(step, SumExp.empty((3,), x.dtype), chunks)[0].log()

        flat = lambda x: jax.nn.logsumexp(x, (0, 2))
        assert_close(jax.jit(total)(x), flat(x))
        assert_close(
            jax.jit(jax.grad(lambda x: total(x).sum()))(x), jax.jit(jax.grad(lambda x: flat(x).sum()))(x)
        )
        t = array(6, 3, 4, seed=1)
        assert_close(jax.jvp(total, (x,), (t,))[1], jax.jvp(flat, (x,), (t,))[1])

    def test_associative_scan(self):
        x = 10 * array(9)
        sums = jax.jit(jax.vmap(lambda v: s2p.sum_exp(v[None])))(x)
        cumulative = jax.jit(lambda s: jax.lax.associative_scan(lambda a, b: a.combine(b), s).log())(sums)
        assert_close(cumulative, np.logaddexp.accumulate(np.asarray(x)))

    @pytest.mark.long
    def test_loops_and_branches(self, name, f):
        x, scale = array(2, 4), jnp.array([[0.5], [2.0]])
        g = lambda c: x + weighted_sum(f(c, scale=scale, where=MASK[0]))
        h = lambda c: x + weighted_sum(PLAIN[name](c * scale, where=MASK[0]))
        twice = h(h(x))
        assert_close(jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda _, c: g(c), x))(x), twice)
        assert_close(jax.jit(lambda p, c: jax.lax.cond(p, g, lambda c: c, c))(True, h(x)), twice)
        expected = jax.jit(jax.grad(lambda c: h(c).sum()))(x)
        assert_close(jax.jit(jax.grad(jax.checkpoint(lambda c: g(c).sum())))(x), expected)
