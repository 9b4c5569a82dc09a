"""Batch dimensions sharded over eight devices need no communication, and results keep their bits."""

import functools

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import P, kinds, normal, place, run, value_and_vjp
from jax.sharding import AxisType

import jax_softmax2p as s2p
from jax_softmax2p.attention.multi_head import multi_head_attention
from jax_softmax2p.attention.operands import Options

X = normal(8, 6, 40)
WHERE = normal(8, 1, 40, seed=1) < 0.9
BIAS = normal(1, 6, 40, seed=2)
SCALE = np.abs(normal(8, 6, 1, seed=3))
LABELS = np.arange(48, dtype=np.int32).reshape(8, 6) - 5
SOFT_LABELS = np.abs(normal(8, 6, 40, seed=4))

OPERATIONS = {
    "softmax": s2p.softmax,
    "softmax of bfloat16": lambda x, **kwargs: s2p.softmax(x.astype(jnp.bfloat16), **kwargs).astype(x.dtype),
    "softmax, masked": functools.partial(s2p.softmax, where=WHERE, scale=SCALE, bias=BIAS),
    "softmax, banded": functools.partial(s2p.softmax, where=s2p.Band(before=30, after=1), bias=BIAS),
    "log_softmax": functools.partial(s2p.log_softmax, scale=SCALE),
    "logsumexp": functools.partial(s2p.logsumexp, axis=-1, where=WHERE),
    "cross-entropy": functools.partial(s2p.softmax_cross_entropy_with_integer_labels, labels=LABELS),
    "cross-entropy, soft": functools.partial(s2p.softmax_cross_entropy, labels=SOFT_LABELS),
}


def equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def has_sharding_of(array, x):
    return array.sharding.is_equivalent_to(
        jax.sharding.NamedSharding(x.sharding.mesh, P(*x.sharding.spec[: array.ndim])), array.ndim
    )


def close(actual, expected):
    """What each device chooses for its shard may differ in the last bits from what one device does."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6), actual, expected)


def assert_no_communication(f, x, axis_type, *spec, compare=equal):
    """Asserts that f and its VJP need no collective, have one device's results, and the sharding of x."""
    mesh = devices.make_mesh(axis_type)
    both = value_and_vjp(f)
    cotangent = np.cos(np.arange(np.prod(shape := jax.eval_shape(f, x).shape))).reshape(shape).astype(x.dtype)
    expected = jax.jit(both)(x, cotangent)
    with jax.set_mesh(mesh):
        operands = place(x, mesh, *spec), place(cotangent, mesh, *spec)
        actual, found = run(both, *operands)
    assert not found
    compare(actual, expected)
    assert all(has_sharding_of(array, operands[0]) for array in jax.tree.leaves(actual))


@pytest.mark.parametrize("name", OPERATIONS)
def test_batch_over_two_mesh_axes(name):
    f = OPERATIONS[name]
    native = functools.partial(f, implementation="native")
    assert_no_communication(native, X, AxisType.Auto, "data", "model")
    assert_no_communication(f, X, AxisType.Auto, "data", "model", compare=close)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "cross-entropy"])
def test_explicit_mesh(name):
    f = s2p.log_softmax if name == "log_softmax" else OPERATIONS[name]
    if name == "logsumexp":
        f = functools.partial(s2p.logsumexp, axis=-1)
    native = functools.partial(f, implementation="native")
    assert_no_communication(native, X, AxisType.Explicit, ("data", "model"))
    assert_no_communication(f, X, AxisType.Explicit, ("data", "model"), compare=close)


def test_axis_that_is_not_the_last():
    assert_no_communication(lambda x: s2p.softmax(x, 1), X, AxisType.Auto, "data", None, "model")
    assert_no_communication(lambda x: s2p.log_softmax(x, 0), X, AxisType.Auto, None, "model", "data")


@pytest.mark.parametrize("name", ["softmax, masked", "log_softmax", "cross-entropy"])
def test_inside_shard_map(name):
    """JAX checks which values vary along which mesh axes; some operands here do not vary."""
    mesh = devices.make_mesh()
    f = {
        "softmax, masked": lambda x, scale: s2p.softmax(x, scale=scale, bias=BIAS),
        "log_softmax": lambda x, scale: s2p.log_softmax(x, scale=scale),
        "cross-entropy": lambda x, scale: (
            s2p.softmax_cross_entropy_with_integer_labels(
                x, jnp.arange(6, dtype=jnp.int32) * jnp.ones((x.shape[0], 1), jnp.int32)
            )
            + scale[..., 0]
        ),
    }[name]
    both = value_and_vjp(f)
    cotangent = jnp.cos(jnp.arange(X.size).reshape(X.shape))[
        ..., 0 if name == "cross-entropy" else slice(None)
    ]
    operands = X, SCALE, cotangent.astype(X.dtype)
    spec = P(("data", "model"))
    actual, found = run(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec), *operands)
    assert not found
    close(actual, jax.jit(both)(*operands))


