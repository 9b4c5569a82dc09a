"""Functions that patch_jax_nn replaces look like the originals, and are pickled by name."""

import copy
import dataclasses
import functools
import inspect
import pickle
import pkgutil
import typing
import weakref

import cloudpickle
import jax
import jax.scipy.special
import numpy as np
import pytest
from layers import normal, uses_this_package
from processes import run_python

from jax_softmax2p import patch_jax_nn

PLACES = (
    "jax.nn.softmax",
    "jax.nn.log_softmax",
    "jax.nn.logsumexp",
    "jax.nn.logmeanexp",
    "jax.nn.dot_product_attention",
    "jax.scipy.special.softmax",
    "jax.scipy.special.log_softmax",
    "jax.scipy.special.logsumexp",
)
ORIGINALS = {place: pkgutil.resolve_name(place) for place in PLACES}
JITTED = [place for place, original in ORIGINALS.items() if hasattr(original, "lower")]
PLAIN = [place for place in PLACES if place not in JITTED]

X = normal(3, 5)
HEADS = normal(5, 2, 4)


def operands_of(place):
    return (HEADS, HEADS, HEADS) if place.endswith("attention") else (X,)


@pytest.fixture
def patched():
    with patch_jax_nn() as calls:
        yield calls


class TestLikeness:
    """Whatever is asked of a patched function, the answer is that of the original."""

    @pytest.mark.parametrize("place", PLACES)
    def test_is_another_function_with_the_same_values(self, place):
        operands = operands_of(place)
        expected = ORIGINALS[place](*operands)
        with patch_jax_nn():
            function = pkgutil.resolve_name(place)
            assert function is not ORIGINALS[place]
            assert uses_this_package(function, *operands)
            actual = function(*operands)
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)
        assert pkgutil.resolve_name(place) is ORIGINALS[place]

    @pytest.mark.parametrize("place", PLACES)
    def test_attributes(self, place, patched):
        function, original = pkgutil.resolve_name(place), ORIGINALS[place]
        for name in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
            assert getattr(function, name) == getattr(original, name), name
        assert function.__wrapped__ is original
        assert set(dir(original)) <= set(dir(function))
        assert all(hasattr(function, name) for name in dir(original))

    @pytest.mark.parametrize("place", PLACES)
    def test_inspection(self, place, patched):
        function, original = pkgutil.resolve_name(place), ORIGINALS[place]
        for ask in (inspect.signature, inspect.unwrap, inspect.getdoc, inspect.getsource, inspect.getmodule):
            assert ask(function) == ask(original), ask.__name__
        for ask in (callable, inspect.isroutine, inspect.isclass, inspect.iscoroutinefunction):
            assert ask(function) == ask(original), ask.__name__

    @pytest.mark.parametrize("place", PLACES)
    def test_lacks_what_the_original_lacks(self, place, patched):
        with pytest.raises(AttributeError):
            _ = pkgutil.resolve_name(place).nonsense
        assert hasattr(pkgutil.resolve_name(place), "lower") == hasattr(ORIGINALS[place], "lower")

    def test_as_an_attribute_of_a_class_it_is_a_method(self, patched):
        class Model:
            activation = jax.nn.softmax
            static = staticmethod(jax.nn.softmax)

        with pytest.raises(TypeError):
            Model().activation(X)  # As with any function, the model is the first argument.
        np.testing.assert_array_equal(Model().static(X), jax.nn.softmax(X))
        assert Model.activation is jax.nn.softmax

    def test_as_the_default_of_a_field(self, patched):
        @dataclasses.dataclass
        class Layer:
            activation: typing.Callable = jax.nn.softmax

        np.testing.assert_array_equal(Layer().activation(X), jax.nn.softmax(X))

    @pytest.mark.parametrize("place", PLACES)
    def test_hashes_and_weak_references(self, place, patched):
        function = pkgutil.resolve_name(place)
        assert {function: 1}[pkgutil.resolve_name(place)] == 1
        assert weakref.ref(function)() is function
        assert function != ORIGINALS[place]

    def test_partial(self, patched):
        f = functools.partial(jax.nn.softmax, axis=0)
        np.testing.assert_allclose(f(X), ORIGINALS["jax.nn.softmax"](X, axis=0), rtol=1e-6)
        assert str(inspect.signature(f)).startswith("(x: 'ArrayLike', *, axis: 'Axis' = 0")

    @pytest.mark.long
    @pytest.mark.parametrize(
        "transform",
        [
            jax.jit,
            jax.vmap,
            jax.checkpoint,
            jax.named_call,
            jax.tree_util.Partial,
            lambda f: jax.jit(f, static_argnames="axis"),
            lambda f: lambda x: jax.lax.map(f, x),
            lambda f: jax.grad(lambda x: f(x)[0, 0]),
            lambda f: jax.jacfwd(f),
            lambda f: lambda x: jax.eval_shape(f, x),
            lambda f: lambda x: jax.make_jaxpr(f)(x).out_avals[0],
        ],
    )
    @pytest.mark.parametrize("place", ["jax.nn.softmax", "jax.nn.log_softmax"])
    def test_jax_takes_it_as_a_function(self, transform, place):
        expected = transform(ORIGINALS[place])(X)
        with patch_jax_nn():
            actual = transform(pkgutil.resolve_name(place))(X)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        if isinstance(expected, jax.Array):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

    def test_as_a_static_argument_it_is_traced_anew(self):
        call = jax.jit(lambda f, x: f(x), static_argnums=0)
        assert "softmax2p" not in call.lower(jax.nn.softmax, X).as_text()
        with patch_jax_nn():
            assert "softmax2p" in call.lower(jax.nn.softmax, X).as_text()
            assert call.trace(jax.nn.softmax, X).jaxpr is call.trace(jax.nn.softmax, X).jaxpr
        assert "softmax2p" not in call.lower(jax.nn.softmax, X).as_text()


