"""The code of docs/examples/sinkhorn.py, compared with Sinkhorn's iterations in NumPy."""

import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import normal
from processes import ROOT
from versions import since

EPS = 0.05
SHAPE = (40, 30)


@pytest.fixture(scope="module")
def recipe():
    return types.SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "examples" / "sinkhorn.py")))


def problem(shape=SHAPE, dtype=np.float64):
    """Squared distances of points of a plane, and weights."""
    x, y = normal(shape[0], 2), normal(shape[1], 2, seed=1)
    a, b = (np.abs(normal(size, seed=2)) + 0.1 for size in shape)
    C = ((x[:, None] - y) ** 2).sum(-1) / 4
    return tuple(v.astype(dtype) for v in (C, a / a.sum(), b / b.sum()))


def numpy_lse(z, axis):
    largest = z.max(axis, keepdims=True)
    return np.squeeze(largest, axis) + np.log(np.exp(z - largest).sum(axis))


def numpy_sinkhorn(C, a, b, steps, g=0.0):
    """The plain iterations, of which each potential is made from the other one alone."""
    for _ in range(steps):
        f = EPS * (np.log(a) - numpy_lse((g - C) / EPS, 1))
        g = EPS * (np.log(b) - numpy_lse((f[:, None] - C) / EPS, 0))
    return f, g


def plan(C, f, g):
    return np.exp((np.asarray(f, np.float64)[:, None] + np.asarray(g, np.float64) - C) / EPS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 2e-6)])
def test_potentials_and_plan(dtype, tolerance, recipe):
    C, a, b = problem(dtype=dtype)
    f, g = jax.jit(lambda *operands: recipe.sinkhorn(*operands, EPS, 60))(C, a, b)
    assert f.dtype == g.dtype == dtype
    exact_f, exact_g = numpy_sinkhorn(*(v.astype(np.float64) for v in (C, a, b)), 60)
    np.testing.assert_allclose(f, exact_f, rtol=0, atol=tolerance)
    np.testing.assert_allclose(g, exact_g, rtol=0, atol=tolerance)
    exact_plan = plan(C.astype(np.float64), exact_f, exact_g)
    np.testing.assert_allclose(plan(C.astype(np.float64), f, g), exact_plan, rtol=0, atol=tolerance / EPS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_until_the_marginals_are_right(dtype, tolerance, recipe):
    C, a, b = problem(dtype=dtype)
    f, g = jax.jit(lambda *operands: recipe.sinkhorn_until(*operands, EPS, tolerance))(C, a, b)
    P = plan(C.astype(np.float64), f, g)
    assert np.abs(P.sum(1) - a).sum() <= 1.5 * tolerance
    np.testing.assert_allclose(P.sum(0), b, rtol=50 * np.finfo(dtype).eps)
    assert recipe.marginal_error(C, a, f, g, EPS) <= tolerance
    assert recipe.marginal_error(C, a, 0 * f, 0 * g, EPS) > 0.1


def test_gradients_of_the_value(recipe):
    """They are the plan and the potentials, as differences of values show."""
    C, a, b = problem((6, 5))
    value = jax.jit(lambda *operands: recipe.transport_value(*operands, EPS, 1e-12))
    f, g = recipe.sinkhorn_until(C, a, b, EPS, 1e-12)
    P = plan(C, f, g)
    np.testing.assert_allclose(value(C, a, b), (P * C).sum() + EPS * (P * (np.log(P) - 1)).sum(), rtol=1e-9)
    gradients = jax.jit(jax.grad(value, (0, 1, 2)))(C, a, b)
    for actual, expected in zip(gradients, (P, f, g), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
    rng = np.random.default_rng(0)
    for i, direction in enumerate((rng.standard_normal(C.shape), normal(6), normal(5))):
        direction = direction - (0 if i == 0 else direction.mean())  # The masses stay equal.
        moved = [
            [v + sign * 1e-5 * direction if j == i else v for j, v in enumerate((C, a, b))]
            for sign in (1, -1)
        ]
        difference = (value(*moved[0]) - value(*moved[1])) / 2e-5
        np.testing.assert_allclose((gradients[i] * direction).sum(), difference, rtol=1e-6)


def test_gradient_through_the_steps(recipe):
    C, a, b = problem((6, 5))

    def loss(C, lse):
        def step(potentials, _):
            f, g = potentials
            f = EPS * (jnp.log(a) - lse((g - C) / EPS, 1))
            return (f, EPS * (jnp.log(b) - lse((f[:, None] - C) / EPS, 0))), None

        (f, g), _ = jax.lax.scan(step, (jnp.zeros_like(a), jnp.zeros_like(b)), length=5)
        return (f**2).sum() + (g**3).sum()

    def ours(C):
        f, g = recipe.sinkhorn(C, a, b, EPS, 5)
        return (f**2).sum() + (g**3).sum()

    expected = jax.jit(jax.grad(lambda C: loss(C, jax.nn.logsumexp)))(C)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(C), expected, rtol=1e-9, atol=1e-12)


def test_relative_steps_give_the_same_plan(recipe):
    C, a, b = problem()
    a[3] = 0
    f, g = np.zeros_like(a), np.zeros_like(b)
    for _ in range(20):
        f, g = recipe.relative_step(C, a, b, f, g, EPS)
    with np.errstate(divide="ignore"):  # Relative to b, a g of 0 is the logarithm of b here.
        expected = plan(C, *numpy_sinkhorn(C, a, b, 20, EPS * np.log(b)))
    np.testing.assert_allclose(a[:, None] * b * plan(C, f, g), expected, rtol=1e-10, atol=1e-15)


def test_costs_that_are_not_stored(recipe):
    x, y, f, g = normal(6, 2), normal(12, 2), normal(6), normal(12)
    C = ((x[:, None] - y) ** 2).sum(-1)
    expected = recipe.log_marginal(C, f, g, EPS, 1)
    actual = jax.jit(lambda *operands: recipe.log_marginal_of_points(*operands, EPS, 4))(x, y, f, g)
    np.testing.assert_allclose(actual, expected, rtol=1e-13)


@since(jax, "0.10", "fusions that store nothing of this size")
def test_no_array_of_the_costs_size(recipe):
    C, a, b = problem((512, 1024), np.float32)
    for function in (
        lambda C, a, b: recipe.sinkhorn(C, a, b, EPS, 50),
        lambda C, a, b: recipe.sinkhorn_until(C, a, b, EPS, 1e-4),
    ):
        compiled = jax.jit(function).lower(C, a, b).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < C.nbytes / 16