def test_partly_manual_mesh():
    """Inside a shard_map over some axes of the mesh, XLA shards along the others."""
    mesh = devices.make_mesh()
    x = place(X, mesh, "data", "model")
    for manual, spec in (("data", P("data")), ("model", P(None, "model"))):
        f = jax.shard_map(s2p.softmax, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={manual})
        y, found = run(f, x)
        assert not found
        equal(y, s2p.softmax(X))


def test_manual_mesh_but_for_an_axis_of_size_1():
    mesh = jax.make_mesh((8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    f = jax.shard_map(s2p.softmax, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    equal(jax.jit(f)(X), s2p.softmax(X))


def test_partly_manual_mesh_without_devices():
    """The mesh of the shard_map is abstract: it has none that XLA could be called back for."""
    mesh = devices.make_mesh()
    spec = P("data")
    f = jax.shard_map(
        s2p.softmax, mesh=mesh.abstract_mesh, in_specs=spec, out_specs=spec, axis_names={"data"}
    )
    close(jax.jit(f)(place(X, mesh, "data")), s2p.softmax(X))


def test_partial_sums_are_refused():
    mesh = devices.make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        a, b = place(normal(4, 8), mesh, None, "data"), place(normal(8, 5, seed=1), mesh, "data")
        partial_sums = lambda a, b: jnp.einsum("ij,jk->ik", a, b, out_sharding=P(unreduced={"data"}))
        for function in (s2p.softmax, lambda x: s2p.logsumexp(x, -1)):
            with pytest.raises(NotImplementedError, match=r"unreduced along the mesh axes .*'data'"):
                jax.make_jaxpr(lambda a, b, f=function: f(partial_sums(a, b)))(a, b)


@pytest.mark.parametrize("operation", ["softmax", "logsumexp", "attention"])
def test_partly_manual_mesh_with_conflicting_shardings(operation):
    """Shards of one size, but of other rows on most devices, are not taken together."""
    auto = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("manual", "a", "b"), axis_types=auto)
    along = lambda name, x: jax.lax.with_sharding_constraint(x, P(name))
    function, operands = {
        "softmax": (s2p.softmax, (X,)),
        "logsumexp": (lambda x: s2p.logsumexp(x, -1), (X,)),
        "attention": (s2p.dot_product_attention, [normal(8, 20, 2, 16, seed=seed) for seed in range(3)]),
    }[operation]
    names = ["a", "b", "b"][: len(operands)]
    f = lambda *operands: along("b", function(*map(along, names, operands)))
    specs = (P("manual"),) * len(operands)
    sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("manual"), axis_names={"manual"})
    close(jax.jit(sharded)(*operands), function(*operands))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(s2p.softmax, jax.nn.softmax), (s2p.log_softmax, jax.nn.log_softmax), (s2p.logsumexp, jax.nn.logsumexp)],
    ids=["softmax", "log_softmax", "logsumexp"],
)
@pytest.mark.long(theirs=jax.nn.softmax, spec=(None, ("data", "model"), None))
@pytest.mark.parametrize("spec", [(None, ("data", "model"), None), ("data", "model", None)])
def test_several_axes_of_an_explicit_mesh(ours, theirs, spec):
    """Results are sharded as JAX's, gradients as x."""
    x = normal(4, 8, 6)
    mesh = devices.make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
        for axis in (None, (0, 1), (2, 1)):
            f = lambda x, axis=axis, of=ours: of(x, axis)
            expected, y = theirs(placed, axis), jax.jit(f)(placed)
            assert jax.typeof(y) == jax.typeof(expected)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
            gradient = jax.jit(jax.grad(lambda x, f=f: (f(x) ** 2).sum()))(placed)
            assert jax.typeof(gradient) == jax.typeof(placed)
            exact = jax.grad(lambda x, axis=axis: (theirs(x, axis) ** 2).sum())(x)
            np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=1e-5)
        if ours is s2p.log_softmax:
            loss = s2p.softmax_cross_entropy(placed, jnp.full(x.shape, 0.1), (0, 1))
            np.testing.assert_allclose(loss, -0.1 * ours(x, (0, 1)).sum((0, 1)), rtol=1e-5)
            labels = s2p.softmax_cross_entropy_with_integer_labels(placed, jnp.array([3] * 6), (0, 1))
            np.testing.assert_allclose(labels, -ours(x, (0, 1))[0, 3], rtol=1e-5)


