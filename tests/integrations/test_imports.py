"""Other libraries are imported only when an integration that needs them is used."""

import processes


def test_flax_and_equinox_are_not_imported():
    code = """
import sys
from jax_softmax2p.integrations import flax_attention, patch_jax_nn, replace_equinox_attention
assert not {"flax", "equinox"} & sys.modules.keys()
from jax_softmax2p.integrations import EquinoxMultiheadAttention
assert "equinox" in sys.modules
"""
    result = processes.run_python(code, options=())
    assert result.returncode == 0, result.stderr
