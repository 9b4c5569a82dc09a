"""Dropout of attention's weights, fused: by flax's function, which draws the mask, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_close, normal, quick_jit, weighted_sum
from jax.test_util import check_grads
from test_attention import DTYPES, formula

from jax_softmax2p import explain, native
from jax_softmax2p.integrations import flax_attention

KEEP_PROB = 0.7
DROPOUT = {"dropout_rng": jax.random.key(3), "dropout_rate": 1 - KEEP_PROB}
OPTIONS = {
    "plain": {},
    "of each head": {"broadcast_dropout": False},
    "causal": {"is_causal": True},
    "masked queries": {"mask": (normal(2, 1, 70, 150, seed=4) > 0) & (np.arange(70)[:, None] % 7 > 1)},
    "masked queries, of each head": {
        "mask": np.arange(70)[:, None] > np.full((70, 150), 30),
        "broadcast_dropout": False,
    },
    "bias": {"bias": normal(1, 4, 70, 150, seed=5)},
    "sinks and soft cap": {"sinks": normal(4, seed=6), "logits_soft_cap": 1.5, "is_causal": True},
}


def operands_of(b, t, s, n, k, h, dtype=np.float64):
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    return [normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes)]


def exact(query, key, value, bias=None, *, broadcast_dropout=True, **options):
    """What flax_attention is to compute, in float64."""
    shape = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
    shape = (1, 1, *shape[2:]) if broadcast_dropout else shape
    kept = jax.random.bernoulli(DROPOUT["dropout_rng"], KEEP_PROB, shape)
    return formula(query, key, value, bias, dropout_mask=kept, **options) / KEEP_PROB


def value_and_gradients(function, operands, bias=None, *, jit=jax.jit, **options):
    """Of a weighted sum of the output, in query, key, value and, if there is one, the bias."""
    arrays = [*operands] if bias is None else [*operands, bias]

    def total(query, key, value, *bias):
        y = function(query, key, value, *bias, **options)
        return weighted_sum(y), y

    gradient = jax.grad(total, tuple(range(len(arrays))), has_aux=True)
    return jit(gradient)(*arrays)


def exact_value_and_gradients(operands, **options):
    return value_and_gradients(exact, operands, jit=quick_jit, **options)


@pytest.mark.long(option="masked queries")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_and_gradients(option, dtype):
    """Many queries, in several tiles of keys; those that attend to no key have equal weights before."""
    operands = operands_of(2, 70, 150, 4, 2, 20)
    expected = exact_value_and_gradients(operands, **OPTIONS[option])
    options = {
        name: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x
        for name, x in OPTIONS[option].items()
    }
    ours = functools.partial(flax_attention, **DROPOUT)
    actual = value_and_gradients(ours, [x.astype(dtype) for x in operands], **options)
    assert all(x.dtype == dtype for x in jax.tree.leaves(actual))
    assert_close(actual, expected, 1e-5 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("t", [1, 3, 9])
def test_few_queries_of_many_keys(t):
    """As in a chunk of a long text, whose gradient is split over keys."""
    operands = operands_of(1, t, 1100, 2, 1, 8)
    ours = functools.partial(flax_attention, **DROPOUT)
    assert_close(value_and_gradients(ours, operands), exact_value_and_gradients(operands))


@pytest.mark.parametrize("precision", [None, "highest"])
@pytest.mark.parametrize("hides_queries", [False, True])
def test_causal_in_blocks(precision, hides_queries):
    """Attention that is composed in blocks, and the tangents of the kernel, which are composed, too."""
    t, s = 1100, 1000  # More than 2^20 logits.
    operands = operands_of(1, t, s, 1, 1, 8)
    # Hidden queries attend to every key that dropout keeps, whatever the causal mask says.
    mask = np.broadcast_to(np.arange(t)[:, None] % 9 > 0 if hides_queries else True, (t, s))
    f = functools.partial(flax_attention, is_causal=True, mask=mask, precision=precision, **DROPOUT)
    actual = jax.jit(lambda *xs: jax.jvp(f, xs, xs))(*operands)
    exact_f = functools.partial(exact, is_causal=True, mask=mask)
    assert_close(actual, quick_jit(lambda *xs: jax.jvp(exact_f, xs, xs))(*operands))


def test_no_keys():
    q, k, v = operands_of(1, 3, 0, 2, 2, 4)
    assert np.all(flax_attention(q, k, v, is_causal=True, **DROPOUT) == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("keep_prob", [KEEP_PROB, np.float32(KEEP_PROB)])
def test_16_bits(dtype, keep_prob):
    """The probability is not rounded to 16 bits, by which all elements would be too large."""
    operands = operands_of(2, 70, 80, 2, 2, 64, dtype)
    dropout = {"dropout_rng": DROPOUT["dropout_rng"], "dropout_rate": 1 - keep_prob}
    with jax.numpy_dtype_promotion("strict"):
        y = jax.jit(functools.partial(flax_attention, **dropout))(*operands)
    assert y.dtype == dtype
    kept = jax.random.bernoulli(dropout["dropout_rng"], 1 - dropout["dropout_rate"], (1, 1, 70, 80))
    expected = formula(*(x.astype(np.float64) for x in operands), dropout_mask=kept) / KEEP_PROB
    assert_close(y, expected, 2 * float(jnp.finfo(dtype).eps))
    bias = float(np.sum(np.asarray(y, np.float64) * expected) / np.sum(expected**2)) - 1
    assert abs(bias) < 0.05 * float(jnp.finfo(dtype).eps)


@functools.partial(quick_jit, static_argnames="before")
def exact_results(kept, cotangent, *operands, before):
    """The output, lse and gradients of attention to ``before`` keys before each query, and to none after."""
    options = {"local_window_size": (before, 0), "return_residual": True}
    (y, lse), vjp = jax.vjp(functools.partial(formula, dropout_mask=kept, **options), *operands)
    return [y, lse, *vjp((cotangent, jnp.zeros_like(lse)))]


@pytest.mark.parametrize("isa", native.supported_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_window", [False, True])
def test_instruction_sets(isa, dtype, in_window):
    """The kernels themselves; in a window, half of the queries attend to no key."""
    t, s = (40, 20) if in_window else (40, 70)
    operands = operands_of(2, t, s, 4, 2, 9, dtype)
    cotangent = normal(2, t, 4, 9, seed=7).astype(dtype)
    kept = normal(t, s, seed=8) > -0.5
    window = {"before": 3 if in_window else None, "after": 0}
    actual = native.attention(*operands, cotangent, **window, dropout_mask=kept, isa=isa)
    wide = [np.asarray(x, np.float64) for x in (cotangent, *operands)]
    tolerance = {8: 1e-13, 4: 4e-6}.get(np.dtype(dtype).itemsize, 4 * float(jnp.finfo(dtype).eps))
    expected = exact_results(kept, *wide, before=3 if in_window else t)
    assert_close([np.asarray(x, np.float64) for x in actual], expected, tolerance)


def test_wrong_masks():
    q = normal(1, 3, 1, 4).astype(np.float32)
    for wrong in (np.ones((3, 2), bool), np.ones((3, 3), np.uint8), np.ones((2, 3), bool)):
        with pytest.raises(ValueError, match=r"dropout_mask must be bool of shape \(3, 3\), got"):
            native.attention(q, q, q, dropout_mask=wrong)


def test_a_dropped_value_that_is_nan_harms_nobody():
    q, k, v = operands_of(1, 70, 80, 1, 1, 8)
    kept = np.asarray(jax.random.bernoulli(DROPOUT["dropout_rng"], KEEP_PROB, (1, 1, 70, 80)))[0, 0, :, 5]
    v[:, 5] = np.nan
    f = functools.partial(flax_attention, **DROPOUT)
    y, gradient = jax.jit(lambda q: (f(q, k, v), jax.grad(lambda q: f(q, k, v).sum())(q)))(q)
    for result in (y, gradient):
        np.testing.assert_array_equal(np.isnan(result[0, :, 0, 0]), kept)


def test_derivatives_of_higher_order():
    operands = operands_of(2, 1, 3, 2, 1, 2)
    f = jax.jit(functools.partial(flax_attention, **DROPOUT, broadcast_dropout=False))
    check_grads(f, operands, order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_shared", [False, True])
def test_vmap_of_gradients(is_shared):
    """Of a mask for each example, or one for all."""
    operands = [np.stack([x, 2 * x]) for x in operands_of(2, 9, 12, 2, 1, 4)]
    keys = DROPOUT["dropout_rng"] if is_shared else jax.random.split(DROPOUT["dropout_rng"])

    def gradient(key, *operands):
        f = functools.partial(flax_attention, dropout_rng=key, dropout_rate=0.3)
        return jax.grad(lambda *operands: weighted_sum(f(*operands)), (0, 1, 2))(*operands)

    actual = jax.jit(jax.vmap(gradient, (None if is_shared else 0, 0, 0, 0)))(keys, *operands)
    each = [gradient(keys if is_shared else keys[i], *(x[i] for x in operands)) for i in range(2)]
    assert_close(actual, jax.tree.map(lambda *xs: jnp.stack(xs), *each))


def test_is_native():
    x = jax.ShapeDtypeStruct((2, 64, 4, 32), np.float32)
    loss = lambda q, k, v: flax_attention(q, k, v, **DROPOUT).sum()
    choices = explain(jax.grad(loss, (0, 1, 2)), x, x, x)
    assert [choice.implementation for choice in choices] == ["native", "native"]
