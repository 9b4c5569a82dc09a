"""patch_jax_nn with flax: its own attention functions, wherever it holds them, against flax unpatched."""

import flax
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import weighted_sum
from flax import nnx
from flax.nnx.nn import attention as nnx_attention
from layers import assert_close, normal, uses_this_package
from processes import run_python
from versions import since

from jax_softmax2p import patch_jax_nn

Q, K, V = (normal(3, 5, 4, 8, seed=i) for i in range(3))
MASK = normal(3, 1, 5, 5) > -0.5
MASK = MASK.at[1, 0, 2].set(False)
DROPOUT = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.4}

ATTENTION = {
    "flax.linen.dot_product_attention": lambda: flax.linen.dot_product_attention,
    "flax.nnx.dot_product_attention": lambda: nnx.dot_product_attention,
}
WEIGHTS = {
    "flax.linen.dot_product_attention_weights": lambda: flax.linen.dot_product_attention_weights,
    "flax.nnx.nn.attention.dot_product_attention_weights": lambda: (
        nnx_attention.dot_product_attention_weights
    ),
}

OPTIONS = {
    "plain": {},
    "mask": {"mask": MASK},
    "mask of numbers": {"mask": MASK.astype(np.float32)},
    "bias of heads and mask": {"bias": normal(1, 4, 1, 5), "mask": MASK},
    "dropout": DROPOUT,
    "dropout of each head, mask, bias": {
        **DROPOUT,
        "broadcast_dropout": False,
        "mask": MASK,
        "bias": normal(3, 4, 5, 5),
    },
    "deterministic": {**DROPOUT, "deterministic": True},
    "dtype": {"dtype": np.float64, "bias": normal(3, 4, 5, 5)},
    "precision": {"precision": "highest"},
}


def both(place, functions, *operands, **options):
    """What the original and its replacement compute; no call falls back."""
    expected = jax.jit(lambda *operands: functions[place]()(*operands, **options))(*operands)
    with patch_jax_nn() as calls:
        assert uses_this_package(lambda *operands: functions[place]()(*operands, **options), *operands)
        actual = jax.jit(lambda *operands: functions[place]()(*operands, **options))(*operands)
    assert calls.computed[place] == 2
    assert not calls.fallbacks
    return actual, expected


