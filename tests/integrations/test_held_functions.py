"""patch_jax_nn in modules that hold JAX's functions: what it finds, replaces, reports and restores."""

import importlib.util
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import normal, uses_this_package

from jax_softmax2p.integrations import HeldFunction, held_functions, patch_jax_nn

SOFTMAX = jax.nn.softmax
"""It is replaced itself where all loaded modules are, this one among them."""

X = normal(3, 5)

LIBRARY = """
import collections, dataclasses, functools, types
import jax
from jax.nn import softmax, log_softmax as other_name
from jax.scipy.special import logsumexp

ACTIVATIONS = {"softmax": softmax, "relu": jax.nn.relu, 3: {"nested": other_name}}
ORDERED = collections.OrderedDict(a=1, b=softmax)

def gate(x, y=2, activation=softmax):
    return activation(x)

def named(x, *, activation=softmax):
    return activation(x)

def decorated(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)
    return call

@decorated
@jax.jit
def deep(x, activation=softmax):
    return activation(x)

def annotated(x):
    return annotated.activation(x)

annotated.activation = softmax

class Layer:
    activation = softmax
    static = staticmethod(softmax)
    table = {"lse": logsumexp}

    class Inner:
        activation = softmax

    def __call__(self, x, activation=softmax):
        return activation(x)

    @staticmethod
    def run(x, activation=softmax):
        return activation(x)

@dataclasses.dataclass
class Fields:
    activation: object = softmax
    own: object = dataclasses.field(default=softmax, init=False)
    keyword: object = dataclasses.field(default=softmax, kw_only=True)
"""

REPLACED = {
    "softmax": "jax.nn.softmax",
    "other_name": "jax.nn.log_softmax",
    "logsumexp": "jax.nn.logsumexp",
    "ACTIVATIONS['softmax']": "jax.nn.softmax",
    "ACTIVATIONS[3]['nested']": "jax.nn.log_softmax",
    "ORDERED['b']": "jax.nn.softmax",
    "gate(activation=)": "jax.nn.softmax",
    "named(activation=)": "jax.nn.softmax",
    "deep(activation=)": "jax.nn.softmax",
    "annotated.activation": "jax.nn.softmax",
    "Layer.activation": "jax.nn.softmax",
    "Layer.static": "jax.nn.softmax",
    "Layer.table['lse']": "jax.nn.logsumexp",
    "Layer.Inner.activation": "jax.nn.softmax",
    "Layer.__call__(activation=)": "jax.nn.softmax",
    "Layer.run(activation=)": "jax.nn.softmax",
    "Fields.activation": "jax.nn.softmax",
    "Fields.own": "jax.nn.softmax",
    "Fields.keyword": "jax.nn.softmax",
    "Fields.activation, the field's default": "jax.nn.softmax",
    "Fields.own, the field's default": "jax.nn.softmax",
    "Fields.keyword, the field's default": "jax.nn.softmax",
    "Fields.__init__(activation=)": "jax.nn.softmax",
    "Fields.__init__(keyword=)": "jax.nn.softmax",
}

USES = {
    "name": lambda library: library.softmax,
    "other name": lambda library: library.other_name,
    "function of the module": lambda library: lambda x: eval("softmax", vars(library))(x),
    "dictionary": lambda library: library.ACTIVATIONS["softmax"],
    "nested dictionary": lambda library: library.ACTIVATIONS[3]["nested"],
    "default": lambda library: library.gate,
    "default by keyword": lambda library: library.named,
    "default within decorators": lambda library: library.deep,
    "attribute of a function": lambda library: library.annotated,
    "static method": lambda library: library.Layer.static,
    "static method of an instance": lambda library: library.Layer().static,
    "dictionary of a class": lambda library: library.Layer.table["lse"],
    "class in a class": lambda library: library.Layer.Inner.activation,
    "default of a method": lambda library: library.Layer(),
    "default of a static method": lambda library: library.Layer.run,
    "field": lambda library: library.Fields().activation,
    "field by keyword": lambda library: library.Fields().keyword,
}


