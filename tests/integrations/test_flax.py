"""Layers of flax with this package's attention, compared with the same layers without it."""

import functools

import flax
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import assert_close, normal, uses_this_package, weighted_sum
from versions import since

from jax_softmax2p.integrations import flax_attention
from jax_softmax2p.integrations.flax_hook import flax_attention_weights

MASK = normal(3, 1, 5, 5) > -0.5
MASK = MASK.at[1, 0, 2].set(False)

FLOAT64_ROWS_WITHOUT_A_KEY = [since(jax, "0.10.1", "numbers in rows of float64 without a key")]
"""nnx leaves such rows to jax.nn."""

LAYERS_TAKE_IS_CAUSAL = since(flax, "0.12.2", "is_causal in layers of nnx")

CALLS = {
    "plain": {},
    "mask": {"mask": MASK},
    "mask of floats": {"mask": MASK.astype(np.float32)},
    "mask of heads": {"mask": normal(3, 4, 5, 5) > 0},
    "bias and mask": {"bias": normal(3, 4, 5, 5), "mask": MASK},
    "dropout": {"dropout_rng": jax.random.key(1), "dropout_rate": 0.4, "mask": MASK},
    "dropout of each head": {
        "dropout_rng": jax.random.key(1),
        "dropout_rate": 0.4,
        "broadcast_dropout": False,
        "bias": normal(1, 4, 1, 5),
    },
    "deterministic": {"dropout_rng": jax.random.key(1), "dropout_rate": 0.4, "deterministic": True},
    "float64": {"dtype": np.float64, "mask": MASK},
    "precision": {"precision": "highest"},
}