class TestFunctions:
    @pytest.mark.long
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("place", ATTENTION)
    def test_attention(self, place, options):
        assert_close(*both(place, ATTENTION, Q, K, V, **OPTIONS[options]))

    @pytest.mark.long
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("place", WEIGHTS)
    def test_weights(self, place, options):
        assert_close(*both(place, WEIGHTS, Q, K, **OPTIONS[options]))

    @pytest.mark.long
    @pytest.mark.parametrize("options", ["bias of heads and mask", "dropout of each head, mask, bias"])
    @pytest.mark.parametrize("place", [*ATTENTION, *WEIGHTS])
    def test_gradients(self, place, options):
        functions, operands = (ATTENTION, (Q, K, V)) if place in ATTENTION else (WEIGHTS, (Q, K))

        def gradient(bias, *operands):
            call = lambda bias, *operands: weighted_sum(
                functions[place]()(*operands, **{**OPTIONS[options], "bias": bias})
            )
            return jax.jit(jax.grad(call, range(len(operands) + 1)))(bias, *operands)

        bias = OPTIONS[options]["bias"]
        expected = gradient(bias, *operands)
        with patch_jax_nn() as calls:
            actual = gradient(bias, *operands)
        assert calls.computed[place] == 1
        assert_close(actual, expected, 4e-6)

    @pytest.mark.long
    @pytest.mark.parametrize(
        "dtypes",
        [
            ("bfloat16", "bfloat16", "bfloat16"),
            ("float16", "float32", "float16"),
            ("int32", "int32", "int32"),
            ("float64", "float32", "float32"),
        ],
        ids=" ".join,
    )
    @pytest.mark.parametrize("place", [*ATTENTION, *WEIGHTS])
    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_promotion(self, place, dtypes, dtype):
        """The dtype of the result is flax's; 16-bit results are compared with those of float64."""
        functions, count = (ATTENTION, 3) if place in ATTENTION else (WEIGHTS, 2)
        operands = [(3 * x).astype(d) for x, d in zip((Q, K, V)[:count], dtypes, strict=False)]
        actual, expected = both(place, functions, *operands, dtype=dtype, mask=MASK)
        assert actual.dtype == expected.dtype
        rounded = [x.astype(dtype or jnp.promote_types(x.dtype, "float16")) for x in operands]
        # Linen computes float64 in float64 throughout.
        linen = next(iter(functions.values()))()
        exact = linen(*(x.astype(np.float64) for x in rounded), mask=MASK)
        eps = float(jnp.finfo(actual.dtype).eps)
        # Products in 16 bits, of which weights are made, are rounded by themselves.
        tolerance = 4 * eps if place in ATTENTION else 16 * max(eps, float(jnp.finfo("float32").eps))
        np.testing.assert_allclose(
            actual.astype(np.float64), exact, rtol=tolerance, atol=tolerance * float(jnp.abs(exact).max())
        )

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
    @pytest.mark.parametrize(
        "place", ["flax.linen.dot_product_attention", "flax.linen.dot_product_attention_weights"]
    )
    def test_float32_for_softmax(self, place, dtype):
        functions, operands = (ATTENTION, (Q, K, V)) if place in ATTENTION else (WEIGHTS, (Q, K))
        operands = [x.astype(dtype) for x in operands]
        # Every query has a key: in float64 flax computes NaN for others.
        mask = MASK | jnp.eye(5, dtype=bool)
        options = {"mask": mask, "force_fp32_for_softmax": True, **DROPOUT}
        actual, expected = both(place, functions, *operands, **options)
        assert actual.dtype == expected.dtype
        tolerance = 16 * max(float(jnp.finfo(d).eps) for d in (dtype, "float32"))
        np.testing.assert_allclose(
            actual.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance
        )

    @since(flax, "0.12.4", "is_causal and groups of heads")
    @pytest.mark.parametrize("options", [{}, {"mask": MASK}, DROPOUT], ids=["plain", "mask", "dropout"])
    def test_causal_groups_of_heads(self, options):
        q = normal(3, 5, 8, 8)
        full = {**options, "is_causal": True}
        if "mask" in full:
            full["mask"] = jnp.broadcast_to(MASK, (3, 8, 5, 5))
        assert_close(*both("flax.nnx.dot_product_attention", ATTENTION, q, K, V, **full))
        weights = "flax.nnx.nn.attention.dot_product_attention_weights"
        assert_close(*both(weights, WEIGHTS, q, K, **full))

    @pytest.mark.parametrize("place", [*ATTENTION, *WEIGHTS])
    def test_arguments_by_position(self, place):
        """In nnx the last ones are others than in linen."""
        functions, operands = (ATTENTION, (Q, K, V)) if place in ATTENTION else (WEIGHTS, (Q, K))
        by_position = (None, MASK, False, jax.random.key(2), 0.3, False, np.float32, None, None)
        assert_close(*both(place, functions, *operands, *by_position[:0]))
        expected = functions[place]()(*operands, *by_position)
        promote = [] if place.startswith("flax.linen") else [lambda xs, dtype: xs]
        with patch_jax_nn() as calls:
            assert_close(functions[place]()(*operands, *by_position, *promote), expected)
        assert not calls.fallbacks

    @pytest.mark.parametrize("place", WEIGHTS)
    def test_errors_are_flaxs(self, place):
        messages = []
        for context in patch_jax_nn, lambda: patch_jax_nn("flax"):
            with pytest.raises((ValueError, AssertionError, TypeError)) as patched, context() as calls:
                WEIGHTS[place]()(Q, normal(3, 5, 4, 7))
            messages.append(str(patched.value))
            assert not calls.computed[place]
        with pytest.raises((ValueError, AssertionError, TypeError)) as original:
            WEIGHTS[place]()(Q, normal(3, 5, 4, 7))
        assert {str(original.value)} == set(messages)

    @pytest.mark.parametrize("options", [{"einsum": jnp.einsum}, {"einsum_dot_general": jax.lax.dot_general}])
    def test_einsums(self, options):
        place = "flax.linen.dot_product_attention_weights"
        assert_close(*both(place, WEIGHTS, Q, K, mask=MASK, **options))


