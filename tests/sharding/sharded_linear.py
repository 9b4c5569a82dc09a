"""linear_softmax_cross_entropy with classes or tokens that are sharded; test_sharding.py runs this."""

# ruff: noqa: B023 (functions are called in the iteration that defines them)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from versions import since

import jax_softmax2p as s2p
from jax_softmax2p.linear import blocks

N, D, V = 13, 6, 300
OPTIONS = ({}, {"soft_cap": 3.0, "z_loss": 0.01, "label_smoothing": 0.1})

ours = functools.partial(s2p.linear_softmax_cross_entropy, token_block_size=4)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(blocks, "MIN_CHUNK_CLASSES", 64)
    monkeypatch.setattr(blocks, "MAX_CHUNK_CLASSES", 128)


def arrays():
    rng = np.random.default_rng(0)
    x, w, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, D), (D, V), (V,)))
    return jnp.array(x), jnp.array(w), jnp.array(bias), jnp.array(rng.integers(0, V, N))


def plain(x, w, labels, *, bias=0.0, soft_cap=None, label_smoothing=0.0, z_loss=0.0):
    """The loss from stored logits, in float64."""
    z = x.astype(jnp.float64) @ w.astype(jnp.float64) + bias
    z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
    log_p, lse = jax.nn.log_softmax(z), jax.nn.logsumexp(z, -1)
    at_label = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return -(1 - label_smoothing) * at_label - label_smoothing * log_p.mean(-1) + z_loss * lse**2


def assert_near(results, expected):
    for result, value in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(result, np.float64) - value).max()
        assert error <= 100 * 2.0**-24 * np.abs(value).max()


def test_classes_sharded_among_devices(small_chunks):
    x, w, bias, labels = arrays()
    mesh = jax.make_mesh((2,), ("vocab",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    for options in OPTIONS:
        specs = P(), P(None, "vocab"), P(), P("vocab")
        sharded = jax.shard_map(
            lambda x, w, labels, b: ours(x, w, labels, bias=b, axis_name="vocab", **options),
            mesh=mesh,
            in_specs=specs,
            out_specs=P(),
        )
        c = jnp.arange(N) / 4
        f = lambda loss, x, w, b: (loss(x, w, labels, b) * c).sum()
        truth = lambda x, w, labels, b: plain(x, w, labels, bias=b, **options)
        result = jax.jit(jax.value_and_grad(functools.partial(f, sharded), (0, 1, 2)))(x, w, bias)
        expected = jax.value_and_grad(functools.partial(f, truth), (0, 1, 2))(x, w, bias)
        assert_near(result, expected)


@since(jax, "0.9", "no error where XLA replicates labels that are sharded")
@pytest.mark.parametrize("implementation", [None, "native"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_tokens_sharded_among_devices(small_chunks, axis_type, implementation):
    x, w, _, labels = arrays()
    x, labels = x[:12], labels[:12]
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,), devices=jax.devices()[:2])
    f = lambda loss, x, w: loss(x, w, labels).mean()
    expected = jax.value_and_grad(functools.partial(f, plain), (0, 1))(x, w)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P("batch"))
        shards = jax.device_put(x, sharding), jax.device_put(w, jax.NamedSharding(mesh, P()))
        g = lambda x, w, labels: ours(x, w, labels, implementation=implementation).mean()
        result = jax.jit(jax.value_and_grad(g, (0, 1)))(*shards, jax.device_put(labels, sharding))
    assert_near(result, expected)
    if axis_type == AxisType.Auto:
        local = lambda x, w, labels: jax.lax.pmean(ours(x, w, labels).mean(), "batch")
        specs = P("batch"), P(), P("batch")
        sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        assert_near(jax.value_and_grad(sharded, (0, 1))(x, w, labels), expected)
