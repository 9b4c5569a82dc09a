"""Near certainty nothing collapses: logarithms of probabilities, losses and gradients are exact relative to
each element's own size, however near to 0 that is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from near_certainty import assert_exact, exact_loss, rows_of, terms_of

from jax_softmax2p import (
    log_softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)

pytestmark = pytest.mark.long


def along(axis, *arrays):
    return [array if axis == -1 else array.T for array in arrays]


def one_hot(labels, z, dtype):
    return (np.arange(z.shape[1]) == labels[:, None]).astype(dtype)


def check_integer_labels(z, labels, dtype, axis=-1, where=True, **options):
    x, mask = along(axis, z, np.broadcast_to(where, z.shape))
    options |= {} if where is True else {"where": mask}
    f = lambda x: softmax_cross_entropy_with_integer_labels(x, labels, axis, **options)
    losses, g = jax.jit(lambda x: (f(x), jax.grad(lambda x: f(x).sum())(x)))(x)
    expected_losses, expected_g = exact_loss(np.where(where, z, -np.inf), labels)
    assert_exact(losses, expected_losses, dtype)
    assert_exact(along(axis, g)[0], expected_g, dtype)


def check_soft_labels(z, labels, dtype, axis=-1, where=True, **options):
    """Labels that are one-hot."""
    x, soft, mask = along(axis, z, one_hot(labels, z, dtype), np.broadcast_to(where, z.shape))
    options |= {} if where is True else {"where": mask}
    f = lambda x, soft: softmax_cross_entropy(x, soft, axis, **options)
    losses, g = jax.jit(lambda x, soft: (f(x, soft), jax.grad(lambda x: f(x, soft).sum())(x)))(x, soft)
    expected_losses, expected_g = exact_loss(np.where(where, z, -np.inf), labels)
    assert_exact(losses, expected_losses, dtype)
    assert_exact(along(axis, g)[0], expected_g, dtype)


def check_log_softmax(z, labels, dtype, axis=-1, **options):
    """The cotangent is -1 at the label alone."""
    x, t = along(axis, z, -one_hot(labels, z, dtype))
    f = lambda x: log_softmax(x, axis, **options)
    y, g = jax.jit(lambda x, t: (f(x), jax.vjp(f, x)[1](t)[0]))(x, t)
    assert_exact(along(axis, y)[0], terms_of(z)[0], dtype)
    assert_exact(along(axis, g)[0], exact_loss(z, labels)[1], dtype)


CHECKS = {
    "integer labels": check_integer_labels,
    "soft labels": check_soft_labels,
    "log_softmax": check_log_softmax,
}


@pytest.mark.parametrize("n", [2, 10, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("implementation", ["native", "reference", None])
@pytest.mark.parametrize("check", CHECKS)
def test_last_axis(check, implementation, dtype, n):
    CHECKS[check](*rows_of(n, dtype), dtype, implementation=implementation)


@pytest.mark.parametrize("n", [2, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("check", CHECKS)
def test_first_axis(check, dtype, n):
    CHECKS[check](*rows_of(n, dtype), dtype, axis=0, implementation="native")


@pytest.mark.parametrize(("n", "axis"), [(10, -1), (300, -1), (20, 0)])
@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("check", ["integer labels", "soft labels"])
def test_masks(check, implementation, n, axis):
    """What is masked is far above all others."""
    z, labels = rows_of(n, np.float32)
    where = np.random.default_rng(n).random(z.shape) < 0.7
    where |= (np.arange(n) == labels[:, None]) | (z == z.max(-1, keepdims=True))
    z = np.where(where, z, np.float32(1e4))
    CHECKS[check](z, labels, np.float32, axis, where, implementation=implementation)


@pytest.mark.parametrize("n", [100_000, 1_000_000])
@pytest.mark.parametrize("check", CHECKS)
def test_long_rows(check, n):
    z = 2 * np.random.default_rng(n).random((2, n)).astype(np.float32)
    labels = np.array([n - 1, n // 2])
    z[[0, 1], labels] += np.array([40, 75], np.float32)
    CHECKS[check](z, labels, np.float32, implementation="native")


@pytest.mark.parametrize("n", [2, 3, 5, 10, 33, 100, 300])
def test_rows_in_a_loop(n):
    """Small ones keep the derivative, which the reference computes with the loss."""
    z, labels = rows_of(n, np.float32)
    f = softmax_cross_entropy_with_integer_labels
    losses, g = jax.jit(lambda x: jax.lax.map(lambda row: jax.value_and_grad(f)(*row), (x, labels)))(z)
    expected_losses, expected_g = exact_loss(z, labels)
    assert_exact(losses, expected_losses, np.float32)
    assert_exact(g, expected_g, np.float32)


@pytest.mark.parametrize(("n", "axis"), [(100, -1), (300, -1), (5000, -1), (100, 0), (1000, 0)])
@pytest.mark.parametrize("check", CHECKS)
def test_equal_others(check, n, axis):
    """Additions of equal terms have the same rounding: errors do not cancel. tests/selftest has more."""
    margins = np.arange(1, 40, dtype=np.float32)
    z = np.repeat(-margins[:, None] * np.float32(1.03), n, axis=1)
    labels = np.arange(len(margins)) * 7 % n
    z[np.arange(len(margins)), labels] = 0
    CHECKS[check](z, labels, np.float32, axis, implementation="native")


@pytest.mark.parametrize("n", [10, 300])
def test_bfloat16(n):
    """Rounded once from float32."""
    z, labels = rows_of(n, np.float32)
    z = np.asarray(z, jnp.bfloat16)
    expected_losses, expected_g = exact_loss(z.astype(np.float32), labels)
    f = lambda x: softmax_cross_entropy_with_integer_labels(x, labels, implementation="native")
    for actual, exact in ((f(z), expected_losses), (jax.jit(jax.grad(lambda x: f(x).sum()))(z), expected_g)):
        error = np.abs(np.asarray(actual).astype(np.longdouble) - exact)
        assert (error <= 2.0**-8 * np.abs(exact) + 2.0**-126).all()


def test_vmap():
    z, labels = rows_of(10, np.float32)
    f = lambda x, label: softmax_cross_entropy_with_integer_labels(x, label, implementation="native")
    losses, g = jax.jit(jax.vmap(jax.value_and_grad(f)))(z, labels)
    expected_losses, expected_g = exact_loss(z, labels)
    assert_exact(losses, expected_losses, np.float32)
    assert_exact(g, expected_g, np.float32)
