"""flax, equinox and optax with this package in them, held against themselves without it."""

import copy
import functools
import pickle
import threading

import equinox as eqx
import flax
import flax.linen
import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np
import optax
import pytest
from flax import nnx
from versions import since

import jax_softmax2p as s2p
from jax_softmax2p import integrations
from jax_softmax2p.integrations import flax_attention, patch_jax_nn, replace_equinox_attention

NAMES = ("softmax", "log_softmax", "logsumexp", "dot_product_attention")


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype))


def weighted(y):
    """A sum that no symmetry makes 0."""
    return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y)


def assert_close(actual, expected, tolerance=2e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(e, float), rtol=tolerance, atol=tolerance)


def uses_this_package(function, *operands):
    """Traced as a new function: of one that it knows JAX takes the trace that it has."""
    return "softmax2p" in str(jax.make_jaxpr(lambda *operands: function(*operands))(*operands))


MASK = normal(3, 1, 5, 5) > -0.5
MASK = MASK.at[1, 0, 2].set(False)

# nnx leaves them to jax.nn.
FLOAT64_ROWS_WITHOUT_A_KEY = [since(jax, "0.10.1", "numbers in rows of float64 without a key")]
LAYERS_TAKE_IS_CAUSAL = since(flax, "0.12.2", "is_causal in layers of nnx")

CALLS = {
    "plain": {},
    "mask": {"mask": MASK},
    "mask of floats": {"mask": MASK.astype(np.float32)},
    "mask of heads": {"mask": normal(3, 4, 5, 5) > 0},
    "bias and mask": {"bias": normal(3, 4, 5, 5), "mask": MASK},
    "dropout": {"dropout_rng": jax.random.key(1), "dropout_rate": 0.4, "mask": MASK},
    "dropout of each": {
        "dropout_rng": jax.random.key(1),
        "dropout_rate": 0.4,
        "broadcast_dropout": False,
        "bias": normal(1, 4, 1, 5),
    },
    "deterministic": {"dropout_rng": jax.random.key(1), "dropout_rate": 0.4, "deterministic": True},
    "float64": {"dtype": np.float64, "mask": MASK},
    "precision": {"precision": "highest"},
}


class TestFlaxFunction:
    """The function itself: with all that layers may pass."""

    @pytest.mark.parametrize(
        "case",
        [pytest.param(case, marks=FLOAT64_ROWS_WITHOUT_A_KEY * (case == "float64")) for case in CALLS],
    )
    def test_is_that_of_flax(self, case):
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3)]
        functions = (flax_attention, nnx.dot_product_attention, flax.linen.dot_product_attention)
        ours, *theirs = (jax.jit(functools.partial(f, **CALLS[case]))(*operands) for f in functions)
        for y in theirs:
            assert_close(ours, y)

    @pytest.mark.parametrize("case", ["bias and mask", "dropout"])
    def test_gradients(self, case):
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3)]

        def gradients(function):
            f = lambda *operands: weighted(function(*operands, **CALLS[case]))
            return jax.jit(jax.grad(f, (0, 1, 2)))(*operands)

        assert_close(gradients(flax_attention), gradients(flax.linen.dot_product_attention))

    @pytest.mark.parametrize("options", [{}, {"dropout_rng": jax.random.key(1), "dropout_rate": 0.4}])
    def test_causal(self, options):
        """Of nnx alone. With dropout nnx adds its mask as it does others'."""
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3)]
        ours = flax_attention(*operands, is_causal=True, mask=MASK, **options)
        theirs = nnx.dot_product_attention(*operands, mask=MASK & np.tri(5, dtype=bool), **options)
        assert_close(ours, theirs)

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
        """Held against float32: flax has logits of 16 bits, and is further off."""
        operands = [normal(3, 5, 4, 8, seed=i).astype(dtype) for i in range(3)]
        y = flax_attention(*operands, mask=MASK, force_fp32_for_softmax=force)
        theirs = flax.linen.dot_product_attention(*operands, mask=MASK, force_fp32_for_softmax=force)
        assert y.dtype == theirs.dtype
        exact = flax.linen.dot_product_attention(*(x.astype(np.float32) for x in operands), mask=MASK)
        np.testing.assert_allclose(y.astype(np.float32), exact, rtol=float(jnp.finfo(y.dtype).eps), atol=1e-6)

    def test_products_of_others(self):
        """Quantized ones, for example."""
        halved = lambda *arguments: 0.5 * jnp.einsum(*arguments)
        operands = [normal(3, 5, 4, 8, seed=i) for i in range(3)]
        options = {"qk_attn_weights_einsum": halved, "attn_weights_value_einsum": halved, "mask": MASK}
        assert_close(
            flax_attention(*operands, **options), flax.linen.dot_product_attention(*operands, **options)
        )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"key": normal(3, 5, 3, 8)}, r"key must go with query's shape \(3, 5, 4, 8\)"),
            ({"value": normal(3, 6, 4, 8)}, r"value must have key's shape \(3, 5, 4, 8\)"),
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
                run = lambda layer: weighted(layer(self.X, rngs=nnx.Rngs(7), **call))
                return nnx.value_and_grad(run)(layer)

            y, gradient = value_and_gradient(layer)
            return y, nnx.to_pure_dict(gradient)

        assert_close(both(flax_attention), both(nnx.dot_product_attention), 1e-5)

    @since(flax, "0.12.6", "nnx.capture")
    @pytest.mark.parametrize("call", [{}, {"mask": MASK}, {"is_causal": True}])
    def test_nnx_keeps_weights(self, call):
        def both(attention):
            layer = self.nnx_layer(attention, dropout_rate=0.5, deterministic=False)
            run = nnx.capture(layer, nnx.Intermediate)
            y, kept = run(self.X, rngs=nnx.Rngs(7), sow_weights=True, **call)
            return y, nnx.to_pure_dict(kept)["attention_weights"]

        assert_close(both(flax_attention), both(nnx.dot_product_attention))

    def test_nnx_decoding(self):
        """One token after another, from the cache."""
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
            y, kept = apply(variables, self.X, **call)
            gradient = jax.grad(lambda variables: weighted(apply(variables, self.X, **call)[0]))(variables)
            return y, gradient, kept

        actual, expected = both(flax_attention), both(flax.linen.dot_product_attention)
        assert ("intermediates" in actual[2]) == sow
        assert_close(actual, expected)

    def test_they_use_this_package(self):
        layer = self.nnx_layer(flax_attention)
        assert uses_this_package(layer, self.X)
        assert not uses_this_package(self.nnx_layer(nnx.dot_product_attention), self.X)


