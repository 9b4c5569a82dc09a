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


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("case", "option"),
    [("plain", "sinks"), ("plain", "cap"), ("lengths of 0, causal", "sinks"), ("all", "both")],
)
def test_values_and_gradients(case, option, way):
    """In float64, with grouped heads and with fully masked queries."""
    ours = functools.partial(dot_product_attention, **WAYS[way])
    assert_close(value_and_gradients(ours, **arguments_of(case, option)), expected(case, option))


@pytest.mark.parametrize("way", ["native", "reference"])
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

    @pytest.mark.long
    @pytest.mark.parametrize(("t", "s"), [(2, 77), (61, 70)])
    def test_values_and_gradients(self, t, s):
        @jax.jit
        def exact(q, k, v, cotangent):
            attend = functools.partial(
                formula, sinks=SINKS, logits_soft_cap=2.0, local_window_size=(1000, 5), return_residual=True
            )
            (y, lse), vjp = jax.vjp(attend, q, k, v)
            return y, lse, *vjp((cotangent, jnp.zeros_like(lse)))

        shapes = (2, t, 4, 9), (2, s, 2, 9), (2, s, 2, 9), (2, t, 4, 9)
        for dtype in DTYPES:
            arrays = [
                ((4 if i == 0 else 1) * normal(*shape, seed=i)).astype(dtype)
                for i, shape in enumerate(shapes)
            ]
            expected = exact(*(x.astype(np.float64) for x in arrays))
            wide = np.float64 if dtype == np.float64 else np.float32
            rounding = 2e-6 if wide == np.float32 else 1e-14
            if np.dtype(dtype).itemsize == 2:
                rounding = 4 * float(jnp.finfo(dtype).eps)
            options = {"soft_cap": 2.0, "sinks": SINKS.astype(wide), "after": 5}
            for isa in native.supported_isas():
                actual = native.attention(*arrays, **options, isa=isa)
                assert_close([np.asarray(x, np.float64) for x in actual], [*expected], rounding)


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

    @pytest.mark.parametrize("cap", [1e29, 1e31, float(np.finfo(np.float32).max)])
    def test_caps_that_change_nothing(self, cap, implementation):
        q, k, v = (x.astype(np.float32) for x in inputs())
        call = functools.partial(dot_product_attention, q, k, v, implementation=implementation)
        np.testing.assert_allclose(call(logits_soft_cap=cap), call(), rtol=1e-5, atol=1e-6)

    def test_is_any_number_that_is_known(self):
        q, k, v = inputs()
        expected = dot_product_attention(q, k, v, logits_soft_cap=3.0)
        for cap in (3, np.float32(3), np.array(3.0), jnp.float32(3)):
            np.testing.assert_array_equal(dot_product_attention(q, k, v, logits_soft_cap=cap), expected)

    def test_traced_number(self):
        with pytest.raises(ValueError, match=r"soft_cap must be .* known outside of jit, got .*Tracer"):
            jax.jit(lambda cap: dot_product_attention(*inputs(), logits_soft_cap=cap))(3.0)

    def test_nan_harms_its_query_alone(self):
        q, k, v = inputs()
        q[0, 2, 1] = np.nan
        y = dot_product_attention(q, k, v, logits_soft_cap=3.0, implementation="native")
        assert np.isnan(y[0, 2, 1]).all()
        assert np.isfinite(y).sum() == y.size - y.shape[-1]

    def test_large_logits_have_finite_gradients(self):
        q, k, v = (x.astype(np.float32) for x in inputs())
        f = functools.partial(dot_product_attention, logits_soft_cap=5.0, implementation="native")
        gradients = jax.jit(jax.grad(lambda *xs: f(*xs).sum(), (0, 1, 2)))(1e20 * q, k, v)
        assert all(np.isfinite(x).all() for x in gradients)


class TestSinks:
    @pytest.mark.parametrize("way", ["native", "composed"])
    def test_minus_infinity_is_no_sink(self, way):
        f = functools.partial(dot_product_attention, mask=SPARSE_MASK, return_residual=True, **WAYS[way])

        def total(q, sinks):
            y, lse = f(q, *inputs()[1:], sinks=sinks)
            return weighted_sum(y), (y, lse)

        with_sinks = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(inputs()[0], np.full(4, -INF))
        without = jax.jit(jax.value_and_grad(lambda q: total(q, None), has_aux=True))(inputs()[0])
        assert_close((with_sinks[0], with_sinks[1][0]), without)
        np.testing.assert_array_equal(with_sinks[1][1], 0)

    @pytest.mark.parametrize(
        ("masked_by", "way"),
        [("mask", "native"), ("bias", "native"), ("lengths", "native"), ("bias", "composed")],
    )
    def test_queries_without_keys(self, masked_by, way):
        """They attend to the sink alone: 0, and its logit; and have no gradient."""
        hidden = np.zeros((2, 1, 7, 9))
        hidden[1, 0, 3:] = -INF
        options = {
            "mask": {"mask": hidden == 0},
            "bias": {"bias": hidden},
            "lengths": {"key_value_seq_lengths": lengths(9, 0)},
        }[masked_by]
        f = functools.partial(dot_product_attention, return_residual=True, **options, **WAYS[way])

        def total(q, k, v, sinks):
            y, lse = f(q, k, v, sinks=sinks)
            return y[1, 3:].sum(), (y, lse)

        gradient = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))
        gradients, (y, lse) = gradient(*inputs(), SINKS)
        np.testing.assert_array_equal(y[1, 3:], 0)
        np.testing.assert_array_equal(lse[1, 3:], np.broadcast_to(SINKS, (4, 4)))
        assert np.isfinite(y).all()
        for x in gradients:
            np.testing.assert_array_equal(x, 0)

    @pytest.mark.parametrize("way", WAYS)
    def test_near_saturation(self, way):
        """The output, and the gradient in sinks, to their own size however small they are."""
        sinks = np.array([-30.0, 30.0, -20.0, 20.0])

        def value_and_gradient(attention, dtype):
            operands = [x.astype(dtype) for x in inputs()]

            def total(sinks):
                y = attention(*operands, sinks=sinks)
                return weighted_sum(y), y

            return jax.jit(jax.grad(total, has_aux=True))(sinks.astype(dtype))

        gradient, y = value_and_gradient(functools.partial(dot_product_attention, **WAYS[way]), np.float32)
        exact_gradient, exact = value_and_gradient(formula, np.float64)
        np.testing.assert_allclose(gradient, exact_gradient, rtol=3e-5)
        assert (np.abs(y - exact).max((0, 1, 3)) < 1e-5 * np.abs(exact).max((0, 1, 3))).all()

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
            jax.jit(jax.grad(lambda sinks: f(sinks).sum().astype(float)))(
                jnp.asarray(SINKS, np.float32)
            ).dtype
            == np.float32
        )


class TestTransforms:
    def test_derivatives(self):
        """Of the first order in both modes, and of the second."""
        options = {"logits_soft_cap": 2.0, "is_causal": True, "implementation": "native"}
        f = jax.jit(lambda q, sinks, bias: dot_product_attention(q, q, q, bias, sinks=sinks, **options))
        operands = normal(1, 3, 2, 2), SINKS[:2], normal(1, 2, 1, 3)
        check_grads(f, operands, order=1, modes=["fwd"], atol=1e-5, rtol=1e-5)
        check_grads(f, operands, order=2, modes=["rev"], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("b", "in_axes", "way"),
        [
            (1, (None, 0), "native"),
            (1, (0, 0), "native"),
            (2, (1, None), "native"),
            (2, (None, 0), "native"),
            (2, (None, 0), "composed"),
        ],
    )
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