ATTENTION = {
    "whole": {},
    "causal, in blocks": {"is_causal": True, "query_block_size": 8},
    "masked, in blocks": {"mask": normal(8, 1, 1, 32, seed=5) < 0.5, "query_block_size": 16},
    "fused": {"implementation": "native", "is_causal": True},
    "fused, masked": {"implementation": "native", "mask": normal(8, 1, 1, 32, seed=5) < 0.5},
}


OURS = {"query_block_size", "implementation"}


@pytest.mark.long
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, axis_type):
    """Sharded by batch and heads. The rounding of matrix products depends on their sizes."""
    q, k, v = normal(8, 32, 4, 8), normal(8, 32, 2, 8, seed=1), normal(8, 32, 2, 8, seed=2)
    attend = lambda q, k, v: s2p.dot_product_attention(q, k, v, **ATTENTION[name])
    options = {key: value for key, value in ATTENTION[name].items() if key not in OURS}
    exact = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)
    cotangent = normal(*q.shape, seed=3)
    wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v, cotangent)]
    expected = jax.jit(value_and_vjp(exact))(*wide)
    mesh = devices.make_mesh(axis_type)
    with jax.set_mesh(mesh):
        operands = [place(x, mesh, "data", None, "model") for x in (q, k, v, cotangent)]
        actual, found = run(value_and_vjp(attend), *operands)
    assert not found
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)
    assert all(has_sharding_of(x, operands[0]) for x in jax.tree.leaves(actual))


@pytest.mark.long(name="fused, masked")
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_inside_shard_map(name):
    q, k, v = normal(8, 32, 4, 8), normal(8, 32, 2, 8, seed=1), normal(8, 32, 2, 8, seed=2)
    options = {key: value for key, value in ATTENTION[name].items() if key != "mask"}
    mask = ATTENTION[name].get("mask", np.ones((8, 1, 1, 32), bool))
    both = value_and_vjp(lambda q, k, v, mask: s2p.dot_product_attention(q, k, v, mask=mask, **options))
    operands = q, k, v, mask, normal(*q.shape, seed=3)
    spec = P(("data", "model"))
    (y, gradients), found = run(
        jax.shard_map(both, mesh=devices.make_mesh(), in_specs=spec, out_specs=spec), *operands
    )
    assert not found
    expected_y, expected_gradients = jax.jit(both)(*operands)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(y, expected_y)
    jax.tree.map(close, gradients[:3], expected_gradients[:3])


@pytest.mark.long(axis_type=AxisType.Auto, implementation="native")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_attention_with_sinks(implementation, axis_type):
    """Sinks are sharded by heads; only the sum of their gradient over the batch communicates."""
    q, k, v = normal(8, 32, 4, 8), normal(8, 32, 2, 8, seed=1), normal(8, 32, 2, 8, seed=2)
    sinks, cotangent = normal(4, seed=4), normal(*q.shape, seed=3)
    attend = lambda q, k, v, sinks: s2p.dot_product_attention(
        q, k, v, sinks=sinks, is_causal=True, logits_soft_cap=2.0, implementation=implementation
    )
    expected = jax.jit(value_and_vjp(attend))(
        *(jnp.asarray(x, jnp.float64) for x in (q, k, v, sinks, cotangent))
    )
    mesh = devices.make_mesh(axis_type)
    with jax.set_mesh(mesh):
        placed = [place(x, mesh, "data", None, "model") for x in (q, k, v, cotangent)]
        placed.insert(3, place(sinks, mesh, "model"))
        actual, found = run(value_and_vjp(attend), *placed)
        y, found_in_value = run(attend, *placed[:4])
    assert kinds(found) == ["all-reduce"]
    assert not found_in_value
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, actual, expected)
    close(y, expected[0])


