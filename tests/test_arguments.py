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


NO_ARRAYS = [
    "text",
    np.array([None]),
    np.zeros(3, "datetime64[D]"),
    np.zeros(3, [("a", np.float32)]),
    np.zeros(3, np.longdouble),
]


@pytest.mark.parametrize("value", NO_ARRAYS, ids=lambda value: str(getattr(value, "dtype", "text")))
@pytest.mark.parametrize(("function", "name"), [(f, name) for f in ARGUMENTS for name in ARGUMENTS[f]])
def test_errors_name_the_argument(function, name, value):
    """They do not name a function inside JAX that fails first."""
    with pytest.raises(TypeError, match=f"^{name} must be an array"):
        getattr(s2p, function)(**ARGUMENTS[function] | {name: value})


def test_integers_are_relative_to_the_largest_that_a_band_keeps():
    x = np.array([[0, 1, 2**30]] * 3, np.int32)
    for function in (s2p.softmax, s2p.log_softmax):
        np.testing.assert_array_equal(function(x, where=s2p.Band()), function(x, where=np.tri(3, dtype=bool)))
    np.testing.assert_allclose(s2p.softmax(x, where=s2p.Band())[1], [*jax.nn.softmax(jnp.arange(2.0)), 0])


@pytest.mark.parametrize("function", [lambda x: x, np.float64, np.complex128, np.int64])
def test_known_numbers_of_numpy(function):
    """Without jax_enable_x64 they are cut as by jnp.asarray, and labels saturate."""
    x = np.array([[1, 2, 3]])
    x = x.astype(function) if isinstance(function, type) else function(x)
    with jax.enable_x64(False):
        y = s2p.softmax(x)
        assert y.dtype == jax.nn.softmax(jnp.asarray(x)).dtype
        np.testing.assert_allclose(y, jax.nn.softmax(jnp.asarray(x)), rtol=1e-6)
        labels = np.array([1, 2**32], np.int64)
        losses = s2p.softmax_cross_entropy_with_integer_labels(jnp.zeros((2, 4)), labels)
        np.testing.assert_allclose(losses, [np.log(4), np.nan], rtol=1e-6)


def test_options_that_are_numbers():
    """Integers of NumPy are integers, and booleans and text no numbers."""
    assert s2p.Band(np.int64(3)) == s2p.Band(3)
    attend = lambda **options: s2p.dot_product_attention(HEADS, HEADS, HEADS, **options)
    np.testing.assert_array_equal(attend(query_block_size=np.int64(2)), attend(query_block_size=2))
    loss = lambda **options: s2p.linear_softmax_cross_entropy(
        LOGITS, jnp.ones((3, 5)), jnp.ones(2, int), **options
    )
    np.testing.assert_array_equal(loss(recompute=jnp.array(True)), loss(recompute=True))
    for call in (
        lambda: s2p.Band(True),
        lambda: attend(query_block_size=True),
        lambda: loss(token_block_size=True),
        lambda: loss(class_axis=1.0),
        lambda: loss(label_smoothing="0.1"),
    ):
        with pytest.raises(ValueError, match=r"(before|_size|class_axis|label_smoothing) must be"):
            call()


def test_attention_takes_no_complex_bias():
    with pytest.raises(TypeError, match="bias must be real, got dtype complex"):
        s2p.dot_product_attention(HEADS, HEADS, HEADS, bias=jnp.ones((1, 1, 1, 1), jnp.complex64))


def test_linear_loss_of_no_features():
    loss = s2p.linear_softmax_cross_entropy(jnp.zeros((2, 0)), jnp.zeros((0, 4)), jnp.zeros(2, int))
    np.testing.assert_allclose(loss, np.log([4, 4]), rtol=1e-6)


@pytest.mark.parametrize("axis_name", [(), [], {}])
def test_errors_name_axis_name(axis_name):
    with pytest.raises(ValueError, match="axis_name must name axes"):
        s2p.softmax(LOGITS, axis_name=axis_name)


def test_errors_of_losses_name_labels_and_axis():
    with pytest.raises(
        ValueError, match=r"labels must broadcast with the logits' shape \(2, 3\), got \(5, 7\)"
    ):
        s2p.softmax_cross_entropy(LOGITS, jnp.ones((5, 7)))
    where = jnp.ones(2, bool)
    for axis in (2, -3):
        with pytest.raises(ValueError, match=f"axis {axis} is out of range"):
            s2p.softmax_cross_entropy_with_integer_labels(LOGITS, jnp.ones(2, int), axis, where)
    with pytest.raises(ValueError, match=r"where must have at most the logits' 2 dimensions"):
        s2p.softmax_cross_entropy_with_integer_labels(LOGITS, jnp.ones(2, int), -1, where[None, None])
    logits, mask = jnp.ones((3, 4, 5)), jnp.ones((4, 4), bool)
    words = r"where must broadcast with the logits' shape \(3, 4, 5\) .* rows, \(5,\), got shape \(4, 4\)"
    with pytest.raises(ValueError, match=words):
        s2p.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros(5, int), (0, 1), mask)
    with pytest.raises(ValueError, match=words):
        s2p.softmax_cross_entropy(logits, logits, (0, 1), mask)
    with pytest.raises(ValueError, match="axis must be an integer or a tuple of integers, got None"):
        s2p.softmax_cross_entropy_with_integer_labels(LOGITS, jnp.ones(2, int), None)
