"""linear_softmax_cross_entropy and logsumexp_of_products against the plain composition in float64."""

# ruff: noqa: B023 (functions are called in the iteration that defines them)

import functools
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from processes import ROOT

import jax_softmax2p as s2p
from jax_softmax2p.linear import blocks

N, D, V = 13, 6, 300
IMPLEMENTATIONS = (None, "native", "reference")
OPTIONS = (
    {},
    {"soft_cap": 3.0, "scale": 0.5, "z_loss": 0.01, "label_smoothing": 0.1},
    {"z_loss": 0.01},
)
# Of the largest entry: products and sums of D, N and V terms, and roundings to 16 bits on the way.
TOLERANCE = {"float32": 30 * 2.0**-24, "bfloat16": 2.0**-7, "float16": 2.0**-10, "float64": 1e-13}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several chunks of classes, with some left over."""
    monkeypatch.setattr(blocks, "MIN_CHUNK_CLASSES", 64)
    monkeypatch.setattr(blocks, "MAX_CHUNK_CLASSES", 128)
    monkeypatch.setattr(blocks, "MAX_CHUNK_LOGITS", 1)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    inputs, weights = rng.standard_normal((N, D)), rng.standard_normal((D, V))
    return inputs, weights, rng.standard_normal(V), rng.integers(0, V, N), rng.random(N) < 0.7


def plain(x, w, labels, *, bias=None, where=None, scale=1.0, soft_cap=None, label_smoothing=0.0, z_loss=0.0):
    """The loss from stored logits, by jax.nn, for float64."""
    z = scale * (x @ w)
    z = z if bias is None else z + bias
    z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
    log_p, lse = jax.nn.log_softmax(z), jax.nn.logsumexp(z, -1)
    at_label = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    loss = -(1 - label_smoothing) * at_label - label_smoothing * log_p.mean(-1) + z_loss * lse**2
    return loss if where is None else jnp.where(where, loss, 0)


def assert_near(results, expected, dtype, factor=1.0):
    for result, value in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        value = np.asarray(value, np.float64)
        error = np.abs(np.asarray(result, np.float64) - value).max()
        assert error <= factor * TOLERANCE[dtype] * np.abs(value).max()


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        *(("float32", name) for name in IMPLEMENTATIONS),
        *((name, None) for name in TOLERANCE if name != "float32"),
    ],
)
@pytest.mark.parametrize("cotangent", ["mean", "of tokens"])
def test_value_and_gradients(arrays, dtype, implementation, cotangent):
    inputs, weights, bias, labels, mask = arrays
    c = np.ones(N) / N if cotangent == "mean" else np.arange(N) - 3.0
    with jax.enable_x64(True):
        for i, options in enumerate(OPTIONS):
            if i != 1 and (dtype != "float32" or implementation is not None):
                continue  # Compilations take long.
            class_axis, recompute, where = i % 2, i == 2, mask if i else None
            x, w, b = (jnp.asarray(a, dtype) for a in (inputs, weights, bias))

            def total(loss, *operands, **more):
                return (loss(*operands[:2], labels, bias=operands[2], **more).astype(jnp.float64) * c).sum()

            call = lambda x, w, b: total(
                s2p.linear_softmax_cross_entropy,
                x,
                w.T if class_axis == 0 else w,
                b,
                where=where,
                class_axis=class_axis,
                recompute=recompute,
                implementation=implementation,
                token_block_size=4,
                **options,
            )
            truth = lambda x, w, b: total(plain, x, w, b, where=where, **options)
            exact = [a.astype(jnp.float64) for a in (x, w, b)]
            value, gradients = jax.jit(jax.value_and_grad(call, (0, 1, 2)))(x, w, b)
            expected, expected_gradients = jax.jit(jax.value_and_grad(truth, (0, 1, 2)))(*exact)
            scale = float(jnp.abs(plain(*exact[:2], labels, bias=exact[2])).max() * np.abs(c).sum())
            assert abs(value - expected) <= TOLERANCE[dtype] * scale
            assert_near(gradients, expected_gradients, dtype)
            assert [g.dtype for g in gradients] == [x.dtype] * 3


def test_gradients_of_some_operands_alone(arrays):
    inputs, weights, bias, labels, _ = (jnp.asarray(a) for a in arrays)
    f = lambda x, w, b: s2p.linear_softmax_cross_entropy(x, w, labels, bias=b, token_block_size=4).mean()
    g = lambda x, w, b: plain(x, w, labels, bias=b).mean()
    with jax.enable_x64(True):
        for wanted in ((0,), (1,)):
            expected = jax.jit(jax.grad(g, wanted))(
                *(np.asarray(a, np.float64) for a in (inputs, weights, bias))
            )
            assert_near(jax.jit(jax.grad(f, wanted))(inputs, weights, bias), expected, "float32")


def test_a_fully_certain_token_does_not_collapse():
    """The margin is 25: optax's loss and gradient are 0 there."""
    x, w = jnp.eye(2), jnp.zeros((2, 300)).at[0, 7].set(25.0)
    f = lambda x: s2p.linear_softmax_cross_entropy(x, w, jnp.array([7, 7]))
    loss, vjp = jax.vjp(f, x)
    with mpmath.workdps(40):
        expected = float(mpmath.log1p(299 * mpmath.exp(-25)))
        share = 299 * mpmath.exp(-25) / (1 + 299 * mpmath.exp(-25))
        expected_gradient = float(-25 * share)
    np.testing.assert_allclose(loss[0], expected, rtol=1e-6)
    np.testing.assert_allclose(vjp(jnp.array([1.0, 0.0]))[0][0, 0], expected_gradient, rtol=1e-6)