@pytest.mark.long(axis_type=AxisType.Auto)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(8, 4, 32, 32), (1, 1, 32, 32)])
def test_attention_with_dropout(shape, axis_type):
    """Its mask is sharded as the weights are, or shared."""
    q, k, v = normal(8, 32, 4, 8), normal(8, 32, 2, 8, seed=1), normal(8, 32, 2, 8, seed=2)
    kept, cotangent = normal(*shape, seed=4) > -0.5, normal(*q.shape, seed=3)

    def attend(q, k, v, kept):
        options = Options(keep_prob=0.7, implementation="native")
        return multi_head_attention(q, k, v, dropout_mask=kept, options=options).output

    def both(q, k, v, kept, cotangent):
        y, vjp = jax.vjp(lambda *arrays: attend(*arrays, kept), q, k, v)
        return y, vjp(cotangent)

    expected = jax.jit(both)(q, k, v, kept, cotangent)
    mesh = devices.make_mesh(axis_type)
    with jax.set_mesh(mesh):
        placed = [place(x, mesh, "data", None, "model") for x in (q, k, v, cotangent)]
        placed.insert(3, place(kept, mesh, *(("data", "model") if shape[0] > 1 else ())))
        actual, found = run(both, *placed)
    assert not found
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)


SHARED_KEYS = {
    "one head of keys": (4, 1, ("data", None, "model"), {"all-reduce"}),
    "one head of keys, sharded batch": (4, 1, ("data",), set()),
    "one head of keys, not sharded": (4, 1, (), set()),
    # Nothing can be done but to gather the heads.
    "more shards than heads of keys": (8, 2, (None, None, "data"), None),
    "heads on two axes": (8, 4, (None, None, ("model", "data")), None),
    "more shards than heads of keys, sharded batch": (8, 2, ("model", None, "data"), None),
}
"""Heads of queries and of keys, the sharding of queries, and the collectives of the gradient."""
ALWAYS_TESTED = {("one head of keys", AxisType.Auto), ("heads on two axes", AxisType.Auto)}


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        pytest.param(name, axis_type, marks=() if (name, axis_type) in ALWAYS_TESTED else pytest.mark.long)
        for name in SHARED_KEYS
        for axis_type in (AxisType.Auto, AxisType.Explicit)
    ],
)
def test_attention_whose_heads_share_keys(name, axis_type):
    heads, key_heads, spec, expected_kinds = SHARED_KEYS[name]
    q, k, v = normal(8, 32, heads, 8), *(normal(8, 32, key_heads, 8, seed=i) for i in (1, 2))
    bias, cotangent = normal(1, heads, 32, 32, seed=4), normal(*q.shape, seed=3)
    attend = lambda q, k, v, bias: s2p.dot_product_attention(q, k, v, bias, implementation="native")
    wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v, bias, cotangent)]
    expected = jax.jit(value_and_vjp(jax.nn.dot_product_attention))(*wide)
    mesh = devices.make_mesh(axis_type)
    of_keys = spec[:1]
    with jax.set_mesh(mesh):
        placed = [place(q, mesh, *spec), place(k, mesh, *of_keys), place(v, mesh, *of_keys)]
        placed.append(place(bias, mesh))
        y, _ = run(attend, *placed)
        placed.append(jax.device_put(cotangent, y.sharding))
        without_bias = lambda q, k, v, bias, cotangent: value_and_vjp(lambda q, k, v: attend(q, k, v, bias))(
            q, k, v, cotangent
        )
        actual, _ = run(value_and_vjp(attend), *placed)
        _, found = run(without_bias, *placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)
    assert expected_kinds is None or set(kinds(found)) == expected_kinds


@pytest.mark.parametrize("mapped", ["query and key", "bias"])
def test_vmap_of_attention_over_a_sharded_axis(mapped):
    """All results are sharded along it, as with jax.nn, whatever is mapped."""
    q, k, bias = normal(2, 8, 4, 8), normal(2, 12, 2, 8, seed=1), normal(1, 4, 8, 12, seed=2)
    axes = (None, None, 0) if mapped == "bias" else (0, 0, None)
    stack = lambda x, axis: x if axis is None else np.stack([x - np.float32(i / 8) for i in range(8)])
    operands = [stack(x, axis) for x, axis in zip((q, k, bias), axes, strict=True)]

    def value_and_gradients(attend):
        f = lambda q, k, bias: attend(q, k, k, bias)
        loss = lambda *operands: (f(*operands) ** 2).sum()
        return jax.vmap(lambda *operands: (f(*operands), jax.grad(loss, (0, 1, 2))(*operands)), axes)

    ours = functools.partial(s2p.dot_product_attention, implementation="native")
    mesh = devices.make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = [
            place(x, mesh, "data" if axis == 0 else None) for x, axis in zip(operands, axes, strict=True)
        ]
        actual = jax.jit(value_and_gradients(ours))(*placed)
        expected = jax.jit(value_and_gradients(jax.nn.dot_product_attention))(*placed)
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), actual, expected)