class TestLayers:
    X = normal(3, 5, 32)

    def linen_layer(self, cls, **options):
        layer = cls(num_heads=4, **options)
        variables = layer.init(jax.random.key(0), self.X, deterministic=True)
        apply = lambda variables: layer.apply(
            variables,
            self.X,
            mask=MASK,
            deterministic=False,
            rngs={"dropout": jax.random.key(1)},
            sow_weights=True,
            mutable=["intermediates"],
        )
        gradient = jax.grad(lambda variables: weighted_sum(apply(variables)[0]))
        return layer, jax.jit(lambda: (apply(variables), gradient(variables)))()

    @pytest.mark.long
    @pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
    @pytest.mark.parametrize("name", ["MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"])
    @pytest.mark.filterwarnings("ignore:.*SelfAttention")
    def test_linen(self, name, dropout_rate):
        cls = getattr(flax.linen, name)
        layer, expected = self.linen_layer(cls, dropout_rate=dropout_rate)
        with patch_jax_nn() as calls:
            patched, actual = self.linen_layer(cls, dropout_rate=dropout_rate)
            assert patched.attention_fn is flax.linen.dot_product_attention
        assert calls.computed["flax.linen.dot_product_attention"] >= 2
        assert not calls.fallbacks
        assert_close(actual, expected)
        assert layer.attention_fn is flax.linen.dot_product_attention is cls(4).attention_fn
        assert layer.attention_fn is not patched.attention_fn

    def test_subclasses_of_linens_layers(self):
        """A class that is defined elsewhere has defaults of its own, for which its module is to be named."""
        with patch_jax_nn():
            assert Subclass(4).attention_fn is not flax.linen.dot_product_attention
        with patch_jax_nn(__name__) as calls:
            assert Subclass(4).attention_fn is flax.linen.dot_product_attention
        listed = {held.place for held in calls.replaced if held.module == __name__}
        assert listed == {"Subclass.__init__(attention_fn=)", "Subclass.attention_fn, the field's default"}
        assert Subclass(4).attention_fn is flax.linen.dot_product_attention

    @pytest.mark.parametrize(
        "options", [{}, {"dropout_rate": 0.5, "deterministic": False}], ids=["plain", "dropout"]
    )
    def test_nnx(self, options):
        def run():
            layer = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0), **options)

            @nnx.jit
            def value_and_gradient(layer):
                call = lambda layer: weighted_sum(layer(self.X, mask=MASK, rngs=nnx.Rngs(7)))
                return nnx.value_and_grad(call)(layer)

            y, gradient = value_and_gradient(layer)
            return layer.attention_fn, (y, nnx.to_pure_dict(gradient))

        original, expected = run()
        with patch_jax_nn() as calls:
            patched, actual = run()
        assert calls.computed["flax.nnx.dot_product_attention"] >= 1
        assert not calls.fallbacks
        assert patched is not original is run()[0]
        assert_close(actual, expected, 1e-5)

    def test_a_layer_from_before(self):
        """It holds flax's function, whose calls of jax.nn are replaced."""
        layer = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
        expected = layer(self.X)
        with patch_jax_nn() as calls:
            assert_close(layer(self.X), expected)
        assert calls.computed == {"jax.nn.dot_product_attention": 1}


class Subclass(flax.linen.MultiHeadDotProductAttention):
    more: int = 3


def test_flax_that_is_loaded_later():
    """It is not needed before, and then covered."""
    code = """
import sys
from jax_softmax2p import patch_jax_nn
with patch_jax_nn() as calls:
    assert "flax" not in sys.modules
assert not any(held.module.startswith("flax") for held in calls.replaced)
import flax.linen
original = flax.linen.dot_product_attention
outer = patch_jax_nn()
outer.__enter__()
assert flax.linen.MultiHeadDotProductAttention(4).attention_fn is flax.linen.dot_product_attention
assert flax.linen.dot_product_attention is not original
outer.__exit__(None, None, None)
assert flax.linen.MultiHeadDotProductAttention(4).attention_fn is flax.linen.dot_product_attention is original
"""
    result = run_python(code, options=())
    assert result.returncode == 0, result.stderr
