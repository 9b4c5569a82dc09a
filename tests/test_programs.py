"""The workloads of the benchmarks' sections ``programs`` and ``small`` compute what they should.

In float32 all ways of tracing a program agree with jax.nn's result in float64, and so do short operations.
"""

import functools

import jax
import numpy as np
import pytest

from benchmarks import ratios, runner, small
from benchmarks.backends import OPERATIONS, TracedProgram
from benchmarks.cases import Case
from benchmarks.programs import PROGRAMS, TRACINGS, compiled
from benchmarks.progress import Progress

for_every_program = pytest.mark.parametrize("name", PROGRAMS)


def run(name, tracing, dtype="float32"):
    program = PROGRAMS[name]
    with jax.enable_x64(dtype == "float64"):
        function, arguments = program.instantiate(program.small_shape, dtype)
        return compiled(function, arguments, tracing)(*arguments)


@pytest.mark.long
@for_every_program
def test_all_tracings_agree(name):
    exact = run(name, "jax.nn", "float64")
    assert {leaf.dtype.name for leaf in exact} == {"float64"}
    for tracing in TRACINGS:
        if tracing == "our losses" and not PROGRAMS[name].has_our_losses:
            continue
        for leaf, expected in zip(run(name, tracing), exact, strict=True):
            assert leaf.dtype == np.float32
            error = np.abs(np.asarray(leaf, np.float64) - expected).max()
            assert error <= PROGRAMS[name].tolerance * np.abs(expected).max(), tracing


@for_every_program
def test_patching_reaches_it(name):
    function, arguments = PROGRAMS[name].instantiate(PROGRAMS[name].small_shape)
    with TRACINGS["patched"]():
        assert "softmax2p" in str(jax.make_jaxpr(function)(*arguments))


def test_temporaries_are_measured():
    """A sum along axis 0 reads a matrix that XLA keeps, 400 kB."""
    case = Case((100, 1000), operation="softmax along axis 0")
    backends = tuple(functools.partial(TracedProgram, tracing) for tracing in ("jax.nn", "patched"))
    table = runner.Table("T", (case,), backends, (ratios.PATCHED_MEMORY,), quantity="temporaries")
    (row,) = runner.run_table(table, runner.Effort(1, 1, 1, 1e-4), Progress(0)).rows
    assert all(4e5 <= sample < 1e6 for (sample,) in row.samples.values())
    assert row.ratios["patched / jax.nn"] == row.samples["patched"][0] / row.samples["jax.nn"][0]
    assert ratios.PATCHED_MEMORY.value({"patched": 2.0**17, "jax.nn": 0.0}) == 2


@pytest.mark.long
@pytest.mark.parametrize("name", small.OPERATIONS)
def test_short_operations_agree(name):
    operation = small.OPERATIONS[name]
    case = Case((4, 4) if "product" in name else (5, 3), operation=name)
    x = np.random.default_rng(0).standard_normal(case.shape, np.float32)
    with jax.enable_x64(True):
        wide = [v.astype(np.float64) if v.dtype == np.float32 else v for v in (x, *operation.operands(case))]
        exact = jax.tree.leaves(jax.jit(operation.jax_nn(case.axis))(*wide))
    with jax.enable_x64(False):
        for of in (operation.ours, operation.jax_nn):
            leaves = jax.tree.leaves(jax.jit(of(case.axis))(x, *operation.operands(case)))
            for leaf, expected in zip(leaves, exact, strict=True):
                assert leaf.dtype == np.float32
                np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_cases_have_operations():
    """All shapes of a table have operands, along their axis."""
    for cases in small.CASES.values():
        for case in cases:
            assert case.operation in OPERATIONS
            assert all(operand.size <= case.elements for operand in OPERATIONS[case.operation].operands(case))