def make_module(monkeypatch, name, code=""):
    """A module that is loaded for the time of a test, with its code run in it."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(code, vars(module))
    return module


@pytest.fixture
def library(monkeypatch):
    return make_module(monkeypatch, "some_library", LIBRARY)


def contents(library):
    """All that the places of a library hold, defaults in tuples of their own."""
    names = {name: vars(library)[name] for name in ("softmax", "other_name", "logsumexp")}
    functions = {
        name: (f.__defaults__, dict(f.__kwdefaults__ or {}))
        for name, f in {
            "gate": library.gate,
            "named": library.named,
            "deep": library.deep.__wrapped__.__wrapped__,
            "call": library.Layer.__call__,
            "run": library.Layer.run,
            "init": library.Fields.__init__,
        }.items()
    }
    fields = {name: field.default for name, field in library.Fields.__dataclass_fields__.items()}
    classes = [dict(vars(cls)) for cls in (library.Layer, library.Layer.Inner, library.Fields)]
    tables = dict(library.ACTIVATIONS), dict(library.ACTIVATIONS[3]), dict(library.ORDERED)
    table_of_class = dict(library.Layer.table)
    return names, functions, fields, classes, tables, table_of_class, library.annotated.activation


def places(listed, module="some_library"):
    return {held.place for held in listed if held.module == module}


class TestReplaced:
    @pytest.mark.long
    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("by", ["module", "name", "loaded modules"])
    def test_every_use_reaches_this_package(self, use, by, library):
        call = lambda x: USES[use](library)(x)
        expected = call(X)
        arguments = {"module": ([library], {}), "name": (["some_library"], {})}
        modules, options = arguments.get(by, ([], {"loaded_modules": True}))
        assert not uses_this_package(call, X)
        with patch_jax_nn(*modules, **options) as calls:
            # A jitted function that was traced before keeps its trace, for the same shape.
            assert uses_this_package(call, normal(4, 7))
            np.testing.assert_allclose(call(X), expected, rtol=2e-6)
        assert places(calls.replaced) == REPLACED.keys()
        assert not uses_this_package(call, normal(5, 7))

    def test_what_it_lists(self, library):
        with patch_jax_nn(library) as calls:
            pass
        listed = {held.place: held for held in calls.replaced if held.module == "some_library"}
        for place, function in REPLACED.items():
            assert listed[place] == HeldFunction("some_library", place, function)
        assert not places(calls.not_replaced)
        lines = str(calls).splitlines()
        assert f"replaced: {len(calls.replaced)}" in lines
        assert "  some_library: ACTIVATIONS['softmax'] is jax.nn.softmax" in lines

    def test_restores_exactly(self, library):
        before = contents(library)
        with patch_jax_nn(library):
            assert contents(library) != before
        assert contents(library) == before
        with pytest.raises(KeyError), patch_jax_nn(library):
            raise KeyError
        assert contents(library) == before

    def test_not_asked_for(self, library):
        before = contents(library)
        with patch_jax_nn() as calls:
            assert contents(library) == before
        assert not places(calls.replaced)

    def test_classes_that_are_called_inside(self, library):
        """An object that is made inside keeps the function; one from before keeps the original."""
        before = library.Fields()
        with patch_jax_nn(library):
            inside = library.Fields()
            assert before.activation is SOFTMAX
        assert uses_this_package(inside.activation, X)
        assert library.Fields().activation is SOFTMAX

    def test_packages_stand_for_their_modules(self, monkeypatch):
        code = "from jax.nn import softmax"
        package, inner, similar = (
            make_module(monkeypatch, name, code) for name in ("pack", "pack.inner", "package")
        )
        for argument in (package, "pack"):
            with patch_jax_nn(argument):
                assert package.softmax is inner.softmax is jax.nn.softmax is not SOFTMAX
                assert similar.softmax is SOFTMAX
        with patch_jax_nn("pack.inner"):
            assert package.softmax is SOFTMAX
            assert inner.softmax is not SOFTMAX
        assert package.softmax is inner.softmax is SOFTMAX


class TestNotReplaced:
    @pytest.mark.parametrize(
        ("code", "place", "reason"),
        [
            ("held = (softmax, 1)", "held[0]", "it is in a tuple"),
            ("held = [0, softmax]", "held[1]", "it is in a list"),
            ("held = {softmax}", "held[0]", "it is in a set"),
            ("held = {'a': [softmax]}", "held['a'][0]", "it is in a list"),
            ("held = types.MappingProxyType({'a': softmax})", "held['a']", "it is in a mappingproxy"),
            ("held = functools.partial(softmax, axis=0)", "held", "it is in a functools.partial"),
            ("held = functools.partial(map, softmax)", "held", "it is in a functools.partial"),
            ("held = jax.jit(softmax)", "held.__wrapped__", "it is in an object of type PjitFunction"),
            ("held = jax.checkpoint(softmax)", "held", "it is in a function that wraps it"),
            ("held = types.SimpleNamespace(a=softmax)", "held.a", "it is in an object of type SimpleName"),
            (
                "def make(f):\n    def held(x):\n        return f(x)\n    return held\nheld = make(softmax)",
                "make.<locals>.held, variable f",
                "it is in a closure",
            ),
            (
                # As functions that Cython compiles have them.
                "class Compiled:\n    __slots__ = '__defaults__',\n"
                "held = Compiled()\nheld.__defaults__ = softmax,",
                "held",
                "it is in an object of type Compiled",
            ),
            ("class Held:\n    held = softmax,", "Held.held[0]", "it is in a tuple"),
            ("class Held:\n    held = classmethod(softmax)", "Held.held", "it is in a classmethod"),
        ],
    )
    def test_it_is_listed_and_stays(self, code, place, reason, monkeypatch):
        imports = "import functools, types, jax\nsoftmax = jax.nn.softmax\n"
        module = make_module(monkeypatch, "holder", f"{imports}{code}\ndel softmax")
        held = dict(vars(module))
        with patch_jax_nn(module) as calls:
            assert vars(module) == held
        (found,) = (held for held in calls.not_replaced if held.module == "holder")
        assert (found.place, found.function) == (place, "jax.nn.softmax")
        assert found.reason.startswith(reason)
        assert f"  {found}" in str(calls).splitlines()
        assert not places(calls.replaced, "holder")

    def test_immutable_classes(self):
        """Those that are compiled may be, here int."""
        place = held_functions.Place(int, "activation", type.__setattr__)
        description = HeldFunction("compiled", "int.activation", "jax.nn.softmax")
        places = []
        holdings = [held_functions.Holding(place, description, SOFTMAX, jnp.exp)]
        replaced, (left,) = held_functions.replace(holdings, places)
        assert not places
        assert not replaced
        assert left.place == "int.activation"
        assert "immutable" in left.reason

    def test_other_modules_things(self, monkeypatch, library):
        """What a module imports is searched where it is defined."""
        user = make_module(monkeypatch, "user", "from some_library import gate, Layer, softmax\nimport jax")
        with patch_jax_nn(user) as calls:
            assert user.softmax is jax.nn.softmax
            assert library.softmax is library.Layer.activation is library.gate.__defaults__[1] is SOFTMAX
        assert places(calls.replaced, "user") == {"softmax"}

    @pytest.mark.parametrize(
        ("modules", "error", "words"),
        [
            (["nonsense"], ValueError, "modules must be loaded, got 'nonsense'"),
            ([3], TypeError, "modules must be modules or their names, got 3"),
            ([jax, SOFTMAX], TypeError, "modules must be modules or their names, got <"),
            (["jax._src.nn.functions"], ValueError, "private modules .* 'jax._src.nn.functions'"),
            ([sys.modules["jax._src.nn.functions"]], ValueError, "modules must not be JAX's private"),
            (["jax_softmax2p"], ValueError, "this package's, got 'jax_softmax2p'"),
        ],
    )
    def test_errors(self, modules, error, words):
        with pytest.raises(error, match=words), patch_jax_nn(*modules):
            pass
        assert jax.nn.softmax is SOFTMAX

    @pytest.mark.parametrize("options", [{"loaded_modules": True}, {}])
    def test_internals_stay(self, options):
        """JAX's own, and what this package holds of JAX's by name, which the reference calls."""
        from jax_softmax2p import factors

        functions, softmax, logsumexp = sys.modules["jax._src.nn.functions"], SOFTMAX, jax.nn.logsumexp
        with patch_jax_nn("jax", **options) as calls:
            assert functions.softmax is softmax
            assert functions.logsumexp is factors.logsumexp_of_jax is logsumexp
        assert all(
            "._" not in held.module for held in calls.replaced if held.module.partition(".")[0] == "jax"
        )


class TestHostileModules:
    """Modules are searched without running their code, whatever they hold."""

    def test_objects_that_refuse_to_be_looked_at(self, monkeypatch):
        code = """