class TestFlaxAttention:
    """The function itself, with all arguments that layers may pass."""

    @pytest.mark.long
    @pytest.mark.parametrize(
        "case",
        [pytest.param(case, marks=FLOAT64_ROWS_WITHOUT_A_KEY * (case == "float64")) for case in CALLS],
    )
    def test_agrees_with_flax(self, case):
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3)]
        functions = (flax_attention, nnx.dot_product_attention, flax.linen.dot_product_attention)
        ours, *theirs = (jax.jit(functools.partial(f, **CALLS[case]))(*operands) for f in functions)
        for y in theirs:
            assert_close(ours, y)

    @pytest.mark.parametrize("case", ["bias and mask", "dropout"])
    def test_gradients(self, case):
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3)]

        def gradients(function):
            f = lambda *operands: weighted_sum(function(*operands, **CALLS[case]))
            return jax.jit(jax.grad(f, (0, 1, 2)))(*operands)

        assert_close(gradients(flax_attention), gradients(flax.linen.dot_product_attention))

    @pytest.mark.parametrize("options", [{}, {"dropout_rng": jax.random.key(1), "dropout_rate": 0.4}])
    def test_causal(self, options):
        """Only nnx has is_causal; with it and dropout nnx combines the causal mask with the other masks."""
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3)]
        ours = flax_attention(*operands, is_causal=True, mask=MASK, **options)
        theirs = nnx.dot_product_attention(*operands, mask=MASK & np.tri(5, dtype=bool), **options)
        assert_close(ours, theirs)

    @pytest.mark.parametrize("rate", [0.0, 0.4])
    @pytest.mark.parametrize("weights_exist", [False, True])
    def test_sinks_and_soft_cap(self, weights_exist, rate):
        """Which flax lacks, against float64; dropout takes no part in the sum."""
        q, k, v = (np.asarray(normal(3, 5, 4, 8, seed=i)) for i in range(3))
        sinks, rng = np.array([-1.0, 0.0, 1.0, 2.0], np.float32), jax.random.key(1)
        einsums = ("qk_attn_weights_einsum", "attn_weights_value_einsum") if weights_exist else ()
        options = dict.fromkeys(einsums, jnp.einsum)
        if rate:
            options |= {"dropout_rng": rng, "dropout_rate": rate}
        y = flax_attention(q, k, v, mask=MASK, logits_soft_cap=1.5, sinks=sinks, **options)
        z = 1.5 * np.tanh(np.einsum("bqhd,bkhd->bhqk", *(x.astype(float) for x in (q, k))) / 8**0.5 / 1.5)
        e = np.where(MASK, np.exp(z), 0)
        weights = e / (e.sum(-1, keepdims=True) + np.exp(sinks.astype(float))[:, None, None])
        if rate:
            weights = weights * jax.random.bernoulli(rng, 1 - rate, (1, 1, 5, 5)) / (1 - rate)
        assert_close(y, np.einsum("bhqk,bkhd->bqhd", weights, v).astype(y.dtype))

    @pytest.mark.long
    @pytest.mark.parametrize("batch", [(), (2, 3)])
    @pytest.mark.parametrize("rate", [0.0, 0.3])
    def test_any_number_of_batch_dimensions(self, batch, rate):
        operands = [normal(*batch, 5, 4, 8, seed=i) for i in range(3)]
        mask = normal(*batch[:1], *(1 for _ in batch[1:]), 1, 5, 5) > -1
        options = {"mask": mask, "dropout_rng": jax.random.key(0), "dropout_rate": rate}
        options["broadcast_dropout"] = False
        functions = (flax_attention, flax.linen.dot_product_attention)
        assert_close(*(jax.jit(functools.partial(f, **options))(*operands) for f in functions))

    @since(flax, "0.12.4", "groups of heads")
    def test_groups_of_heads_and_other_sizes_of_values(self):
        q, k, v = normal(2, 5, 6, 8), normal(2, 7, 3, 8), normal(2, 7, 3, 4)
        options = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.3}
        assert_close(flax_attention(q, k, v, **options), nnx.dot_product_attention(q, k, v, **options))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
    @pytest.mark.parametrize("force", [False, True])
    def test_16_bits(self, dtype, force):
        """Compared with float32: flax computes logits in 16 bits, with larger errors."""
        operands = [normal(3, 5, 4, 8, seed=i).astype(dtype) for i in range(3)]
        y = flax_attention(*operands, mask=MASK, force_fp32_for_softmax=force)
        theirs = flax.linen.dot_product_attention(*operands, mask=MASK, force_fp32_for_softmax=force)
        assert y.dtype == theirs.dtype
        exact = flax.linen.dot_product_attention(*(x.astype(np.float32) for x in operands), mask=MASK)
        np.testing.assert_allclose(y.astype(np.float32), exact, rtol=float(jnp.finfo(y.dtype).eps), atol=1e-6)

    def test_custom_einsums(self):
        """Layers pass them to quantize the products, for example."""
        halved = lambda *arguments: 0.5 * jnp.einsum(*arguments)
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3)]
        options = {"qk_attn_weights_einsum": halved, "attn_weights_value_einsum": halved, "mask": MASK}
        assert_close(
            flax_attention(*operands, **options), flax.linen.dot_product_attention(*operands, **options)
        )

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"qk_attn_weights_einsum": jnp.einsum}, "must be given together"),
            ({"attn_weights_value_einsum": jnp.einsum}, "must be given together"),
            ({"precision": "highest"}, "cannot be combined"),
            ({"einsum_dot_general": jax.lax.dot_general}, "cannot be combined"),
        ],
    )
    def test_einsums_that_flax_refuses(self, options, words):
        if words == "cannot be combined":
            options = options | {
                "qk_attn_weights_einsum": jnp.einsum,
                "attn_weights_value_einsum": jnp.einsum,
            }
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3)]
        with pytest.raises(ValueError, match=r"together|mutually"):
            flax.linen.dot_product_attention(*operands, **options)
        with pytest.raises(ValueError, match=words):
            flax_attention(*operands, **options)

    @pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
    @pytest.mark.parametrize("function", [flax_attention, flax_attention_weights])
    def test_dropout_rates_that_are_none(self, function, rate):
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3 if function is flax_attention else 2)]
        with pytest.raises(ValueError, match=f"dropout_rate must be .* got {rate}"):
            function(*operands, dropout_rate=rate, dropout_rng=jax.random.key(0))

    @pytest.mark.parametrize("options", [{}, {"mask": MASK}, {"dropout_rate": 0.3}])
    def test_complex_arrays(self, options):
        options = options | {"dropout_rng": jax.random.key(0)}
        operands = [normal(3, 5, 4, 8, seed=i) + 1j * normal(3, 5, 4, 8, seed=i + 3) for i in range(3)]
        actual, expected = (
            jax.jit(functools.partial(f, **options))(*operands)
            for f in (flax_attention, flax.linen.dot_product_attention)
        )
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"query": normal(5, 8)}, r"query must have at least 3 dimensions, got shape \(5, 8\)"),
            (
                {"key": normal(3, 5, 4, 7)},
                r"key must have .* query's shape \(3, 5, 4, 8\), got \(3, 5, 4, 7\)",
            ),
            ({"key": normal(3, 5, 3, 8)}, "query must have a multiple of key's 3 heads, got 4"),
            ({"key": normal(3, 5, 0, 8)}, "query must have a multiple of key's 0 heads, got 4"),
            ({"value": normal(3, 6, 4, 8)}, r"value must have key's shape \(3, 5, 4, 8\)"),
            ({"bias": normal(5, 7)}, r"bias must broadcast to .* = \(3, 4, 5, 5\), got shape \(5, 7\)"),
            ({"mask": normal(5, 7) > 0}, r"mask must broadcast to .* = \(3, 4, 5, 5\), got shape \(5, 7\)"),
            ({"dropout_rate": 0.5}, "dropout_rng must be given where dropout_rate is not 0"),
        ],
    )
    def test_errors(self, arguments, words):
        good = {name: normal(3, 5, 4, 8) for name in ("query", "key", "value")}
        with pytest.raises(ValueError, match=words):
            flax_attention(**good | arguments)


