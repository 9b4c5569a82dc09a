"""What implementation=None runs: which sizes are native, what explain says of them, and what vmap changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import normal, values_and_gradient

import jax_softmax2p
from jax_softmax2p import (
    Band,
    dot_product_attention,
    explain,
    linear_softmax_cross_entropy,
    log_softmax,
    logsumexp,
    softmax,
)
from jax_softmax2p.primitives.thresholds import min_elements

FUNCTIONS = {"softmax": softmax, "logsumexp": logsumexp, "log_softmax": log_softmax}


def calls_in(function, *args):
    """How many native kernels the compiled program calls."""
    return jax.jit(function).lower(*args).compile().as_text().count('custom_call_target="jax_softmax2p')


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def in_loop(function):
    return lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x + jnp.sum(function(x)), x)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("n", "axis"), [(2, -1), (16, -1), (64, -1), (256, -1), (4, -2)])
def test_loops_follow_the_table(name, n, axis):
    """On both sides of each threshold; explain says the same."""
    shape_of = lambda rows: (rows, n) if axis == -1 else (n, rows)
    call = in_loop(lambda x: FUNCTIONS[name](x, axis=axis))
    least = min_elements(name, shape_of(8), axis, in_loop=True)
    for rows, expected in ((least // n, 1), (least // n - 1, 0)):
        if not rows:
            continue
        shape = shape_of(rows)
        assert calls_in(call, floats(*shape)) == expected, shape
        [explanation] = explain(call, floats(*shape))
        assert explanation.implementation == ("native" if expected else "reference")
        assert (explanation.shape, explanation.dtype, explanation.axis) == (shape, "float32", axis)
        assert explanation.reason == f"{rows * n} elements in a loop: from {least} on a native call is faster"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_batched_shape_counts(name):
    f = lambda row: in_loop(lambda row: FUNCTIONS[name](row, axis=-1))(row)
    assert calls_in(f, floats(100)) == 0
    assert calls_in(jax.vmap(f), floats(1000, 100)) == 1
    [explanation] = explain(jax.vmap(f), floats(1000, 100))
    assert (explanation.shape, explanation.implementation) == ((1000, 100), "native")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outside_loops_all_sizes_are_native(name):
    f = lambda x: FUNCTIONS[name](x, axis=-1)
    assert calls_in(f, floats(3)) == 1
    assert explain(f, floats(3))[0].implementation == "native"


def test_scans_their_gradients_and_jitted_bodies_are_loops():
    scan = lambda f: lambda x: jax.lax.scan(lambda c, row: (c + f(row), None), 0.0, x)[0]
    jitted = jax.jit(lambda row: logsumexp(row))
    for function in (scan(logsumexp), jax.grad(scan(logsumexp)), scan(jitted)):
        assert calls_in(function, floats(20, 3)) == 0
    assert explain(scan(jitted), floats(20, 3))[0].implementation == "reference"
    both = lambda x: scan(jitted)(x) + jitted(x[0])
    assert calls_in(both, floats(20, 3)) == 1


def test_small_attention_and_losses_in_loops():
    """What is lowered to other functions is in the loop, too, and so are its derivatives."""
    scan = lambda f: lambda x: jax.lax.scan(lambda c, row: (c + f(row).sum(), None), 0.0, x)[0]
    key = jnp.ones((1, 4, 1, 4), jnp.float32)
    attention = scan(lambda q: dot_product_attention(q, key, key))
    queries = jnp.ones((20, 1, 1, 1, 4), jnp.float32)
    linear = scan(lambda x: linear_softmax_cross_entropy(x, jnp.ones((4, 7), jnp.float32), jnp.arange(2)))
    inputs = jnp.ones((20, 2, 4), jnp.float32)
    for function, x in ((attention, queries), (linear, inputs)):
        for f in (function, jax.grad(function), lambda x, f=function: jax.jvp(f, (x,), (x,))):
            assert calls_in(f, x) == 0


def test_explains_derivatives_in_loops():
    """What is lowered to other functions is explained by these."""
    key = jnp.ones((8, 2, 8), jnp.float32)
    attention = lambda q: dot_product_attention(q, key, key)
    f = lambda qs: jax.lax.map(lambda q: jax.jvp(attention, (q,), (q,))[1], qs)
    found = explain(f, jax.ShapeDtypeStruct((5, 4, 2, 8), "float32"))
    assert {x.operation for x in found} >= {"softmax2p", "softmax2p_jacobian"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_native_stays_native(name):
    f = lambda row: FUNCTIONS[name](row, axis=-1, implementation="native")
    assert calls_in(f, floats(3)) == 1
    assert explain(f, floats(3))[0].reason == "implementation='native'"


def test_reference_stays_the_reference():
    f = lambda x: softmax(x, implementation="reference")
    assert calls_in(f, floats(1000, 1000)) == 0
    assert explain(f, floats(1000, 1000)) == []


def test_explains_loops_branches_and_gradients():
    """What lies in loops and branches is part of the program, and what derivatives add."""

    def f(x):
        step = lambda carry, row: (carry + logsumexp(row), softmax(row))
        total, rows = jax.lax.scan(step, 0.0, x)
        return jax.lax.cond(total > 0, lambda: log_softmax(x).sum(), lambda: rows.sum())

    found = [(e.operation, e.shape, e.implementation) for e in explain(f, floats(300, 8))]
    assert sorted(found) == [
        ("softmax2p", (8,), "reference"),
        ("softmax2p_log_softmax", (300, 8), "native"),
        ("softmax2p_logsumexp", (8,), "reference"),
    ]
    gradient = jax.grad(lambda x: softmax(x)[0, 0])
    assert [e.operation for e in explain(gradient, floats(64, 1000))] == ["softmax2p", "softmax2p_jacobian"]


def test_explains_what_cannot_be_native():
    [explanation] = explain(softmax, jax.ShapeDtypeStruct((1000, 1000), jnp.complex64))
    assert explanation.implementation == "reference"
    assert "complex64" in explanation.reason
    with pytest.raises(ValueError, match="complex64"):
        explain(lambda x: softmax(x, implementation="native"), jax.ShapeDtypeStruct((4,), jnp.complex64))


def test_computations_of_reductions_are_explained_as_the_reference():
    reducer = lambda a, b: a + b + 0 * softmax(jnp.stack([a, b]))[0]
    f = lambda x: jax.lax.reduce(x, np.float32(0), reducer, (0,))
    assert {e.implementation for e in explain(f, floats(1000))} == {"reference"}


# Rows on both sides of every threshold, and of the size from which on derivatives recompute the softmax.
SHAPES = [(3, 5), (5, 16), (40, 50), (300, 7), (200, 200)]


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_on_both_sides(name, shape):
    """First and second derivatives are those of jax.nn in float64."""
    x, v = normal(*shape), normal(*shape, seed=1)
    ours = lambda x: jnp.sum(FUNCTIONS[name](x, axis=-1) ** 2)
    theirs = lambda x: jnp.sum(getattr(jax.nn, name)(x, axis=-1) ** 2)
    gradient_and_hvp = lambda f: jax.jit(lambda x, v: jax.jvp(jax.grad(f), (x,), (v,)))(x, v)
    gradient, hvp = gradient_and_hvp(theirs)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(x), gradient, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(gradient_and_hvp(ours)[1], hvp, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_of_the_loss_on_both_sides(shape):
    x, labels = normal(*shape), np.arange(shape[0]) % shape[1]
    loss = lambda f: lambda x: (f(x, labels) ** 2).sum()
    ours = jax.jit(jax.grad(loss(jax_softmax2p.softmax_cross_entropy_with_integer_labels)))(x)
    theirs = jax.jit(jax.grad(loss(optax.softmax_cross_entropy_with_integer_labels)))(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["logsumexp", "log_softmax"])
@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_gradients_of_special_rows_are_those_of_jax(name, special):
    for x in (np.array([[0.0, special, 1.0]]), np.full((1, 3), special)):
        ours = jax.jit(values_and_gradient(lambda x: FUNCTIONS[name](x, axis=-1)))(x)
        theirs = jax.jit(values_and_gradient(lambda x: getattr(jax.nn, name)(x, axis=-1)))(x)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-15, err_msg=str(x))


@pytest.mark.long
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("n", [3, 40, 300])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_gradients_of_special_rows_of_any_layout(name, special, n, axis, implementation):
    """Of rows with one such element, and of rows of nothing else."""
    x = normal(20, n)
    x[3, 1], x[17, -1], x[8] = special, special, special
    x = x if axis == -1 else x.T
    f = functools.partial(FUNCTIONS[name], axis=axis, implementation=implementation)
    ours = jax.jit(values_and_gradient(f))(x)
    theirs = jax.jit(values_and_gradient(functools.partial(getattr(jax.nn, name), axis=axis)))(x)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-14)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-13, atol=1e-13)


def test_bands_of_small_arrays():
    x = normal(6, 6)
    mask = np.tril(np.ones((6, 6), bool))
    f = lambda where: lambda x: jnp.sum(log_softmax(x, where=where)[jnp.tril_indices(6)] ** 2)
    np.testing.assert_allclose(
        jax.jit(jax.grad(f(Band())))(x), jax.jit(jax.grad(f(mask)))(x), rtol=1e-12, atol=1e-13
    )
