"""What the public functions accept besides arrays of floats, and errors that name the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import normal

import jax_softmax2p as s2p


@pytest.mark.long
@pytest.mark.parametrize("dtype", [d for d in ("int2", "uint2", "int4", "uint4") if hasattr(jnp, d)])
@pytest.mark.parametrize("masked", [False, True])
def test_integers_below_8_bits(dtype, masked, implementation):
    """JAX promotes them in some operations only. The results are those of the same numbers as float64."""
    limits = jnp.iinfo(dtype)
    numbers = np.array([[0, 1, limits.max, limits.min], [1, limits.max, 1, 0]]).astype(np.int8)
    x, where = jnp.asarray(numbers).astype(dtype), np.array([[True, True, False, True]]) if masked else None
    for name, theirs in (("softmax", jax.nn.softmax), ("log_softmax", jax.nn.log_softmax)):
        y = getattr(s2p, name)(x, where=where, implementation=implementation)
        assert y.dtype == jnp.exp(jnp.int8(1)).dtype
        np.testing.assert_allclose(y, theirs(numbers.astype(float), where=where), rtol=2e-6, atol=2e-7)
    y = s2p.logsumexp(x, -1, where=where, implementation=implementation)
    np.testing.assert_allclose(y, jax.nn.logsumexp(numbers.astype(float), -1, where=where), rtol=2e-6)
    y = s2p.softmax(x, where=where, bias=x, implementation=implementation)
    np.testing.assert_allclose(y, jax.nn.softmax(2.0 * numbers, where=where), rtol=2e-6)


@pytest.mark.long
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("x64", [False, True])
def test_logsumexp_of_booleans(axis, x64, implementation):
    a, where = np.asarray(normal(3, 5) > 0), np.asarray(normal(3, 5, seed=1) > -1)
    with jax.enable_x64(x64):
        for options in ({}, {"where": where}, {"keepdims": True}):
            actual = s2p.logsumexp(a, axis, implementation=implementation, **options)
            expected = jax.nn.logsumexp(a, axis, **options)
            if "where" not in options:  # With x64, jax.nn's is float64 then.
                assert actual.dtype == expected.dtype
            np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_logsumexp_with_boolean_factors():
    x, factors = normal(3, 5), normal(3, 5, seed=1) > 0
    np.testing.assert_array_equal(
        s2p.logsumexp(x, -1, factors), jax.nn.logsumexp(x, -1, factors), strict=True
    )


LOGITS = jnp.ones((2, 3))
HEADS = jnp.ones((3, 2, 4))
ARGUMENTS = {
    "softmax": {"x": LOGITS, "where": None, "scale": None, "bias": None},
    "log_softmax": {"x": LOGITS, "where": None, "scale": None, "bias": None},
    "logsumexp": {"a": LOGITS, "b": None, "where": None, "scale": None, "bias": None},
    "sum_exp": {"x": LOGITS, "where": None},
    "softmax_cross_entropy": {"logits": LOGITS, "labels": LOGITS, "where": None},
    "softmax_cross_entropy_with_integer_labels": {
        "logits": LOGITS,
        "labels": jnp.ones(2, int),
        "where": None,
    },
    "dot_product_attention": {
        "query": HEADS,
        "key": HEADS,
        "value": HEADS,
        "bias": None,
        "mask": None,
        "scale": None,
        "query_seq_lengths": None,
        "sinks": None,
    },
}


@pytest.mark.parametrize("value", ["text", np.array([None])], ids=type)
@pytest.mark.parametrize(("function", "name"), [(f, name) for f in ARGUMENTS for name in ARGUMENTS[f]])
def test_errors_name_the_argument(function, name, value):
    """They do not name a function inside JAX that fails first."""
    with pytest.raises(TypeError, match=f"^{name} must be an array"):
        getattr(s2p, function)(**ARGUMENTS[function] | {name: value})


@pytest.mark.parametrize("axis_name", [(), [], {}])
def test_errors_name_axis_name(axis_name):
    with pytest.raises(ValueError, match="axis_name must name axes"):
        s2p.softmax(LOGITS, axis_name=axis_name)


def test_errors_of_losses_name_labels_and_axis():
    with pytest.raises(
        ValueError, match=r"labels must broadcast with the logits' shape \(2, 3\), got \(5, 7\)"
    ):
        s2p.softmax_cross_entropy(LOGITS, jnp.ones((5, 7)))
    with pytest.raises(ValueError, match="axis must be an integer or a tuple of integers, got None"):
        s2p.softmax_cross_entropy_with_integer_labels(LOGITS, jnp.ones(2, int), None)