class TestFlaxLayers:
    X = normal(3, 5, 32)

    @staticmethod
    def nnx_layer(attention, **options):
        options = {"decode": False, "rngs": nnx.Rngs(0)} | options
        return nnx.MultiHeadAttention(4, 32, attention_fn=attention, **options)

    @pytest.mark.parametrize(
        ("call", "rate"),
        [
            ({}, 0.5),
            ({"mask": MASK}, 0.0),
            pytest.param({"is_causal": True}, 0.0, marks=LAYERS_TAKE_IS_CAUSAL),
        ],
    )
    def test_nnx(self, call, rate):
        def both(attention):
            layer = self.nnx_layer(attention, dropout_rate=rate, deterministic=False)

            @nnx.jit
            def value_and_gradient(layer):
                run = lambda layer: weighted_sum(layer(self.X, rngs=nnx.Rngs(7), **call))
                return nnx.value_and_grad(run)(layer)

            y, gradient = value_and_gradient(layer)
            return y, nnx.to_pure_dict(gradient)

        assert_close(both(flax_attention), both(nnx.dot_product_attention), 1e-5)

    @since(flax, "0.12.6", "nnx.capture")
    @pytest.mark.parametrize("call", [{}, {"mask": MASK}, {"is_causal": True}])
    def test_nnx_stores_weights(self, call):
        def both(attention):
            layer = self.nnx_layer(attention, dropout_rate=0.5, deterministic=False)
            run = nnx.capture(layer, nnx.Intermediate)
            y, intermediates = run(self.X, rngs=nnx.Rngs(7), sow_weights=True, **call)
            return y, nnx.to_pure_dict(intermediates)["attention_weights"]

        assert_close(both(flax_attention), both(nnx.dot_product_attention))

    def test_nnx_decoding(self):
        """Tokens one after another, with the keys and values of the cache."""
        results = []
        for attention in (flax_attention, nnx.dot_product_attention):
            layer = self.nnx_layer(attention, decode=True)
            layer.init_cache(self.X.shape)
            results.append(jnp.concatenate([layer(self.X[:, i : i + 1]) for i in range(5)], 1))
        assert_close(*results)

    @pytest.mark.parametrize(
        ("options", "sow"),
        [({}, False), ({"dropout_rate": 0.5}, True), ({"force_fp32_for_softmax": True}, False)],
    )
    def test_linen(self, options, sow):
        def both(attention):
            layer = flax.linen.MultiHeadDotProductAttention(4, attention_fn=attention, **options)
            variables = layer.init(jax.random.key(0), self.X, deterministic=True)
            apply = functools.partial(
                layer.apply,
                mutable=["intermediates"],
                rngs={"dropout": jax.random.key(1)},
            )
            call = {"mask": MASK, "deterministic": False, "sow_weights": sow}
            y, stored = apply(variables, self.X, **call)
            loss = lambda variables: weighted_sum(apply(variables, self.X, **call)[0])
            gradient = jax.grad(loss)(variables)
            return y, gradient, stored

        actual, expected = both(flax_attention), both(flax.linen.dot_product_attention)
        assert ("intermediates" in actual[2]) == sow
        assert_close(actual, expected)

    def test_layers_use_this_package(self):
        layer = self.nnx_layer(flax_attention)
        assert uses_this_package(layer, self.X)
        assert not uses_this_package(self.nnx_layer(nnx.dot_product_attention), self.X)