def test_labels_out_of_range_and_masked_tokens():
    x, w = jnp.ones((4, 2)).at[3].set(jnp.nan), jnp.ones((2, 5))
    labels, where = jnp.array([-1, 5, -6, 9]), jnp.array([True, True, True, False])
    f = lambda x, w: s2p.linear_softmax_cross_entropy(x, w, labels, where=where)
    loss, vjp = jax.vjp(f, x, w)
    np.testing.assert_allclose(loss, [np.log(5), np.nan, np.nan, 0], rtol=1e-6)
    x_bar, w_bar = vjp(jnp.ones(4))
    # Of a label that is no class, the gradient is that of the lse: the mean of the weights, and of x.
    np.testing.assert_allclose(x_bar, [[0, 0], [1, 1], [1, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(w_bar, np.array([0.6] * 4 + [-0.4])[None].repeat(2, 0), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_masked_tokens_spoil_no_gradient(value):
    """Neither by what they hold nor by their scale; that of a scale which all tokens share among them."""
    x, where = jnp.ones((3, 2)), jnp.array([True, False, True])
    spoilt, scales = x.at[1].set(value), jnp.ones((3, 1)).at[1].set(value)
    w, labels = jnp.arange(10.0).reshape(2, 5), jnp.array([1, 2, 3])
    masked = {
        "loss": lambda x, scale: s2p.linear_softmax_cross_entropy(x, w, labels, where=where, scale=scale),
        "lse": lambda x, scale: jnp.where(
            where, s2p.logsumexp_of_products(x, w.T, where=where, scale=scale), 0
        ),
    }
    for f in masked.values():
        gradient = jax.grad(lambda *operands, f=f: f(*operands).sum(), (0, 1))
        expected_x, expected_scale = gradient(x, 2.0)
        np.testing.assert_allclose(gradient(spoilt, 2.0)[1], expected_scale, rtol=1e-6)
        np.testing.assert_array_equal(gradient(spoilt, 2.0)[0], expected_x)
        np.testing.assert_array_equal(gradient(x, scales)[0], gradient(x, jnp.ones((3, 1)))[0])


def losses_of(arrays):
    inputs, weights, _, labels, _ = (jnp.asarray(a, None) for a in arrays)
    ours = functools.partial(s2p.linear_softmax_cross_entropy, token_block_size=4)
    return inputs.astype(jnp.float32), weights.astype(jnp.float32), labels, ours


def test_vmap_of_shared_and_of_own_weights(arrays):
    x, w, labels, ours = losses_of(arrays)
    xs, ws = jnp.stack([x, 2 * x, -x]), jnp.stack([w, -w, 0.5 * w])
    c = jnp.arange(3.0)
    for w_axis, weights in ((None, w), (0, ws)):
        for loss_of_batch in (
            lambda loss, xs, w: (jax.vmap(loss, (0, w_axis, None))(xs, w, labels).mean(1) * c).sum(),
            lambda loss, xs, w: jax.vmap(loss, (0, w_axis, None))(xs, w, labels).mean(),
        ):
            result = jax.jit(jax.grad(loss_of_batch, (1, 2)), static_argnums=0)
            assert_near(result(ours, xs, weights), result(plain, xs, weights), "float32", 4)
        # Gradients of each element of the batch.
        for_one = lambda loss: jax.grad(lambda x, w: loss(x, w, labels).mean(), (0, 1))
        each = lambda loss: jax.jit(jax.vmap(for_one(loss), (0, w_axis)))(xs, weights)
        assert_near(each(ours), each(plain), "float32", 4)


def test_batch_with_shared_weights_has_one_gradient_of_them(arrays):
    """vmap makes no gradient of the weights for each element of the batch."""
    x, w, labels, ours = losses_of(arrays)
    xs = jnp.broadcast_to(x, (50, *x.shape))
    f = lambda xs, w: jax.vmap(ours, (0, None, None))(xs, w, labels).mean()
    text = str(jax.make_jaxpr(jax.grad(f, 1))(xs, w))
    assert f"50,{D},{V}" not in text
    assert f"50,{N},{V}" not in text


def test_checkpoint_scan_and_second_derivatives(arrays):
    x, w, labels, ours = losses_of(arrays)
    for wrap in (
        lambda loss: lambda x, w: jax.checkpoint(lambda x, w: loss(x, w, labels).mean())(x, w),
        lambda loss: (
            lambda x, w: jax.lax.scan(
                lambda carry, x: (carry + loss(x, w, labels).mean(), None), 0.0, jnp.stack([x, -x])
            )[0]
        ),
        lambda loss: lambda x, w: jnp.sum(jax.grad(lambda x: loss(x, w, labels).mean())(x) ** 2),
        lambda loss: lambda x, w: jax.jvp(lambda w: loss(x, w, labels).mean(), (w,), (w**2,))[1],
        lambda loss: lambda x, w: (loss(x, w, labels) ** 2).sum(),
    ):
        result, expected = (jax.jit(jax.value_and_grad(wrap(loss), (0, 1)))(x, w) for loss in (ours, plain))
        assert_near(result, expected, "float32", 20)
    hessian = lambda loss: jax.jit(jax.hessian(lambda x: loss(x, w, labels[:2]).sum()))(x[:2])
    assert_near(hessian(ours), hessian(plain), "float32", 20)


def test_logits_are_never_stored():
    shapes = [(512, 32), (32, 20000), (512,)]
    x, w, labels = (jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (float, float, int), strict=True))
    for recompute in (False, True):
        f = lambda x, w, labels: s2p.linear_softmax_cross_entropy(
            x, w, labels, token_block_size=32, recompute=recompute
        ).mean()
        compiled = jax.jit(jax.value_and_grad(f, (0, 1))).lower(x, w, labels).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 512 * 20000 * 4 / 5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logsumexp_of_products(arrays, implementation):
    a, b, bias, _, mask = (jnp.asarray(array) for array in arrays)
    truth = lambda a, b, bias: jax.nn.logsumexp(0.5 * (a @ b) + bias, -1)
    f = lambda a, b, bias: s2p.logsumexp_of_products(
        a, b.T, bias=bias, scale=0.5, token_block_size=4, implementation=implementation
    )
    c = np.linspace(-1, 2, N)
    total = lambda f: lambda *operands: (f(*operands) * c).sum()
    with jax.enable_x64(True):
        exact = [np.asarray(x, np.float64) for x in (a, b, bias)]
        assert_near(f(a, b, bias), truth(*exact), "float32")
        result = jax.jit(jax.grad(total(f), (0, 1, 2)))(a, b, bias)
        assert_near(result, jax.jit(jax.grad(total(truth), (0, 1, 2)))(*exact), "float32")
    masked = s2p.logsumexp_of_products(a, b.T, where=mask)
    assert np.array_equal(np.isneginf(masked), ~np.asarray(mask))


def test_sizes_of_zero_and_leading_dimensions():
    f = s2p.linear_softmax_cross_entropy
    assert f(jnp.ones((0, 2)), jnp.ones((2, 5)), jnp.zeros(0, int)).shape == (0,)
    x, labels = jnp.ones((2, 3, 4)), jnp.zeros((2, 3), int)
    np.testing.assert_allclose(f(x, jnp.ones((4, 7)), labels), np.full((2, 3), np.log(7)), rtol=1e-6)
    np.testing.assert_allclose(f(x[0, 0], jnp.ones((4, 7)), jnp.array(3)), np.log(7), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_z_loss_of_a_nearly_certain_label(implementation):
    """Its gradient at the label is that of the z-loss, which is far less than the roundings of 1."""
    x, weights = jnp.ones((1, 1), jnp.float32), jnp.array([[1e-3, -30.0, -30.0]], jnp.float32)
    f = lambda bias: s2p.linear_softmax_cross_entropy(
        x, weights, jnp.array([0]), bias=bias, z_loss=1e-5, implementation=implementation
    )
    gradient = jax.grad(lambda bias: f(bias).sum())(jnp.zeros(3, jnp.float32))
    z = np.asarray(weights[0], np.float64)
    lse, p = np.log(np.exp(z).sum()), np.exp(z) / np.exp(z).sum()
    others = np.array([-p[1] - p[2], p[1], p[2]])
    expected = others + 2e-5 * lse * p
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_label_smoothing_of_large_logits(implementation):
    x, weights = jnp.ones((1, 1), jnp.float32), jnp.full((1, 2), 3e38, jnp.float32)
    loss = s2p.linear_softmax_cross_entropy(
        x, weights, jnp.array([0]), label_smoothing=0.1, implementation=implementation
    )
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_sizes_with_axis_name():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P(), P(None, "x"), P()), "out_specs": P()}
    f = lambda x, w, labels: s2p.linear_softmax_cross_entropy(x, w, labels, axis_name="x")
    call = jax.shard_map(f, mesh=mesh, **specs)
    for w in (jnp.ones((3, 0)), jnp.ones((0, 3))):
        with pytest.raises(ValueError, match=r"those of weights not 0; got .*\(\d, \d\)"):
            call(jnp.ones((2, len(w))), w, jnp.zeros(2, int))
    assert call(jnp.ones((0, 3)), jnp.ones((3, 4)), jnp.zeros(0, int)).shape == (0,)


def test_vmap_over_nothing():
    x, w, labels = jnp.ones((0, 3, 4)), jnp.ones((4, 5)), jnp.zeros((0, 3), int)
    f = lambda x, w: jax.vmap(lambda x, labels: s2p.linear_softmax_cross_entropy(x, w, labels))(x, labels)
    assert f(x, w).shape == (0, 3)
    gradients = jax.jit(jax.grad(lambda *xs: f(*xs).sum(), (0, 1)))(x, w)
    assert gradients[0].shape == x.shape
    np.testing.assert_array_equal(gradients[1], jnp.zeros((4, 5)))
    dot = jax.jvp(f, (x, w), (x, w))[1]
    assert dot.shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": jnp.ones((3, 2), int)}, TypeError, "inputs must be floating"),
        ({"weights": jnp.ones((3, 5))}, ValueError, "weights must be"),
        ({"labels": jnp.zeros(4, int)}, ValueError, "labels must have"),
        ({"labels": jnp.zeros(3)}, TypeError, "labels must be integers"),
        ({"bias": jnp.zeros(4)}, ValueError, "bias must have"),
        ({"where": jnp.ones(3)}, ValueError, "where must be boolean"),
        ({"where": jnp.ones(4, bool)}, ValueError, "where must broadcast"),
        ({"scale": jnp.ones(3)}, ValueError, "scale must broadcast to one number a row"),
        ({"scale": True}, TypeError, "scale must be an array of numbers, got dtype bool"),
        ({"scale": 1j}, TypeError, "scale must be real, got dtype complex"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"label_smoothing": jnp.ones(3)}, ValueError, "label_smoothing must be a finite number"),
        ({"z_loss": "a"}, ValueError, "z_loss must be a finite number"),
        ({"z_loss": np.complex64(1)}, ValueError, "z_loss must be a finite number"),
        ({"z_loss": 10**400}, ValueError, "z_loss must be a finite number"),
        ({"token_block_size": 2.5}, ValueError, "token_block_size must be a positive integer"),
        ({"class_axis": 2}, ValueError, "class_axis"),
        ({"token_block_size": 0}, ValueError, "token_block_size"),
        ({"axis_name": "nowhere"}, ValueError, "axis_name"),
        ({"implementation": "fast"}, ValueError, "implementation"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    arguments = {"inputs": jnp.ones((3, 2)), "weights": jnp.ones((2, 5)), "labels": jnp.zeros(3, int)}
    with pytest.raises(error, match=message):
        s2p.linear_softmax_cross_entropy(**(arguments | changes))


def test_numbers_of_any_kind():
    operands = jnp.ones((3, 2)), jnp.ones((2, 5)), jnp.zeros(3, int)
    expected = s2p.linear_softmax_cross_entropy(*operands, label_smoothing=0.5, z_loss=0.25)
    for number in (np.float32, jnp.float32, jnp.bfloat16, np.array, jnp.zeros((), jnp.bfloat16).dtype.type):
        options = {"label_smoothing": number(0.5), "z_loss": number(0.25)}
        np.testing.assert_array_equal(s2p.linear_softmax_cross_entropy(*operands, **options), expected)
    with pytest.raises(ValueError, match="z_loss must be a finite number that is known outside of jit"):
        jax.jit(lambda z: s2p.linear_softmax_cross_entropy(*operands, z_loss=z))(0.5)


def test_recipes_of_the_docs():
    """The code of docs/contrastive.md, run as it stands there."""
    text = (ROOT / "docs" / "contrastive.md").read_text(encoding="utf-8")
    recipe: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, recipe)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 9, 4))
    z = 2.0 * x @ y.T
    log_p = [z - np.log(np.exp(z).sum(axis, keepdims=True)) for axis in (0, 1)]
    expected = -np.mean([np.diagonal(a) for a in log_p])
    np.testing.assert_allclose(recipe["contrastive_loss"](x, y, 2.0), expected, rtol=1e-6)
    cost, g, log_a = ((x[:, None] - y) ** 2).sum(-1) / 2, rng.standard_normal(9), np.log(np.full(9, 1 / 9))
    expected = 0.5 * (log_a - np.log(np.exp((g - cost) / 0.5).sum(1)))
    np.testing.assert_allclose(recipe["half_step"](x, y, log_a, g, 0.5), expected, rtol=1e-5)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_strict_modes_of_jax(implementation):
    """A bias needs no promotion of ranks, and tracing no transfer from the host."""
    x, weights, bias, labels = jnp.ones((4, 6)), jnp.ones((6, 7)), jnp.ones(7), jnp.arange(4)
    loss = lambda x, weights, bias, labels: s2p.linear_softmax_cross_entropy(
        x, weights, labels, bias=bias, implementation=implementation
    ).sum()
    with jax.numpy_rank_promotion("raise"), jax.transfer_guard("disallow"):
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, weights, bias, labels)
    np.testing.assert_allclose(value, 4 * np.log(7), rtol=1e-6)
    assert [g.shape for g in gradients] == [(4, 6), (6, 7), (7,)]


@pytest.mark.long(class_axis=1, dtype=jnp.bfloat16, recompute=False)
@pytest.mark.parametrize("class_axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_16_bit_weights(dtype, recompute, class_axis):
    """With cotangents that differ between tokens, for which they are computed again."""
    x, weights = (jnp.asarray(np.sin(np.arange(64 * n)).reshape(64, n), dtype) for n in (64, 1000))
    labels, factors = jnp.arange(64) % 1000, jnp.linspace(0.5, 2.0, 64)

    def ours(weights):
        w = weights if class_axis else weights.T
        loss = s2p.linear_softmax_cross_entropy(x, w, labels, class_axis=class_axis, recompute=recompute)
        return jnp.sum(loss.astype(jnp.float32) * factors)

    def exact(weights):
        z = x.astype(jnp.float64) @ weights
        loss = jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, labels[:, None], -1)[:, 0]
        return jnp.sum(loss * factors)

    actual = jax.jit(jax.grad(ours))(weights)
    expected = jax.jit(jax.grad(exact))(weights.astype(jnp.float64))
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=2.0**-6 * np.abs(expected).max()
    )
