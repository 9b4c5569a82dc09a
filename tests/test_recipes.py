"""Functions that the docstrings show how to build, compared with formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import normal

import jax_softmax2p as s2p
from jax_softmax2p import SumExp, sum_exp

FLOATS = [np.float32, np.float64]


def plain_softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_temperature_of_every_query():
    scores, inverse = normal(2, 5, 7), np.abs(normal(2, 5, 1)) + 0.1
    y = s2p.softmax(scores, scale=inverse)
    np.testing.assert_allclose(y, plain_softmax(scores * inverse), rtol=1e-13)
    # The gradient of the scale is the covariance of scores and cotangents under the softmax.
    t = normal(2, 5, 7, seed=1)
    g = jax.jit(jax.grad(lambda inverse: jnp.sum(t * s2p.softmax(scores, scale=inverse))))(inverse)
    p = plain_softmax(scores * inverse)
    covariance = (p * scores * t).sum(-1) - (p * scores).sum(-1) * (p * t).sum(-1)
    np.testing.assert_allclose(g[..., 0], covariance, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_gates_of_the_k_largest(k):
    router = normal(6, 8)
    kth = jnp.sort(router)[:, -k][:, None]
    gates = np.asarray(s2p.softmax(router, where=router >= kth))
    for row, gate in zip(router, gates, strict=True):
        largest = np.argsort(row)[-k:]
        expected = np.zeros(8)
        expected[largest] = np.exp(row[largest]) / np.exp(row[largest]).sum()
        np.testing.assert_allclose(gate, expected, rtol=1e-13)


def test_decoupled_loss_for_many_positives():
    """The softmax of each positive is over itself and the negatives, without the other positives."""
    positives, negatives = 5 * normal(3, 4), 5 * normal(3, 9, seed=1)
    pairs = sum_exp(positives[..., None]).combine(SumExp(*(x[:, None] for x in sum_exp(negatives))))
    negative_sum = np.exp(negatives).sum(-1, keepdims=True)
    expected = -np.log(np.exp(positives) / (np.exp(positives) + negative_sum))
    np.testing.assert_allclose(pairs.log() - positives, expected, rtol=1e-12, atol=1e-14)

    def loss(positives, negatives):
        pairs = sum_exp(positives[:, None]).combine(sum_exp(negatives))
        return jnp.sum(pairs.log() - positives)

    positive_grad, negative_grad = jax.jit(jax.grad(loss, (0, 1)))(positives[0], negatives[0])
    p = np.exp(positives[0]) / (np.exp(positives[0]) + negative_sum[0])
    np.testing.assert_allclose(positive_grad, p - 1, rtol=1e-12)
    expected = np.exp(negatives[0]) * ((1 - p) / negative_sum[0]).sum()
    np.testing.assert_allclose(negative_grad, expected, rtol=1e-12)


def test_distillation():
    """The gradient at temperature T is T times the student's probabilities minus the teacher's."""
    teacher, student, temperature = 3 * normal(4, 6), 3 * normal(4, 6, seed=1), 4.0
    soft = s2p.softmax(teacher, scale=1 / temperature)
    loss = lambda student: temperature**2 * s2p.softmax_cross_entropy(student / temperature, soft)
    p, q = plain_softmax(teacher / temperature), plain_softmax(student / temperature)
    np.testing.assert_allclose(loss(student), -(temperature**2) * (p * np.log(q)).sum(-1), rtol=1e-13)
    g = jax.jit(jax.grad(lambda student: loss(student).sum()))(student)
    np.testing.assert_allclose(g, temperature * (q - p), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
def test_logsumexp_of_chunks(dtype):
    chunks = (300 * normal(5, 3, 4)).astype(dtype)
    step = lambda total, chunk: (total.combine(sum_exp(chunk)), None)
    total, _ = jax.lax.scan(step, SumExp.empty((3,), dtype), chunks)
    flat = np.moveaxis(chunks, 0, 1).reshape(3, 20).astype(np.float64)
    expected = flat.max(-1) + np.log(np.exp(flat - flat.max(-1, keepdims=True)).sum(-1))
    np.testing.assert_allclose(total.log(), expected, rtol=2 * np.finfo(dtype).eps)