class TestEquinox:
    @staticmethod
    def layers(**options):
        options = {"num_heads": 4, "query_size": 32, "key": jax.random.key(0)} | options
        return integrations.EquinoxMultiheadAttention(**options), eqx.nn.MultiheadAttention(**options)

    @staticmethod
    def both(layer, x, **call):
        def loss(layer, x):
            y = layer(x, x, x, **call)
            return weighted(y), y

        gradient, y = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(layer, x)
        return y, jax.tree.leaves(gradient)

    @pytest.mark.parametrize(
        ("options", "call"),
        [
            ({}, {}),
            ({}, {"mask": MASK[1, 0], "key": jax.random.key(2)}),
            ({"dropout_p": 0.4, "inference": True}, {"key": jax.random.key(2)}),
            (
                {"qk_size": 6, "vo_size": 10, "output_size": 7, "use_query_bias": True},
                {"mask": normal(4, 5, 5) > 0},
            ),
        ],
        ids=["plain", "mask and key", "inference", "sizes and masks of heads"],
    )
    def test_is_that_of_equinox(self, options, call):
        ours, theirs = self.layers(**options)
        assert_close(self.both(ours, normal(5, 32), **call), self.both(theirs, normal(5, 32), **call))

    @pytest.mark.parametrize("mask", [None, MASK[1, 0]])
    def test_dropout(self, mask):
        ours, theirs = self.layers(dropout_p=0.4)
        x, call = normal(5, 32), {"key": jax.random.key(3), "mask": mask}
        actual = self.both(ours, x, **call)
        assert_close(actual, self.both(theirs, x, **call))
        assert not np.allclose(actual[0], ours(x, x, x, inference=True, mask=mask))
        assert_close(ours(x, x, x, inference=True), theirs(x, x, x, inference=True))
        with pytest.raises(RuntimeError, match="key"):
            ours(x, x, x)

    def test_a_batch_and_longer_keys(self):
        ours, theirs = self.layers()
        q, k = normal(3, 5, 32), normal(3, 7, 32)
        assert_close(jax.vmap(ours)(q, k, k), jax.vmap(theirs)(q, k, k))

    def test_processing_of_heads(self):
        ours, theirs = self.layers()
        x, twice = normal(5, 32), lambda q, k, v: (2 * q, k, v)
        assert_close(ours(x, x, x, process_heads=twice), theirs(x, x, x, process_heads=twice))
        with pytest.raises(ValueError, match="process_heads must not change"):
            ours(x, x, x, process_heads=lambda q, k, v: (q[:1], k, v))

    def test_errors(self):
        ours, _ = self.layers()
        x = normal(5, 32)
        with pytest.raises(ValueError, match="value must be as long as key_, 5, got 4"):
            ours(x, x, x[:4])
        with pytest.raises(ValueError, match=r"mask must have shape \(5, 5\) or \(4, 5, 5\), got \(5,\)"):
            ours(x, x, x, mask=np.ones(5, bool))
        with pytest.warns(UserWarning, match="deterministic"):
            ours(x, x, x, deterministic=True)

    def test_replacing(self):
        """In a model that there is, weights and all; the model stays as it was."""
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
        """With optax, in place of the layer in a model: the same parameters after every step."""
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

    def test_nothing_else_has_that_name(self):
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = integrations.nonsense


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
        """Each call enters anew."""
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

    def test_what_ours_refuses_jax_computes(self):
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
        """Names of flax's own for JAX's functions; what is not one of these stays."""
        original, own = flax.linen.softmax, flax.linen.dot_product_attention
        with patch_jax_nn(flax.linen, nnx, flax.linen):
            assert uses_this_package(lambda x: flax.linen.log_softmax(flax.linen.softmax(x)), normal(3))
            assert nnx.softmax is not original
            assert flax.linen.dot_product_attention is own
        assert flax.linen.softmax is nnx.softmax is original

    def test_reaches_layers_and_losses(self):
        x, labels = normal(5, 32), jnp.arange(5)
        layer = eqx.nn.MultiheadAttention(4, 32, key=jax.random.key(0))
        functions = [
            lambda x: layer(x, x, x),
            lambda x: TestFlaxLayers.nnx_layer(nnx.dot_product_attention)(x[None]),
            lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels),
            lambda x: optax.softmax_cross_entropy(x, jax.nn.one_hot(labels, 32)),
        ]
        for function in functions:
            expected = function(x)
            with patch_jax_nn():
                assert uses_this_package(function, x)
                assert_close(jax.jit(function)(x), expected)

    def test_threads(self):
        """Contexts of threads overlap in any order: the last one out restores."""
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


