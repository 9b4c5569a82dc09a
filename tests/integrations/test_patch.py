"""patch_jax_nn: what it replaces, what it reaches, what it counts, and that it restores everything."""

import contextlib
import sys
import threading
import types

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
ORIGINALS = {name: getattr(jax.nn, name) for name in NAMES}
SCIPY = {name: getattr(jax.scipy.special, name) for name in ("softmax", "log_softmax")}
LOGMEANEXP = jax.nn.logmeanexp

X = normal(3, 5)
HEADS = normal(5, 2, 4)


@pytest.fixture
def patched():
    with patch_jax_nn() as calls:
        yield calls


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

    @pytest.mark.parametrize("modules", [(), (flax.linen, nnx, flax.linen), ("flax",)])
    def test_names_in_flax(self, modules):
        """Flax's further names of JAX's functions; to name flax as well changes nothing."""
        original = flax.linen.softmax
        with patch_jax_nn(*modules):
            assert uses_this_package(lambda x: flax.linen.log_softmax(flax.linen.softmax(x)), normal(3))
            assert nnx.softmax is not original
        assert flax.linen.softmax is nnx.softmax is original

    def test_names_in_jax(self):
        """JAX's further public names, where they are loaded."""
        from jax.example_libraries import stax

        original = stax.softmax
        with patch_jax_nn() as calls:
            assert stax.softmax is jax.nn.softmax
            assert stax.logsoftmax is jax.nn.log_softmax
        assert stax.softmax is original
        left = {held.function for held in calls.not_replaced if held.module == stax.__name__}
        assert left == {"jax.nn.softmax", "jax.nn.log_softmax"}  # In the closures of its layers.

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


class TestCounts:
    """The context says how many calls this package computed, how many fell back, and why."""

    def test_computed(self, patched):
        for module in (jax.nn, jax.scipy.special):
            for name in ("softmax", "log_softmax", "logsumexp"):
                getattr(module, name)(X)
        jax.nn.logmeanexp(X)
        jax.nn.dot_product_attention(HEADS, HEADS, HEADS)
        assert patched.computed == {
            "jax.nn.softmax": 1,
            "jax.nn.log_softmax": 1,
            "jax.nn.logsumexp": 2,  # jax.scipy.special's is the same function.
            "jax.nn.logmeanexp": 1,
            "jax.nn.dot_product_attention": 1,
            "jax.scipy.special.softmax": 1,
            "jax.scipy.special.log_softmax": 1,
        }
        assert not patched.fallbacks

    @pytest.mark.parametrize(
        ("call", "place", "words"),
        [
            (lambda: jax.nn.softmax(X, where=np.ones((2, 1, 5), bool)), "jax.nn.softmax", "where must broad"),
            (lambda: jax.nn.logsumexp(X, 1, jnp.full(5, 2.0)), "jax.nn.logsumexp", "no kernel with b"),
            (lambda: jax.nn.logsumexp(X + 1j), "jax.nn.logsumexp", "nor for complex"),
            (
                lambda: jax.scipy.special.logsumexp(X[0], 0, jnp.ones((2, 5))),
                "jax.nn.logsumexp",
                "no kernel with b",
            ),
        ],
    )
    def test_fallbacks(self, call, place, words):
        expected = call()
        with patch_jax_nn() as calls:
            actual = [call(), call()]
        np.testing.assert_array_equal(actual[0], expected)
        assert not calls.computed
        (((function, reason), count),) = calls.fallbacks.items()
        assert (function, count) == (place, 2)
        assert words in reason

    def test_calls_that_jax_refuses_as_well(self):
        """They raise JAX's error without mention of this package's, and are no fallbacks."""
        with patch_jax_nn() as calls, pytest.raises(TypeError) as patched:
            jax.nn.softmax("text")
        error = patched.value
        while error is not None:
            assert "x must be an array" not in str(error)
            error = error.__context__
        assert not calls.computed
        assert not calls.fallbacks

    def test_jitted_functions_count_when_traced(self, patched):
        f = jax.jit(lambda x: jax.nn.softmax(x))
        for _ in range(3):
            f(X)
        assert patched.computed == {"jax.nn.softmax": 1}

    def test_nested_contexts_count_what_each_sees(self):
        with patch_jax_nn() as outer:
            jax.nn.softmax(X)
            with patch_jax_nn() as inner:
                jax.nn.softmax(X)
            jax.nn.softmax(X)
        kept = jax.nn.softmax
        kept(X)
        assert outer.computed == {"jax.nn.softmax": 3}
        assert inner.computed == {"jax.nn.softmax": 1}

    def test_threads(self, patched):
        def run():
            for _ in range(50):
                jax.nn.softmax(X)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert patched.computed == {"jax.nn.softmax": 200}

    def test_counts_outlive_exceptions(self):
        counts = []
        with contextlib.suppress(KeyError), patch_jax_nn() as calls:
            counts.append(calls)
            jax.nn.softmax(X)
            raise KeyError
        assert counts[0].computed == {"jax.nn.softmax": 1}


