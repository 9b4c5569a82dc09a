"""What attention does with logits beyond jax.nn: sinks, and the soft cap, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_close, normal, weighted_sum
from jax.test_util import check_grads
from test_attention import CASES, DTYPES, SPARSE_MASK, formula, inputs, lengths

from jax_softmax2p import dot_product_attention, explain, native

INF = float("inf")
SINKS = np.array([-1.0, 0.5, 2.0, 0.0])
OPTIONS = {
    "sinks": {"sinks": SINKS},
    "cap": {"logits_soft_cap": 1.5},
    "both": {"sinks": SINKS, "logits_soft_cap": 1.5},
}
WAYS = {
    "native": {"implementation": "native"},
    "composed": {"query_block_size": 4},
    "reference": {"implementation": "reference"},
}
NAMES = ("query", "key", "value", "bias", "scale", "sinks")


def value_and_gradients(function, **arguments):
    """Of a weighted sum of the output, in all arguments that have gradients; and the lse."""
    differentiated = {
        name: jnp.asarray(x) for name, x in arguments.items() if name in NAMES and x is not None
    }
    others = {name: x for name, x in arguments.items() if name not in differentiated}

    def total(differentiated):
        y, lse = function(**differentiated, **others, return_residual=True)
        return weighted_sum(y), lse

    return jax.jit(jax.value_and_grad(total, has_aux=True))(differentiated)


@functools.cache
def expected(case, option):
    return value_and_gradients(formula, **arguments_of(case, option))


def arguments_of(case, option, dtype=np.float64):
    arrays = dict(zip(("query", "key", "value"), (x.astype(dtype) for x in inputs()), strict=True))
    return arrays | CASES[case] | OPTIONS[option]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", ["plain", "mask and bias, causal", "lengths of 0, causal", "all"])
def test_values_and_gradients(case, option, way):
    """In float64, with grouped heads and with fully masked queries."""
    ours = functools.partial(dot_product_attention, **WAYS[way])
    assert_close(value_and_gradients(ours, **arguments_of(case, option)), expected(case, option))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, way):
    """Computed in float32 at least, rounded once."""
    arguments = arguments_of("all", "both", dtype)
    arguments["sinks"] = SINKS.astype(dtype)
    ours = jax.jit(
        functools.partial(
            dot_product_attention, **WAYS[way], **CASES["all"], return_residual=True, logits_soft_cap=1.5
        )
    )
    arrays = {name: arguments[name] for name in ("query", "key", "value", "sinks")}
    actual = ours(**arrays)
    assert {x.dtype for x in actual} == {np.dtype(dtype)}
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    exact = formula(**wide, **CASES["all"], logits_soft_cap=1.5, return_residual=True)
    rounding = float(jnp.finfo(dtype).eps) / 2
    for x, y in zip(actual, exact, strict=True):
        y = np.asarray(y)
        # Half an ULP, and what comes before it.
        before = 1e-14 if dtype == np.float64 else 1e-6
        assert (np.abs(np.asarray(x, np.float64) - y) <= rounding * np.abs(y) * 1.001 + before).all()


class TestInstructionSets:
    """The kernels on NumPy arrays, forward with few queries and with many, and the gradient."""

    @pytest.mark.parametrize("isa", native.supported_isas())
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("t", "s"), [(2, 77), (61, 70)])
    def test_values_and_gradients(self, t, s, dtype, isa):
        q, k, v = normal(2, t, 4, 9), normal(2, s, 2, 9, seed=1), normal(2, s, 2, 9, seed=2)
        arrays = [x.astype(dtype) for x in (4 * q, k, v, normal(2, t, 4, 9, seed=3))]
        wide = np.float64 if dtype == np.float64 else np.float32
        options = {"soft_cap": 2.0, "sinks": SINKS.astype(wide), "after": 5, "isa": isa}
        actual = native.attention(*arrays, **options)
        *operands, cotangent = (np.asarray(x, np.float64) for x in arrays)
        exact = functools.partial(
            formula, sinks=SINKS, logits_soft_cap=2.0, local_window_size=(1000, 5), return_residual=True
        )
        (y, lse), vjp = jax.vjp(exact, *operands)
        rounding = 2e-6 if wide == np.float32 else 1e-14
        if np.dtype(dtype).itemsize == 2:
            rounding = 4 * float(jnp.finfo(dtype).eps)
        for x, e in zip(actual, (y, lse, *vjp((cotangent, jnp.zeros_like(lse)))), strict=True):
            assert_close(np.asarray(x, np.float64), e, rounding)


class TestSoftCap:
    @pytest.mark.parametrize("isa", native.supported_isas())
    def test_every_logit(self, isa):
        """Its own rounding: logits as large as the cap, far larger, and near 0, where tanh cancels easily.

        One key has the logit; its lse, of that key alone, is the capped logit.
        """
        logits = np.concatenate([np.geomspace(1e-6, 1e5, 400), [0, INF]])
        logits = np.concatenate([logits, -logits])
        for dtype, bound in ((np.float32, 4 * 2.0**-23), (np.float64, 4 * 2.0**-52)):
            for cap in (0.5, 50.0):
                z = logits.astype(dtype)
                query = z.reshape(1, -1, 1, 1)
                one = np.ones((1, 1, 1, 1), dtype)
                _, lse = native.attention(query, one, one, soft_cap=cap, isa=isa)
                exact = cap * np.tanh(z.astype(np.float64) / cap)
                error = np.abs(lse.reshape(-1) - exact)
                # The lse is the sum of a logarithm and of an exponent's.
                assert (error <= bound * np.maximum(np.abs(exact), 1)).all()

    def test_nan_harms_its_query_alone(self):
        q, k, v = inputs()
        q[0, 2, 1] = np.nan
        y = dot_product_attention(q, k, v, logits_soft_cap=3.0, implementation="native")
        assert np.isnan(y[0, 2, 1]).all()
        assert np.isfinite(y).sum() == y.size - y.shape[-1]

    def test_large_logits_do_not_saturate_gradients_to_nan(self):
        q, k, v = (x.astype(np.float32) for x in inputs())
        f = functools.partial(dot_product_attention, logits_soft_cap=5.0)
        for way in WAYS.values():
            gradients = jax.grad(lambda *xs, way=way: f(*xs, **way).sum(), (0, 1, 2))(1e20 * q, k, v)
            assert all(np.isfinite(x).all() for x in gradients)


class TestSinks:
    @pytest.mark.parametrize("way", WAYS)
    def test_minus_infinity_is_no_sink(self, way):
        f = functools.partial(dot_product_attention, mask=SPARSE_MASK, return_residual=True, **WAYS[way])
        gradients = jax.value_and_grad(lambda *xs, sinks=None: f(*xs, sinks=sinks)[0].sum(), (0, 1, 2))
        for function in (f, gradients):
            without, without_sinks = jax.jit(function)(*inputs()), np.full(4, -INF)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-15),
                jax.jit(function)(*inputs(), sinks=without_sinks),
                without,
            )
        gradient = jax.grad(lambda sinks: f(*inputs(), sinks=sinks)[0].sum())(np.full(4, -INF))
        np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("masked_by", ["mask", "bias", "lengths"])
    def test_queries_without_keys(self, masked_by, way):
        """They attend to the sink alone: 0, and its logit; and have no gradient."""
        hidden = np.zeros((2, 1, 7, 9))
        hidden[1, 0, 3:] = -INF
        options = {
            "mask": {"mask": hidden == 0},
            "bias": {"bias": hidden},
            "lengths": {"key_value_seq_lengths": lengths(9, 0)},
        }[masked_by]
        f = functools.partial(dot_product_attention, **options, **WAYS[way])
        y, lse = f(*inputs(), sinks=SINKS, return_residual=True)
        np.testing.assert_array_equal(y[1, 3:], 0)
        np.testing.assert_array_equal(lse[1, 3:], np.broadcast_to(SINKS, (4, 4)))
        assert np.isfinite(y).all()
        gradient = jax.grad(lambda *xs: f(*xs[:3], sinks=xs[3])[1, 3:].sum(), (0, 1, 2, 3))
        for x in gradient(*inputs(), SINKS):
            np.testing.assert_array_equal(x, 0)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("sink", [-30.0, 30.0])
    def test_near_saturation(self, sink, way):
        """The output, and the gradient in sinks, to their own size however small they are."""
        q, k, v = (x.astype(np.float32) for x in inputs())
        function = lambda attention: lambda q, k, v, sinks: weighted_sum(attention(q, k, v, sinks=sinks))
        ours = functools.partial(dot_product_attention, **WAYS[way])
        gradient = lambda f, *xs: jax.jit(jax.grad(function(f), 3))(*xs, np.full(4, sink, xs[0].dtype))
        wide = [x.astype(np.float64) for x in (q, k, v)]
        np.testing.assert_allclose(gradient(ours, q, k, v), gradient(formula, *wide), rtol=3e-5)
        y = ours(q, k, v, sinks=np.full(4, sink, np.float32))
        exact = formula(*wide, sinks=np.full(4, sink))
        assert np.abs(y - exact).max() < 1e-5 * np.abs(exact).max()

    def test_no_pass_over_keys_is_added(self):
        """The kernel takes them, and their gradient needs its results alone."""
        x = jax.ShapeDtypeStruct((1, 64, 4, 8), "float32")
        f = lambda x, sinks: dot_product_attention(x, x, x, sinks=sinks).sum()
        choices = explain(jax.grad(f, (0, 1)), x, jax.ShapeDtypeStruct((4,), "float32"))
        assert [(choice.operation, choice.implementation) for choice in choices] == [
            ("softmax2p_attention", "native"),
            ("softmax2p_attention_vjp", "native"),
        ]

    def test_dtype_of_their_own(self):
        q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
        f = lambda sinks: dot_product_attention(q, k, v, sinks=sinks)
        assert f(SINKS).dtype == jnp.bfloat16
        assert (
            jax.grad(lambda sinks: f(sinks).sum().astype(float))(jnp.asarray(SINKS, np.float32)).dtype
            == np.float32
        )


class TestTransforms:
    @pytest.mark.parametrize("way", ["native", "composed"])
    def test_derivatives(self, way):
        """Of first and second order, in both modes."""
        mask = normal(1, 2, 3, 4) > 0
        mask[0, 0, 1] = False

        @jax.jit
        def f(q, k, v, sinks, bias):
            return dot_product_attention(
                q, k, v, bias, mask, sinks=sinks, logits_soft_cap=2.0, is_causal=True, **WAYS[way]
            )

        operands = (*inputs(b=1, t=3, s=4, n=2, k=1, h=2), SINKS[:2], normal(1, 2, 1, 4))
        check_grads(f, operands, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("way", ["native", "composed"])
    @pytest.mark.parametrize("in_axes", [(0, 0), (None, 0), (1, None)])
    @pytest.mark.parametrize("b", [1, 2])
    def test_vmap(self, b, in_axes, way):
        q, k, v = inputs(b=b)
        operands = [
            x if axis is None else np.stack([x, 2 * x, -x], axis)
            for x, axis in zip((q, SINKS), in_axes, strict=True)
        ]

        def value_and_gradients(attention):
            f = lambda q, sinks: weighted_sum(attention(q, k, v, sinks=sinks))
            return jax.jit(jax.vmap(jax.value_and_grad(f, (0, 1)), in_axes))(*operands)

        ours = functools.partial(dot_product_attention, **WAYS[way])
        assert_close(value_and_gradients(ours), value_and_gradients(formula))

    @pytest.mark.parametrize("name", ["bias", "mask", "key_value_seq_lengths"])
    def test_vmap_of_an_operand_alone(self, name):
        """Of one example, whose query, key and value are shared."""
        q, k, v = inputs(b=1)
        operand = {
            "bias": normal(3, 1, 4, 7, 9),
            "mask": normal(3, 1, 4, 7, 9) > 0,
            "key_value_seq_lengths": np.array([[3], [9], [0]], np.int32),
        }[name]
        f = lambda attention: lambda x: weighted_sum(attention(q, k, v, **{name: x}))
        y = jax.jit(jax.vmap(f(functools.partial(dot_product_attention, implementation="native"))))(operand)
        assert_close(y, np.array([f(formula)(x) for x in operand]))

    def test_checkpoint_and_scan(self):
        q, k, v = inputs(s=7, n=2)
        f = lambda attention: lambda q, sinks: (q + attention(q, k, v, sinks=sinks), None)
        looped = lambda attention: (
            lambda sinks: weighted_sum(
                jax.lax.scan(jax.checkpoint(f(attention)), q, jnp.stack([sinks, 2 * sinks]))[0]
            )
        )
        ours = functools.partial(dot_product_attention, implementation="native")
        assert_close(*(jax.jit(jax.grad(looped(attention)))(SINKS[:2]) for attention in (ours, formula)))
