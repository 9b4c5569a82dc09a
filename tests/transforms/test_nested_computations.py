"""The functions inside computations that JAX nests in others: reducers, updates, branches, loop bodies.

XLA compiles a reducer as scalar code and ends the process where it meets a custom call there. So every test
that would do that runs in a process of its own, and prints what it found.
"""

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from versions import cpu_only

import jax_softmax2p as s2p

PRELUDE = """
import functools
import jax, jax.numpy as jnp, numpy as np
import jax_softmax2p as s2p

x = jnp.asarray(np.linspace(-2, 3, 24).reshape(4, 6), jnp.float32)
row = x[0]

def add(logsumexp):
    return lambda a, b: logsumexp(jnp.stack([a, b]), 0)

def compare(program):
    expected = np.asarray(program(jax.nn.logsumexp))
    actual = np.asarray(program(s2p.logsumexp))
    np.testing.assert_allclose(actual, expected, rtol=3e-6)
    print("equal")
"""

# Each maps a logsumexp, jax.nn's or ours, to a result.
REDUCERS = {
    "reduce": "lambda f: jax.lax.reduce(row, -jnp.inf, add(f), (0,))",
    "reduce under jit": "lambda f: jax.jit(lambda x: jax.lax.reduce(x, -jnp.inf, add(f), (1,)))(x)",
    "reduce under vmap": ("lambda f: jax.vmap(lambda x: jax.lax.reduce(x, -jnp.inf, add(f), (0,)))(x)"),
    "reduce in a loop": ("lambda f: jax.lax.map(lambda x: jax.lax.reduce(x, -jnp.inf, add(f), (0,)), x)"),
    "reduce of several operands": (
        "lambda f: jax.lax.reduce((row, -row), (-jnp.inf, -jnp.inf),"
        " lambda a, b: (add(f)(a[0], b[0]), add(f)(a[1], b[1])), (0,))"
    ),
    "reduce of bfloat16": (
        "lambda f: jax.lax.reduce(row.astype(jnp.bfloat16), jnp.bfloat16(-jnp.inf), add(f), (0,))"
        ".astype(jnp.float32)"
    ),
    "a jitted reducer": "lambda f: jax.lax.reduce(row, -jnp.inf, jax.jit(add(f)), (0,))",
    "a checkpointed reducer": "lambda f: jax.lax.reduce(row, -jnp.inf, jax.checkpoint(add(f)), (0,))",
    "a composite": ("lambda f: jax.lax.reduce(row, -jnp.inf, jax.lax.composite(add(f), 'test.add'), (0,))"),
    "a branch in a reducer": (
        "lambda f: jax.lax.reduce(row, -jnp.inf, lambda a, b: jax.lax.cond(a > b,"
        " lambda: add(f)(a, b), lambda: add(f)(b, a)), (0,))"
    ),
    "a loop in a reducer": (
        "lambda f: jax.lax.reduce(row, -jnp.inf,"
        " lambda a, b: jax.lax.fori_loop(0, 1, lambda i, c: add(f)(c, b), a), (0,))"
    ),
    "a long row in a reducer": (
        "lambda f: jax.lax.reduce(row, 0.0, lambda a, b: f(jnp.full(3000, a) / 2, 0) + b, (0,))"
    ),
    "reduce_window": "lambda f: jax.lax.reduce_window(x, -jnp.inf, add(f), (2, 2), (1, 1), 'VALID')",
    "reduce, by three of each": (
        "lambda f: jax.lax.reduce(row, 0.0, lambda a, b: f(jnp.stack([a, b] * 3), 0), (0,))"
    ),
    "the same in a loop": (
        "lambda f: jax.lax.fori_loop(0, 3, lambda _, x: x + jax.lax.reduce(x, 0.0,"
        " lambda a, b: f(jnp.stack([a, b] * 3), 0), (0,)), row)"
    ),
    "reduce_window of several operands": (
        "lambda f: jax.lax.reduce_window((row, -row), (-jnp.inf, -jnp.inf),"
        " lambda a, b: (add(f)(a[0], b[0]), add(f)(a[1], b[1])), (2,), (1,), 'VALID')"
    ),
    "reduce_window under vmap": (
        "lambda f: jax.vmap(lambda x: jax.lax.reduce_window(x, -jnp.inf, add(f), (2,), (1,), 'VALID'))(x)"
    ),
    "an update": "lambda f: x.at[1].apply(lambda v: f(jnp.stack([v, v + 1]), 0))",
    "updates by an array of indices": (
        "lambda f: x.at[jnp.array([1, 2])].apply(lambda v: f(jnp.stack([v, v + 1]), 0))"
    ),
    "an update under vmap and jit": (
        "lambda f: jax.jit(jax.vmap(lambda x: x.at[1].apply(lambda v: f(jnp.stack([v, 2 * v]), 0))))(x)"
    ),
}


