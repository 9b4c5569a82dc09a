"""The benchmarks' programs: in float32 all ways of tracing one agree with jax.nn's result in float64."""

import jax
import numpy as np
import pytest

from benchmarks.programs import PROGRAMS, TRACINGS, compiled, temporary_bytes

for_every_program = pytest.mark.parametrize("name", PROGRAMS)


def run(name, tracing, dtype="float32"):
    program = PROGRAMS[name]
    with jax.enable_x64(dtype == "float64"):
        function, arguments = program.instantiate(program.small_shape, dtype)
        return compiled(function, arguments, tracing)(*arguments)


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


def test_temporaries_are_told():
    function, arguments = PROGRAMS["softmax along axis 0"].instantiate((100, 1000))
    size = temporary_bytes(compiled(function, arguments, "jax.nn"))
    assert size is not None
    assert 4 * 10**5 <= size < 10**6