class TestMethodsOfJittedFunctions:
    """jax.nn.log_softmax and logmeanexp are jitted, and have methods for their programs."""

    @pytest.mark.parametrize("place", JITTED)
    def test_lower_and_trace(self, place, patched):
        f = pkgutil.resolve_name(place)
        for program in (f.lower(X), f.lower(X, axis=0), f.lower(X, (0, 1)), f.trace(X, 0).lower()):
            assert "softmax2p" in program.as_text()
        np.testing.assert_allclose(f.lower(X, 0).compile()(X), ORIGINALS[place](X, 0), rtol=1e-5)

    @pytest.mark.parametrize("place", JITTED)
    def test_eval_shape(self, place, patched):
        for axis in (0, 1, None):
            expected = ORIGINALS[place].eval_shape(X, axis=axis)
            actual = pkgutil.resolve_name(place).eval_shape(X, axis=axis)
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)

    @pytest.mark.parametrize("place", JITTED)
    def test_clear_cache(self, place, patched):
        pkgutil.resolve_name(place).clear_cache()
        assert "softmax2p" in pkgutil.resolve_name(place).lower(X).as_text()


@dataclasses.dataclass
class Holder:
    function: typing.Any


class TestPickling:
    """Patched functions are pickled by name: loading gives what the name stands for then."""

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("module", [pickle, cloudpickle])
    def test_by_name(self, place, module):
        with patch_jax_nn():
            data = module.dumps(pkgutil.resolve_name(place))
            assert pickle.loads(data) is pkgutil.resolve_name(place)
        assert pickle.loads(data) is ORIGINALS[place]

    @pytest.mark.parametrize("place", PLAIN)
    def test_the_original_within_a_context(self, place, patched):
        """Jitted functions are not among them: JAX unpickles them as copies, patched or not."""
        assert pickle.loads(pickle.dumps(ORIGINALS[place])) is ORIGINALS[place]

    @pytest.mark.parametrize("place", PLACES)
    def test_one_that_is_kept_is_pickled_outside(self, place):
        with patch_jax_nn():
            kept = pkgutil.resolve_name(place)
        assert pickle.loads(pickle.dumps(kept)) is ORIGINALS[place]
        with patch_jax_nn():
            assert pickle.loads(pickle.dumps(kept)) is kept

    @pytest.mark.parametrize(
        "hold",
        [
            Holder,
            lambda f: functools.partial(f, axis=0),
            lambda f: jax.tree_util.Partial(f, axis=0),
            lambda f: [f, {"activation": f}],
            jax.jit,
            lambda f: jax.jit(functools.partial(f, axis=0)),
            lambda f: lambda x: f(x) + 1,
            lambda f: jax.jit(lambda x: f(x) + 1),
        ],
        ids=[
            "object",
            "partial",
            "tree partial",
            "containers",
            "jit",
            "jit partial",
            "closure",
            "jit closure",
        ],
    )
    def test_what_holds_one(self, hold, patched):
        """It can be pickled, and if it can be called, it works when it is loaded."""
        held = hold(jax.nn.softmax)
        loaded = cloudpickle.loads(cloudpickle.dumps(held))
        if callable(held):
            np.testing.assert_array_equal(loaded(X), held(X))

    def test_a_function_that_names_it(self, patched):
        """cloudpickle takes functions of __main__ by value, with the globals that they name."""
        code = "import jax\nfrom jax.nn import softmax\nf = jax.jit(lambda x: softmax(x) + jax.nn.softmax(x))"
        scope = {"__name__": "__main__"}
        exec(code, scope)
        loaded = cloudpickle.loads(cloudpickle.dumps(scope["f"]))
        np.testing.assert_allclose(loaded(X), 2 * ORIGINALS["jax.nn.softmax"](X), rtol=1e-6)

    def test_in_a_process_without_this_package(self):
        with patch_jax_nn():
            data = pickle.dumps([pkgutil.resolve_name(place) for place in PLACES])
        code = f"""
import pickle, pkgutil, sys
loaded = pickle.loads({data!r})
assert loaded == [pkgutil.resolve_name(place) for place in {PLACES!r}]
assert "jax_softmax2p" not in sys.modules
"""
        result = run_python(code)
        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize("place", PLACES)
    def test_copies_are_the_same_object(self, place, patched):
        function = pkgutil.resolve_name(place)
        assert copy.copy(function) is function
        assert copy.deepcopy([function])[0] is function