class TestReach:
    def test_other_names_in_other_modules(self):
        """A function is replaced whatever its name, and a name only where it stands for the function."""
        module = types.ModuleType("other")
        module.sm, module.softmax, module.lse = jax.nn.softmax, jnp.exp, jax.scipy.special.logsumexp
        with patch_jax_nn(module):
            assert module.sm is jax.nn.softmax
            assert module.lse is jax.nn.logsumexp
            assert module.softmax is jnp.exp
        assert module.sm is jax.nn.softmax
        assert module.lse is jax.scipy.special.logsumexp

    @pytest.mark.parametrize("name", [None, 3])
    def test_modules_without_a_name(self, name, monkeypatch):
        """A program may have made one, which is not searched, and cannot be asked for."""
        module, original = types.ModuleType("nameless"), jax.nn.softmax
        module.__name__, module.sm = name, original
        if name is None:
            del module.__name__
        monkeypatch.setitem(sys.modules, "nameless", module)
        with patch_jax_nn(loaded_modules=True):
            assert module.sm is original
        with pytest.raises(ValueError, match="modules must have names, got <module"), patch_jax_nn(module):
            pass

    @pytest.mark.parametrize("axis", [None, 0, (0, 1)])
    @pytest.mark.parametrize("name", ["softmax", "log_softmax"])
    def test_scipys_functions(self, name, axis, patched):
        """Their axis is None by default, and by keyword only."""
        original = SCIPY[name]
        function = getattr(jax.scipy.special, name)
        np.testing.assert_allclose(function(X, axis=axis), original(X, axis=axis), rtol=2e-6)
        np.testing.assert_allclose(function(X), original(X), rtol=2e-6)
        with pytest.raises(TypeError):
            function(X, 0)
        with pytest.raises(TypeError):
            function(x=X)

    def test_logmeanexp_of_more_elements_than_float16_counts(self, patched):
        np.testing.assert_allclose(jax.nn.logmeanexp(jnp.zeros(70000, jnp.float16)), 0, atol=1e-2)

    @pytest.mark.long
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"axis": 1, "keepdims": True},
            {"axis": (0, 1)},
            {"where": np.asarray(X) > -0.5},
            {"axis": -1, "where": np.asarray([[True], [False], [True]])},
            {"axis": 0, "where": np.asarray(X[0]) > 0, "keepdims": True},
        ],
    )
    def test_logmeanexp(self, options, patched):
        original = LOGMEANEXP
        for x in (X, X.astype(np.float64), jnp.arange(15).reshape(3, 5), X.astype(jnp.bfloat16)):
            actual, expected = jax.nn.logmeanexp(x, **options), original(x.astype(np.float64), **options)
            assert actual.dtype == original(x, **options).dtype
            tolerance = 8 * float(jnp.finfo(actual.dtype).eps)
            np.testing.assert_allclose(actual.astype(float), expected, rtol=tolerance, atol=tolerance)
        total = lambda f: lambda x: f(x, axis=0, where=np.asarray(X) > -2)[0]
        gradients = jax.jit(jax.grad(total(jax.nn.logmeanexp)))(X), jax.jit(jax.grad(total(original)))(X)
        np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-7)
        assert not patched.fallbacks

    @pytest.mark.parametrize("dtype", ["int8", "uint32", "bfloat16", "float64"])
    def test_strict_promotion(self, dtype):
        """No call falls back, and values are those of the same numbers as float64."""
        x = jnp.asarray(np.arange(15).reshape(3, 5) % 7).astype(dtype)
        for place in ("softmax", "log_softmax", "logsumexp"):
            expected = ORIGINALS[place](x.astype(np.float64), axis=-1)
            with jax.numpy_dtype_promotion("strict"), patch_jax_nn() as calls:
                actual = getattr(jax.nn, place)(x, axis=-1)
            tolerance = 4 * float(jnp.finfo(actual.dtype).eps)
            np.testing.assert_allclose(actual.astype(float), expected, rtol=tolerance, atol=tolerance)
            assert calls.computed.total() == 1
            assert not calls.fallbacks
