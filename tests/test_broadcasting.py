"""Shapes broadcast as in optax, for labels and masks, and as in jax.nn, for factors of logsumexp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import normal, weighted_sum

import jax_softmax2p as s2p


def assert_same_gradients(ours, theirs, *operands):
    """Compares results and gradients of a weighted sum in the first operand, shapes and dtypes included."""

    def both(function):
        def loss(x):
            y = function(x, *operands[1:])
            return weighted_sum(y), y

        return jax.jit(jax.grad(loss, has_aux=True))(operands[0])

    for actual, expected in zip(both(ours), both(theirs), strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


class TestLabels:
    """Labels, logits and masks broadcast with one another, as in optax."""

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("logits", "labels", "axis"),
        [
            ((1, 3), (4,), -1),
            ((4, 3), (1,), -1),
            ((2, 4, 3), (2, 1), -1),
            ((2, 4, 3), (1, 4), -1),
            ((2, 1, 3), (1, 4), -1),
            ((2, 4, 3), (1, 3), 0),
            ((2, 4, 3), (1, 1), 1),
            ((1, 3, 5), (2, 5), 1),
            ((2, 4, 3), (1,), (0, 2)),
            ((2, 1, 3), (4,), (2, 0)),
            ((1, 3), (0,), -1),
        ],
    )
    def test_integers(self, logits, labels, axis, implementation):
        integers = np.random.default_rng(0).integers(2, size=labels)
        loss = s2p.softmax_cross_entropy_with_integer_labels
        assert_same_gradients(
            functools.partial(loss, axis=axis, implementation=implementation),
            functools.partial(optax.softmax_cross_entropy_with_integer_labels, axis=axis),
            normal(*logits),
            integers,
        )

    @pytest.mark.parametrize(
        ("logits", "labels", "where"),
        [
            ((1, 3), (4,), (4, 3)),
            ((1, 3), (4,), (4,)),
            ((1, 3), (1,), (4, 3)),
            ((4, 3), (1,), (1, 3)),
            ((2, 1, 3), (1, 4), (2, 4, 1)),
        ],
    )
    def test_integers_with_a_mask(self, logits, labels, where):
        rng = np.random.default_rng(1)
        integers, mask = rng.integers(3, size=labels), rng.random(where) < 0.7
        functions = (
            lambda x, labels, f=f: f(x, labels, where=mask)
            for f in (
                s2p.softmax_cross_entropy_with_integer_labels,
                optax.softmax_cross_entropy_with_integer_labels,
            )
        )
        assert_same_gradients(*functions, normal(*logits), integers)

    @pytest.mark.parametrize(
        ("logits", "labels", "where"),
        [
            ((1, 3), (4, 3), (4, 3)),
            ((1, 3), (3,), (4,)),
            ((1, 3), (2, 4, 3), (4, 3)),
            ((2, 1, 3), (4, 3), (1, 4, 1)),
        ],
    )
    def test_distributions_with_a_mask(self, logits, labels, where):
        mask = np.random.default_rng(1).random(where) < 0.7
        functions = (
            lambda x, labels, f=f: f(x, labels, where=mask)
            for f in (s2p.softmax_cross_entropy, optax.softmax_cross_entropy)
        )
        assert_same_gradients(*functions, normal(*logits), np.abs(normal(*labels)))

    def test_integers_of_one_row_need_no_copies_of_the_row(self):
        """The lse of the row is computed once, whatever the number of labels."""
        x, labels = normal(1, 1000), np.arange(500)
        loss = lambda x: s2p.softmax_cross_entropy_with_integer_labels(x, labels, implementation="native")
        assert "500,1000]" not in str(jax.make_jaxpr(jax.value_and_grad(lambda x: loss(x).sum()))(x))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
    def test_many_integers_of_one_row_of_16_bits(self, dtype):
        """Counts of labels, in the gradient of the row, are exact beyond what the dtype can count."""
        x, labels = normal(1, 7).astype(dtype), np.arange(6000) % 3
        total = lambda loss: lambda x: loss(x, labels).astype(np.float32).sum()
        actual = jax.jit(jax.grad(total(s2p.softmax_cross_entropy_with_integer_labels)))(x)
        expected = jax.jit(jax.grad(total(optax.softmax_cross_entropy_with_integer_labels)))(
            x.astype(np.float64)
        )
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual.astype(float), expected, rtol=2 * float(jnp.finfo(dtype).eps))

    @pytest.mark.parametrize("labels", [(), (3,), (4, 1), (2, 4)])
    def test_integers_that_do_not_broadcast(self, labels):
        with pytest.raises(ValueError, match=r"labels must have a shape that broadcasts .* \(4,\), got"):
            s2p.softmax_cross_entropy_with_integer_labels(jnp.ones((4, 3)), jnp.zeros(labels, int))


class TestFactors:
    """logsumexp(a, b=…) broadcasts a, b and where, as in jax.nn."""

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("a", "b", "axis"),
        [
            ((4,), (3, 4), -2),
            ((4,), (3, 4), 0),
            ((4,), (2, 3, 4), (0, -1)),
            ((1, 4), (3, 1), 0),
            ((), (3, 4), 1),
            ((3, 4), (2, 1, 1), -3),
            ((3, 4), (4,), None),
        ],
    )
    @pytest.mark.parametrize("masked", [False, True])
    def test_axis_counts_dimensions_of_the_product(self, a, b, axis, masked):
        factors = normal(*b)
        where = np.random.default_rng(2).random(np.broadcast_shapes(a, b)) < 0.8 if masked else None
        functions = (
            lambda x, f=f: jnp.stack(f(x, axis, factors, return_sign=True, where=where))
            for f in (s2p.logsumexp, jax.nn.logsumexp)
        )
        assert_same_gradients(*functions, normal(*a))

    @pytest.mark.parametrize("shapes", [((4,), (3,), None), ((4,), (3, 4), (2, 4))])
    def test_shapes_that_do_not_broadcast(self, shapes):
        a, b, where = (None if shape is None else jnp.ones(shape) for shape in shapes)
        with pytest.raises(ValueError, match="a, b and where must broadcast"):
            s2p.logsumexp(a, 0, b, where=None if where is None else where > 0)
