"""The tests that go through XLA, again for every other instruction set: a process has but one."""

import os
import pathlib
import subprocess
import sys

import pytest

from jax_softmax2p import native

TESTS = pathlib.Path(__file__).parent.parent
OTHERS = [isa for isa in native.supported_isas() if isa != native.active_isa()]


@pytest.mark.skipif("JAX_SOFTMAX2P_ISA" in os.environ, reason="is itself such a run")
@pytest.mark.parametrize("isa", OTHERS)
def test_through_xla(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider"]
    # Rules of transformations and the reference are the same for all; what kernels compute is not.
    command += ["-k", "not reference"]
    names = (
        "test_softmax.py",
        "test_losses.py",
        "numerics/test_family_accuracy.py",
        "numerics/test_properties.py::TestInsideJit",
    )
    paths = [str(TESTS / name) for name in names]
    result = subprocess.run(
        [*command, *paths],
        cwd=TESTS.parent,
        env={**os.environ, "JAX_SOFTMAX2P_ISA": isa},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-4000:]