class Meta(type):
    def __getattribute__(cls, name):
        raise RuntimeError(name)

class Refusing(metaclass=Meta):
    pass

class Proxy:
    def __getattribute__(self, name):
        raise RuntimeError(name)
    def __eq__(self, other):
        raise RuntimeError
    def __hash__(self):
        raise RuntimeError

proxy, table = Proxy(), {"a": Proxy(), "b": softmax}
loop = [table]
loop.append(loop)
table["loop"] = loop
names = globals()
deep = softmax
for _ in range(10_000):
    deep = [deep]
many = list(range(100_000))

def empty():
    if not many:
        later = softmax
    return lambda: later
closure = empty()
"""
        module = make_module(monkeypatch, "hostile", f"from jax.nn import softmax{code}")
        with patch_jax_nn(module) as calls:
            assert module.table["b"] is jax.nn.softmax
        assert module.table["b"] is SOFTMAX
        assert places(calls.replaced, "hostile") == {"softmax", "table['b']"}

    def test_modules_of_their_own_class(self, monkeypatch):
        class Lazy(types.ModuleType):
            def __getattribute__(self, name):
                raise RuntimeError(name)

            def __setattr__(self, name, value):
                raise RuntimeError(name)

        module = Lazy("lazy")
        names = object.__getattribute__(module, "__dict__")
        names["softmax"] = SOFTMAX
        monkeypatch.setitem(sys.modules, "lazy", module)
        with patch_jax_nn("lazy"):
            assert names["softmax"] is jax.nn.softmax
        assert names["softmax"] is SOFTMAX

    def test_entries_that_are_no_modules(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "nothing", None)
        original = SOFTMAX
        with patch_jax_nn(loaded_modules=True):
            assert jax.nn.softmax is SOFTMAX is not original
        assert jax.nn.softmax is SOFTMAX is original


class TestNesting:
    def test_with_other_modules(self, monkeypatch):
        code = "from jax.nn import softmax\ndef f(x, a=softmax, b=softmax): pass"
        first, second = (make_module(monkeypatch, name, code) for name in ("first", "second"))
        defaults = first.f.__defaults__
        with patch_jax_nn(first):
            with patch_jax_nn(first, second):
                assert second.softmax is not SOFTMAX
            assert second.softmax is SOFTMAX
            assert first.softmax is first.f.__defaults__[0] is first.f.__defaults__[1] is jax.nn.softmax
        assert first.softmax is jax.nn.softmax is SOFTMAX
        assert first.f.__defaults__ == defaults

    @pytest.mark.parametrize("order", ["as entered", "reversed"])
    def test_any_order(self, order, library):
        before = contents(library)
        contexts = [patch_jax_nn(*modules) for modules in ([library], [], [library], ["some_library"])]
        for context in contexts:
            context.__enter__()
        inside = contents(library)
        for context in contexts if order == "as entered" else reversed(contexts):
            assert contents(library) == inside or context is contexts[0]
            context.__exit__(None, None, None)
        assert contents(library) == before
        assert jax.nn.softmax is SOFTMAX

    def test_what_the_body_assigns(self, library):
        """It is undone, as a name of jax.nn is."""
        log_softmax = library.other_name
        with patch_jax_nn(library):
            library.softmax = library.ACTIVATIONS["softmax"] = jnp.exp
            with patch_jax_nn(library):
                assert library.softmax is jnp.exp
            library.other_name = log_softmax
            with patch_jax_nn(library):
                assert library.other_name is jax.nn.log_softmax
        assert library.softmax is library.ACTIVATIONS["softmax"] is SOFTMAX
        assert library.other_name is log_softmax

    def test_threads(self, library):
        before = contents(library)
        failures = []

        def run():
            for _ in range(20):
                with patch_jax_nn(library):
                    held = [library.softmax, library.Layer.static, library.gate.__defaults__[1]]
                    if any(function is SOFTMAX for function in held):
                        failures.append(held)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert contents(library) == before


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.mark.filterwarnings("ignore")
class TestLibraries:
    """Libraries that import JAX's functions by name."""

    @installed("numpyro")
    def test_numpyro(self):
        import numpyro.distributions

        mixture = lambda x: numpyro.distributions.MixtureSameFamily(
            numpyro.distributions.Categorical(logits=X[0]),
            numpyro.distributions.Normal(jnp.arange(5.0), 1.0),
        ).log_prob(x)
        expected = mixture(X)
        with patch_jax_nn("numpyro") as calls:
            assert uses_this_package(mixture, X)
            np.testing.assert_allclose(mixture(X), expected, rtol=1e-5)
        assert any(held.module.startswith("numpyro.") for held in calls.replaced)
        assert not uses_this_package(mixture, X)

    @installed("jaxopt")
    def test_jaxopt(self):
        import jaxopt.loss

        loss = lambda x: jaxopt.loss.multiclass_logistic_loss(1, x)
        expected = loss(X[0])
        with patch_jax_nn("jaxopt"):
            assert uses_this_package(loss, X[0])
            np.testing.assert_allclose(loss(X[0]), expected, rtol=1e-5)
        assert not uses_this_package(loss, X[0])
