"""Runs the tests that go through XLA again for every instruction set but the active one."""

import os
import pathlib

import pytest
from processes import run_pytest

from jax_softmax2p import native

TESTS = pathlib.Path(__file__).parent.parent
OTHERS = [isa for isa in native.supported_isas() if isa != native.active_isa()]


@pytest.mark.skipif("JAX_SOFTMAX2P_ISA" in os.environ, reason="this is already such a run")
@pytest.mark.parametrize("isa", OTHERS)
def test_through_xla(isa):
    names = (
        "test_softmax.py",
        "test_losses.py",
        "numerics/test_jit_accuracy.py",
        "numerics/test_properties.py::TestInsideJit",
    )
    # Transformation rules and the reference do not depend on the instruction set; the kernels do.
    arguments = ["-x", "-k", "not reference", *(TESTS / name for name in names)]
    run_pytest(*arguments, timeout=900, JAX_SOFTMAX2P_ISA=isa)