@pytest.mark.parametrize("heads", [4, 1])
def test_attention_with_a_learned_bias(heads):
    """The batch shares it: only the sums of its gradient communicate."""
    q, k, v = normal(8, 32, 4, 8), normal(8, 32, 2, 8, seed=1), normal(8, 32, 2, 8, seed=2)
    bias, cotangent = normal(1, heads, 32, 32, seed=4), normal(*q.shape, seed=3)
    attend = lambda q, k, v, bias: s2p.dot_product_attention(q, k, v, bias, implementation="native")
    exact = jax.nn.dot_product_attention
    expected = jax.jit(value_and_vjp(exact))(
        *(jnp.asarray(x, jnp.float64) for x in (q, k, v, bias, cotangent))
    )
    mesh = devices.make_mesh()
    with jax.set_mesh(mesh):
        placed = [place(x, mesh, "data", None, "model") for x in (q, k, v, cotangent)]
        placed.insert(3, place(bias, mesh, None, "model" if heads > 1 else None))
        actual, found = run(value_and_vjp(attend), *placed)
    assert set(kinds(found)) == {"all-reduce"}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)


LOGITS = np.where(normal(8, 640, seed=6) < 1.5, 3 * normal(8, 640, seed=7), -np.inf)
ROW_LABELS = np.array([0, 639, -1, -640, 640, 5, 319, 320], np.int32)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (s2p.softmax, jax.nn.softmax),
        (s2p.log_softmax, jax.nn.log_softmax),
        (functools.partial(s2p.logsumexp, axis=-1), functools.partial(jax.nn.logsumexp, axis=-1)),
        (
            lambda x: s2p.softmax_cross_entropy_with_integer_labels(x, ROW_LABELS),
            lambda x: (
                jax.nn.logsumexp(x, -1)
                - jnp.take_along_axis(x, ROW_LABELS[:, None], -1, mode="fill", fill_value=jnp.nan)[:, 0]
            ),
        ),
    ],
    ids=["softmax", "log_softmax", "logsumexp", "cross-entropy"],
)
def test_sharded_axis_under_jit(ours, theirs):
    """Results are right, with no more collectives than jax.nn needs, of 3 numbers a row where it has 2."""
    mesh = devices.make_mesh()
    y = jax.eval_shape(theirs, LOGITS)
    operands = LOGITS.astype(np.float32), normal(*y.shape, seed=8)
    run_with_vjp = lambda f: run(
        value_and_vjp(f), *(place(x, mesh, None, ("data", "model")) for x in operands[:1]), operands[1]
    )
    expected = jax.jit(value_and_vjp(theirs))(*(jnp.asarray(x, jnp.float64) for x in operands))
    actual, found = run_with_vjp(ours)
    _, found_in_theirs = run_with_vjp(theirs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6), actual, expected)
    assert "all-gather" not in kinds(found)
    assert len(found) <= len(found_in_theirs)
    assert 2 * sum(size for _, size in found) <= 3 * sum(size for _, size in found_in_theirs)


@pytest.mark.parametrize("implementation", [None, "native", "reference"])
def test_infinities_and_nan_on_a_sharded_axis(implementation):
    mesh = devices.make_mesh()
    x = np.zeros((4, 16), np.float32)
    x[0, 0], x[1, 1], x[2], x[3, 3] = np.inf, np.nan, -np.inf, -np.inf
    sharded = place(x, mesh, None, "model")
    lse = jax.jit(functools.partial(s2p.logsumexp, axis=-1, implementation=implementation))
    np.testing.assert_allclose(lse(sharded), jax.nn.logsumexp(x, -1), rtol=1e-6)
    for dtype in (jnp.float32, jnp.bfloat16):
        y = jax.jit(functools.partial(s2p.softmax, implementation=implementation))(sharded.astype(dtype))
        expected = jax.nn.softmax(jnp.asarray(x, dtype))
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (y, expected)), rtol=1e-2)


def test_band_with_sharded_columns():
    mesh = devices.make_mesh()
    f = lambda x: s2p.softmax(x, where=s2p.Band(before=9, after=3))
    y, found = run(f, place(X, mesh, None, "model", "data"))
    np.testing.assert_allclose(y, f(X), rtol=1e-6, atol=1e-7)
    assert "all-gather" not in kinds(found)


def test_export_for_several_devices_takes_the_reference():
    mesh = devices.make_mesh()
    x = place(X, mesh, "data")
    exported = jax.export.export(jax.jit(s2p.softmax))(x)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(jax.jit(loaded.call)(x), s2p.softmax(X), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="implementation='native' cannot run: a program for several devices"):
        jax.export.export(jax.jit(functools.partial(s2p.softmax, implementation="native")))(x)
