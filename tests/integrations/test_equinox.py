"""Layers and models of equinox with this package's attention, compared with the same ones without it."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layers import assert_close, normal, uses_this_package, weighted_sum

from jax_softmax2p import integrations
from jax_softmax2p.integrations import replace_equinox_attention

MASK = normal(5, 5) > -0.5
MASK = MASK.at[2].set(False)


class TestEquinox:
    @staticmethod
    def layers(**options):
        options = {"num_heads": 4, "query_size": 32, "key": jax.random.key(0)} | options
        return integrations.EquinoxMultiheadAttention(**options), eqx.nn.MultiheadAttention(**options)

    @staticmethod
    def both(layer, x, **call):
        def loss(layer, x):
            y = layer(x, x, x, **call)
            return weighted_sum(y), y

        gradient, y = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(layer, x)
        return y, jax.tree.leaves(gradient)

    @pytest.mark.parametrize(
        ("options", "call"),
        [
            ({}, {}),
            ({}, {"mask": MASK, "key": jax.random.key(2)}),
            ({"dropout_p": 0.4, "inference": True}, {"key": jax.random.key(2)}),
            (
                {"qk_size": 6, "vo_size": 10, "output_size": 7, "use_query_bias": True},
                {"mask": normal(4, 5, 5) > 0},
            ),
        ],
        ids=["plain", "mask and key", "inference", "sizes and masks of heads"],
    )
    def test_agrees_with_equinox(self, options, call):
        ours, theirs = self.layers(**options)
        assert_close(self.both(ours, normal(5, 32), **call), self.both(theirs, normal(5, 32), **call))

    @pytest.mark.parametrize("mask", [None, MASK])
    def test_dropout(self, mask):
        ours, theirs = self.layers(dropout_p=0.4)
        x, call = normal(5, 32), {"key": jax.random.key(3), "mask": mask}
        actual = self.both(ours, x, **call)
        assert_close(actual, self.both(theirs, x, **call))
        assert not np.allclose(actual[0], ours(x, x, x, inference=True, mask=mask))
        assert_close(ours(x, x, x, inference=True), theirs(x, x, x, inference=True))
        with pytest.raises(RuntimeError, match="key"):
            ours(x, x, x)

    @pytest.mark.parametrize("rate", [1.0, np.float32(1)])
    def test_dropout_of_everything(self, rate):
        ours, theirs = self.layers(dropout_p=rate)
        x, call = normal(5, 32), {"key": jax.random.key(3)}
        assert_close(ours(x, x, x, **call), theirs(x, x, x, **call))
        gradient = jax.grad(lambda x: ours(x, x, x, **call).sum())(x)
        np.testing.assert_array_equal(gradient, 0)

    def test_batch_and_longer_keys(self):
        ours, theirs = self.layers()
        q, k = normal(3, 5, 32), normal(3, 7, 32)
        assert_close(jax.jit(jax.vmap(ours))(q, k, k), jax.jit(jax.vmap(theirs))(q, k, k))

    def test_processing_of_heads(self):
        ours, theirs = self.layers()
        x, twice = normal(5, 32), lambda q, k, v: (2 * q, k, v)
        assert_close(ours(x, x, x, process_heads=twice), theirs(x, x, x, process_heads=twice))
        with pytest.raises(ValueError, match="process_heads must not change"):
            ours(x, x, x, process_heads=lambda q, k, v: (q[:1], k, v))

    @pytest.mark.parametrize(
        "dtypes", [("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")]
    )
    def test_dtypes_are_promoted(self, dtypes):
        ours, theirs = self.layers(dtype=dtypes[0])
        query, key = normal(3, 32).astype(dtypes[0]), normal(4, 32).astype(dtypes[1])
        assert_close(ours(query, key, key), theirs(query, key, key), 0.02)
        widen = lambda q, k, v: (q.astype(dtypes[1]), k.astype(dtypes[1]), v)
        widened = [layer(query, query, query, process_heads=widen) for layer in (ours, theirs)]
        assert_close(*widened, 0.02)

    def test_complex_layers_are_those_of_equinox(self):
        ours, theirs = self.layers(dtype=jnp.complex64)
        x = normal(5, 32)
        (y, expected) = (layer(x, x, x, mask=MASK) for layer in (ours, theirs))
        assert_close((y.real, y.imag), (expected.real, expected.imag))

    def test_errors(self):
        ours, _ = self.layers()
        x = normal(5, 32)
        with pytest.raises(ValueError, match="value must be as long as key_, 5, got 4"):
            ours(x, x, x[:4])
        with pytest.raises(ValueError, match=r"mask must have shape \(5, 5\) or \(4, 5, 5\), got \(5,\)"):
            ours(x, x, x, mask=np.ones(5, bool))
        with pytest.warns(UserWarning, match="deterministic") as caught:
            ours(x, x, x, deterministic=True)
        assert [warning.filename for warning in caught] == [__file__]

    def test_replacing(self):
        """A layer of an existing model keeps its weights, and the model is not changed."""
        _, theirs = self.layers(dropout_p=0.2)
        model = {"attention": theirs, "others": [eqx.nn.Linear(2, 3, key=jax.random.key(0)), theirs]}
        ours = replace_equinox_attention(model)
        assert type(model["attention"]) is eqx.nn.MultiheadAttention
        assert type(ours["others"][1]) is integrations.EquinoxMultiheadAttention
        x, key = normal(5, 32), jax.random.key(1)
        assert uses_this_package(lambda x: ours["attention"](x, x, x, key=key), x)
        assert_close(ours["attention"](x, x, x, key=key), theirs(x, x, x, key=key))
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(copied["attention"]) is integrations.EquinoxMultiheadAttention

    def test_training(self):
        """With optax, with either layer: the same losses in every step."""
        x = normal(5, 32)

        def train(layer):
            optimizer = optax.adam(1e-2)
            state = optimizer.init(eqx.filter(layer, eqx.is_array))

            @eqx.filter_jit
            def step(layer, state):
                loss, gradient = eqx.filter_value_and_grad(lambda layer: jnp.sum(layer(x, x, x) ** 2))(layer)
                updates, state = optimizer.update(gradient, state)
                return eqx.apply_updates(layer, updates), state, loss

            losses = []
            for _ in range(5):
                layer, state, loss = step(layer, state)
                losses.append(loss)
            return losses

        ours, theirs = (train(layer) for layer in self.layers())
        assert ours[-1] < 0.9 * ours[0]
        assert_close(ours, theirs, 1e-4)

    @pytest.mark.long
    @pytest.mark.parametrize("rate", [0.0, 0.4, np.array([0.1, 0.5, 0.9], np.float32)])
    def test_ensembles(self, rate):
        """Layers that are stacked by filter_vmap, each with its own weights and dropout rate."""
        x, keys, mask = normal(3, 5, 8), jax.random.split(jax.random.key(0), 3), np.tri(5, dtype=bool)

        def both(layer_type):
            make = lambda rate, key: layer_type(2, 8, dropout_p=rate, key=key)
            layers = eqx.filter_vmap(make, in_axes=(0 if np.ndim(rate) else None, 0))(rate, keys)
            call = lambda layer, x, key: self.both(layer, x, mask=mask, key=key)
            return eqx.filter_jit(eqx.filter_vmap(call))(layers, x, keys)

        actual, expected = both(integrations.EquinoxMultiheadAttention), both(eqx.nn.MultiheadAttention)
        assert_close(actual, expected, 1e-5)

    def test_replacing_ensembles(self):
        keys = jax.random.split(jax.random.key(0), 3)
        layers = eqx.filter_vmap(lambda key: eqx.nn.MultiheadAttention(2, 8, key=key))(keys)
        run = eqx.filter_vmap(lambda layer, x: layer(x, x, x))
        x = normal(3, 5, 8)
        assert_close(run(replace_equinox_attention(layers), x), run(layers, x), 1e-5)

    def test_unknown_attributes(self):
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = integrations.nonsense