def equal(code, **environment):
    """Whether the process that runs the code, after the prelude, lives and prints that results are equal."""
    result = processes.run_python(PRELUDE + code, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split() == ["equal"]


# A process starts in seconds: each holds several programs, and what fails is named in its output.
@pytest.mark.long(first=0)
@pytest.mark.parametrize("first", range(0, len(REDUCERS), 6))
def test_reducers_and_updates(first):
    chosen = list(REDUCERS.items())[first : first + 6]
    programs = "".join(f"    {name!r}: {program},\n" for name, program in chosen)
    code = f"""
programs = {{
{programs}}}
for name, program in programs.items():
    expected, actual = (jax.tree.map(np.asarray, program(f)) for f in (jax.nn.logsumexp, s2p.logsumexp))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-2 if "bfloat16" in name else 3e-6)
    jax.tree.map(close, actual, expected)
    print(name, flush=True)
"""
    result = processes.run_python(PRELUDE + code)
    assert result.stdout.splitlines() == [name for name, _ in chosen], result.stderr[-3000:]


def test_a_jitted_function_inside_a_reducer_and_outside():
    """JAX lowers it once for both callers."""
    assert equal(
        """
def program(f):
    g = jax.jit(lambda a, b: f(jnp.full(3000, a) / 2, 0) + b)
    return jax.jit(lambda x: g(x[0], x[1]) + jax.lax.reduce(x, 0.0, g, (0,)) + g(x[0], x[1]))(row)

compare(program)
"""
    )


@cpu_only
def test_only_the_reducer_takes_the_reference():
    """A native call beside it stays one."""
    add = lambda a, b: s2p.logsumexp(jnp.stack([a, b]), 0)
    f = lambda x: s2p.softmax(x) + jax.lax.reduce(x[0], jnp.float32(-jnp.inf), add, (0,))
    text = jax.jit(f).lower(jnp.zeros((64, 2000), jnp.float32)).as_text()
    assert text.count("custom_call @jax_softmax2p_softmax_v1") == 1
    assert "custom_call @jax_softmax2p_log_sum_v1" not in text


def test_patched_jax_nn_in_a_reducer():
    assert equal(
        """
def program(f):
    return jax.lax.reduce(row, -jnp.inf, lambda a, b: jax.nn.logsumexp(jnp.stack([a, b]), 0), (0,))

expected = np.asarray(program(None))
jax.clear_caches()
with s2p.patch_jax_nn():
    np.testing.assert_allclose(np.asarray(program(None)), expected, rtol=3e-6)
print("equal")
"""
    )


def test_select_and_scatter():
    """The gradient of a pooling by a selection of the user's own."""
    assert equal(
        """
from jax._src.lax.windowed_reductions import _select_and_scatter

def program(f):
    select = lambda a, b: add(f)(a, b) - b > 0.5
    return _select_and_scatter(row, select, (2,), (2,), ((0, 0),), jnp.ones(3), jnp.float32(0), jax.lax.add)

compare(program)
"""
    )


def test_losses_and_derivatives_in_a_reducer():
    assert equal(
        """
import optax

def program(f):
    ours = f is s2p.logsumexp
    loss = (s2p if ours else optax).softmax_cross_entropy_with_integer_labels
    log_softmax = (s2p if ours else jax.nn).log_softmax
    value = jax.lax.reduce(row, 0.0, lambda a, b: loss(jnp.stack([a, b]), 1), (0,))
    tangent = lambda a, b: jax.jvp(lambda a: log_softmax(jnp.stack([a, b])).sum(), (a,), (b,))[1]
    return value + jax.lax.reduce(row, 1.0, tangent, (0,))

compare(program)
"""
    )


@pytest.mark.parametrize("num_classes", [20, 2000])
def test_linear_losses_in_a_reducer(num_classes):
    assert equal(
        f"""
def logsumexp(f, a, b):
    x, weights = jnp.stack([a, b])[None], jnp.sin(jax.lax.iota(jnp.float32, 2 * {num_classes})).reshape(2, -1)
    return s2p.logsumexp_of_products(x, weights.T) if f is s2p.logsumexp else f(x @ weights, -1)

def program(f):
    return jax.lax.reduce(row, 0.0, lambda a, b: logsumexp(f, a, b)[0], (0,))

compare(program)
"""
    )


def test_native_in_a_reducer_is_an_error_that_says_why():
    reducer = lambda a, b: s2p.logsumexp(jnp.stack([a, b]), 0, implementation="native")
    x = jnp.zeros(4, jnp.float32)
    with pytest.raises(ValueError, match=r"implementation='native' cannot run: .*reducer"):
        jax.jit(lambda x: jax.lax.reduce(x, jnp.float32(-jnp.inf), reducer, (0,))).lower(x)


def test_derivatives_of_reduce():
    """JAX differentiates the reducer by unrolling it, so that no computation is nested."""
    x = jnp.linspace(-1.0, 2.0, 3)
    add = lambda a, b: s2p.logsumexp(jnp.stack([a, b]), 0)
    gradient = jax.jit(jax.grad(lambda x: jax.lax.reduce(x, jnp.array(-jnp.inf, x.dtype), add, (0,))))(x)
    np.testing.assert_allclose(gradient, jax.nn.softmax(x), rtol=1e-12)


# JAX lowers these to whole programs, where a custom call may stand.
NESTED = {
    "associative_scan": lambda f, x: jax.lax.associative_scan(
        lambda a, b: f(jnp.stack([a, b]), 0), x, axis=1
    ),
    "map in batches": lambda f, x: jax.lax.map(lambda x: f(x, 0), x, batch_size=3),
    "switch": lambda f, x: jax.lax.switch(1, [lambda x: f(x, 0), lambda x: f(2 * x, 0)], x),
    "cond under vmap": lambda f, x: jax.vmap(
        lambda x: jax.lax.cond(x[0] > 0, lambda x: f(x, 0), lambda x: f(2 * x, 0), x)
    )(x),
    "while_loop under vmap": lambda f, x: jax.vmap(
        lambda x: jax.lax.while_loop(lambda x: f(x, 0) < 10, lambda x: x + f(x, 0) ** 2 + 1, x)
    )(x),
    "custom_root": lambda f, x: jax.lax.custom_root(
        lambda z: f(z + x[0], 0) - 1, 0.5, lambda g, z: z - g(z), lambda g, y: y / g(1.0)
    ),
    "custom_linear_solve": lambda f, x: jax.lax.custom_linear_solve(
        lambda z: z * f(x[0], 0),
        x[1],
        lambda matvec, b: b / matvec(jnp.ones_like(b)),
        lambda matvec, b: b / matvec(jnp.ones_like(b)),
    ),
    "custom_linear_solve in a loop": lambda f, x: jax.lax.map(
        lambda row: jax.lax.custom_linear_solve(
            lambda z: z * f(row, 0), row[0], lambda matvec, b: b / matvec(jnp.ones_like(b)), symmetric=True
        ),
        x,
    ),
    "vectorize": lambda f, x: jnp.vectorize(lambda x: f(x, 0), signature="(n)->()")(x),
    "apply_along_axis": lambda f, x: jnp.apply_along_axis(lambda x: f(x, 0), 0, x),
    "ufunc": lambda f, x: jnp.frompyfunc(
        lambda a, b: f(jnp.stack([a, b]), 0), 2, 1, identity=-jnp.inf
    ).reduce(x, 1),
    "piecewise": lambda f, x: jnp.piecewise(x, [x > 0], [lambda v: v * f(x[0], 0), 0.0]),
    "platform_dependent": lambda f, x: jax.lax.platform_dependent(
        x, cpu=lambda x: f(x, 1), default=lambda x: f(2 * x, 1)
    ),
    "composite": lambda f, x: jax.lax.composite(lambda x: f(x, 1), "test.logsumexp")(x),
    "sequential_vmap": lambda f, x: jax.vmap(jax.custom_batching.sequential_vmap(lambda x: f(x, 0)))(x),
}


@pytest.mark.long
@pytest.mark.parametrize("name", NESTED)
def test_nested_programs(name, implementation):
    ours = lambda x, axis: s2p.logsumexp(x, axis, implementation=implementation)
    x = jnp.asarray(np.linspace(-2, 3, 24).reshape(4, 6))
    program = NESTED[name]
    np.testing.assert_allclose(
        jax.jit(lambda x: program(ours, x))(x), program(jax.nn.logsumexp, x), rtol=1e-12
    )
