"""Public functions outside jit: one compiled program a call, with the results and errors as within."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_softmax2p as s2p
from jax_softmax2p import native

X = np.random.default_rng(0).standard_normal((3, 5), np.float32)
LABELS = np.array([0, 4, 2], np.int32)
MASK = np.array([[True, True, False, True, True]])

# One call of each function, with arrays in every place that takes them, and of static arguments some.
CALLS = {
    "softmax": lambda x: s2p.softmax(x, where=jnp.asarray(MASK), scale=0.5, bias=jnp.ones(5)),
    "softmax of a band": lambda x: s2p.softmax(x, where=s2p.Band()),
    "log_softmax": lambda x: s2p.log_softmax(x, axis=0),
    "logsumexp": lambda x: s2p.logsumexp(x, axis=(0, 1), keepdims=True),
    "sum_exp": lambda x: s2p.sum_exp(x).mantissa,
    "integer labels": lambda x: s2p.softmax_cross_entropy_with_integer_labels(x, jnp.asarray(LABELS)),
    "soft labels": lambda x: s2p.softmax_cross_entropy(x, jax.nn.one_hot(LABELS, 5)),
    "attention": lambda x: s2p.dot_product_attention(*3 * [x.reshape(1, 3, 1, 5)], is_causal=True),
}


COMPILED = []
"""Grows by one entry for every program that XLA compiles. Listeners cannot be removed before jax 0.9."""


def record_compilation(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


jax.monitoring.register_event_duration_secs_listener(record_compilation)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: s2p.softmax(x, axis=(0, 1)),
        lambda x: s2p.log_softmax(x, axis=0),
        lambda x: s2p.logsumexp(x, keepdims=True),
        lambda x: s2p.softmax_cross_entropy(x, x),
    ],
)
def test_one_program(call):
    """Each step compiled by itself would be several programs for the first call of a shape."""
    x = jnp.asarray(np.ones((5, 29), np.float32))
    native.unavailable_reason()  # The trial call of the first use is a program of its own.
    jax.clear_caches()
    before = len(COMPILED)
    jax.block_until_ready(call(x))
    jax.block_until_ready(call(x))
    assert len(COMPILED) == before + 1


@pytest.mark.parametrize("name", CALLS)
def test_same_as_in_jit(name):
    x = jnp.asarray(X)
    eager, jitted = CALLS[name](x), jax.jit(CALLS[name])(x)
    np.testing.assert_allclose(eager, jitted, rtol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(CALLS[name](x), jitted, rtol=1e-6)


@pytest.mark.parametrize("array", [X, X.astype(np.float64), X.astype(np.float16), jnp.asarray(X), X[0, 0]])
def test_arrays_of_numpy(array):
    exact = np.exp(np.asarray(array, np.float64))
    np.testing.assert_allclose(s2p.softmax(array, axis=None), exact / exact.sum(), rtol=2e-3)


def test_labels_that_jit_would_cut():
    """Without x64 JAX makes class 0 of 2^32, and so would jit before the function sees it."""
    loss = s2p.softmax_cross_entropy_with_integer_labels(X[:1], np.array([2**32]))
    assert np.isnan(loss).all()


@pytest.mark.parametrize("axis", [[0, 1], (0, 1), np.int64(1), None, -1])
def test_axes_of_every_type(axis):
    as_tuple = tuple(axis) if isinstance(axis, list) else axis
    total = np.sum(np.asarray(s2p.softmax(jnp.asarray(X), axis=axis)), as_tuple)
    np.testing.assert_allclose(total, np.ones_like(total), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0, 2.0]), TypeError, "x must be an array or a number, got list"),
        (lambda f: f(X, 5), ValueError, "axis 5 is out of range"),
        (lambda f: f(X, where=LABELS), ValueError, "where must be boolean"),
        (lambda f: f(X, algorithm="fast"), ValueError, "algorithm must be one of"),
        (lambda f: f(X, implementation=[]), ValueError, r"implementation must be .*got \[\]"),
        (lambda f: f(X, -1, None, 2.0), TypeError, "positional arguments"),
        (lambda f: f(X, axes=1), TypeError, "unexpected keyword argument 'axes'"),
        (lambda f: f(), TypeError, "missing 1 required positional argument: 'x'"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(s2p.softmax)


def test_functions_look_like_themselves():
    assert list(inspect.signature(s2p.softmax).parameters)[:3] == ["x", "axis", "where"]
    assert pickle.loads(pickle.dumps(s2p.softmax)) is s2p.softmax
    assert "two-pass algorithm" in s2p.softmax.__doc__


def test_band_goes_through_jit():
    """As an argument of the caller's own jitted function, where a mask would stand."""
    softmax = jax.jit(lambda x, where: s2p.softmax(x, where=where))
    np.testing.assert_array_equal(softmax(jnp.asarray(X), s2p.Band()), CALLS["softmax of a band"](X))


def test_too_many_arguments_are_an_error():
    """However many there are: none is dropped."""
    for count in (5, 20):
        with pytest.raises(TypeError, match="positional arguments"):
            s2p.softmax_cross_entropy_with_integer_labels(X, LABELS, -1, *[None] * count)
