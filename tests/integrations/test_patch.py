"""patch_jax_nn: what it replaces, what it reaches, and that it restores everything."""

import threading

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np
import optax
import pytest
from flax import nnx
from layers import assert_close, normal, uses_this_package

import jax_softmax2p as s2p
from jax_softmax2p.integrations import patch_jax_nn

NAMES = ("softmax", "log_softmax", "logsumexp", "dot_product_attention")


class TestPatch:
    def test_routes_and_restores(self):
        originals = {name: getattr(jax.nn, name) for name in NAMES}
        x, heads = normal(2, 5), normal(5, 2, 4)
        calls = {
            "softmax": lambda: jax.nn.softmax(x, 0, where=x > 0),
            "log_softmax": lambda: jax.nn.log_softmax(x, axis=(0, 1)),
            "logsumexp": lambda: jax.nn.logsumexp(x, -1, keepdims=True, return_sign=True),
            "dot_product_attention": lambda: jax.nn.dot_product_attention(
                heads, heads, heads, is_causal=True
            ),
        }
        expected = {name: call() for name, call in calls.items()}
        with patch_jax_nn():
            for name, call in calls.items():
                assert uses_this_package(call)
                assert_close(call(), expected[name])
                assert getattr(jax.nn, name).__name__ == name
            assert jax.scipy.special.logsumexp is jax.nn.logsumexp
        for name in NAMES:
            assert getattr(jax.nn, name) is originals[name]
            assert not uses_this_package(calls[name])
        assert jax.scipy.special.logsumexp is originals["logsumexp"]

    def test_exceptions_and_nesting(self):
        original = jax.nn.softmax

        def failing():
            with patch_jax_nn():
                raise KeyError

        with patch_jax_nn():
            with pytest.raises(KeyError):
                failing()
            assert jax.nn.softmax is not original
        with pytest.raises(KeyError):
            failing()
        assert jax.nn.softmax is original

    def test_as_a_decorator(self):
        """Each call enters a context."""
        decorated = patch_jax_nn()(lambda x: jax.nn.softmax(x))
        for _ in range(2):
            assert uses_this_package(decorated, normal(3))

    def test_jitted_functions_keep_what_they_were_traced_with(self):
        before, inside = jax.jit(lambda x: jax.nn.softmax(x)), jax.jit(lambda x: jax.nn.softmax(x))
        x = normal(7)
        before(x)
        assert "softmax2p" not in before.lower(x).as_text()
        with patch_jax_nn():
            inside(x)
            assert "softmax2p" not in before.lower(x).as_text()
            assert "softmax2p" in before.lower(normal(8)).as_text()
        assert "softmax2p" in inside.lower(x).as_text()
        assert "softmax2p" not in inside.lower(normal(9)).as_text()

    def test_calls_that_this_package_refuses_go_to_jax(self):
        x = normal(2, 5)
        factors = jnp.array([1.0, -1.0, 2.0, 0.5, 1.0], np.float32)
        calls = [
            lambda: jax.nn.softmax(x, where=np.ones((3, 1, 1), bool)),
            lambda: jax.nn.logsumexp(x, 1, factors, return_sign=True),
            lambda: jnp.abs(jax.nn.logsumexp(x + 1j)),
            lambda: s2p.logsumexp(x, 1, factors),
        ]
        expected = [call() for call in calls]
        with patch_jax_nn():
            assert_close([call() for call in calls], expected)
            with pytest.raises(TypeError) as routed:
                jax.nn.softmax("text")
            with pytest.raises(ValueError, match="implementation"):
                jax.nn.dot_product_attention(x, x, x, implementation="other")
        with pytest.raises(TypeError) as original:
            jax.nn.softmax("text")
        assert str(routed.value) == str(original.value)

    def test_other_modules(self):
        """Further names of JAX's functions in flax; flax's own function of one of the names stays."""
        original, flax_attention = flax.linen.softmax, flax.linen.dot_product_attention
        with patch_jax_nn(flax.linen, nnx, flax.linen):
            assert uses_this_package(lambda x: flax.linen.log_softmax(flax.linen.softmax(x)), normal(3))
            assert nnx.softmax is not original
            assert flax.linen.dot_product_attention is flax_attention
        assert flax.linen.softmax is nnx.softmax is original

    def test_reaches_layers_and_losses(self):
        x, labels = normal(5, 32), jnp.arange(5)
        equinox_layer = eqx.nn.MultiheadAttention(4, 32, key=jax.random.key(0))
        flax_layer = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
        functions = [
            lambda x: equinox_layer(x, x, x),
            lambda x: flax_layer(x[None]),
            lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels),
            lambda x: optax.softmax_cross_entropy(x, jax.nn.one_hot(labels, 32)),
        ]
        for function in functions:
            expected = function(x)
            with patch_jax_nn():
                assert uses_this_package(function, x)
                assert_close(jax.jit(function)(x), expected)

    def test_threads(self):
        """Contexts of threads may overlap in any order: the last one that is left restores."""
        original, entered, leave = jax.nn.softmax, threading.Event(), threading.Event()

        def other():
            with patch_jax_nn():
                entered.set()
                leave.wait(30)

        thread = threading.Thread(target=other)
        with patch_jax_nn():
            thread.start()
            assert entered.wait(30)
        assert jax.nn.softmax is not original
        leave.set()
        thread.join()
        assert jax.nn.softmax is original
