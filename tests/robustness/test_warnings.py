"""Warnings concern the caller's line, which they print and by which filters select them."""

import pytest
from processes import run_python
from versions import cpu_only

WITHOUT_THE_LIBRARY = """
import sys, warnings
sys.modules["jax_softmax2p._native"] = None
import jax, jax.numpy as jnp
import jax_softmax2p as s2p
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {call}
(warning,) = caught
assert "jax_softmax2p runs its jax.numpy reference" in str(warning.message)
print(warning.filename)
"""


@cpu_only
@pytest.mark.parametrize(
    "call",
    [
        "s2p.softmax(jnp.zeros(4))",
        "jax.jit(jax.grad(lambda x: s2p.log_softmax(x)[0]))(jnp.zeros(4))",
    ],
)
def test_reference_for_lack_of_the_library(call):
    """The warning is given inside JAX's and this package's frames."""
    result = run_python(WITHOUT_THE_LIBRARY.format(call=call))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "<string>"
