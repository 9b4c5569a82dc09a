"""The reference, which small work takes, is held to 4 ULP, and loses nothing near certainty."""

import contextlib
import functools

import cases
import jax
import jax.numpy as jnp
import near_certainty
import numpy as np
import pytest

from jax_softmax2p import exact_sums, log_softmax, logsumexp, reference, softmax
from jax_softmax2p.primitives.logsumexp_derivatives import no_labels

pytestmark = pytest.mark.long

LENGTHS = (1, 2, 3, 5, 8, 10, 16, 31, 64, 100, 128, 257, 512, 777, 1000, 1024)


def spikes(rng, n):
    """Rows of which the first element lies 0 to 15 above the others."""
    x = rng.standard_normal((40, n))
    x[:, 0] += np.linspace(0, 15, 40)
    return x


def two_valued(rng, n):
    return np.where(rng.random((40, n)) < 0.5, 0, np.linspace(0, 9, 40)[:, None])


def ascending(rng, n):
    return np.sort(3 * rng.standard_normal((40, n)))


def far_from_0(rng, n):
    return 1000 * rng.random((40, n)) + np.linspace(-10_000, 10_000, 40)[:, None]


CLASSES = {
    **dict.fromkeys(cases.ROW_CLASSES),
    "spikes": spikes,
    "two-valued": two_valued,
    "ascending": ascending,
    "descending": lambda rng, n: ascending(rng, n)[:, ::-1],
    "far from 0": far_from_0,
}


SURROUNDINGS = {
    "alone": contextlib.nullcontext,
    "in a loop": functools.partial(exact_sums.in_loop, True),
    "on an accelerator": functools.partial(exact_sums.on_accelerator, True),
}
"""For what the reference is traced. What it makes for accelerators runs on CPUs, too."""

surroundings = pytest.mark.parametrize("where", SURROUNDINGS)


def jitted(function):
    """The function in all surroundings, by name. One of each for all tests, so that every shape is compiled
    once."""

    def traced(where, *arrays):
        with SURROUNDINGS[where]():
            return function(*arrays)

    return {where: jax.jit(functools.partial(traced, where)) for where in SURROUNDINGS}


reference_softmax = jitted(lambda x: softmax(x, implementation="reference"))
reference_log_softmax = jitted(lambda x: log_softmax(x, implementation="reference"))
reference_logsumexp = jitted(lambda x: logsumexp(x, -1, implementation="reference"))


@jitted
def reference_derivative(x):
    """From exponentials that the logsumexp has computed, as in the loops of hidden Markov models."""
    of_rows = jnp.ones(x.shape[0], x.dtype)
    arguments = x, of_rows, of_rows, no_labels(), of_rows, reference.ScaleBiasMask()
    return reference.logsumexp_vjp(*arguments, axis=1, shares_forward=True)


@jitted
def reference_label_gradient(x, labels):
    """As the gradient of the cross-entropy of labels is lowered."""
    operands = reference.ScaleBiasMask()
    lse = reference.logsumexp(x, operands, axis=1, exact=True)
    return reference.logsumexp_vjp(x, *lse, labels, jnp.ones(x.shape[0], x.dtype), operands, axis=1)


def rows_of(name, n, dtype):
    make = CLASSES[name]
    if make is None:
        return np.stack([cases.make(name, n, dtype, seed) for seed in range(10)])
    return make(np.random.default_rng(n), n).astype(dtype)


def all_rows(n, dtype):
    """Rows of every class in one array, for which XLA compiles once, and the class of each row."""
    rows = {name: rows_of(name, n, dtype) for name in CLASSES}
    return np.concatenate([*rows.values()]), np.repeat([*rows], [len(x) for x in rows.values()])


def by_class(names, *arrays):
    """Yields, for every class, its name and its rows of the arrays."""
    for name in CLASSES:
        yield name, *(x[names == name] for x in arrays)


@pytest.mark.parametrize("where", ["alone", "in a loop"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_softmax_is_within_4_ulp(n, dtype, where):
    x, names = all_rows(n, dtype)
    y = np.asarray(reference_softmax[where](x))
    for name, actual, exact in by_class(names, y, cases.exact_softmax(x)):
        assert cases.ulp_error(actual, exact) <= 4, name


@surroundings
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_logarithms_keep_the_contract(n, dtype, where):
    """Twice that of the kernels: 4 ULP, or 2 ULP of the row's largest logit."""
    x, names = all_rows(n, dtype)
    largest = x.max(-1)
    lse = np.asarray(reference_logsumexp[where](x))
    minimum = cases.MIN_LOG_ERROR[np.dtype(dtype)]
    for name, *arrays in by_class(names, lse, cases.exact_logsumexp(x), largest):
        assert cases.log_error(*arrays, minimum) <= 2, name
    log_p = np.asarray(reference_log_softmax[where](x))
    for name, *arrays in by_class(names, log_p, cases.exact_log_softmax(x), largest[:, None]):
        assert cases.log_error(*arrays) <= 2, name


@surroundings
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LENGTHS)
def test_derivative_of_logsumexp_is_within_4_ulp_of_the_largest_entry(n, dtype, where):
    x, names = all_rows(n, dtype)
    exact = cases.exact_softmax(x)
    unit = np.spacing(exact.max(-1, keepdims=True).astype(dtype)).astype(np.longdouble)
    errors = np.abs(np.asarray(reference_derivative[where](x)) - exact) / unit
    for name, of_class in by_class(names, errors):
        assert (of_class <= 4).all(), name


@surroundings
@pytest.mark.parametrize("n", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_near_certainty(n, dtype, where):
    """The logarithm of a probability of nearly 1 is exact relative to itself, however near."""
    allowed = 8 * 2.0**-24 if dtype == np.float32 else 2.0**-8
    for margin in range(0, 84, 4):
        x = np.random.default_rng(margin).standard_normal((n, n)).astype(dtype)
        x[np.arange(n), np.arange(n)] += margin
        exact = np.diagonal(cases.exact_log_softmax(x))
        actual = np.diagonal(np.asarray(reference_log_softmax[where](x))).astype(np.longdouble)
        relative = np.abs(actual - exact) / -exact
        assert (relative <= allowed).all(), (margin, relative.max())


@surroundings
@pytest.mark.parametrize("n", [2, 10, 30])
def test_gradient_of_labels_near_certainty(n, where):
    """The last row has no label."""
    z, labels = near_certainty.rows_of(n, np.float32)
    labels[-1] = n
    gradient = np.asarray(reference_label_gradient[where](z, labels.astype(np.int32)))
    expected = near_certainty.exact_loss(z[:-1], labels[:-1])[1]
    near_certainty.assert_exact(gradient[:-1], expected, np.float32, ulps=8)
    assert cases.ulp_error(gradient[-1:], cases.exact_softmax(z[-1:])) <= 8