class Transformer(nnx.Module):
    """Two layers of causal attention over 17 tokens."""

    def __init__(self, attention, rngs):
        self.embedding = nnx.Embed(17, 16, rngs=rngs)
        self.layers = nnx.List(
            [
                nnx.MultiHeadAttention(
                    2,
                    16,
                    decode=False,
                    attention_fn=attention,
                    dropout_rate=0.1,
                    deterministic=False,
                    rngs=rngs,
                )
                for _ in range(2)
            ]
        )
        self.norms = nnx.List([nnx.LayerNorm(16, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(16, 17, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for norm, layer in zip(self.norms[:2], self.layers, strict=True):
            x = x + layer(norm(x), mask=nnx.make_causal_mask(tokens))
        return self.head(self.norms[2](x))


def train(attention, loss, steps=20):
    """The losses of a small transformer that learns to count, always from the same seed."""
    model = Transformer(attention, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        value, gradient = nnx.value_and_grad(lambda model: loss(model(tokens[:, :-1]), tokens[:, 1:]).mean())(
            model
        )
        optimizer.update(model, gradient)
        return value

    rng = np.random.default_rng(0)
    batches = (rng.integers(17, size=(steps, 4, 1)) + rng.integers(1, 4, (steps, 4, 1)) * np.arange(13)) % 17
    return [float(step(model, optimizer, jnp.asarray(batch))) for batch in batches]


def test_a_transformer_learns_the_same():
    """With flax and optax as they are, with the hook and the loss, and with jax.nn patched beneath them."""
    theirs = train(nnx.dot_product_attention, optax.softmax_cross_entropy_with_integer_labels)
    assert theirs[-1] < 0.8 * theirs[0]
    ours = train(flax_attention, s2p.softmax_cross_entropy_with_integer_labels)
    with patch_jax_nn():
        patched = train(nnx.dot_product_attention, optax.softmax_cross_entropy_with_integer_labels)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    np.testing.assert_allclose(patched, theirs, rtol=1e-4)
    assert ours != theirs
    assert patched != theirs


@pytest.mark.parametrize("soft", [False, True])
def test_losses_in_a_training_step_of_optax(soft):
    """A classifier, from one seed, learns the same with this package's losses as with optax's."""
    x, labels = normal(64, 8), jnp.asarray(np.random.default_rng(0).integers(10, size=64))
    targets = jax.nn.one_hot(labels, 10) * 0.9 + 0.01 if soft else labels
    name = "softmax_cross_entropy" if soft else "softmax_cross_entropy_with_integer_labels"

    def losses(loss):
        optimizer, params = optax.sgd(0.5, momentum=0.9), {"w": normal(8, 10), "b": jnp.zeros(10, np.float32)}
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            function = lambda params: loss(x @ params["w"] + params["b"], targets).mean()
            value, gradient = jax.value_and_grad(function)(params)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(params, updates), state, value

        values = []
        for _ in range(10):
            params, state, value = step(params, state)
            values.append(float(value))
        return values

    ours, theirs = losses(getattr(s2p, name)), losses(getattr(optax, name))
    assert theirs[-1] < 0.9 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
