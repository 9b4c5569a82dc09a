"""Runs tests of the kernels that go through XLA again for every instruction set but the active one."""

import os
import pathlib

import pytest
from processes import run_pytest

from jax_softmax2p import native

TESTS = pathlib.Path(__file__).parent.parent
OTHERS = [isa for isa in native.supported_isas() if isa != native.active_isa()]


@pytest.mark.long
@pytest.mark.skipif("JAX_SOFTMAX2P_ISA" in os.environ, reason="this is already such a run")
@pytest.mark.parametrize("isa", OTHERS)
def test_through_xla(isa):
    names = (
        "test_softmax.py::TestEdges",
        "test_softmax.py::TestWhere",
        *(
            f"test_losses.py::TestIntegerLabels::test_{name}"
            for name in ("lengths", "axes", "special_rows", "half_precision", "no_loss_is_negative")
        ),
        *(f"test_losses.py::TestSoftLabels::test_{name}" for name in ("lengths", "axes", "masks")),
        "test_fused_attention.py::TestGradientInBias::test_several_chunks_of_keys",
        "test_fused_attention.py::TestGradientInBias::test_large_equal_logits",
        "numerics/test_jit_accuracy.py",
        "numerics/test_near_certainty.py::test_last_axis",
        "numerics/test_properties.py::TestInsideJit",
    )
    # Checks of arguments, transformation rules and the reference do not depend on the instruction set.
    arguments = ["-x", "-k", "not reference", *(TESTS / name for name in names)]
    run_pytest(*arguments, timeout=900, JAX_SOFTMAX2P_ISA=isa)
