"""First derivatives where logits, tangents or cotangents are not finite, or nearly not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_softmax2p as s2p

NAN, INF = float("nan"), float("inf")
LENGTHS = [3, 16, 20, 64, 300]
DTYPES = [np.float32, np.float64, jnp.bfloat16, np.float16]


def rows(n, count):
    return 3 * np.random.default_rng(n).standard_normal((count, n))


def along(axis, x):
    """Rows, as an array whose axis they lie along."""
    return x if axis == -1 else x.T


@pytest.mark.long(n=20)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tangents_of_masked_rows_that_are_not_finite(n, axis, dtype, implementation):
    """A mask that leaves elements hides neither a NaN, nor an infinity, nor that all are -inf."""
    x, where = rows(n, 5).astype(dtype), np.ones((5, n), bool)
    x[0, 0], x[1, 0], x[2] = NAN, INF, -INF
    where[:, -1], where[3] = False, False
    label = np.zeros(5, np.int32)
    functions = {
        "logsumexp": (s2p.logsumexp, [NAN, NAN, NAN, 0, 1]),
        "log_softmax": (s2p.log_softmax, [NAN, NAN, NAN, 0, 0]),
    }
    if implementation == "native":  # The reference's loss, NaN in these rows, may have a tangent of 0.
        loss = lambda x, **options: s2p.softmax_cross_entropy_with_integer_labels(x, label, **options)
        functions["cross-entropy"] = loss, [NAN, NAN, NAN, 0, 0]
    for name, (function, expected) in functions.items():
        f = functools.partial(function, axis=axis, where=along(axis, where), implementation=implementation)
        operand = along(axis, x)
        tangent = jax.jit(lambda x, t, f=f: jax.jvp(f, (x,), (t,))[1])(operand, np.ones_like(operand))
        tangent = along(axis, np.asarray(tangent))[:, 1] if name == "log_softmax" else tangent
        np.testing.assert_allclose(tangent, expected, atol=1e-5, err_msg=name)


@pytest.mark.long(n=20, dtype=np.float32)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_huge_cotangents(n, axis, dtype, implementation):
    """They are multiplied by each probability, without an overflow on the way."""
    limits = jnp.finfo(dtype)
    huge = float(limits.max)
    factors = np.array([INF, -INF, NAN, huge, -huge, huge / 3, huge * 2.0**-20, 1]).astype(dtype)
    x = rows(n, factors.size).astype(dtype)
    x[-1] = 0
    x[3, :2] = 0.1 * huge, -0.1 * huge
    labels = np.full(factors.size, n - 1, np.int32)
    wide = x.astype(np.float64)
    p = np.exp(wide - wide.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = factors.astype(np.float64)[:, None] * p
    tolerance = 16 * float(limits.eps)

    def gradient(function):
        f = functools.partial(function, axis=axis, implementation=implementation)
        y = jax.jit(lambda x, factor: jax.vjp(f, x)[1](factor)[0])(along(axis, x), factors)
        return along(axis, np.asarray(y, np.float64))

    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(gradient(s2p.logsumexp), expected, rtol=tolerance, atol=float(limits.tiny))
        # JAX's own sums of the terms of a loss overflow.
        first = 6 if implementation == "reference" else 0
        expected[:, -1] = factors.astype(np.float64) * -p[:, :-1].sum(-1)
        loss = lambda x, **options: s2p.softmax_cross_entropy_with_integer_labels(x, labels, **options)
        y = gradient(loss)
        np.testing.assert_allclose(y[first:], expected[first:], rtol=tolerance, atol=float(limits.tiny))


@pytest.mark.parametrize(
    "row", [[-3e38, 3e38, 0, 1], [3e38, -3e38, 3e38, 0], [-3.4e38, 3.4e38, 0, 1], [-INF, 3e38, -3e38, 0]]
)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_gradients_where_differences_overflow(row, name, implementation):
    """Against float64, in which none does."""
    x, weights = np.array(row, np.float32), np.array([0.5, -1, 2, 0.25])

    def total(function, x, **options):
        y = function(x, axis=-1, **options)
        return jnp.sum(jnp.where(jnp.isfinite(x), weights.astype(x.dtype) * y, 0))

    ours = functools.partial(total, getattr(s2p, name), implementation=implementation)
    expected = jax.jit(jax.grad(functools.partial(total, getattr(jax.nn, name))))(x.astype(np.float64))
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(x), expected, rtol=1e-6)
